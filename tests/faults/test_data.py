"""Hostile and broken data sets: refused with the file and what is wrong with it, or read as what they are."""

import contextlib
import dataclasses
import functools
import io
import json
import operator
import os
import pathlib
import pickle
import shutil
import socket
import struct
import sys
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dpa_jax.data.feeds.host_crop import EvalCrop, TrainCrop
from dpa_jax.data.sources import cifar
from tests.faults import sets
from tests.faults.harness import TINY
from tests.faults.sets import NAMES, bounded, encoded, opened, pixels, read, write_parquet


@pytest.fixture(autouse=True)
def _home(case, monkeypatch):
    """Nothing of the user's is looked into or left there."""
    monkeypatch.setenv("HOME", str(case.folder / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(case.folder / "cache"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """prepared(case) -> a copy of a prepared set in the case's folder."""
    original = tmp_path_factory.mktemp("prepared")
    sets.make_prepared(original)

    def copy(case):
        shutil.copytree(original / "small", case.folder / "set/small")
        return case.folder / "set/small/1.0.0"

    return copy


def refused(case, words, name, directory, **changes):
    """Opening or reading the set, every image of it, ends in an error with all the words."""
    with case.raises(*words), bounded():
        splits = opened(name, directory, **changes).load()
        for split in splits:
            for i in range(len(split)):
                if not hasattr(split, "inputs"):
                    split.read(i)


# ---------------- Where the set is said to be ----------------

SOURCES = ("folder", "imagenet", "parquet", "tfds:small", "cifar10", "cifar100")
PLACES = {
    "missing": lambda root: root / "nowhere",
    "empty": lambda root: root,
    "file": lambda root: (root / "file").write_text("x") and root / "file",
    "pipe": lambda root: os.mkfifo(root / "pipe") or root / "pipe",
    "unknown home": lambda _: "~nobody-is-called-so/data",
    "long": lambda root: root / ("x" * 300),
    "loop": lambda root: os.symlink(root / "loop", root / "loop") or root / "loop",
    "inside a file": lambda root: (root / "file").write_text("x") and root / "file/data",
    "null": lambda _: "data\0",
    "other bytes": lambda root: root / os.fsdecode(b"\xff\xfe"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SOURCES)
def test_a_place_without_a_set(case, name, place):
    refused(case, (), name, PLACES[place](case.folder))


@pytest.mark.parametrize(
    "name",
    ["tfds:", "tfds:..", "tfds:/", "tfds:../small", "tfds:small/../small", "tfds:*", "tfds:small/*", "tfds:a\0b", ":"],
)
def test_a_name_that_is_none(case, prepared, name):
    prepared(case)
    refused(case, ("data.name",), name, case.folder / "set")


# ---------------- Code ----------------

FEATURES = ("featuresDict", "features")
CANARIES = {
    "set": ("features.json", ("pythonClassName",)),
    "image": ("features.json", (*FEATURES, "image", "pythonClassName")),
    "label": ("features.json", (*FEATURES, "label", "pythonClassName")),
    "text": ("features.json", (*FEATURES, "note", "pythonClassName")),
    "legacy type": ("features.json", ("type",)),
    "module": ("dataset_info.json", ("moduleName",)),
    "config": ("dataset_info.json", ("configName",)),
}


def rewrite(file, path, value):
    """Puts a value at a path of keys of a JSON file."""
    content = json.loads(file.read_text())
    *parents, last = path
    functools.reduce(operator.getitem, parents, content)[last] = value
    file.write_text(json.dumps(content))


def plant(case, monkeypatch, name="canary"):
    """A module that can be imported and leaves a mark."""
    (case.folder / f"{name}.py").write_text("class Feature: pass\nopen(__file__ + '.mark', 'w').close()")
    monkeypatch.syspath_prepend(case.folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


def sang(case):
    return any(case.folder.rglob("*.mark"))


@pytest.mark.parametrize("source", ["tfds:small", "cifar10"])
@pytest.mark.parametrize("place", CANARIES)
def test_a_class_that_the_metadata_names(case, monkeypatch, prepared, place, source):
    folder = prepared(case)
    plant(case, monkeypatch)
    file, path = CANARIES[place]
    rewrite(folder / file, path, "canary.Feature")
    if source == "cifar10":
        rewrite(folder / "dataset_info.json", ("name",), "cifar10")
        folder.parent.rename(folder.parent.with_name("cifar10"))
    with contextlib.suppress(Exception), bounded():
        read(source, case.folder / "set")
    if sang(case):
        case.code(f"{file} {path}")


@pytest.mark.parametrize("nested", ["sequence", "featuresDict"])
def test_a_class_that_is_named_further_down(case, monkeypatch, prepared, nested):
    folder = prepared(case)
    plant(case, monkeypatch)
    inner = {"pythonClassName": "canary.Feature", "tensor": {"shape": {}, "dtype": "int64"}}
    whole = {"feature": inner} if nested == "sequence" else {"features": {"a": inner}}
    core = "tensorflow_datasets.core.features"
    kind = f"{core}.sequence_feature.Sequence" if nested == "sequence" else f"{core}.features_dict.FeaturesDict"
    rewrite(folder / "features.json", (*FEATURES, "more"), {"pythonClassName": kind, nested: whole})
    with contextlib.suppress(Exception), bounded():
        read("tfds:small", case.folder / "set")
    if sang(case):
        case.code(nested)


def test_a_class_in_the_data_folder_of_a_program(case, prepared):
    shutil.copytree(prepared(case), case.folder / "data/small/1.0.0")
    (case.folder / "data/canary.py").write_text("class Feature: pass\nopen(__file__ + '.mark', 'w').close()")
    rewrite(
        case.folder / "data/small/1.0.0/features.json", (*FEATURES, "label", "pythonClassName"), "data.canary.Feature"
    )
    arguments = ("--config.data.name=tfds:small", "--config.data.dir=data")
    ended = case.train(*TINY, *arguments, env={"PYTHONPATH": f"{os.getcwd()}:{case.folder}"})
    if sang(case):
        case.code("features.json")
    case.refused(ended, "has no uint8 images", "data.canary.Feature")


class Command:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


PICKLES = {
    "command": lambda mark: pickle.dumps(Command(mark)),
    "command in a list": lambda mark: pickle.dumps({b"data": [Command(mark)], b"fine_labels": []}),
    "eval": lambda _: b'cbuiltins\neval\n(S\'open("evil.mark", "w")\'\ntR.',
    "attribute": lambda _: b"cnumpy\nndarray.tofile\n.",
    "memmap": lambda _: b"cnumpy\nmemmap\n(S'evil.mark'\nS'u1'\nS'w+'\nI0\n(I9\nttR.",
    "load": lambda _: b"cnumpy\nload\n(S'x.npy'\ntR.",
    "persistent": lambda _: b"Pevil\n.",
    "extension": lambda _: b"\x82\x01.",
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_that_wants_more_than_arrays(case, monkeypatch, kind):
    monkeypatch.chdir(case.folder)
    archive = sets.make_cifar(case.folder / "set", packed=False)
    content = PICKLES[kind](case.folder / "evil.mark")
    (case.folder / "set/small-python/test").write_bytes(content)
    with case.raises("small-python/test", "MD5"), bounded():
        cifar.load(archive, str(case.folder / "set"), False)
    # Where even the sum is right: the reader of pickles by itself.
    with contextlib.suppress(Exception), bounded():
        cifar.read_pickle(case.folder / "set/small-python/test", cifar.hashlib.md5(content).hexdigest())
    if sang(case):
        case.code(kind)


# ---------------- Archives ----------------


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


MEMBERS = {
    "parent": tarfile.TarInfo("small-python/../../evil"),
    "absolute": tarfile.TarInfo("/tmp/evil"),
    "other folder": tarfile.TarInfo("evil"),
    "link": link("small-python/evil", "/etc/passwd", tarfile.SYMTYPE),
    "hard link": link("small-python/evil", "small-python/test", tarfile.LNKTYPE),
    "pipe": link("small-python/evil", "", tarfile.FIFOTYPE),
    "device": link("small-python/evil", "", tarfile.CHRTYPE),
    "folder above": tarfile.TarInfo("./small-python/../evil"),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_an_archive_with_a_member_that_leads_elsewhere(case, member):
    folder = case.folder / "set"
    archive = sets.make_cifar(folder, packed=True)
    packed = folder / "small-python.tar.gz"
    whole = io.BytesIO()
    with tarfile.open(packed) as old, tarfile.open(fileobj=whole, mode="w:gz") as new:
        new.addfile(MEMBERS[member], io.BytesIO())
        for info in old:
            new.addfile(info, old.extractfile(info))
    packed.write_bytes(whole.getvalue())
    archive = dataclasses.replace(archive, md5=cifar.hashlib.md5(whole.getvalue()).hexdigest())
    with case.raises("evil", "not a plain file inside"), bounded():
        cifar.load(archive, str(folder), False)
    left = {path.name for path in folder.iterdir()}
    assert left == {"small-python.tar.gz"} and not (case.folder / "evil").exists()


@pytest.mark.parametrize("what", ["empty", "half", "text", "other"])
def test_an_archive_that_is_not_the_published_one(case, what):
    archive = sets.make_cifar(case.folder / "set", packed=True)
    packed = case.folder / "set/small-python.tar.gz"
    content = packed.read_bytes()
    packed.write_bytes(
        {"empty": b"", "half": content[: len(content) // 2], "text": b"x", "other": content + b"\0"}[what]
    )
    with case.raises(str(packed), "MD5", "download it again"), bounded():
        cifar.load(archive, str(case.folder / "set"), False)


def test_an_archive_that_is_a_pipe(case):
    archive = sets.make_cifar(case.folder / "set", packed=True)
    (case.folder / "set/small-python.tar.gz").unlink()
    os.mkfifo(case.folder / "set/small-python.tar.gz")
    with case.raises("small was not found"), bounded():
        cifar.load(archive, str(case.folder / "set"), False)


# ---------------- Parquet ----------------

# What a file has in place of the labels 0, 1 and 2, and words of the error.
LABELS = {
    "2^32": ({"labels": [0, 1, 2**32]}, ("row 2", "4294967296")),
    "2^32 + 1": ({"labels": [2**32 + 1, 1, 2]}, ("row 0", "4294967297")),
    "-2^32": ({"labels": [0, -(2**32), 2]}, ("row 1", "-4294967296")),
    "2^63 - 1": ({"labels": [0, 2**63 - 1, 2]}, ("row 1", "9223372036854775807")),
    "2^64 - 1": ({"labels": [0, 2**64 - 1, 2], "type": pa.uint64()}, ("row 1", "18446744073709551615")),
    "only 2^64 - 1": ({"labels": [2**64 - 1] * 3, "type": pa.uint64()}, ("row 0", "18446744073709551615")),
    "another class": ({"labels": [0, 1, 3]}, ("row 2", "is 3", "3 classes")),
    "some -1": ({"labels": [0, -1, 2]}, ("row 1", "-1")),
    "-2": ({"labels": [-2, -2, -2]}, ("row 0", "-2")),
    "null": ({"labels": [0, None, 2]}, ("row 1", "missing")),
    "fractions": ({"labels": [0.0, 1.5, 2.0]}, ("label", "integers", "double")),
    "whole floats": ({"labels": [0.0, 1.0, 2.0]}, ("label", "integers", "double")),
    "not a number": ({"labels": [0.0, float("nan"), 2.0]}, ("label", "integers")),
    "bool": ({"labels": [False, True, True]}, ("label", "integers", "bool")),
    "text": ({"labels": list("012")}, ("label", "integers", "string")),
    "lists": ({"labels": [[0], [1], [2]]}, ("label", "integers", "list")),
    "dates": ({"labels": [0, 1, 2], "type": pa.timestamp("s")}, ("label", "integers", "timestamp")),
    "no such column": ({"labels": [0, 1, 2], "column": "other"}, ("label", "integers")),
    "other order": ({"labels": [0, 1, 2], "metadata": sets.about(NAMES[::-1])}, ("other columns or classes",)),
    "other names": ({"labels": [0, 1, 2], "metadata": sets.about("xyz")}, ("other columns or classes",)),
    "more classes": ({"labels": [0, 1, 2], "metadata": sets.about((*NAMES, "dog"))}, ("other columns or classes",)),
    "no metadata": ({"labels": [0, 1, 2], "metadata": "{}"}, ("Image", "ClassLabel")),
    "cut metadata": ({"labels": [0, 1, 2], "metadata": sets.about()[:-3]}, ("metadata", "damaged")),
    "metadata of a list": ({"labels": [0, 1, 2], "metadata": "[1]"}, ("metadata", "no JSON object")),
    "metadata of a number": ({"labels": [0, 1, 2], "metadata": "7"}, ("metadata", "no JSON object")),
    "deep metadata": ({"labels": [0, 1, 2], "metadata": '{"a":' * 50_000}, ("metadata", "nested too deeply")),
    "other bytes": ({"labels": [0, 1, 2], "metadata": b"\xff\xfe\xff"}, ("metadata", "damaged")),
    "info is a list": ({"labels": [0, 1, 2], "metadata": '{"info": []}'}, ("'info'", "dict")),
    "features is a text": ({"labels": [0, 1, 2], "metadata": '{"info": {"features": "x"}}'}, ("'features'", "dict")),
    "a feature is a number": ({"labels": [0, 1, 2], "metadata": sets.about(img=3)}, ("Image",)),
    "two images": (
        {"labels": [0, 1, 2], "metadata": sets.about(more={"_type": "Image"})},
        ("one column of type Image",),
    ),
    "no names": ({"labels": [0, 1, 2], "metadata": sets.about(())}, ("classes of 'label'",)),
    "names are numbers": ({"labels": [0, 1, 2], "metadata": sets.about((1, 2, 3))}, ("classes of 'label'",)),
    "image is a text": ({"labels": [0, 1, 2], "images": list("abc"), "image_type": pa.string()}, ("'img'", "struct")),
    "image is missing": (
        {"labels": [0], "images": [{"path": "x"}], "image_type": pa.struct([("path", pa.string())])},
        ("'img'", "struct"),
    ),
    "path alone": ({"labels": [0], "images": [{"bytes": None, "path": "x"}]}, ("row 3", "path alone")),
    "null image": ({"labels": [0], "images": [None]}, ("row 3", "path alone")),
    "empty image": ({"labels": [0], "images": [{"bytes": b"", "path": None}]}, ("row 3", "cannot be decoded")),
    "text for an image": ({"labels": [0], "images": [{"bytes": b"GIF89a", "path": None}]}, ("row 3", "neither a JPEG")),
}


@pytest.mark.parametrize("what", LABELS)
def test_a_parquet_file_that_is_wrong(case, what):
    sets.make_parquet(case.folder / "set")
    changes, words = LABELS[what]
    write_parquet(case.folder / "set/train-00001-of-00002.parquet", **changes)
    refused(case, ("train-0000", *words), "parquet", case.folder / "set")


def test_a_metadata_without_an_image_column(case):
    for name in ("train", "test"):
        write_parquet(case.folder / f"set/{name}-0.parquet", [0, 1], metadata=sets.about().replace("img", "gone"))
    refused(case, ("train-0.parquet", "'gone'"), "parquet", case.folder / "set")


FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "without its middle": lambda path: path.write_bytes(path.read_bytes()[:50] + path.read_bytes()[150:]),
    "magic alone": lambda path: path.write_bytes(b"PAR1PAR1"),
    "long footer": lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\xff\xff\xff\x7fPAR1"),
    "text": lambda path: path.write_text("label,image\n0,a.png\n" * 9),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "folder of parquet": lambda path: (path.unlink(), write_parquet(path / "part.parquet", [0, 1, 2])),
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("split", ["train-00000-of-00002", "test-00000-of-00001"])
@pytest.mark.parametrize("what", FILES)
def test_a_parquet_file_that_is_none(case, what, split):
    sets.make_parquet(case.folder / "set")
    FILES[what](case.folder / f"set/{split}.parquet")
    refused(case, (split,), "parquet", case.folder / "set")


@pytest.mark.parametrize("labels", [[], [-1, -1], [None, None]], ids=["no rows", "all -1", "all null"])
def test_a_parquet_set_without_held_out_rows(case, labels):
    sets.make_parquet(case.folder / "set")
    write_parquet(case.folder / "set/test-00000-of-00001.parquet", labels, type=pa.int64())
    with case.raises("test-00000-of-00001.parquet", "with labels"), bounded():
        opened("parquet", case.folder / "set")  # before anything is trained


@pytest.mark.parametrize("what", ["missing", "one too many", "last missing"])
def test_a_parquet_set_whose_files_are_not_all(case, what):
    sets.make_parquet(case.folder / "set")
    train = case.folder / "set/train-00000-of-00002.parquet"
    if what == "one too many":
        shutil.copy(train, train.with_name("train-00000-of-00001.parquet"))
    else:
        (train if what == "missing" else train.with_name("train-00001-of-00002.parquet")).unlink()
    refused(case, ("missing", "train-0000"), "parquet", case.folder / "set")


@pytest.mark.parametrize("folder", ["label=2", "img=x", "a[0-9]", "{b}", "*", "caf\u00e9", "%2e%2e"])
def test_a_parquet_set_in_a_folder_with_an_odd_name(case, folder):
    sets.make_parquet(case.folder / folder)
    with bounded():
        (_, train), (_, test) = read("parquet", case.folder / folder)
    assert train == [0, 1, 2, 0, 1, 2] and test == [2, 1, 0]


# ---------------- What is remembered ----------------


def make_old(root, time=10**9):
    for path in (root, *root.rglob("*")):
        os.utime(path, (time, time))


def replace(path, content):
    """Writes a file in place, and leaves its folder's time as it was."""
    time = path.parent.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path.parent, ns=(time, time))


def test_records_that_are_overwritten(case, tmp_path_factory):
    """New labels at the same place: not the old ones."""
    sets.make_prepared(case.folder / "set", shape=None)
    make_old(case.folder / "set")
    assert read("tfds:small", case.folder / "set")[0][1] == [0, 1, 2, 0, 1, 2]
    other = sets.make_prepared(tmp_path_factory.mktemp("other"), shape=None, label=2)
    name = "small-train.array_record-00000-of-00001"
    replace(case.folder / "set/small/1.0.0" / name, (other / name).read_bytes())
    assert read("tfds:small", case.folder / "set")[0][1] == [2] * 6


def test_a_parquet_file_that_is_overwritten(case):
    root = sets.make_parquet(case.folder / "set")
    make_old(root)
    first, _ = read("parquet", root)[0]
    other = case.folder / "other.parquet"
    write_parquet(other, [2, 1, 0], images=[{"bytes": encoded(pixels(i)), "path": None} for i in (2, 1, 0)])
    replace(root / "train-00000-of-00002.parquet", other.read_bytes())
    images, labels = read("parquet", root)[0]
    assert labels == [2, 1, 0, 0, 1, 2] and images == [*first[2::-1], *first[3:]]


@pytest.mark.parametrize("change", ["new image", "new class", "gone", "pipe", "folder", "renamed"])
def test_a_folder_that_changes_between_two_runs(case, change):
    root = sets.make_folder(case.folder / "set")
    make_old(root)
    read("folder", root)
    one = root / "train/ant/0.png"
    if change == "new image":
        one.with_name("z.png").write_bytes(one.read_bytes())
        expected = [0, 0, 0, 1, 1, 2, 2]
    elif change == "new class":
        for split in ("train", "val"):
            (root / split / "aardvark").mkdir()
            (root / split / "aardvark/a.png").write_bytes(one.read_bytes())
        expected = [0, 1, 1, 2, 2, 3, 3]
    elif change == "renamed":
        (root / "train/ant").rename(root / "train/dog")
        (root / "val/ant").rename(root / "val/dog")
        expected = [0, 0, 1, 1, 2, 2]
    else:
        one.unlink()
        os.mkfifo(one) if change == "pipe" else one.mkdir() if change == "folder" else None
        expected = [0, 1, 1, 2, 2]
    with bounded():
        assert read("folder", root)[0][1] == expected


def test_an_image_that_is_overwritten(case):
    root = sets.make_folder(case.folder / "set")
    make_old(root)
    read("folder", root)
    replace(root / "train/ant/0.png", encoded(pixels(77)))
    assert read("folder", root)[0][0][0] == pixels(77).tobytes()


CACHES = {
    "empty": lambda _: b"",
    "half": lambda content: content[: len(content) // 2],
    "text": lambda _: b"nonsense",
    "null": lambda _: b"null",
    "deep": lambda _: b"[" * 100_000,
    "other name": lambda content: content.replace(b"0.png", b"9.png"),
    "other class": lambda content: content.replace(b'"bee"', b'"elk"'),
    "way out": lambda content: content.replace(b'"0.png"', b'"../0.png"'),
}


@pytest.mark.parametrize("what", CACHES)
def test_a_list_of_files_that_is_damaged(case, what):
    root = sets.make_folder(case.folder / "set")
    make_old(root)
    wanted = read("folder", root)
    for file in (case.folder / "cache/dpa_jax").iterdir():
        file.write_bytes(CACHES[what](file.read_bytes()))
    with bounded():
        assert read("folder", root) == wanted


def test_a_cache_that_is_a_file(case):
    (case.folder / "cache").write_text("x")
    root = sets.make_folder(case.folder / "set")
    with bounded():
        assert len(read("folder", root)[0][1]) == 6
    sets.make_parquet(case.folder / "parquet")
    refused(case, ("cannot write", "XDG_CACHE_HOME"), "parquet", case.folder / "parquet")


# ---------------- Prepared sets ----------------

RECORDS = "small-train.array_record-00000-of-00001"
DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:65536]),
    "a byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "text": lambda path: path.write_bytes(b"records" * 20_000),
    "zeros": lambda path: path.write_bytes(bytes(2**17)),
    "changed": lambda path: path.write_bytes(path.read_bytes().replace(b"PNG", b"QNG")),
    "gone": lambda path: path.unlink(),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "other split": lambda path: shutil.copy(path.with_name(path.name.replace("train", "test")), path),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_records_that_are_damaged(case, prepared, what):
    folder = prepared(case)
    path = folder / RECORDS
    if what == "changed":  # the middle of the first record
        content = bytearray(path.read_bytes())
        content[200:208] = b"\0\1\2\3\4\5\6\7"
        path.write_bytes(content)
    else:
        DAMAGES[what](path)
    refused(case, (str(folder),), "tfds:small", case.folder / "set")


IMAGE, LABEL = (*FEATURES, "image", "image"), (*FEATURES, "label", "classLabel")
SPLIT = ("splits", 0)
TWICE = {"name": "train", "shardLengths": ["6", "6"], "filepathTemplate": RECORDS}
# The file, the path of keys, the value, and a word of the error.
METADATA = {
    "features: text": ("features.json", ("featuresDict",), "x", "featuresDict"),
    "features: none": ("features.json", FEATURES, {}, "has no uint8 images"),
    "features: list": ("features.json", FEATURES, [1], "features"),
    "feature: number": ("features.json", (*FEATURES, "image"), 3, "has no uint8 images"),
    "image: number": ("features.json", IMAGE, 3, "'image'"),
    "image: 16 bits": ("features.json", (*IMAGE, "dtype"), "uint16", "has no uint8 images"),
    "image: floats": ("features.json", (*IMAGE, "dtype"), "float32", "has no uint8 images"),
    "image: no shape": ("features.json", (*IMAGE, "shape"), {}, "dimensions"),
    "image: rank 2": ("features.json", (*IMAGE, "shape", "dimensions"), ["8", "6"], "shape"),
    "image: size 0": ("features.json", (*IMAGE, "shape", "dimensions"), ["0", "6", "3"], "shape"),
    "image: channels": ("features.json", (*IMAGE, "shape", "dimensions"), ["8", "6", "7"], "shape"),
    "image: negative": ("features.json", (*IMAGE, "shape", "dimensions"), ["-8", "6", "3"], "-8"),
    "image: 10^30": ("features.json", (*IMAGE, "shape", "dimensions"), [10**30, "6", "3"], "1000000000"),
    "image: text": ("features.json", (*IMAGE, "shape", "dimensions"), ["x", "6", "3"], "x is no integer"),
    "image: other height": ("features.json", (*IMAGE, "shape", "dimensions"), ["7", "6", "3"], "(7, 6, 3)"),
    "image: one row": ("features.json", (*IMAGE, "shape", "dimensions"), ["8", "1", "3"], "(8, 1, 3)"),
    "label: 4 classes": ("features.json", (*LABEL, "numClasses"), "4", "4"),
    "label: 0 classes": ("features.json", (*LABEL, "numClasses"), "0", "0 is no integer"),
    "label: 2^31 - 1 classes": ("features.json", (*LABEL, "numClasses"), 2**31 - 1, "2147483647"),
    "label: no number": ("features.json", LABEL, {"x": 1}, "integer"),
    "label: is a tensor": (
        "features.json",
        (*FEATURES, "label", "pythonClassName"),
        "tensorflow_datasets.core.features.tensor_feature.Tensor",
        "has no uint8 images",
    ),
    "info: no splits": ("dataset_info.json", ("splits",), [], "splits"),
    "info: splits are text": ("dataset_info.json", ("splits",), "train", "'splits'"),
    "split: null": ("dataset_info.json", SPLIT, None, "split"),
    "split: same name": ("dataset_info.json", (*SPLIT, "name"), "test", "two splits"),
    "split: no name": ("dataset_info.json", (*SPLIT, "name"), 3, "'name'"),
    "split: other name": ("dataset_info.json", (*SPLIT, "name"), "trian", "needs splits train"),
    "lengths: more": ("dataset_info.json", (*SPLIT, "shardLengths"), ["7"], RECORDS),
    "lengths: fewer": ("dataset_info.json", (*SPLIT, "shardLengths"), ["5"], RECORDS),
    "lengths: negative": ("dataset_info.json", (*SPLIT, "shardLengths"), ["-6"], "-6"),
    "lengths: 10^30": ("dataset_info.json", (*SPLIT, "shardLengths"), ["1" + "0" * 30], "1000000"),
    "lengths: fraction": ("dataset_info.json", (*SPLIT, "shardLengths"), [6.5], "6.5"),
    "lengths: none": ("dataset_info.json", (*SPLIT, "shardLengths"), [], "needs splits train"),
    "lengths: zero": ("dataset_info.json", (*SPLIT, "shardLengths"), ["0"], RECORDS),
    "lengths: two files": ("dataset_info.json", (*SPLIT, "shardLengths"), ["3", "3"], "00000-of-00002"),
    "lengths: text": ("dataset_info.json", (*SPLIT, "shardLengths"), "6", "shardLengths"),
    "lengths: one file twice": ("dataset_info.json", SPLIT, TWICE, "twice"),
    "template: above": ("dataset_info.json", (*SPLIT, "filepathTemplate"), "../../{SPLIT}", "../../train"),
    "template: absolute": ("dataset_info.json", (*SPLIT, "filepathTemplate"), "/etc/passwd", "/etc/passwd"),
    "template: folder": ("dataset_info.json", (*SPLIT, "filepathTemplate"), "a/{SPLIT}", "a/train"),
    "template: parent": ("dataset_info.json", (*SPLIT, "filepathTemplate"), "..", ".."),
    "template: slice": ("dataset_info.json", (*SPLIT, "filepathTemplate"), f"{RECORDS}[0:6]", "missing"),
    "template: attribute": ("dataset_info.json", (*SPLIT, "filepathTemplate"), "{DATASET.__class__}", "missing"),
    "template: number": ("dataset_info.json", (*SPLIT, "filepathTemplate"), 3, "filepathTemplate"),
    "template: null byte": ("dataset_info.json", (*SPLIT, "filepathTemplate"), "a\0b", ""),
    "name: number": ("dataset_info.json", ("name",), 3, "'name'"),
    "format: list": ("dataset_info.json", ("fileFormat",), ["array_record"], "fileFormat"),
    "format: tfrecord": ("dataset_info.json", ("fileFormat",), "tfrecord", "has it as tfrecord"),
}


@pytest.mark.parametrize("what", METADATA)
def test_metadata_that_is_wrong(case, prepared, what):
    folder = prepared(case)
    file, path, value, word = METADATA[what]
    rewrite(folder / file, path, value)
    refused(case, (str(folder), word), "tfds:small", case.folder / "set")


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"[]", "no JSON object"),
        (b"7", "no JSON object"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "damaged"),
    ],
    ids=["empty", "brace", "list", "number", "bytes", "deep object", "deep list", "long number"],
)
def test_metadata_that_is_none(case, prepared, file, content, word):
    folder = prepared(case)
    (folder / file).write_bytes(content)
    refused(case, (str(folder / file), word), "tfds:small", case.folder / "set")


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json", "label.labels.txt"])
def test_metadata_that_is_a_pipe(case, prepared, file):
    folder = prepared(case)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    refused(case, (file,), "tfds:small", case.folder / "set")


@pytest.mark.parametrize("names", ["ant\nbee\n", "ant\nbee\nbee\n", "", "ant\nbee\ncat\ndog\n", "ant\n\n\nbee"])
def test_class_names_that_are_not_as_many_as_classes(case, prepared, names):
    folder = prepared(case)
    (folder / "label.labels.txt").write_text(names)
    refused(case, ("label.labels.txt", "3 different names"), "tfds:small", case.folder / "set")


def test_more_classes_than_there_is_memory_for_their_names(case, prepared):
    folder = prepared(case)
    (folder / "label.labels.txt").unlink()
    rewrite(folder / "features.json", (*LABEL, "numClasses"), 2**31 - 1)
    refused(case, ("features.json", "2147483647"), "tfds:small", case.folder / "set")


@pytest.mark.parametrize("version", ["0.9.0", "1.0.1", "10.0.0", "2.0.0.incomplete", "9" * 200])
@pytest.mark.parametrize("content", ["{", "[]", '{"name": "small"}', '{"name": 3}'])
def test_a_damaged_version_beside_a_good_one(case, prepared, version, content):
    folder = prepared(case).parent / version
    folder.mkdir()
    (folder / "dataset_info.json").write_text(content)
    with bounded():
        assert read("tfds:small", case.folder / "set")[0][1] == [0, 1, 2, 0, 1, 2]


def varint(number):
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def example(label):
    """An example of this label, an integer of 64 bits, which TFDS would not write."""

    def part(number, content):
        return bytes([number << 3 | 2]) + varint(len(content)) + content

    image = part(1, part(1, b"image") + part(2, part(1, part(1, encoded(pixels(0))))))
    return part(1, image + part(1, part(1, b"label") + part(2, part(3, part(1, varint(label % 2**64))))))


@pytest.mark.parametrize("label", [3, 2**31, 2**32, 2**32 + 1, -2, -(2**63)])
def test_a_label_of_a_record_that_is_no_class(case, label):
    sets.make_prepared(case.folder / "set", edit=lambda _: example(label))
    refused(case, ("label", str(label)), "tfds:small", case.folder / "set")


def test_a_label_of_a_record(case):
    sets.make_prepared(case.folder / "set", edit=lambda _: example(2))
    assert read("tfds:small", case.folder / "set")[0][1] == [2] * 6


# ---------------- Folders of images ----------------


def make_socket(path):
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


# What is beside the images without being one.
NO_IMAGES = {
    "pipe": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to a folder": lambda path: path.symlink_to("/tmp"),
    "link to a pipe": lambda path: (os.mkfifo(path.with_suffix(".pipe")), path.symlink_to(path.with_suffix(".pipe"))),
}


@pytest.mark.parametrize("name", ["0-first.png", "x.JPEG"])
@pytest.mark.parametrize("what", NO_IMAGES)
def test_no_image_among_images(case, what, name):
    root = sets.make_folder(case.folder / "set")
    wanted = read("folder", root)
    NO_IMAGES[what](root / "train/ant" / name)
    with bounded():
        assert read("folder", root) == wanted


@pytest.mark.parametrize("what", ["pipe", "device", "folder", "socket", "link to nothing", "gone"])
def test_an_image_that_becomes_something_else_while_a_run_goes_on(case, what):
    root = sets.make_folder(case.folder / "set")
    train, _ = opened("folder", root).load()
    path = root / "train/ant/0.png"
    path.unlink()
    if what == "link to nothing":
        path.symlink_to("nowhere")
    elif what != "gone":
        NO_IMAGES[what](path)
    with case.raises("train/ant/0.png"), bounded():
        train.read(0)


CLASSES = {
    "a file": lambda root: (shutil.rmtree(root / "val/bee"), (root / "val/bee").write_text("x")),
    "gone": lambda root: shutil.rmtree(root / "val/bee"),
    "empty": lambda root: [path.unlink() for path in (root / "val/bee").iterdir()],
    "only held out": lambda root: shutil.copytree(root / "val/bee", root / "val/dog"),
    "only trained": lambda root: shutil.copytree(root / "train/bee", root / "train/dog"),
    "a link to nothing": lambda root: (shutil.rmtree(root / "val/bee"), (root / "val/bee").symlink_to("nowhere")),
    "a loop": lambda root: (shutil.rmtree(root / "val/bee"), (root / "val/bee").symlink_to(root / "val/bee")),
    "a pipe": lambda root: (shutil.rmtree(root / "val/bee"), os.mkfifo(root / "val/bee")),
    "all gone": lambda root: [shutil.rmtree(path) for path in (root / "val").iterdir()],
    "no split": lambda root: shutil.rmtree(root / "val"),
    "split is a file": lambda root: (shutil.rmtree(root / "val"), (root / "val").write_text("x")),
    "one level too deep": lambda root: (root / "val").rename(root / "train/val"),
    "image link to nothing": lambda root: (root / "val/bee/x.png").symlink_to("nowhere"),
}


@pytest.mark.parametrize("what", CLASSES)
def test_a_class_that_is_none(case, what):
    root = sets.make_folder(case.folder / "set")
    CLASSES[what](root)
    refused(case, (str(root),), "folder", root)


@pytest.mark.parametrize(
    "name",
    [b"\xff\xfe", b"a\nb", b" ", b"-rf", b"a'b\"c", "\u202egnp".encode(), b"%s{0}$(x)", "e\u0301".encode(), b"x" * 255],
)
def test_a_class_with_an_odd_name(case, name):
    root = sets.make_folder(case.folder / "set")
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / os.fsdecode(name))
    make_old(root)
    for _ in range(2):  # found, then remembered
        with bounded():
            (images, labels), _ = read("folder", root)
        assert sorted(labels) == [0, 0, 1, 1, 2, 2] and os.fsdecode(name) in opened("folder", root).spec.class_names
        assert {pixels(i).tobytes() for i in range(6)} == set(images)


# ---------------- Images ----------------


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, content=b"", bits=8, colour=2, more=b""):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg(**options):
    return encoded(pixels(0, (40, 30, 3)), "JPEG", **options)


def jpeg_size(content, height, width):
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


BROKEN = {
    "no bytes": b"",
    "one byte": b"\x89",
    "text": b"not an image at all",
    "GIF": encoded(pixels(0), "GIF"),
    "BMP": encoded(pixels(0), "BMP"),
    "TIFF": encoded(pixels(0), "TIFF"),
    "WebP": b"RIFF\x24\0\0\0WEBPVP8 ",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PNG: magic": b"\x89PNG\r\n\x1a\n",
    "PNG: half": encoded(pixels(0))[:90],
    "PNG: no data": png(8, 8),
    "PNG: too little data": png(8, 8, b"\0" * 30),
    "PNG: size 0": png(0, 8, b"\0"),
    "PNG: no colour type": png(8, 8, b"\0" * 200, colour=5),
    "PNG: header sum": png(8, 8, b"\0" * 200)[:29] + b"\0\0\0\0" + png(8, 8, b"\0" * 200)[33:],
    "PNG: 2^31 wide": png(2**31 - 1, 1, b"\0"),
    "PNG: bomb": png(50_000, 50_000, b"\0"),
    "PNG: half a bomb": png(10_000, 10_000, b"\0"),
    "PNG: long text": png(8, 8, b"\0" * 200, more=chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 10**8))),
    "PNG: long chunk": encoded(pixels(0))[:33] + b"\x7f\xff\xff\xffIDAT",
    "JPEG: magic": b"\xff\xd8\xff",
    "JPEG: half": jpeg()[: len(jpeg()) // 2],
    "JPEG: no scan": jpeg()[: jpeg().index(b"\xff\xda")],
    "JPEG: bomb": jpeg_size(jpeg(), 65_000, 65_000),
    "JPEG: half a bomb": jpeg_size(jpeg(), 10_000, 10_000),
    "JPEG: height 0": jpeg_size(jpeg(), 0, 30),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_image(case, what):
    root = sets.make_folder(case.folder / "set")
    (root / "train/bee/1.png").write_bytes(BROKEN[what])
    refused(case, ("train/bee/1.png", "cannot be decoded"), "folder", root)


GREY = pixels(0, (9, 7))
COLOUR = pixels(0, (9, 7, 3))
KINDS = {
    "grey": (encoded(GREY), GREY),
    "grey with alpha": (encoded(Image.fromarray(GREY).convert("LA")), GREY),
    "black and white": (encoded(Image.fromarray(GREY > 99)), (GREY > 99) * np.uint8(255)),
    "16 bits": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY),
    "palette": (encoded(Image.fromarray(GREY).convert("P")), GREY),
    "palette with alpha": (encoded(Image.fromarray(GREY).convert("P"), transparency=bytes(range(256))), GREY),
    "alpha": (encoded(Image.fromarray(COLOUR).convert("RGBA")), COLOUR),
    "transparent colour": (encoded(COLOUR, transparency=(1, 2, 3)), COLOUR),
    "animated": (encoded(COLOUR, save_all=True, append_images=[Image.fromarray(COLOUR[::-1].copy())]), COLOUR),
    "wrong extension": (encoded(COLOUR, "JPEG", quality=100, subsampling=0), None),
    "progressive": (encoded(COLOUR, "JPEG", progressive=True), None),
    "CMYK": (encoded(Image.fromarray(COLOUR).convert("CMYK"), "JPEG"), None),
    "turned by EXIF": (
        encoded(COLOUR, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        COLOUR,
    ),
    "broken EXIF": (encoded(COLOUR, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), None),
    "grown": (encoded(COLOUR) + b"anything" * 99, COLOUR),
    "one pixel": (encoded(COLOUR[:1, :1]), COLOUR[:1, :1]),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_image(case, kind):
    root = sets.make_folder(case.folder / "set")
    content, wanted = KINDS[kind]
    (root / "train/ant/0.png").write_bytes(content)
    with bounded():
        image = opened("folder", root).load()[0].read(0)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
    if wanted is None:
        assert image.shape == (9, 7, 3)
    else:
        wanted = wanted if wanted.ndim == 3 else np.stack([wanted] * 3, -1)
        assert np.array_equal(image, wanted)


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 65_000), (1, 9_000_000)])
@pytest.mark.parametrize("crop", [EvalCrop(224, 256), TrainCrop(224, "none", (0.08, 1), (0.75, 1.333), "bilinear")])
def test_a_very_long_image(case, crop, shape):
    image = np.zeros((*shape, 3), np.uint8)
    with bounded(memory=2**30):
        cut = crop(image) if isinstance(crop, EvalCrop) else crop(image, np.zeros(23, np.float32))
    assert cut.shape == (224, 224, 3)


