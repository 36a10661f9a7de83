import io
import json
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
