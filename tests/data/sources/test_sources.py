import ml_collections
import numpy as np
import pytest

from dpa_jax.data.batch import ArraySpec, Spec
from dpa_jax.data.images import image_spec
from dpa_jax.data.sources import SOURCES, Source, open_source, register
from dpa_jax.data.sources.long_tail import long_tail
from dpa_jax.data.splits import ArraySplit


def config(**changes):
    values = {
        "name": "synthetic",
        "dir": "",
        "download": False,
        "image_size": 6,
        "channels": 2,
        "num_classes": 5,
        "train_examples": 400,
        "test_examples": 101,
        "imbalance": 1.0,
        "mean": (),
        "std": (),
    }
    return ml_collections.ConfigDict({**values, **changes})


def nearest_mean_accuracy(source: Source) -> float:
    """How many test images are nearest to their own class's mean training image."""
    splits = source.load()
    train, test = (split.inputs.reshape(len(split), -1).astype(float) for split in splits)
    means = np.stack([train[splits[0].labels == k].mean(0) for k in range(source.spec.num_classes)])
    nearest = ((test[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    return (nearest == splits[1].labels).mean()


def test_digits():
    source = open_source(config(name="digits"))
    spec, (train, test) = source.spec, source.load()
    assert train.inputs.shape == (1437, 8, 8, 1) and test.inputs.shape == (360, 8, 8, 1)
    assert train.inputs.max() == 255 and spec.num_classes == 10
    share = np.bincount(test.labels) / np.bincount(train.labels)
    assert np.allclose(share, 0.25, atol=0.01)  # stratified
    # Real digits: every image of scikit-learn's is in exactly one of the two, with its own label.
    from sklearn.datasets import load_digits

    def counted(images, labels):
        return sorted((*image.ravel(), label) for image, label in zip(images, labels, strict=True))

    both = np.concatenate([train.inputs, test.inputs])
    labels = np.concatenate([train.labels, test.labels])
    original = load_digits()
    assert counted(np.rint(both * (16 / 255)), labels) == counted(original.images, original.target)
    scaled = train.inputs / 255
    assert abs(scaled.mean() - spec.mean[0]) < 2e-3 and abs(scaled.std() - spec.std[0]) < 2e-3
    assert nearest_mean_accuracy(source) > 0.8


@pytest.mark.parametrize("name", ["synthetic", "fake_data"])
def test_synthetic_is_learnable_balanced_and_always_the_same(name):
    one, other = (open_source(config(name=name)).load() for _ in range(2))
    assert one[0].inputs.shape == (400, 6, 6, 2) and one[1].inputs.shape == (101, 6, 6, 2)
    assert np.bincount(one[0].labels).tolist() == [80] * 5 and len(np.bincount(one[1].labels)) == 5
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a.inputs, b.inputs) and np.array_equal(a.labels, b.labels)
    assert nearest_mean_accuracy(open_source(config(name=name))) > 0.95


def test_synthetic_of_other_shapes():
    source = open_source(config(image_size=3, channels=1, num_classes=7, train_examples=9, test_examples=1))
    train, test = source.load()
    assert train.inputs.shape == (9, 3, 3, 1) and len(test) == 1
    assert len(source.spec.class_names) == source.spec.num_classes == 7 and len(source.spec.mean) == 1
    large = open_source(config(image_size=32, channels=3, train_examples=200))
    scaled = large.load()[0].inputs / 255
    assert abs(scaled.mean() - large.spec.mean[0]) < 0.05 and abs(scaled.std() - large.spec.std[0]) < 0.03


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"got 'cifar1000'\. Did you mean 'cifar100'") as error:
        open_source(config(name="cifar1000"))
    for name in ("digits", "cifar10", "cifar100", "synthetic", "tfds:NAME"):
        assert name in str(error.value)
    with pytest.raises(ValueError, match=r"data\.name must be one of .*; got 'tfd:mnist'"):
        open_source(config(name="tfd:mnist"))


def test_cifar_is_described_without_its_files(tmp_path):
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        source = open_source(config(name=name, dir=str(tmp_path)))
        spec = source.spec
        assert spec.inputs == ArraySpec((32, 32, 3), np.dtype(np.uint8)) and spec.num_classes == classes
        assert (spec.train_examples, spec.test_examples) == (50_000, 10_000) and len(set(spec.class_names)) == classes
        with pytest.raises(FileNotFoundError, match=f"^{name} was not found"):
            source.load()


# ---------------- Sources of one's own ----------------


def test_a_registered_source_goes_by_its_name(monkeypatch):
    monkeypatch.setattr("dpa_jax.data.sources.SOURCES", dict(SOURCES))
    reads = []

    def open_words(data):
        inputs = {"tokens": ArraySpec((4,), np.dtype(np.int32)), "length": ArraySpec((), np.dtype(np.int32))}

        def read():
            reads.append(data.name)
            numbers = [np.arange(examples, dtype=np.int32) for examples in (3, 2)]
            return tuple(ArraySplit({"tokens": np.tile(n[:, None], 4), "length": n}, n) for n in numbers)

        return Source(Spec(data.name, inputs, 3, ("a", "b", "c"), 3, 2), read, lambda: [1, 1, 1])

    register("words", open_words)
    source = open_source(config(name="words", mean=(0.5,)))
    assert source.spec.model_options() == {} and not reads
    assert source.load() is source.load() and reads == ["words"]
    assert source.load()[0].take(np.array([2])).inputs["tokens"].shape == (1, 4)
    with pytest.raises(ValueError, match="there is a data source 'words' already"):
        register("words", open_words)


def split(labels=(0, 1, 2), shape=(2, 2, 1), dtype=np.uint8):
    return ArraySplit(np.zeros((len(labels), *shape), dtype), np.array(labels, np.int32))


def source(train, test, **changes):
    spec = image_spec("set", (2, 2, 1), ("a", "b", "c"), 3, 3, mean=(0.5,), std=(0.5,))
    return Source(spec, lambda: (train, test), lambda: [1, 1, 1])


@pytest.mark.parametrize("bad", [3, -1])
def test_a_label_out_of_range_is_named_with_its_place(bad):
    with pytest.raises(ValueError, match=rf"^set: label {bad} at position 2 of split 'test' .*there are 3 classes"):
        source(split(), split((0, 1, bad))).load()


def test_splits_that_are_not_as_described_are_refused():
    with pytest.raises(ValueError, match=r"examples of split 'test' are uint8 \[4, 4, 1\], not uint8 \[2, 2, 1\]$"):
        source(split(), split(shape=(4, 4, 1))).load()
    with pytest.raises(ValueError, match=r"examples of split 'train' are float32 \[2, 2, 1\]"):
        source(split(dtype=np.float32), split()).load()
    with pytest.raises(ValueError, match="split 'train' has 2 examples, not 3"):
        source(split((0, 1)), split()).load()


def test_a_description_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="each of 1 channels"):
        image_spec("set", (2, 2, 1), ("a",), 3, 3, mean=(0.5, 0.5), std=(0.5,))
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        Spec("set", ArraySpec((2,), np.dtype(np.uint8)), 3, ("a", "b"), 1, 1)
    with pytest.raises(ValueError, match=r"set: there are no examples in the split 'test'"):
        image_spec("set", (2, 2, 1), ("a",), 3, 0, mean=(0.5,), std=(0.5,))
    for shape in ((2, 2), (0, 2, 1)):
        with pytest.raises(ValueError, match=r"images must be uint8 \[H, W, C\] with no side 0, not uint8 \["):
            image_spec("set", shape, ("a",), 1, 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(2, np.int32), "there are 2 labels for an array of 3 examples"),
        (np.zeros(3, np.int64), r"labels must be int32 \[N\], not int64 \[3\]"),
        (np.zeros((3, 1), np.int32), r"labels must be int32 \[N\], not int32 \[3, 1\]"),
    ],
)
def test_a_split_refuses_other_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        ArraySplit({"image": np.zeros((3, 2, 2, 1), np.uint8)}, labels)


