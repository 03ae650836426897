"""A TFDS builder of the test pictures; TFDS wants it in a module of its own in a package."""

import tensorflow_datasets as tfds

from tests.helpers.pictures import CLASSES


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Writes what `tfds build` leaves on disk, without downloading."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, files: dict[str, bytes], **kwargs):
        self.files = files
        super().__init__(**kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "file_name": tfds.features.Text(),
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples("train"),
            "validation": self._generate_examples("val"),
        }

    def _generate_examples(self, split):
        for name, content in sorted(self.files.items()):
            if name.startswith(f"{split}/"):
                yield name, {"file_name": name, "image": content, "label": name.split("/")[1]}
