import dataclasses
import importlib.util
import io
import pickle
import sys
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from dpa_jax.config import default_config
from dpa_jax.data.images import CorruptImageError
from dpa_jax.data.sources import cifar as archives
from dpa_jax.data.sources import open_source
from dpa_jax.data.sources import tfds as prepared
from dpa_jax.data.splits import ArraySplit

RANDOM = np.random.default_rng(0)
NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "PNG")
    return file.getvalue()


def prepare(root, name="small", version="3.0.2", shape=(32, 32, 3), config="", splits=("train", "test"), label=None):
    """A set as TFDS prepares it, in array_record format; its folder and images."""
    folder = root / name / config / version
    folder.mkdir(parents=True)
    names = {"image": tfds.features.Image(shape=shape), "label": tfds.features.ClassLabel(names=NAMES)}
    features = tfds.features.FeaturesDict({**names, "note": tfds.features.Text()})
    content, infos = {}, []
    for split in splits:
        examples = 5 if split == "train" else 3
        sizes = [[4 + i, 9, 3] if None in shape else shape for i in range(examples)]
        images = [RANDOM.integers(0, 256, size, np.uint8) for size in sizes]
        labels = np.arange(examples) % 3 if label is None or split == "train" else np.full(examples, label)
        content[split] = images, labels
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for image, label_ in zip(images, labels, strict=True):
            example = {"image": io.BytesIO(png(image)), "label": int(label_), "note": "x"}
            writer.write(features.serialize_example(features.encode_example(example)))
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        size = path.stat().st_size
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=[examples], num_bytes=size, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, check_data=False)
    if config:
        change(folder, '"name": "', f'"configName": "{config}", "name": "')
    return folder, content


def change(folder, old, new):
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace(old, new, 1))


def opened(name, directory, **changes):
    data = default_config().data
    data.update(name=name, dir=str(directory), **changes)
    return open_source(data)


def load(name, directory, **changes):
    return opened(name, directory, **changes).load()


@pytest.mark.parametrize("up", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_one_shape_are_read_into_memory(tmp_path, up, channels):
    folder, content = prepare(tmp_path, shape=(6, 7, channels))
    source = opened("tfds:small", [folder, *folder.parents][up])
    spec = source.spec
    assert (spec.train_examples, spec.test_examples, spec.inputs.shape) == (5, 3, (6, 7, channels))
    for split, (images, labels) in zip(source.load(), content.values(), strict=True):
        assert isinstance(split, ArraySplit) and np.array_equal(split.inputs, np.stack(images))
        assert np.array_equal(split.labels, labels) and split.labels.dtype == np.int32
    assert spec.class_names == ("ant", "bee", "cat") and len(spec.mean) == channels


@pytest.mark.parametrize("shape", [(None, None, 3), (6, 7, 3)], ids=["any size", "too large"])
def test_other_images_are_read_when_they_are_wanted(tmp_path, monkeypatch, shape):
    folder, content = prepare(tmp_path, shape=shape)
    monkeypatch.setattr(prepared, "_IN_MEMORY", 8 * 6 * 7 * 3 - 1)
    source = opened("tfds:small", tmp_path)
    assert source.spec.mean == (0.485, 0.456, 0.406) and source.spec.inputs.shape == shape
    train, _ = source.load()
    images, labels = content["train"]
    assert train.labels.tolist() == labels.tolist()
    for split in (train, pickle.loads(pickle.dumps(train))):
        for i in (4, 0):
            assert np.array_equal(split.read(i), images[i]) and split.shape(i) == images[i].shape
    assert train.where(3) == f"record 3 in split 'train' of {folder}"
    assert load("tfds:small", tmp_path, imbalance=2)[0].where(2) == f"record 2 in split 'train' of {folder}"


def test_a_corrupt_record_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "png", lambda image, encode=png: encode(image)[:-30])
    folder, _ = prepare(tmp_path)
    with pytest.raises(
        CorruptImageError, match=rf"record 0 in split 'train' of {folder} cannot be decoded: .*runcated"
    ):
        load("tfds:small", tmp_path)


def test_the_newest_version_is_taken(tmp_path):
    for version in ("3.0.9", "3.0.10", "2.5.0"):
        prepare(tmp_path, version=version, shape=(2, 2, 3))
    assert prepared.find("small", [tmp_path]) == tmp_path / "small/3.0.10"


