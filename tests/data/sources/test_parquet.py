import io
import json
import pickle

import ml_collections
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from dpa_jax.data import sources
from dpa_jax.data.splits import CorruptImageError

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


def write(path, rows, features=FEATURES, broken=()):
    columns = {
        "img": [{"bytes": b"no image" if i in broken else png(IMAGES[i]), "path": f"{i}.png"} for i in rows],
        "coarse": [LABELS[i] % 2 for i in rows],
        "fine": [LABELS[i] for i in rows],
    }
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(exist_ok=True)
    pa.parquet.write_table(table, path)


def load(directory):
    return sources.load(
        ml_collections.ConfigDict(
            {"name": "parquet", "dir": str(directory), "download": False, "imbalance": 1.0, "mean": (), "std": ()}
        )
    )


def test_all_files_of_a_split_are_read_in_order(tmp_path):
    write(tmp_path / "data" / "train-00001-of-00002.parquet", [3, 4])
    write(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1, 2])
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", [5, 6])
    data = load(tmp_path)
    assert data.class_names == ("a", "b", "c") and data.num_classes == 3
    for split in (data.train, pickle.loads(pickle.dumps(data.train))):
        assert split.labels.tolist() == LABELS[:5]
        for i in range(5):
            assert np.array_equal(split.read(i), IMAGES[i]) and split.shape(i) == (5, 4, 3)
    assert np.array_equal(data.test.read(1), IMAGES[6]) and data.test.labels.tolist() == LABELS[5:]


def test_a_worker_is_sent_names_only(tmp_path):
    write(tmp_path / "train-0.parquet", range(7))
    write(tmp_path / "test-0.parquet", [0])
    assert len(pickle.dumps(load(tmp_path).train)) < 500 < sum(len(png(image)) for image in IMAGES)


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no train-\*\.parquet in"):
        load(tmp_path)
    write(tmp_path / "train-0.parquet", range(5), broken=[3])
    with pytest.raises(FileNotFoundError, match=r"no test or validation-\*\.parquet in"):
        load(tmp_path)
    write(tmp_path / "test-0.parquet", [5, 6])
    with pytest.raises(CorruptImageError, match=r"row 3 of .*train-0\.parquet cannot be decoded: is neither"):
        load(tmp_path).train.read(3)
    write(tmp_path / "test-0.parquet", [5, 6], {**FEATURES, "fine": {"names": ["a", "b", "d"], "_type": "ClassLabel"}})
    with pytest.raises(ValueError, match="other columns or classes"):
        load(tmp_path)
    write(tmp_path / "train-0.parquet", range(5), {"img": {"_type": "Image"}})
    with pytest.raises(ValueError, match="one column of type Image and one of type ClassLabel"):
        load(tmp_path)
