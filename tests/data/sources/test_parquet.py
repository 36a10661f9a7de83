import io
import json
import os
import pathlib
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from dpa_jax.config import default_config
from dpa_jax.data.images import CorruptImageError
from dpa_jax.data.sources import open_source

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), np.uint8)
LABELS = [2, 0, 1, 1, 2, 0, 1]
FEATURES = {
    "img": {"_type": "Image"},
    "coarse": {"names": ["x", "y"], "_type": "ClassLabel"},
    "fine": {"names": ["a", "b", "c"], "_type": "ClassLabel"},
}


def png(image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, rows, features=FEATURES, broken=(), labels=LABELS):
    columns = {
        "img": [{"bytes": b"no image" if i in broken else png(IMAGES[i]), "path": f"{i}.png"} for i in rows],
        "coarse": [labels[i] % 2 if labels[i] >= 0 else -1 for i in rows],
        "fine": [labels[i] for i in rows],
    }
    columns = {name: column for name, column in columns.items() if name in features}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(exist_ok=True)
    pa.parquet.write_table(table, path)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/dpa_jax"


def opened(directory, **changes):
    data = default_config().data
    data.update(name="parquet", dir=str(directory), **changes)
    return open_source(data)


def test_all_files_of_a_split_are_read_in_order(tmp_path):
    write(tmp_path / "data" / "train-00001-of-00002.parquet", [3, 4])
    write(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1, 2])
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", [5, 6])
    source = opened(tmp_path)
    spec = source.spec
    assert spec.class_names == ("a", "b", "c") and (spec.train_examples, spec.test_examples) == (5, 2)
    train, test = source.load()
    for split in (train, pickle.loads(pickle.dumps(train))):
        assert split.labels.tolist() == LABELS[:5]
        for i in range(5):
            assert np.array_equal(split.read(i), IMAGES[i]) and split.shape(i) == (5, 4, 3)
    assert np.array_equal(test.read(1), IMAGES[6]) and test.labels.tolist() == LABELS[5:]
    tail = opened(tmp_path, imbalance=2.0)
    assert tail.spec.train_examples == len(tail.load()[0]) == 3


def mapped_file(split) -> str:
    """The file whose pages the images of a split are in; empty for memory of the process's own."""
    address = split._images.chunk(0).buffers()[2].address
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= address < last:
            return line.split()[-1]
    return ""


def test_images_are_copied_once_and_mapped_by_every_process(tmp_path, cache_folder):
    write(tmp_path / "train-0.parquet", range(7))
    write(tmp_path / "test-0.parquet", [0])
    train, _ = opened(tmp_path).load()
    copies = {path: path.stat().st_mtime_ns for path in cache_folder.iterdir()}
    assert len(copies) == 2  # one a split, nothing left over
    sent = pickle.dumps(train)
    assert len(sent) < 500 < sum(len(png(image)) for image in IMAGES)
    for split in (train, opened(tmp_path).load()[0], pickle.loads(sent)):
        assert np.array_equal(split.read(6), IMAGES[6])
        assert pathlib.Path(mapped_file(split)) in copies
    assert {path: path.stat().st_mtime_ns for path in cache_folder.iterdir()} == copies
    write(tmp_path / "train-0.parquet", [6, 5, 4, 3])  # another file, another copy
    assert np.array_equal(opened(tmp_path).load()[0].read(0), IMAGES[6])


def test_a_copy_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    write(tmp_path / "train-0.parquet", range(7))
    write(tmp_path / "test-0.parquet", [0])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write .*/file/dpa_jax/\w+\.arrow: .*XDG_CACHE_HOME=DIR chooses another"):
        opened(tmp_path).load()


