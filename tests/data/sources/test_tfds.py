import dataclasses
import functools
import importlib.util
import io
import json
import operator
import os
import pickle
import shutil
import subprocess
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
from dpa_jax.data.sources import open_source, tf_example
from dpa_jax.data.sources import tfds as prepared
from dpa_jax.data.splits import ArraySplit

RANDOM = np.random.default_rng(0)
NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
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
    def builder(config, data_dir, file_format):
        assert (config, data_dir, file_format) == (None, tmp_path, "array_record")
        return types.SimpleNamespace(download_and_prepare=lambda: prepare(data_dir))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorflow")
    with pytest.raises(ValueError, match=r"^data\.name: TFDS has no set 'small'$"):
        load("tfds:small", tmp_path, download=True)
    monkeypatch.setattr(tfds, "builder_cls", {"small": builder}.get)
    assert len(load("tfds:small", tmp_path, download=True)[0]) == 5


def test_labels_are_read_once_while_the_files_are_the_same(tmp_path, monkeypatch):
    folder, _ = prepare(tmp_path, shape=(None, None, 3))
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    first = load("tfds:small", tmp_path)[0].labels
    monkeypatch.setattr(prepared.PreparedSplit, "label", lambda split, i: 0)
    assert np.array_equal(load("tfds:small", tmp_path)[0].labels, first) and first.any()
    records = folder / "small-train.array_record-00000-of-00001"
    records.write_bytes(records.read_bytes())  # in place: the folder does not change
    os.utime(records, (2, 2))
    assert not load("tfds:small", tmp_path)[0].labels.any()


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


# ---------------- What nobody should trust ----------------


def rewrite(folder, name, edit):
    """Changes a metadata file by a function of what it says."""
    file = folder / name
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))


def set_at(path, value):
    """An edit that puts a value at a path of keys."""

    def edit(content):
        *parents, last = path
        functools.reduce(operator.getitem, parents, content)[last] = value
        return content

    return edit


FEATURES = ("featuresDict", "features")
TEST_FILE = "small-test.array_record-00000-of-00001"


