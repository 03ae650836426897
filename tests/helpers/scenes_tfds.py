"""TFDS builders of images with masks; TFDS wants them in a module of their own in a package."""

from typing import Any, ClassVar

import tensorflow_datasets as tfds

from repvgg_jax.data.masks import PairSource

CLASSES = ("road", "sky", "car")


class _Pairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes what `tfds build` leaves on disk, without downloading."""

    VERSION = tfds.core.Version("1.0.0")
    features: ClassVar[dict[str, Any]]

    def __init__(self, *, sources: tuple[PairSource, PairSource], **kwargs):
        self.sources = sources
        super().__init__(**kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self.features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {
            name: self._generate_examples(source)
            for name, source in zip(("train", "validation"), self.sources, strict=True)
        }

    def _generate_examples(self, source):
        image, mask, name = self.features
        for index in range(len(source)):
            pair = source.files[index]
            example = {image: pair["encoded"], mask: pair["mask"], name: pair["name"]}
            yield index, example


class Named(_Pairs):
    """The mask has names of its classes."""

    features: ClassVar = {
        "image": tfds.features.Image(encoding_format="png"),
        "segmentation": tfds.features.LabeledImage(labels=list(CLASSES), encoding_format="png"),
        "file_name": tfds.features.Text(),
    }


class Unnamed(_Pairs):
    """The mask is an image of one channel."""

    features: ClassVar = {
        "image": tfds.features.Image(encoding_format="png"),
        "segmentation_mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        "file_name": tfds.features.Text(),
    }


class Cityscapes(_Pairs):
    """The features of Cityscapes in TFDS."""

    features: ClassVar = {
        "image_left": tfds.features.Image(encoding_format="png"),
        "segmentation_label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        "image_id": tfds.features.Text(),
    }