# ---------------- Whole runs ----------------

STREAMED = (
    *(argument for argument in TINY if "data" not in argument and "crop" not in argument),
    "--config.data.name=folder",
    "--config.data.dir=set",
    "--config.model_options.image_size=8",
    "--config.augment.image_size=8",
    "--config.augment.crop=resized",
    "--config.augment.eval_resize=10",
    "--config.epochs=1",
)


def make_set(case):
    return sets.make_folder(case.folder / "set", {"train": 24, "test": 9})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "train/ant/0.png").write_bytes(b"x"), ("train/ant/0.png", "data.corrupt=replace")),
        (lambda root: (root / "val/bee/1.png").write_bytes(b""), ("val/bee/1.png", "data.corrupt=replace")),
        (lambda root: [path.write_bytes(b"") for path in (root / "val").glob("*/*")], ("no image", "val/ant/0.png")),
        (lambda root: shutil.rmtree(root / "val"), ("no folder", "val")),
    ],
    ids=["corrupt image", "empty held-out image", "no held-out image", "no held-out folder"],
)
def test_a_run_on_a_broken_folder(case, change, words):
    change(make_set(case))
    case.refused(case.train(*STREAMED), *words)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: os.mkfifo(root / "train/ant/pipe.png"),
        lambda root: (root / "train/ant/0.png").write_bytes(encoded(pixels(0, (1, 30_000, 3)))),
        lambda root: (root / "val/ant/0.png").write_bytes(encoded(pixels(0, (60_000, 1, 3)))),
    ],
    ids=["pipe", "long image", "long held-out image"],
)
def test_a_run_on_an_odd_folder(case, change):
    change(make_set(case))
    case.finished(case.train(*STREAMED))


def test_a_run_that_does_without_corrupt_images(case):
    root = make_set(case)
    for path in ("train/ant/0.png", "val/bee/1.png"):
        (root / path).write_bytes(b"x")
    case.finished(case.train(*STREAMED, "--config.data.corrupt=replace"), "train/ant/0.png", "val/bee/1.png")


@pytest.mark.parametrize("labels", [[0, 1, 2**32], [0, 1, None], []], ids=["2^32", "null", "no held-out rows"])
def test_a_run_on_a_broken_parquet_file(case, labels):
    sets.make_parquet(case.folder / "set")
    write_parquet(case.folder / "set/test-00000-of-00001.parquet", labels, type=pa.int64())
    arguments = [argument.replace("name=folder", "name=parquet") for argument in STREAMED]
    case.refused(case.train(*arguments), "test-00000-of-00001.parquet")
    assert not pathlib.Path(case.workdir, "checkpoints").exists()  # before the first epoch
