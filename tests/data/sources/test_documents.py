"""Documents from two files and from a folder a class."""

import numpy as np
import pytest

from dpa_jax.data.sources.documents import open_documents

SPLIT = "0\ttrain\tpets\n1\ttrain\tcars\n2\ttest\tpets\n"
TEXTS = "the cat sat\ncars drive\r\n a dog\x85 ran "


def write(path, split=SPLIT, texts=TEXTS, ending=".split.txt"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ending).write_bytes(split.encode())
    path.with_name(path.name + ".clean.txt").write_bytes(texts.encode())
    return f"text:{path}"


def check(documents):
    assert [text.strip() for text in documents.texts] == ["the cat sat", "cars drive", "a dog\x85 ran"]
    assert documents.class_names == ("cars", "pets")
    assert documents.labels.dtype == np.int32
    assert documents.labels.tolist() == [1, 0, 1]
    assert documents.train.tolist() == [True, True, False]


def test_two_files(tmp_path):
    check(open_documents(write(tmp_path / "own")))


def test_published_sets_are_found_in_one_folder_and_as_their_repository_has_them(tmp_path):
    write(tmp_path / "flat" / "R8")
    check(open_documents("r8", str(tmp_path / "flat")))
    write(tmp_path / "repository" / "20ng", ending=".txt")
    write(tmp_path / "repository" / "corpus" / "20ng", ending=".unused")
    (tmp_path / "repository" / "20ng.clean.txt").unlink()
    check(open_documents("20news", str(tmp_path / "repository")))
    with pytest.raises(FileNotFoundError, match=r"mr: there are no files .*mr.split.txt .*pass --config.data.dir=DIR"):
        open_documents("mr", str(tmp_path / "flat"))


def test_a_folder_a_class(tmp_path):
    for name, content in {
        "train/pets/1": b"the cat sat\nand slept",
        "train/cars/1.txt": "ein rotes Cabriolé".encode("latin-1"),
        "test/pets/.hidden": b"",
        "test/pets/7": "le café".encode(),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    documents = open_documents(f"text:{tmp_path}")
    assert documents.texts == ["ein rotes Cabriolé", "the cat sat\nand slept", "le café"]
    assert documents.labels.tolist() == [0, 1, 1]
    assert documents.train.tolist() == [True, True, False]
    (tmp_path / "test" / "pets" / "8").write_text(" \n")
    with pytest.raises(ValueError, match=r"the document in .*test/pets/8 is empty \(1 such documents\)"):
        open_documents(f"text:{tmp_path}")


@pytest.mark.parametrize(
    ("split", "texts", "message"),
    [
        (SPLIT, TEXTS + "\none more", r"own.split.txt has 3 lines, but .*own.clean.txt has 4 documents"),
        (SPLIT, "a\n \nc\n", r"the document in line 2 of .*own.clean.txt is empty"),
        (SPLIT.replace("2\ttest\tpets", "2\ttest\tplanes"), TEXTS, r"label 'planes' of the test document in line 3"),
        (SPLIT.replace("1\ttrain", "1\tvalid"), TEXTS, r"line 2 of .* must be NAME, train or test, and LABEL"),
        (SPLIT.replace("1\ttrain\tcars", "1 train cars"), TEXTS, r"line 2 of .*; it is '1 train cars'"),
        (SPLIT.replace("test", "train"), TEXTS, "there is no test document"),
    ],
    ids=["length", "empty", "label", "part", "columns", "no-test"],
)
def test_bad_files_are_told_in_one_line(tmp_path, split, texts, message):
    with pytest.raises(ValueError, match=message) as error:
        open_documents(write(tmp_path / "own", split, texts))
    assert "\n" not in str(error.value)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*none/train and no file .*none.split.txt; wanted is PATH"):
        open_documents(f"text:{tmp_path / 'none'}")
    with pytest.raises(FileNotFoundError, match="wanted is PATH"):
        open_documents("text:")
