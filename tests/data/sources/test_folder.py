import contextlib
import io
import json
import os
import pickle
import socket

import numpy as np
import pytest
from PIL import Image

from dpa_jax.config import default_config
from dpa_jax.data import images
from dpa_jax.data.sources import cache, open_source

RANDOM = np.random.default_rng(0)
TREE = {"bee": ["1.png", "2.JPEG"], "ant": ["b.jpg", "a.png", "c.jpeg"], "\u00fc wasp": ["x.PNG"]}


def opened(directory, **changes):
    data = default_config().data
    data.update({"name": "folder", "dir": str(directory), **changes})
    return open_source(data)


def loaded(directory):
    """The two splits and the names of the classes."""
    source = opened(directory)
    return *source.load(), source.spec.class_names


def make_tree(root, tree=TREE, splits=("train", "val")):
    for split in splits:
        for name, files in tree.items():
            (root / split / name).mkdir(parents=True)
            for file in files:
                Image.fromarray(RANDOM.integers(0, 256, (5, 7, 3), np.uint8)).save(root / split / name / file)
    return root


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/dpa_jax"


def make_old(root, seconds=100):
    """Gives every folder an older modification time: of one that has just changed nothing is kept."""
    for path in (root, *(path for path in root.rglob("*") if path.is_dir())):
        time = path.stat().st_mtime - seconds
        os.utime(path, (time, time))


def test_classes_and_images_come_in_order_of_their_names(tmp_path):
    make_tree(tmp_path / "set")
    for ignored in ("notes.txt", ".hidden.png", "._b.jpg"):
        (tmp_path / "set/train/ant" / ignored).write_text("not an image")
    (tmp_path / "set/train/.cache").mkdir()
    train, test, names = loaded(tmp_path / "set")
    assert names == ("ant", "bee", "\u00fc wasp")
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 0, 1, 1, 2] and train.labels.dtype == np.int32
    root = tmp_path / "set/train"
    paths = ["ant/a.png", "ant/b.jpg", "ant/c.jpeg", "bee/1.png", "bee/2.JPEG", "\u00fc wasp/x.PNG"]
    assert [train.where(i) for i in range(6)] == [str(root / path) for path in paths]
    for split in (train, pickle.loads(pickle.dumps(train)), test):
        for i in range(6):
            with Image.open(split.where(i)) as image:
                assert np.array_equal(split.read(i), np.asarray(image)) and split.shape(i) == (5, 7, 3)
    with pytest.raises(OSError, match=r"ant/a\.png"):  # a file that is gone is not a damaged one
        os.unlink(train.where(0))
        train.read(0)


def test_the_held_out_split_may_be_called_test(tmp_path):
    make_tree(tmp_path, splits=("train", "test"))
    assert "/test/ant/" in loaded(tmp_path)[1].where(0)
    make_tree(tmp_path, splits=("val",))
    assert "/val/ant/" in loaded(tmp_path)[1].where(0)


def test_another_layout_is_told_from_the_one_wanted(tmp_path):
    wanted = r"wanted is DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE"
    with pytest.raises(FileNotFoundError, match=rf"no folder \S*/train; {wanted}"):
        loaded(tmp_path)
    make_tree(tmp_path, splits=("train",))
    with pytest.raises(FileNotFoundError, match=rf"no folder \S*/val or \S*/test; {wanted}"):
        loaded(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=rf"no images in \S*/val; {wanted}"):
        loaded(tmp_path)
    make_tree(tmp_path, {"ant": ["a.png"]}, splits=("val",))
    with pytest.raises(ValueError, match=rf"/val has no folder 'bee', .* \(2 such classes\); {wanted}"):
        loaded(tmp_path)
    make_tree(tmp_path, {"bee": ["a.png"], "\u00fc wasp": ["a.png"], "cow": ["a.png"]}, splits=("val",))
    with pytest.raises(ValueError, match=r"/train has no folder 'cow'"):
        loaded(tmp_path)
    (tmp_path / "train/cow").mkdir()
    with pytest.raises(ValueError, match=rf"no images in \S*/train/cow; {wanted}"):
        loaded(tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "imagenet100", "folder"])