@pytest.mark.parametrize("path", [("pythonClassName",), (*FEATURES, "note", "pythonClassName")], ids=["set", "other"])
def test_the_classes_that_the_metadata_names_are_not_imported(tmp_path, monkeypatch, path):
    folder, content = prepare(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "canary_module.py").write_text("Feature = open(__file__ + '.sang', 'w')")
    rewrite(folder, "features.json", set_at(path, "canary_module.Feature"))
    rewrite(folder, "dataset_info.json", set_at(("moduleName",), "canary_module"))
    assert load("tfds:small", tmp_path)[0].labels.tolist() == content["train"][1].tolist()
    rewrite(folder, "features.json", set_at((*FEATURES, "image", "pythonClassName"), "canary_module.Feature"))
    with pytest.raises(ValueError, match=r"has no uint8 images .*'image': 'canary_module\.Feature'"):
        load("tfds:small", tmp_path)
    assert "canary_module" not in sys.modules and not (tmp_path / "canary_module.py.sang").exists()


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("features.json", lambda _: [], "features.json is damaged: it is no JSON object"),
        ("features.json", set_at(FEATURES, 3), "features.json is damaged: 'features' is 3, not of type dict"),
        ("features.json", set_at((*FEATURES, "image", "image", "dtype"), "uint16"), "has no uint8 images"),
        (
            "features.json",
            set_at((*FEATURES, "image", "image", "shape"), {"dimensions": ["6", "x", "3"]}),
            "x is no int",
        ),
        (
            "features.json",
            set_at((*FEATURES, "image", "image", "shape"), {"dimensions": ["6", "3"]}),
            "the shape .6, 3",
        ),
        ("features.json", set_at((*FEATURES, "label", "classLabel", "numClasses"), "4"), "must have 4 different names"),
        ("dataset_info.json", set_at(("splits", 0, "shardLengths"), ["-5"]), "-5 is no integer from 0"),
        ("dataset_info.json", set_at(("splits", 0, "shardLengths"), ["6"]), "it has 5 records that can be read, not 6"),
        ("dataset_info.json", set_at(("splits", 0, "shardLengths"), ["5", "5"]), "00000-of-00002 is missing"),
        ("dataset_info.json", set_at(("splits", 0, "shardLengths"), []), "needs splits train"),
        ("dataset_info.json", set_at(("splits", 0, "filepathTemplate"), TEST_FILE), "it names a file twice"),
        (
            "features.json",
            set_at((*FEATURES, "label", "classLabel", "numClasses"), 10**9),
            "1000000000 classes, more than",
        ),
        ("dataset_info.json", set_at(("splits", 1, "name"), "train"), "has two splits 'train'"),
        ("dataset_info.json", set_at(("splits", 0), None), "a split is None"),
        (
            "dataset_info.json",
            set_at(("splits", 0, "filepathTemplate"), "../{SPLIT}"),
            "'../train', which is no file of",
        ),
        ("dataset_info.json", set_at(("splits", 0, "filepathTemplate"), "/etc/passwd"), "'/etc/passwd', which is no"),
    ],
)
def test_wrong_metadata_is_told_in_one_line(tmp_path, name, edit, message):
    folder, _ = prepare(tmp_path)
    rewrite(folder, name, edit)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load("tfds:small", tmp_path)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_metadata_without_end_is_refused(tmp_path):
    folder, _ = prepare(tmp_path)
    (folder / "features.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=r"features\.json is damaged: it is nested too deeply$"):
        load("tfds:small", tmp_path)


@pytest.mark.parametrize("damage", [lambda _: b"", lambda b: b[: len(b) // 2], lambda b: b[:300] + b"?" * 9 + b[309:]])
def test_damaged_records_are_told_in_one_line(tmp_path, damage):
    folder, _ = prepare(tmp_path)
    file = folder / "small-train.array_record-00000-of-00001"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(OSError, match=rf"({file}|record 0 .* {folder}) is damaged: \w.* Delete its folder") as error:
        load("tfds:small", tmp_path)
    assert "\n" not in str(error.value)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file} is missing"):
        load("tfds:small", tmp_path)


def test_a_damaged_version_does_not_stand_in_the_way_of_a_good_one(tmp_path, caplog):
    prepare(tmp_path)
    newer = tmp_path / "small/4.0.0"
    newer.mkdir()
    (newer / "dataset_info.json").write_text('{"name": "small", ')
    assert len(load("tfds:small", tmp_path)[0]) == 5
    assert f"{newer}/dataset_info.json is damaged" in caplog.text
    shutil.rmtree(tmp_path / "small/3.0.2")
    with pytest.raises(FileNotFoundError, match=rf"{newer}/dataset_info\.json is damaged"):
        load("tfds:small", tmp_path)


def test_an_image_of_another_size_is_not_stretched(tmp_path):
    folder, _ = prepare(tmp_path, shape=(1, 7, 3))
    rewrite(folder, "features.json", set_at((*FEATURES, "image", "image", "shape"), {"dimensions": [6, 7, 3]}))
    with pytest.raises(ValueError, match=r"record 0 .* is an image \(1, 7, 3\); the set's metadata says \(6, 7, 3\)"):
        load("tfds:small", tmp_path)


@pytest.mark.parametrize("label", [2**31, 2**32, -2])
def test_a_label_beyond_its_type_is_refused(tmp_path, monkeypatch, label):
    prepare(tmp_path)
    monkeypatch.setattr(prepared.tf_example, "parse", lambda _: {"label": [label]})
    with pytest.raises(OSError, match=rf"record 0 .* is damaged: its label is \[{label}\], not one of type int"):
        load("tfds:small", tmp_path)


@pytest.mark.parametrize("name", ["", "..", "../small", "/small", "small/../..", "small/*", "s*", "a/b/c"])
def test_a_name_is_no_path(tmp_path, name):
    with pytest.raises(ValueError, match=r"^data\.name must be tfds:NAME or tfds:NAME/CONFIG; got "):
        load(f"tfds:{name}", tmp_path)


def test_examples_are_read_as_tfds_writes_them():
    names = {
        "image": tfds.features.Tensor(shape=(), dtype=np.str_),
        "many": tfds.features.Tensor(shape=(3,), dtype=np.int64),
    }
    features = tfds.features.FeaturesDict({**names, "label": np.int64, "real": np.float32})
    example = {"image": b"x" * 300, "many": [-1, 0, 2**62], "label": -1, "real": 0.5}
    found = tf_example.parse(features.serialize_example(features.encode_example(example)))
    assert found == {"image": [b"x" * 300], "many": [-1, 0, 2**62], "label": [-1], "real": []}
    for damaged in (b"\x0a", b"\x0a\x05abc", b"\xff" * 11, b"\x0b", b"\x08\x01", b"\x0a\x02\x08\x01"):
        with pytest.raises(ValueError, match=r"it is (cut off|no TensorFlow example)"):
            tf_example.parse(damaged)


def test_reading_needs_neither_tensorflow_nor_tfds(tmp_path):
    prepare(tmp_path)
    code = f"""if True:
        import sys
        from dpa_jax.config import default_config
        from dpa_jax.data.sources import open_source
        data = default_config().data
        data.update(name="tfds:small", dir={str(tmp_path)!r})
        assert len(open_source(data).load()[0]) == 5
        print(*{{"tensorflow", "tensorflow_datasets"}} & set(sys.modules))"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("\n", 0), ended.stderr
