"""Decoding and cropping JPEG files: this package against tf.data and decoders among themselves.

Every contender is a process of its own on the same core, with one thread, and reads the same
files from memory. A turn is one pass over them: a random resized crop of every image to 224
pixels, uint8, without the flip; `decode` rows decode whole images and do nothing else. tf.data
runs `sample_distorted_bounding_box`, `decode_and_crop_jpeg` and a bilinear resize that is not
antialiased; ours is. Images are crops of two real photographs, enlarged, 500x375 pixels at
quality 90; `short side N` are the same as `prepare --short_side=N --quality=90` writes them, `raw`
with `--store=raw`.
`batches` rows are this package's whole way, from records on disk through Grain's threads to arrays
on the CPU's device, of a data set as long as ImageNet. PyTurboJPEG (below 2) decodes where it and
its library are installed.

    python benchmarks/input_pipeline.py --rounds 5 --write
    python benchmarks/input_pipeline.py --tensorflow-python OTHER_VENV/bin/python
"""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import harness

IMAGENET = 1_281_167  # training images

CONTENDERS = {
    "tf.data, originals": ("tensorflow", "originals"),
    "ours, originals": ("ours", "originals"),
    "ours, short side 256": ("ours", "256"),
    "ours, short side 224": ("ours", "224"),
    "ours, short side 256, raw": ("ours", "256 raw"),
    "batches, originals": ("batches", "originals"),
    "batches, short side 256": ("batches", "256"),
    "batches, short side 256, raw": ("batches", "256 raw"),
    "decode, simplejpeg": ("simplejpeg", "originals"),
    "decode, PyTurboJPEG": ("turbojpeg", "originals"),
    "decode, OpenCV": ("opencv", "originals"),
    "decode, Pillow": ("pillow", "originals"),
}


def make_files(count: int) -> dict[str, list[bytes]]:
    """JPEG files by kind."""
    from PIL import Image

    from repvgg_jax.data.prepare.shards import Encoding
    from repvgg_jax.data.sources import photo_crops

    originals = []
    for crop in photo_crops(375, count):
        file = io.BytesIO()
        Image.fromarray(crop).resize((500, 375), Image.Resampling.BICUBIC).save(
            file, "JPEG", quality=90
        )
        originals.append(file.getvalue())
    prepared = {
        str(side): [Encoding(side, 90).apply(file) for file in originals] for side in (256, 224)
    }
    prepared["256 raw"] = [Encoding(256, store="raw").apply(file) for file in originals]
    return {"originals": originals} | prepared


def make_records(files: list[bytes], place: pathlib.Path) -> None:
    """Stores the files as `prepare` does."""
    from repvgg_jax.data.decoding import is_raw
    from repvgg_jax.data.prepare import inputs
    from repvgg_jax.data.prepare.prepare import Settings, prepare
    from repvgg_jax.data.prepare.shards import Encoding

    tree = place.with_name(f"{place.name}-files")
    for number, file in enumerate(files):
        for split in ("train", "val")[: 2 if number == 0 else 1]:
            suffix = "ppm" if is_raw(file) else "jpg"
            path = tree / split / "photograph" / f"{number:06}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)
    encoding = Encoding(store="raw" if is_raw(files[0]) else "jpeg")
    prepare(inputs.find(tree), place, Settings(encoding))


def what_lacks(kind: str) -> str | None:
    """Why a contender cannot take part here, or None; of those that nobody has to have."""
    if kind != "turbojpeg":
        return None
    try:
        _turbojpeg()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"PyTurboJPEG below 2 and libturbojpeg are not both here ({error})"
    return None


def passes(kind: str, path: str):
    """A function that goes over all files once."""
    if kind == "batches":
        return _batches(path)
    files = pickle.loads(pathlib.Path(path).read_bytes())
    if kind == "tensorflow":
        return _tensorflow(files)
    if kind == "ours":
        import numpy as np

        from repvgg_jax.data.images import RandomResizedCrop

        crop, rng = RandomResizedCrop(), np.random.default_rng(0)
        return lambda: [crop({"encoded": file}, 224, rng) for file in files]
    if kind == "turbojpeg":
        decode = _turbojpeg()
        return lambda: [decode(file) for file in files]
    import cv2
    import numpy as np
    import simplejpeg
    from PIL import Image

    decode = {
        "simplejpeg": simplejpeg.decode_jpeg,
        "opencv": lambda f: cv2.imdecode(np.frombuffer(f, np.uint8), cv2.IMREAD_COLOR_RGB),
        "pillow": lambda f: np.asarray(Image.open(io.BytesIO(f))),
    }[kind]
    return lambda: [decode(file) for file in files]