def test_folders_are_sources(tmp_path, monkeypatch, name):
    make_tree(tmp_path / "set")
    spec = opened(tmp_path / "set", name=name).spec
    assert spec.mean == (0.485, 0.456, 0.406) and spec.class_names == ("ant", "bee", "\u00fc wasp")
    assert (spec.name, spec.train_examples, spec.test_examples, spec.inputs.shape) == (name, 6, 6, (None, None, 3))
    source = opened(tmp_path / "set", name=name, imbalance=2)
    tail = source.load()[0]
    assert tail.labels.tolist() == [0, 0, 1, 2] and source.spec.train_examples == 4
    for i, label in enumerate(tail.labels):
        assert f"/{spec.class_names[label]}/" in tail.where(i) and tail.read(i).shape == (5, 7, 3)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=rf"data/{name}\. .*--config\.data\.dir=DIR; wanted is DIR/train"
    ) as error:
        opened("", name=name)
    assert ("https://www.image-net.org" in str(error.value)) == (name != "folder")


def test_what_is_no_plain_file_is_no_image(tmp_path):
    root = make_tree(tmp_path / "set")
    os.mkfifo(root / "train/ant/a-pipe.png")
    (root / "train/ant/a-folder.png").mkdir()
    os.symlink("/dev/zero", root / "train/ant/a-device.png")
    os.symlink(root / "train/bee/1.png", root / "train/ant/a-link.png")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(root / "train/ant"):
        listener.bind("a-socket.png")
    train = loaded(root)[0]
    assert [os.path.basename(train.where(i)) for i in range(4)] == ["a-link.png", "a.png", "b.jpg", "c.jpeg"]
    assert np.array_equal(train.read(0), train.read(4))
    os.unlink(root / "train/bee/1.png")
    os.mkfifo(root / "train/bee/1.png")  # after it was listed: opening it must not wait for a writer
    for i in (0, 4):
        with pytest.raises(OSError, match=r"\.png is not a plain file but a pipe or a device"):
            train.read(i)


def test_a_link_to_nothing_is_named(tmp_path):
    root = make_tree(tmp_path)
    os.symlink("nowhere", root / "train/ant/link.png")
    with pytest.raises(FileNotFoundError, match=r"train/ant/link\.png is a link to nothing"):
        loaded(root)


def test_a_home_that_is_unknown_is_told():
    with pytest.raises(ValueError, match=r"^data\.dir: there is no home folder for ~nobody-here/x$"):
        opened("~nobody-here/x")


# ---------------- The remembered index ----------------


def count_looks(monkeypatch):
    looks = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looks.append(path) or scandir(path))
    return looks


def test_the_second_start_looks_into_no_folder(tmp_path, monkeypatch, cache_folder):
    root = make_tree(tmp_path / "set")
    make_old(root)
    first = loaded(root)
    assert len(list(cache_folder.iterdir())) == 2  # a file a split, nothing left over
    looks = count_looks(monkeypatch)
    monkeypatch.chdir(tmp_path)
    second = loaded(root.relative_to(tmp_path))
    assert looks == [] and second[2] == first[2]
    assert [second[0].where(i) for i in range(6)] == [first[0].where(i) for i in range(6)]


@pytest.mark.parametrize("change", ["image", "class"])
def test_a_folder_that_has_changed_is_looked_into_again(tmp_path, change):
    root = make_tree(tmp_path / "set")
    make_old(root)
    loaded(root)
    if change == "image":
        os.rename(root / "train/ant/a.png", root / "train/ant/z.png")
        assert [os.path.basename(loaded(root)[0].where(i)) for i in range(3)] == ["b.jpg", "c.jpeg", "z.png"]
    else:
        make_tree(root, {"cow": ["a.png"]})
        assert loaded(root)[2] == ("ant", "bee", "cow", "\u00fc wasp")


def test_of_a_folder_that_is_changing_nothing_is_kept(tmp_path, cache_folder):
    loaded(make_tree(tmp_path / "set"))
    assert not cache_folder.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"key": 1}', "\x00"])
