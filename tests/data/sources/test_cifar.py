import dataclasses
import hashlib
import io
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest

from dpa_jax.data.sources import cifar as archives

RANDOM = np.random.default_rng(0)


def old_pickle(content: dict) -> bytes:
    """As Python 2 and NumPy 1 wrote it, as CIFAR is: the old module name, flags as integers."""
    new = pickle.dumps(content, protocol=3)
    old = new.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    old = old.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
    assert b"numpy" not in new or (b"_core" not in old and b"\x89\x88" not in old)
    return old


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def batch(examples: int) -> dict:
    return {
        b"data": RANDOM.integers(0, 256, (examples, 3072), np.uint8),
        b"fine_labels": RANDOM.integers(0, 3, examples).tolist(),
    }


BATCHES = {"train_1": batch(4), "train_2": batch(3), "test": batch(2)}
FILES = {
    **{name: old_pickle(content) for name, content in BATCHES.items()},
}


def tar(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as packed:
        for name, content in members.items():
            if isinstance(content, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
            else:
                packed.addfile(content)
    return file.getvalue()


GOOD = {f"small-python/{name}": content for name, content in FILES.items()}


def published(folder: pathlib.Path, members: dict = GOOD, files: dict[str, bytes] = FILES) -> archives.Archive:
    """Publishes an archive under a file:// address."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small-python.tar.gz"
    path.write_bytes(tar(members))
    sums = {name: md5(content) for name, content in files.items()}
    return archives.Archive(
        name="small",
        url=path.as_uri(),
        md5=md5(path.read_bytes()),
        folder="small-python",
        train={name: sums[name] for name in ("train_1", "train_2")},
        test={"test": sums["test"]},
        labels=b"fine_labels",
    )


def extracted(folder: pathlib.Path, files: dict[str, bytes] = FILES) -> pathlib.Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def check_content(loaded) -> None:
    train, test = loaded
    rows = np.concatenate([BATCHES["train_1"][b"data"], BATCHES["train_2"][b"data"]])
    assert train.inputs.shape == (7, 32, 32, 3)
    for channel in range(3):  # the file holds the whole red image, then the green, then the blue one, row by row
        plane = rows[:, 1024 * channel : 1024 * (channel + 1)]
        assert np.array_equal(train.inputs[..., channel].reshape(7, 1024), plane)
    assert train.labels.tolist() == BATCHES["train_1"][b"fine_labels"] + BATCHES["train_2"][b"fine_labels"]
    assert test.inputs.shape == (2, 32, 32, 3) and test.labels.tolist() == BATCHES["test"][b"fine_labels"]


@pytest.mark.parametrize("where", ["small-python", "root/small-python", "root/small/small-python"])
def test_every_layout_of_the_folder_is_found(tmp_path, where):
    archive = published(tmp_path / "elsewhere")
    extracted(tmp_path / where)
    given = tmp_path / where.split("/")[0]
    check_content(archives.load(archive, str(given), download=False))


@pytest.mark.parametrize("given", ["small-python.tar.gz", ".", ".."])
def test_an_archive_is_found_and_extracted_beside_itself(tmp_path, given):
    folder = tmp_path / "sets"
    archive = published(folder)
    check_content(archives.load(archive, str(folder / given), download=False))
    assert sorted(path.name for path in folder.iterdir()) == ["small-python", "small-python.tar.gz"]


def test_the_usual_places_are_looked_in(tmp_path, monkeypatch):
    archive = published(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"home/tensorflow_datasets"):
        archives.load(archive, "", download=False)
    extracted(tmp_path / "home/data/small-python")
    check_content(archives.load(archive, "", download=False))


def test_missing_data_says_where_it_looked_and_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        archives.load(archives.CIFAR100, str(tmp_path), download=False)
    message = str(error.value)
    assert str(tmp_path) in message
    assert "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz" in message
    command = "python train.py --config configs/cifar100_vit.py --config.data.download=True --config.data.dir=DIR"
    assert command in message


def test_download_is_checked_extracted_and_read(tmp_path):
    archive = published(tmp_path / "server")
    check_content(archives.load(archive, str(tmp_path / "new/folder"), download=True))
    assert {path.name for path in (tmp_path / "new/folder").iterdir()} == {
        "small-python",
        "small-python.tar.gz",
    }


def test_a_download_with_another_sum_leaves_nothing(tmp_path):
    archive = dataclasses.replace(published(tmp_path / "server"), md5="0" * 32)
    with pytest.raises(ValueError, match="MD5") as error:
        archives.load(archive, str(tmp_path / "goal"), download=True)
    assert archive.url in str(error.value) and "0" * 32 in str(error.value)
    assert list((tmp_path / "goal").iterdir()) == []


def test_an_address_that_does_not_answer_is_named(tmp_path):
    archive = dataclasses.replace(published(tmp_path), url=(tmp_path / "absent.tar.gz").as_uri())
    with pytest.raises(OSError, match=r"absent\.tar\.gz.*by other means"):
        archives.fetch(archive, tmp_path / "goal")
    assert list((tmp_path / "goal").iterdir()) == []


def test_an_archive_with_another_sum_is_refused(tmp_path):
    archive = published(tmp_path)
    path = tmp_path / "small-python.tar.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError) as error:
        archives.load(archive, str(tmp_path), download=False)
    message = str(error.value)
    assert str(path) in message and archive.md5 in message and md5(path.read_bytes()) in message
    assert not (tmp_path / "small-python").exists()


def test_a_file_with_another_sum_is_refused(tmp_path):
    archive = published(tmp_path / "elsewhere")
    damaged = bytearray(FILES["train_2"])
    damaged[len(damaged) // 2] ^= 1
    extracted(tmp_path / "small-python", {**FILES, "train_2": bytes(damaged)})
    with pytest.raises(ValueError) as error:
        archives.load(archive, str(tmp_path), download=False)
    message = str(error.value)
    assert "small-python/train_2" in message
    assert md5(damaged) in message and md5(FILES["train_2"]) in message


def test_an_incomplete_folder_is_named_and_kept(tmp_path):
    archive = published(tmp_path)
    extracted(tmp_path / "small-python", {"train_1": FILES["train_1"]})
    with pytest.raises(FileExistsError, match="lacks train_2"):
        archives.load(archive, str(tmp_path), download=False)
    assert [path.name for path in (tmp_path / "small-python").iterdir()] == ["train_1"]


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HOSTILE = {
    "parent": {"small-python/../../evil": b"x"},
    "parent inside": {"small-python/a/../../small-python/evil": b"x"},
    "absolute": {"/tmp/evil": b"x"},
    "other folder": {"evil": b"x"},
    "symlink": {"link": link("small-python/evil", "/etc/passwd", tarfile.SYMTYPE)},
    "hard link": {"link": link("small-python/evil", "small-python/test", tarfile.LNKTYPE)},
    "device": {"pipe": link("small-python/evil", "", tarfile.FIFOTYPE)},
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE)
def test_hostile_archives_are_refused_and_leave_nothing(tmp_path, members):
    archive = published(tmp_path / "in", {**GOOD, **members})
    with pytest.raises(ValueError, match="evil"):
        archives.load(archive, str(tmp_path / "in"), download=False)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "in",
        "in/small-python.tar.gz",
    ]


def test_an_extraction_that_fails_midway_leaves_nothing(tmp_path, monkeypatch):
    archive = published(tmp_path)

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "copyfileobj", full)
        with pytest.raises(OSError, match="No space"):
            archives.load(archive, str(tmp_path), download=False)
    assert [path.name for path in tmp_path.iterdir()] == ["small-python.tar.gz"]
    check_content(archives.load(archive, str(tmp_path), download=False))


def test_two_processes_may_extract_at_once(tmp_path, monkeypatch):
    archive = published(tmp_path)
    rename = os.rename

    def late(source, goal):
        extracted(goal)  # the other one finishes just before
        rename(source, goal)

    monkeypatch.setattr(os, "rename", late)
    check_content(archives.load(archive, str(tmp_path), download=False))


class Command:
    def __init__(self, mark: pathlib.Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_with_a_command_is_refused(tmp_path):
    files = {**FILES, "test": pickle.dumps({b"data": [Command(tmp_path / "mark")]})}
    archive = published(tmp_path / "elsewhere", files=files)
    extracted(tmp_path / "small-python", files)
    with pytest.raises(pickle.UnpicklingError, match=r"(posix|nt)\.system"):
        archives.load(archive, str(tmp_path), download=False)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "numpy.memmap", "codecs.open"])
def test_other_globals_are_refused(tmp_path, name):
    module, attribute = name.rsplit(".", 1)
    path = tmp_path / "file"
    path.write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(pickle.UnpicklingError, match=name):
        archives.read_pickle(path, md5(path.read_bytes()))


def test_new_pickles_are_read_too(tmp_path):
    path = tmp_path / "file"
    for protocol in (3, 4):
        path.write_bytes(pickle.dumps(BATCHES["test"], protocol=protocol))
        read = archives.read_pickle(path, md5(path.read_bytes()))
        assert np.array_equal(read[b"data"], BATCHES["test"][b"data"])
