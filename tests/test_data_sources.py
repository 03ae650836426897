"""Every source: what it reads, that it crosses into workers, and what it says of bad data."""

import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from repvgg_jax.data import records
from repvgg_jax.data.dataset import load
from tests.pictures import CLASSES, damaged, encoded, images, photo, settings, write_tree

FILES = images()


def write_records(root, files):
    """Two shards a split, as `prepare` would leave them."""
    from array_record.python.array_record_module import ArrayRecordWriter

    root.mkdir()
    splits = {}
    for split in ("train", "val"):
        names = sorted(name for name in files if name.startswith(split))
        splits[split] = []
        for half in range(2):
            path = root / f"{split}-{half:05}-of-00002.array_record"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for name in names[half::2]:
                label = CLASSES.index(name.split("/")[1])
                writer.write(records.pack(encoded=files[name], label=label, name=name))
            writer.close()
            shard = records.Shard(path.name, len(names[half::2]), path.stat().st_size, "")
            splits[split].append(shard)
    records.Manifest(CLASSES, splits, {}).write(root)
    return root


def write_tfds(root, files, file_format="array_record"):
    """What TFDS's own preparation leaves on disk, by its own writer."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(CLASSES)),
        }
    )
    splits = {
        tfds_name: [
            {"file_name": name, "image": content, "label": name.split("/")[1]}
            for name, content in sorted(files.items())
            if name.startswith(split)
        ]
        for split, tfds_name in (("train", "train"), ("val", "validation"))
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="pictures",
        version="1.0.0",
        data_dir=str(root),
        features=features,
        split_datasets={name: _Examples(examples) for name, examples in splits.items()},
        file_format=file_format,
    )
    return root


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """The settings of the same pictures in every kind of place."""
    root = tmp_path_factory.mktemp("data")
    write_tree(root / "folder", FILES)
    write_records(root / "records", FILES)
    return {
        "folder": settings(f"folder:{root / 'folder'}", train_size=32),
        "records": settings(f"records:{root / 'records'}", train_size=32),
    }
