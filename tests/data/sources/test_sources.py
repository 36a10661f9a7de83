import ml_collections
import numpy as np
import pytest

from dpa_jax.data import sources
from dpa_jax.data.splits import Dataset, Split


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


def nearest_mean_accuracy(dataset: Dataset) -> float:
    """How many test images are nearest to their own class's mean training image."""
    train = dataset.train.images.reshape(len(dataset.train), -1).astype(float)
    test = dataset.test.images.reshape(len(dataset.test), -1).astype(float)
    means = np.stack([train[dataset.train.labels == k].mean(0) for k in range(dataset.num_classes)])
    nearest = ((test[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    return (nearest == dataset.test.labels).mean()


def test_digits():
    digits = sources.load(config(name="digits"))
    assert digits.train.images.shape == (1437, 8, 8, 1) and digits.test.images.shape == (360, 8, 8, 1)
    assert digits.train.images.max() == 255 and digits.num_classes == 10
    share = np.bincount(digits.test.labels) / np.bincount(digits.train.labels)
    assert np.allclose(share, 0.25, atol=0.01)  # stratified
    # Real digits: every image of scikit-learn's is in exactly one of the two, with its own label.
    from sklearn.datasets import load_digits

    def counted(images, labels):
        return sorted((*image.ravel(), label) for image, label in zip(images, labels, strict=True))

    both = np.concatenate([digits.train.images, digits.test.images])
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    original = load_digits()
    assert counted(np.rint(both * (16 / 255)), labels) == counted(original.images, original.target)
    scaled = digits.train.images / 255
    assert abs(scaled.mean() - digits.mean[0]) < 2e-3 and abs(scaled.std() - digits.std[0]) < 2e-3
    assert nearest_mean_accuracy(digits) > 0.8


@pytest.mark.parametrize("name", ["synthetic", "fake_data"])
def test_synthetic_is_learnable_balanced_and_always_the_same(name):
    one, other = sources.load(config(name=name)), sources.load(config(name=name))
    assert one.train.images.shape == (400, 6, 6, 2) and one.test.images.shape == (101, 6, 6, 2)
    assert np.bincount(one.train.labels).tolist() == [80] * 5 and len(np.bincount(one.test.labels)) == 5
    for split in ("train", "test"):
        assert np.array_equal(getattr(one, split).images, getattr(other, split).images)
        assert np.array_equal(getattr(one, split).labels, getattr(other, split).labels)
    assert nearest_mean_accuracy(one) > 0.95


def test_synthetic_of_other_shapes():
    dataset = sources.load(config(image_size=3, channels=1, num_classes=7, train_examples=9, test_examples=1))
    assert dataset.train.images.shape == (9, 3, 3, 1) and len(dataset.test) == 1
    assert len(dataset.class_names) == dataset.num_classes == 7 and len(dataset.mean) == 1
    large = sources.load(config(image_size=32, channels=3, train_examples=200))
    scaled = large.train.images / 255
    assert abs(scaled.mean() - large.mean[0]) < 0.05 and abs(scaled.std() - large.std[0]) < 0.03


@pytest.mark.parametrize("key", ["image_size", "channels", "num_classes", "train_examples", "test_examples"])
def test_synthetic_refuses_empty_sizes(key):
    with pytest.raises(ValueError, match=rf"data\.{key} must be at least 1, not 0"):
        sources.load(config(**{key: 0}))


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"got 'cifar1000'\. Did you mean 'cifar100'") as error:
        sources.load(config(name="cifar1000"))
    for name in ("digits", "cifar10", "cifar100", "synthetic"):
        assert name in str(error.value)


def test_cifar_goes_by_its_name(tmp_path):
    for name in ("cifar10", "cifar100"):
        with pytest.raises(FileNotFoundError, match=f"^{name} was not found"):
            sources.load(config(name=name, dir=str(tmp_path)))


def split(labels=(0, 1, 2), shape=(2, 2, 1)):
    return Split(np.zeros((len(labels), *shape), np.uint8), np.array(labels, np.int32))


def dataset(train, test, **changes):
    parts = {"mean": (0.5,), "std": (0.5,), "class_names": ("a", "b", "c"), **changes}
    return Dataset(name="set", train=train, test=test, num_classes=3, **parts)


@pytest.mark.parametrize("bad", [3, -1])
def test_a_label_out_of_range_is_named_with_its_place(bad):
    with pytest.raises(ValueError, match=rf"label {bad} at position 2 of split 'test' .*there are 3 classes"):
        dataset(split(), split((0, 1, bad, 9)))


def test_parts_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"test images are \(4, 4, 1\), training images \(2, 2, 1\)"):
        dataset(split(), split(shape=(4, 4, 1)))
    with pytest.raises(ValueError, match="each of 1 channels"):
        dataset(split(), split(), mean=(0.5, 0.5))
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        dataset(split(), split(), class_names=("a", "b"))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((3, 2, 2), np.uint8), np.zeros(3, np.int32), r"images must be uint8 .*uint8 \[3, 2, 2\]"),
        (np.zeros((3, 2, 2, 1), np.float32), np.zeros(3, np.int32), "images must be uint8.*float32"),
        (np.zeros((0, 2, 2, 1), np.uint8), np.zeros(0, np.int32), "images must be"),
        (np.zeros((3, 2, 2, 1), np.uint8), np.zeros(2, np.int32), r"labels must be int32 \[3\].*\[2\]"),
        (np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int64), "labels must be int32.*int64"),
    ],
)
def test_a_split_refuses_other_shapes_and_types(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Split(images, labels)


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
    kept = sources.long_tail(labels, classes, imbalance)
    counts = np.bincount(labels[kept])
    assert (counts[0], counts[-1], counts.sum()) == (first, last, total)
    assert np.all(np.diff(counts) <= 0) and np.all(np.diff(kept) > 0)
    assert set(sources.long_tail(labels, classes, 2 * imbalance)) < set(kept)


def test_the_images_that_stay_are_the_same_for_ever():
    kept = sources.long_tail(np.tile(np.arange(2, dtype=np.int32), 8), 2, 4)
    assert kept.tolist() == [0, 2, 4, 6, 8, 9, 10, 11, 12, 14]


def test_a_long_tail_is_cut_from_the_training_split_alone():
    whole, tail = (sources.load(config(imbalance=imbalance)) for imbalance in (1, 16))
    assert np.bincount(tail.train.labels).tolist() == [80, 40, 20, 10, 5]
    assert len(tail.test) == len(whole.test) == 101
    kept = sources.long_tail(whole.train.labels, 5, 16)
    assert np.array_equal(tail.train.images, whole.train.images[kept])
    with pytest.raises(ValueError, match=r"data\.imbalance must be at least 1; got 0\.5"):
        sources.load(config(imbalance=0.5))


def test_a_mean_and_a_standard_deviation_of_ones_own():
    dataset = sources.load(config(mean=(0.1, 0.2)))
    assert dataset.mean == (0.1, 0.2) and dataset.std == sources.load(config()).std
    with pytest.raises(ValueError, match=r"one value for each of 2 channels, not \(0\.1,\)"):
        sources.load(config(mean=(0.1,)))