def _turbojpeg():
    from turbojpeg import TJPF_RGB, TurboJPEG

    decoder = TurboJPEG()
    return lambda file: decoder.decode(file, pixel_format=TJPF_RGB)


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A source, so many times."""

    source: Any
    times: int

    def __len__(self) -> int:
        return len(self.source) * self.times

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.source[index % len(self.source)]


def _batches(path: str):
    import jax

    from repvgg_jax.data.batches import train_batches
    from repvgg_jax.data.dataset import load
    from repvgg_jax.data.settings import DataSettings

    data = load(DataSettings(source=f"records:{path}", train_size=224))
    count = len(data.train)
    batch_size = next(size for size in range(32, 0, -1) if count % size == 0)
    # Grain shuffles few images more slowly than many.
    data = dataclasses.replace(data, train=Repeated(data.train, IMAGENET // count))
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    batches = train_batches(data, batch_size=batch_size, seed=0, start_step=0, sharding=device)
    return lambda: [next(batches)["label"] for _ in range(count // batch_size)]


def _tensorflow(files: list[bytes]):
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    def crop(content):
        shape = tf.io.extract_jpeg_shape(content)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros((1, 0, 4)),
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(content, window, channels=3)
        return tf.cast(tf.image.resize(image, (224, 224)), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(files).map(crop)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    dataset = dataset.with_options(options)
    return lambda: [None for _ in dataset]


def serve(kind: str, path: str) -> None:
    """Runs a pass for every line of the input, and prints the seconds of processor it took."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    run = passes(kind, path)
    began = time.process_time()
    for _ in sys.stdin:
        run()
        # From report to report: what reads ahead works between two turns, too.
        ended = time.process_time()
        print(f"seconds {ended - began}", flush=True)
        began = ended


def main() -> None:
    """Takes turns and reports."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tensorflow-python", default=sys.executable)
    parser.add_argument("--serve", nargs=2, help="used by this script itself")
    options = parser.parse_args()
    if options.serve:
        return serve(*options.serve)

    files = make_files(options.images)
    with tempfile.TemporaryDirectory() as directory:
        workers = {}
        for name, (kind, which) in CONTENDERS.items():
            if reason := what_lacks(kind):
                print(f"{name}: skipped, {reason}")
                continue
            path = pathlib.Path(directory, f"{kind}-{which}")
            if kind == "batches":
                make_records(files[which], path)
            else:
                path.write_bytes(pickle.dumps(files[which]))
            python = options.tensorflow_python if kind == "tensorflow" else sys.executable
            workers[name] = subprocess.Popen(
                [python, __file__, "--serve", kind, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        rates = {name: [] for name in workers}
        for counted in range(-1, options.rounds):
            for name, worker in workers.items():
                worker.stdin.write("go\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
                if not line.startswith("seconds "):
                    raise SystemExit(f"{name} does not run here; is it installed?")
                if counted >= 0:
                    rates[name].append(options.images / float(line.split()[1]))
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    base = rates["tf.data, originals"]
    rows = []
    for name, values in rates.items():
        ratio = harness.summary([a / b for a, b in zip(values, base, strict=True)])
        rate = harness.summary(values)
        rows.append(
            {
                "contender": name,
                "images/s per core": rate["median"],
                "min": rate["min"],
                "max": rate["max"],
                "x tf.data": ratio["median"],
                "x min": ratio["min"],
                "x max": ratio["max"],
            }
        )
    sizes = {k: round(sum(map(len, v)) / len(v) / 1e3, 1) for k, v in files.items()}
    harness.report(
        "input_pipeline",
        rows,
        note=f"{__doc__}\nImages per second of processor time; {options.rounds} rounds.",
        write=options.write,
        images=options.images,
        mean_kilobytes=json.dumps(sizes),
    )
    return None


if __name__ == "__main__":
    main()