def test_of_several_configurations_one_is_named(tmp_path):
    for config in ("plain", "fancy"):
        prepare(tmp_path, config=config, shape=(2, 2, 3))
    with pytest.raises(ValueError, match="several configurations: name one of fancy, plain after a /"):
        load("tfds:small", tmp_path)
    assert prepared.find("small/fancy", [tmp_path]) == tmp_path / "small/fancy/3.0.2"


def test_the_validation_split_stands_in_for_a_test_split_without_labels(tmp_path):
    _, content = prepare(tmp_path, splits=("train", "validation"), shape=(2, 2, 3))
    assert load("tfds:small", tmp_path)[1].labels.tolist() == content["validation"][1].tolist()
    prepare(tmp_path / "b", label=-1, shape=(2, 2, 3))
    with pytest.raises(ValueError, match=r"needs splits train, and test or validation, with labels; it has \['train'"):
        load("tfds:small", tmp_path / "b")
    prepare(tmp_path / "c", splits=("test",), shape=(2, 2, 3))
    with pytest.raises(ValueError, match=r"it has \['test'\]"):
        load("tfds:small", tmp_path / "c")


def test_a_set_that_is_not_there_says_how_to_prepare_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load("tfds:flowers", tmp_path, download=True)  # without TensorFlow nothing is prepared
    message = str(error.value)
    assert str(tmp_path) in message and "pip install '.[tfds]'" in message
    command = "tfds.builder('flowers', data_dir='DIR', file_format='array_record').download_and_prepare()"
    assert f'python -c "import tensorflow_datasets as tfds; {command}"\nand pass --config.data.dir=DIR' in message


def test_a_set_in_another_format_is_named(tmp_path):
    folder, _ = prepare(tmp_path)
    change(folder, '"array_record"', '"tfrecord"')
    with pytest.raises(FileNotFoundError, match=rf"{folder} has it as tfrecord\.\nTo prepare it"):
        load("tfds:small", tmp_path)
    assert prepared.find("small", [tmp_path]) is None


def test_other_features_are_refused(tmp_path):
    folder, _ = prepare(tmp_path)
    file = folder / "features.json"
    file.write_text(file.read_text().replace('"label"', '"kind"'))
    with pytest.raises(ValueError, match=r"(?s)has no uint8 images `image` with a class `label` each, but .*kind"):
        load("tfds:small", tmp_path)


def test_tfds_prepares_where_tensorflow_is(tmp_path, monkeypatch):
    def builder(name, data_dir, file_format):
        assert (name, data_dir, file_format) == ("small", tmp_path, "array_record")
        return types.SimpleNamespace(download_and_prepare=lambda: prepare(data_dir))

    monkeypatch.setattr(tfds, "builder", builder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorflow")
    assert len(load("tfds:small", tmp_path, download=True)[0]) == 5


def test_labels_are_read_once(tmp_path, monkeypatch):
    import os

    folder, _ = prepare(tmp_path, shape=(None, None, 3))
    os.utime(folder, (1, 1))
    os.utime(folder / "dataset_info.json", (1, 1))
    first = load("tfds:small", tmp_path)[0].labels
    monkeypatch.setattr(prepared.PreparedSplit, "label", lambda split, i: 0)
    assert np.array_equal(load("tfds:small", tmp_path)[0].labels, first) and first.any()


def test_cifar_is_found_as_tfds_prepares_it(tmp_path):
    folder, content = prepare(tmp_path, name="cifar10")
    train, test = archives.load(archives.CIFAR10, str(tmp_path), download=False)
    for split, (images, labels) in zip((train, test), content.values(), strict=True):
        assert np.array_equal(split.inputs, np.stack(images)) and np.array_equal(split.labels, labels)
    assert opened("tfds:cifar10", tmp_path).spec.mean == (0.4914, 0.4822, 0.4465)
    with pytest.raises(ValueError, match="cifar10: split 'train' has 5 examples, not 50000"):
        load("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError):
        archives.load(dataclasses.replace(archives.CIFAR10, name="large"), str(folder), download=False)
    change(folder, '"array_record"', '"tfrecord"')
    with pytest.raises(FileNotFoundError, match="array_record"):
        load("cifar10", folder)


def test_reading_needs_no_tensorflow():
    assert "tensorflow" not in sys.modules