@pytest.mark.parametrize("missing", ["values", "column"])
def test_the_validation_split_takes_the_place_of_a_test_split_without_labels(tmp_path, missing):
    write(tmp_path / "data" / "train-0.parquet", range(4))
    if missing == "values":
        write(tmp_path / "data" / "test-0.parquet", [4, 5, 6], labels=[-1] * 7)
    else:
        write(tmp_path / "data" / "test-0.parquet", [4, 5, 6], {"img": FEATURES["img"]})
    with pytest.raises(FileNotFoundError, match=r"test-0\.parquet has no labels\); wanted is"):
        opened(tmp_path)
    write(tmp_path / "data" / "validation-0.parquet", [4, 5])
    source = opened(tmp_path)
    assert source.spec.test_examples == 2 and source.load()[1].labels.tolist() == LABELS[4:6]


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        opened(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no train-\*\.parquet with labels in"):
        opened(tmp_path)
    write(tmp_path / "train-0.parquet", range(5), broken=[3])
    with pytest.raises(FileNotFoundError, match=r"no test or validation-\*\.parquet with labels in"):
        opened(tmp_path)
    write(tmp_path / "test-0.parquet", [5, 6])
    with pytest.raises(CorruptImageError, match=r"row 3 of .*train-0\.parquet.* cannot be decoded: is neither"):
        opened(tmp_path).load()[0].read(3)
    write(tmp_path / "test-0.parquet", [5, 6], {**FEATURES, "fine": {"names": ["a", "b", "d"], "_type": "ClassLabel"}})
    with pytest.raises(ValueError, match="other columns or classes"):
        opened(tmp_path)
    write(tmp_path / "train-0.parquet", range(5), {"fine": FEATURES["fine"]})
    with pytest.raises(ValueError, match="one column of type Image and one of type ClassLabel"):
        opened(tmp_path)


# ---------------- What nobody should trust ----------------


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_labels(path, labels, names=("a", "b", "c"), about=None, type=None):
    """A file of one black image a label; `about` is its metadata where that is not the right one."""
    features = {"img": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    about = json.dumps({"info": {"features": features}}) if about is None else about
    images = [{"bytes": png(IMAGES[0]), "path": None}] * len(labels)
    table = pa.table({"img": pa.array(images, IMAGE), "label": pa.array(labels, type)})
    path.parent.mkdir(exist_ok=True, parents=True)
    pa.parquet.write_table(table.replace_schema_metadata({"huggingface": about}), path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2**32], "row 1 of the column 'label' is 4294967296, not one of its 3 classes, 0 to 2$"),
        ([0, -(2**32)], "row 1 .* is -4294967296, not one"),
        ([0, 3], "row 1 .* is 3, not one"),
        ([-1, 0], "row 0 .* is -1, not one"),
        ([0, None], "row 1 of 'label' is missing"),
        ([0.0, 1.5], r"must be one of integers, not \[DataType\(double\)\]"),
        ([True, False], "must be one of integers"),
        (["a", "b"], "must be one of integers"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_that_are_no_classes_are_refused(tmp_path, split, labels, message):
    for name in ("train", "test"):
        write_labels(tmp_path / f"{name}-0.parquet", [0, 1, 2])
    write_labels(tmp_path / f"{split}-1.parquet", labels)
    with pytest.raises(ValueError, match=rf"{split}-1\.parquet.*{message}"):
        opened(tmp_path)


def test_the_greatest_label_is_no_missing_one(tmp_path):
    write_labels(tmp_path / "test-0.parquet", [0])
    write_labels(tmp_path / "train-0.parquet", [2**64 - 1, 2**64 - 1], type=pa.uint64())
    with pytest.raises(ValueError, match=r"row 0 .* is 18446744073709551615, not one"):
        opened(tmp_path)


def test_a_file_with_another_order_of_classes_is_refused(tmp_path):
    write_labels(tmp_path / "test-0.parquet", [0])
    write_labels(tmp_path / "train-0.parquet", [0, 1])
    write_labels(tmp_path / "train-1.parquet", [0, 1], names=("b", "a", "c"))
    with pytest.raises(ValueError, match=r"train-1\.parquet has other columns or classes than .*train-0\.parquet"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "about",
    [
        "{",
        "[]",
        "\xff",
        "[" * 100_000,
        '{"info": []}',
        '{"info": {"features": []}}',
        '{"info": {"features": {"img": 1, "label": null}}}',
        '{"info": {"features": {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel"}}}}',
        '{"info": {"features": {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": []}}}}',
        '{"info": {"features": {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": [1, 2]}}}}',
        '{"info": {"features": {"label": {"_type": "Image"}}}}',
        '{"info": {"features": {"none": {"_type": "Image"}}}}',
        '{"info": {"features": {"img": {"_type": "Image"}, "none": {"_type": "ClassLabel", "names": ["a"]}}}}',
    ],
)
def test_malformed_metadata_is_told_in_one_line(tmp_path, about):
    for name in ("train", "test"):
        write_labels(tmp_path / f"{name}-0.parquet", [0, 1], about=about)
    with pytest.raises(ValueError, match=r"train-0\.parquet") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda _: b"", lambda b: b[:-9], lambda b: b[:4] + b[40:], lambda _: b"PAR1" * 9])