# ---------------- Long tails ----------------


@pytest.mark.parametrize(
    ("classes", "each", "imbalance", "first", "last", "total"),
    # As published for the long-tailed CIFAR sets.
    [
        (10, 5000, 100, 5000, 50, 12406),
        (10, 5000, 50, 5000, 100, 13996),
        (10, 5000, 10, 5000, 500, 20431),
        (100, 500, 100, 500, 5, 10847),
        (100, 500, 50, 500, 10, 12608),
        (100, 500, 10, 500, 50, 19573),
    ],
)
def test_the_published_long_tails(classes, each, imbalance, first, last, total):
    labels = np.tile(np.arange(classes, dtype=np.int32), each)
    kept = long_tail(labels, classes, imbalance)
    counts = np.bincount(labels[kept])
    assert (counts[0], counts[-1], counts.sum()) == (first, last, total)
    assert np.all(np.diff(counts) <= 0) and np.all(np.diff(kept) > 0)
    assert set(long_tail(labels, classes, 2 * imbalance)) < set(kept)


def test_the_images_that_stay_are_the_same_for_ever():
    kept = long_tail(np.tile(np.arange(2, dtype=np.int32), 8), 2, 4)
    assert kept.tolist() == [0, 2, 4, 6, 8, 9, 10, 11, 12, 14]


@pytest.mark.parametrize(("name", "counts"), [("synthetic", [80, 40, 20, 10, 5]), ("digits", None)])
def test_a_long_tail_is_cut_from_the_training_split_alone(name, counts):
    whole, tail = (open_source(config(name=name, imbalance=imbalance)) for imbalance in (1, 16))
    known = tail.spec.train_examples  # before anything is loaded
    (all_train, all_test), (train, test) = whole.load(), tail.load()
    assert len(train) == known < len(all_train) and len(test) == len(all_test) == tail.spec.test_examples
    found = np.bincount(train.labels).tolist()
    assert found == (counts or found) and found[0] >= 15 * found[-1]
    kept = long_tail(all_train.labels, whole.spec.num_classes, 16)
    assert np.array_equal(train.inputs, all_train.inputs[kept])


@pytest.mark.parametrize(("name", "examples"), [("cifar10", 12406), ("cifar100", 10847)])
def test_the_size_of_a_long_tail_is_known_before_loading(name, examples, tmp_path):
    assert open_source(config(name=name, dir=str(tmp_path), imbalance=100)).spec.train_examples == examples


def test_a_mean_and_a_standard_deviation_of_ones_own():
    spec = open_source(config(mean=(0.1, 0.2))).spec
    assert spec.mean == (0.1, 0.2) and spec.std == open_source(config()).spec.std
    with pytest.raises(ValueError, match=r"one value for each of 2 channels, not \(0\.1,\)"):
        open_source(config(mean=(0.1,)))
