"""Every reader of files, on files with bytes changed, cut out and put in.

Reading ends in the same data, or in an error of ours in one line. Other data is let pass only where the format has no
sum to tell by; a comment says where.
"""

import itertools
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpa_jax.data.sources import cifar
from tests.faults import sets
from tests.faults.harness import Fault

EXAMPLES = 300  # of each test

_often = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))


# What is done to a file, one after the other: (kind, where, with what).
_damages = st.lists(
    st.tuples(
        st.sampled_from(("change", "change", "cut", "end", "insert")),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=16),
    ),
    min_size=1,
    max_size=3,
)


def damaged(original, damages):
    """The bytes with what is to be done; three times out of four where there is something but zeros."""
    result = bytearray(original)
    places = [i for i, byte in enumerate(original) if byte] or [0]
    for kind, where, what in damages:
        at = int(where * len(original)) if what[0] % 4 == 0 else places[int(where * len(places))]
        if kind == "change" and at < len(result):
            result[at] ^= what[0] or 1
        elif kind == "cut":
            del result[at : at + 4 * len(what)]
        elif kind == "end":
            del result[at:]
        else:
            result[at:at] = what
    return bytes(result)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of the module, and its cache folder in it."""
    home = tmp_path_factory.mktemp("readers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        yield home


def tried(case, read, wanted, same=lambda found, wanted: found == wanted):
    """Reads once; what comes of it must be an error of ours or the same."""
    case.tried += 1
    try:
        with sets.bounded():
            found = read()
    except (ValueError, OSError) as error:
        if not sets.is_ours(error):
            raise Fault("traceback", repr(error)) from error
    except Fault:
        raise
    except Exception as error:
        raise Fault("traceback", repr(error)) from error
    else:
        if not same(found, wanted):
            raise Fault("silent", f"{found} is not {wanted}"[:2000])


def same_labels(found, wanted):
    """The labels; of images their number alone."""
    return [(len(images), labels) for images, labels in found] == [(len(images), labels) for images, labels in wanted]


def same_or_corrupt(found, wanted):
    """The labels, and every image that can be decoded."""
    pairs = [pair for split, other in zip(found, wanted, strict=True) for pair in zip(split[0], other[0], strict=True)]
    return same_labels(found, wanted) and all(one == other or isinstance(one, str) for one, other in pairs)


def each(case, home, name, make, file, same=lambda found, wanted: found == wanted):
    """Tries damage of one file of a set that is read as `name`; each is another copy, as the cache goes by path."""
    original = make(home / f"original-{os.urandom(4).hex()}")
    root = next(parent for parent in (original, *original.parents) if parent.name.startswith("original-"))
    wanted, content = sets.read(name, root), (original / file).read_bytes()
    numbers = itertools.count()

    @_often
    @given(_damages)
    def check(damages):
        changed = damaged(content, damages)
        copy = home / f"{root.name}-{next(numbers)}"
        shutil.copytree(root, copy)
        (copy / (original / file).relative_to(root)).write_bytes(changed)
        tried(case, lambda: sets.read(name, copy), wanted, same)
        shutil.rmtree(copy)
        shutil.rmtree(home / "cache", ignore_errors=True)

    check()


@pytest.mark.parametrize("file", ["train/ant/0.png", "val/bee/1.png"])
def test_an_image_of_a_folder(case, home, file):
    # PNG's sums are over the compressed bytes and over a chunk each, and Pillow passes over some; JPEG has none: that
    # the pixels are right cannot be promised.
    each(case, home, "folder", sets.make_folder, file, same_labels)


def make_jpegs(root):
    sets.make_folder(root)
    for path in root.glob("*/*/*.png"):
        path.with_suffix(".jpg").write_bytes(sets.encoded(sets.pixels(0, (40, 30, 3)), "JPEG"))
        path.unlink()
    return root


def test_a_jpeg_of_a_folder(case, home):
    each(case, home, "folder", make_jpegs, "train/ant/0.jpg", same_labels)


@pytest.mark.parametrize("file", ["train-00000-of-00002.parquet", "test-00000-of-00001.parquet"])
def test_a_parquet_file(case, home, file):
    # The pages have sums here. The footer never has: names of classes may change with it.
    each(case, home, "parquet", sets.make_parquet, file, same_or_corrupt)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json", "label.labels.txt"])
def test_the_metadata_of_a_prepared_set(case, home, file):
    # Names of classes have no sum; the labels and images are those of the records.
    each(case, home, "tfds:small", sets.make_prepared, file)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_records_of_a_prepared_set(case, home, split):
    each(case, home, "tfds:small", sets.make_prepared, f"small-{split}.array_record-00000-of-00001")


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_examples_of_a_prepared_set(case, home, split):
    """Examples damaged before they are written, so that the sums of the records are right."""
    examples = []
    sets.make_prepared(home / f"examples-{split}", edit=lambda example: examples.append(example) or example)
    numbers = itertools.count()

    @settings(_often, max_examples=EXAMPLES // 3)
    @given(_damages)
    def check(damages):
        changed = damaged(examples[0], damages)
        root = home / f"examples-{split}-{next(numbers)}"
        sets.make_prepared(root, edit=lambda example: changed if example == examples[0] else example)
        # No sum is wrong: whatever is an image of the right size and a class is one.
        tried(case, lambda: sets.read("tfds:small", root), None, lambda found, _: len(found[0][0]) == 6)
        shutil.rmtree(root)

    check()


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "batch"])
def test_cifar(case, home, packed):
    original = home / f"cifar-{packed}"
    archive = sets.make_cifar(original, packed)
    file = "small-python.tar.gz" if packed else "small-python/train_1"
    content, numbers = (original / file).read_bytes(), itertools.count()
    wanted = sets.content(cifar.load(archive, str(shutil.copytree(original, home / f"cifar-{packed}-read")), False))

    @_often
    @given(_damages)
    def check(damages):
        changed = damaged(content, damages)
        copy = shutil.copytree(original, home / f"cifar-{packed}-{next(numbers)}")
        (copy / file).write_bytes(changed)
        tried(case, lambda: sets.content(cifar.load(archive, str(copy), False)), wanted)
        shutil.rmtree(copy)

    check()


def make_old(root):
    for path in (root, *root.rglob("*")):
        os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize(
    ("name", "make", "same"),
    [
        ("folder", sets.make_folder, lambda found, wanted: found == wanted),
        ("tfds:small", lambda root: sets.make_prepared(root, shape=None), lambda found, wanted: found == wanted),
        # An Arrow file has no sums: images may be others, their bytes are the user's own copy.
        ("parquet", sets.make_parquet, same_labels),
    ],
    ids=["folder", "prepared", "parquet"],
)
def test_what_is_remembered(case, home, name, make, same):
    root = home / f"remembered-{name.partition(':')[0]}"
    make(root)
    make_old(root)
    cache = home / "cache/dpa_jax"
    shutil.rmtree(cache, ignore_errors=True)
    wanted = sets.read(name, root)
    files = {path: path.read_bytes() for path in cache.iterdir()}
    assert files
    file, content = max(files.items(), key=lambda item: len(item[1]))

    @_often
    @given(_damages)
    def check(damages):
        changed = damaged(content, damages)
        for path, whole in files.items():
            path.write_bytes(changed if path == file else whole)
        tried(case, lambda: sets.read(name, root), wanted, same)

    check()