def test_a_damaged_index_is_made_again(tmp_path, monkeypatch, cache_folder, damage):
    root = make_tree(tmp_path / "set")
    make_old(root)
    names = loaded(root)[2]
    for file in cache_folder.iterdir():
        digest, content = file.read_text().split("\n")
        file.write_text(damage or f"{digest}\n{json.dumps({**json.loads(content), 'result': 7})}")
    assert loaded(root)[2] == names
    looks = count_looks(monkeypatch)
    assert loaded(root)[2] == names and looks == []


def test_an_index_in_which_a_letter_has_changed_is_made_again(tmp_path, cache_folder):
    root = make_tree(tmp_path / "set")
    make_old(root)
    names = loaded(root)[2]
    for file in cache_folder.iterdir():
        assert file.read_text().count("a.png") == 1
        file.write_text(file.read_text().replace("a.png", "x.png"))
    train, _, again = loaded(root)
    assert again == names and os.path.basename(train.where(0)) == "a.png"


def test_an_index_that_cannot_be_kept_costs_nothing_but_time(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "set")
    make_old(root)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(loaded(root)[0]) == 6

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(cache.os, "replace", full)
    assert len(loaded(root)[0]) == 6
    assert list((tmp_path / "other/dpa_jax").iterdir()) == []


# ---------------- Decoding ----------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


GREY = Image.fromarray(np.arange(0, 240, 2, np.uint8).reshape(10, 12))
COLOUR = Image.merge("RGB", (GREY, GREY.rotate(180), Image.new("L", GREY.size, 77)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(COLOUR, "PNG"), COLOUR),
        (encoded(GREY, "PNG"), GREY),
        (encoded(GREY.convert("LA"), "PNG"), GREY),
        (encoded(COLOUR.convert("RGBA"), "PNG"), COLOUR),
        (encoded(GREY.convert("P"), "PNG"), GREY),
        (encoded(GREY.convert("P"), "PNG", transparency=bytes(range(256))), GREY),
        (encoded(GREY.point(lambda x: 255 * (x > 99)).convert("1"), "PNG"), GREY.point(lambda x: 255 * (x > 99))),
        (encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"), GREY),
    ],
    ids=["RGB", "L", "LA", "RGBA", "P", "P and alpha", "1", "16 bits"],
)
def test_every_kind_of_png_is_decoded(content, expected, channels):
    decoded = images.decode(io.BytesIO(content), channels, "x")
    assert decoded.dtype == np.uint8 and decoded.shape == (10, 12, channels)
    assert np.array_equal(decoded.squeeze(), np.asarray(expected.convert({1: "L", 3: "RGB"}[channels])))


@pytest.mark.parametrize("image", [COLOUR, GREY, COLOUR.convert("CMYK")], ids=["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg_is_decoded(image):
    decoded = images.decode(io.BytesIO(encoded(image, "JPEG", quality=100, subsampling=0)), 3, "x")
    assert np.abs(decoded.astype(int) - np.asarray(image.convert("RGB")).astype(int)).max() <= 6


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "neither a JPEG nor a PNG"),
        (b"text", "neither a JPEG nor a PNG"),
        (encoded(GREY, "GIF"), "neither a JPEG nor a PNG"),
        (encoded(COLOUR.resize((99, 99)), "JPEG")[:-60], "truncated"),
        (encoded(COLOUR, "PNG")[:-60], "(?i:truncated)"),
        (encoded(Image.new("1", (20000, 20000)), "PNG"), "decompression bomb"),
        (
            encoded(Image.new("1", (9500, 9500)), "PNG"),
            "9500 x 9500 pixels are more than 89478485|exceeds limit of 89478485",
        ),
    ],
    ids=["empty", "text", "GIF", "short JPEG", "short PNG", "bomb", "half a bomb"],
)
def test_a_corrupt_image_is_named(tmp_path, content, reason):
    make_tree(tmp_path, {"ant": ["a.png", "b.png"]})
    split = loaded(tmp_path)[0]
    (tmp_path / "train/ant/b.png").write_bytes(content)
    with pytest.raises(images.CorruptImageError, match=rf"train/ant/b\.png cannot be decoded: .*{reason}") as error:
        split.read(1)
    copied = pickle.loads(pickle.dumps(error.value))
    assert type(copied) is images.CorruptImageError and str(copied) == str(error.value)
    assert split.read(0).shape == (5, 7, 3)
