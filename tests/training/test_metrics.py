import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpa_jax.training.metrics import Classification, cross_entropy


def predictions(num_classes, size, seed, classes=None):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(size, num_classes)).astype(np.float32)
    labels = random.choice(num_classes if classes is None else classes, size=size).astype(np.int32)
    logits[np.arange(size), labels] += random.choice([0.0, 2.0], size=size)  # right more often than by chance
    return logits, labels


@pytest.mark.parametrize(
    ("num_classes", "size", "classes"),
    [
        (10, 200, None),
        (100, 64, None),  # most classes in few or no samples
        (10, 40, [0, 3, 4]),  # predicted classes that are never true
        (3, 30, None),  # fewer classes than five
        (2, 1, None),
    ],
)
def test_figures_equal_scikit_learn(num_classes, size, classes):
    logits, labels = predictions(num_classes, size, seed=num_classes, classes=classes)
    parts, of = [], jax.jit(Classification.of)
    for begin in range(0, size, 16):  # the last batch is padded
        part, truth = logits[begin : begin + 16], labels[begin : begin + 16]
        padding = 16 - len(truth)
        part = np.pad(part, ((0, padding), (0, 0)), constant_values=7.0)
        parts.append(of(part, np.pad(truth, (0, padding), constant_values=-1)))
    counts = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    figures = jax.jit(Classification.compute)(counts)

    guesses = logits.argmax(1)
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        labels, guesses, average="macro", zero_division=0
    )
    five = np.argsort(-logits, axis=1)[:, :5]
    expected = {
        "top1": sklearn.metrics.accuracy_score(labels, guesses),
        "top5": np.mean([label in row for label, row in zip(labels, five, strict=True)]),
        "recall": recall,
        "precision": precision,
        "f1": f1,
    }
    assert counts.count == size
    assert figures.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(figures[name], expected[name], rtol=1e-6, atol=0, err_msg=name)


def test_nothing_counted_gives_zeros():
    figures = Classification.of(jnp.zeros((1, 4)), jnp.array([-1])).compute()
    assert {name: float(value) for name, value in figures.items()} == dict.fromkeys(figures, 0.0)


def test_counts_do_not_depend_on_the_split_over_devices_or_batches():
    logits, labels = predictions(10, 64, seed=1)
    labels[5] = -1
    whole = Classification.of(logits, labels)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    sharded = jax.jit(Classification.of)(jax.device_put(logits, sharding), jax.device_put(labels, sharding))
    parts = [Classification.of(logits[half], labels[half]) for half in (slice(24), slice(24, None))]
    merged = jax.tree.map(jnp.add, *parts)
    for other in (sharded, merged):
        chex.assert_trees_all_equal(whole, other)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_of_labelled_samples(label_smoothing):
    logits, labels = predictions(7, 12, seed=3)
    labels[[2, 11]] = -1
    total, count = cross_entropy(logits, labels, label_smoothing)

    kept = labels >= 0
    wide = logits[kept].astype(np.float64)
    log_p = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    right = log_p[np.arange(len(wide)), labels[kept]]
    expected = -((1 - label_smoothing) * right + label_smoothing * log_p.mean(1))
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
    assert count == 10


def test_cross_entropy_is_float32_and_padding_has_no_gradient():
    logits, labels = predictions(5, 6, seed=4)
    labels[3] = -1
    total, count = cross_entropy(jnp.asarray(logits, jnp.bfloat16), labels)
    assert total.dtype == count.dtype == jnp.float32
    gradient = jax.grad(lambda z: cross_entropy(z, labels, 0.1)[0])(jnp.asarray(logits))
    assert not gradient[3].any()
    assert gradient[jnp.array([0, 1, 2, 4, 5])].any(axis=1).all()


def test_what_is_no_number_is_taken_for_no_class():
    """A model that has diverged does not score the share of the first class."""
    logits = jnp.array([[jnp.nan] * 3, [1.0, jnp.nan, 0.0], [2.0, 1.0, 0.0]])
    found = jax.device_get(Classification.of(logits, jnp.array([0, 1, 0])))
    assert (found.top1, found.top5, found.count) == (1, 1, 3)
    assert found.taken.tolist() == [1, 0, 0]


def test_logits_without_a_label_have_no_gradient():
    logits = jnp.array([[jnp.nan] * 3, [2.0, 1.0, 0.0]])
    labels = jnp.array([-1, 0])
    (total, count), gradient = jax.value_and_grad(cross_entropy, has_aux=True)(logits, labels)
    assert np.isfinite(total) and count == 1
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.isfinite(gradient).all()