def test_a_damaged_file_is_named(tmp_path, damage):
    for name in ("train-0", "train-1", "test-0"):
        write_labels(tmp_path / f"{name}.parquet", [0, 1])
    file = tmp_path / "train-1.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{file} cannot be read: .* Get it anew$"):
        opened(tmp_path).load()


def test_what_is_no_plain_file_is_refused(tmp_path):
    write_labels(tmp_path / "test-0.parquet", [0])
    os.mkfifo(tmp_path / "train-0.parquet")
    with pytest.raises(OSError, match=r"train-0\.parquet is not a plain file"):
        opened(tmp_path)
    os.unlink(tmp_path / "train-0.parquet")
    write_labels(tmp_path / "train-0.parquet/inside.parquet", [0])
    with pytest.raises(OSError, match=r"Is a directory: .*train-0\.parquet"):
        opened(tmp_path)


def test_a_file_that_is_missing_is_told_by_the_numbers_of_the_others(tmp_path):
    write_labels(tmp_path / "test-0.parquet", [0])
    for i in (0, 2):
        write_labels(tmp_path / f"train-0000{i}-of-00003-abc.parquet", [0])
    with pytest.raises(ValueError, match="one file is missing, or one too many, of train-00000-of-00003-abc"):
        opened(tmp_path)
    write_labels(tmp_path / "train-00001-of-00003-abc.parquet", [0])
    assert opened(tmp_path).spec.train_examples == 3


def test_a_folder_whose_name_says_something_is_a_folder(tmp_path):
    for name in ("train", "test"):
        write_labels(tmp_path / f"label=2/{name}-0.parquet", [0, 1])
    assert opened(tmp_path / "label=2").load()[0].labels.tolist() == [0, 1]


def test_a_set_without_held_out_rows_is_refused_at_once(tmp_path):
    write_labels(tmp_path / "train-0.parquet", [0, 1])
    write_labels(tmp_path / "test-0.parquet", [], type=pa.int64())
    with pytest.raises(FileNotFoundError, match=r"no test or validation-\*\.parquet with labels in"):
        opened(tmp_path)


def test_an_image_of_which_there_is_the_path_alone_is_named(tmp_path):
    for name in ("train", "test"):
        write_labels(tmp_path / f"{name}-0.parquet", [0, 1])
    file = tmp_path / "train-0.parquet"
    table = pa.parquet.read_table(file)
    paths = pa.array([{"bytes": None, "path": "x.png"}] * 2, IMAGE)
    pa.parquet.write_table(table.set_column(0, "img", paths), file)
    with pytest.raises(CorruptImageError, match=r"row 0 of .*train-0\.parquet .*: the file has its path alone"):
        opened(tmp_path).load()[0].read(0)


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_a_damaged_copy_is_named(tmp_path, cache_folder, keep):
    for name in ("train", "test"):
        write_labels(tmp_path / f"{name}-0.parquet", [0, 1])
    opened(tmp_path).load()
    for copy in cache_folder.iterdir():
        copy.write_bytes(copy.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=rf"{cache_folder}/\w+\.arrow cannot be read: .*\. Delete it, it is made again$"
    ):
        opened(tmp_path).load()
