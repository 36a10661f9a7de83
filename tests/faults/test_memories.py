"""Memories against a plain loop over samples: values of every size, and some that are no numbers."""

import functools

import hypothesis.extra.numpy as drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpa_jax
from dpa_jax.activations.penalties import RECORDS

C, STEPS = 3, 3
SHAPES = ((12, 3), (5, 7))  # samples, classes: each is compiled
ODD = (0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 3e36, np.nan, np.inf, -np.inf)
FEW = st.sampled_from(ODD) | st.floats(-4, 4, width=16)
MANY = st.sampled_from((0.0, 1.0, -1.0, 0.25, -0.5, 3.0)) | st.floats(-4, 4, width=16)


@st.composite
def batches(draw):
    """K, and STEPS batches: inputs [B, C], labels [B] and gradients of the outputs [B, C]."""
    samples, num_classes = draw(st.sampled_from(SHAPES))
    steps = []
    for _ in range(STEPS):
        x = draw(drawn.arrays(np.float32, (samples, C), elements=MANY))
        for row in draw(st.lists(st.integers(0, samples - 1), max_size=samples // 2)):
            x[row] = draw(drawn.arrays(np.float32, C, elements=FEW))
        # Small ranges leave classes out; -2 and K are labels that there are not.
        low, high = sorted(draw(st.tuples(st.integers(-2, num_classes), st.integers(-2, num_classes))))
        labels = draw(drawn.arrays(np.int32, samples, elements=st.integers(low, high)))
        gradients = draw(drawn.arrays(np.float32, (samples, C), elements=st.sampled_from((-2.0, 0.0, 1.0, np.nan))))
        steps.append((x, labels, gradients))
    return num_classes, steps


@functools.cache
def compiled(make, num_classes):
    """The mechanism's first variables, and its training step."""
    act = make(num_classes)
    variables = dict(act.init(jax.random.key(1), jnp.zeros((2, C))))

    @jax.jit
    def step(variables, x, labels, gradients):
        learned = {name: variables[name] for name in ("params", "backward_memory") if name in variables}

        def loss_fn(learned, x):
            y, mutated = act.apply({**variables, **learned}, x, labels, train=True, mutable=dpa_jax.MUTABLE)
            terms = dpa_jax.penalties(mutated)
            # What the penalties add is looked at by itself: the task's own gradient may be no number.
            return jnp.sum(y * gradients), (terms, mutated)

        def penalty_of(params, x):
            _, mutated = act.apply({**variables, **params}, x, labels, train=True, mutable=dpa_jax.MUTABLE)
            return sum(dpa_jax.penalties(mutated).values())

        update, (terms, mutated) = jax.grad(loss_fn, has_aux=True)(learned, x)
        new = {name: value for name, value in mutated.items() if name != RECORDS}
        if "backward_memory" in variables:
            new["backward_memory"] = jax.tree.map(jnp.add, variables["backward_memory"], update["backward_memory"])
        params = {name: value for name, value in learned.items() if name == "params"}
        return {**variables, **new}, terms, jax.grad(penalty_of, argnums=(0, 1))(params, x)

    return variables, step


def follow(make, num_classes, steps, loop):
    """Runs the steps, each beside the loop's, which has the memories in float64 and knows what is too near to call."""
    variables, step = compiled(make, num_classes)
    for x, labels, gradients in steps:
        part = (labels >= 0) & (labels < num_classes) & np.isfinite(loop.pooled(x)).all(axis=1)
        variables, terms, (of_params, of_x) = step(variables, x, labels, gradients)
        loop(x.astype(np.float64), np.where(part, labels, -1), gradients, variables, terms)
        for leaf in jax.tree.leaves((variables, of_params)):
            assert np.isfinite(leaf).all()
        np.testing.assert_array_equal(np.asarray(of_x)[~part], 0)


def close(found, expected, scale):
    """Equal but for the rounding of float32, in numbers of this scale; what float32 does not hold is infinite."""
    with np.errstate(over="ignore"):
        expected = np.asarray(expected).astype(np.float32)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    away = np.abs(np.where(finite, found, 0) - np.where(finite, expected, 0).astype(np.float64))
    assert (away <= 1e-5 * np.abs(scale) + 1e-36).all(), (found, expected)


def mean_square(values, mask):
    return np.square(values[mask]).mean() if mask.any() else 0.0


class Dpa:
    """The mechanism sample by sample."""

    momentum, interval = 0.9, 2

    def __init__(self, num_classes):
        self.forward, self.backward, self.scale = (np.zeros((num_classes, C)) for _ in range(3))
        self.step = 0

    def __call__(self, x, labels, gradients, variables, terms):
        self.step = (self.step + 1) % self.interval
        due, old = self.step == 0, self.backward.copy()
        mask, unsure = np.zeros(x.shape, bool), False
        for i, k in enumerate(labels):
            if k < 0:
                continue
            if due:
                sign = np.where(gradients[i] > 0, 1.0, np.where(np.isnan(gradients[i]), 0.0, -1.0))
                self.forward[k] += self.momentum * (x[i] - self.forward[k])
                self.scale[k] += self.momentum * (np.abs(x[i]) - self.scale[k])
                self.backward[k] += self.momentum * (sign - self.backward[k])
            mask[i] = (self.forward[k] < 0) & (x[i] > 0) & (old[k] < 0)
            near = (np.abs(self.forward[k]) < 1e-5 * self.scale[k] + 1e-36) & (self.scale[k] > 0)
            unsure |= (near & (x[i] > 0) & (old[k] < 0)).any()
        close(variables["forward_memory"]["mean"], self.forward, self.scale)
        close(variables["backward_memory"]["mean"], self.backward, 1.0)
        if not unsure:
            expected = mean_square(np.abs(x), mask)
            close(terms["channel"], expected, expected)

    pooled = staticmethod(np.positive)


class Arr:
    """The mechanism sample by sample."""

    momentum, interval = 0.1, 2

    def __init__(self, num_classes):
        self.mean, self.scale = (np.zeros((num_classes, C)) for _ in range(2))
        self.count = np.zeros(num_classes, int)

    def __call__(self, x, labels, gradients, variables, terms):
        distances, scale = [], 0.0
        for i, k in enumerate(labels):
            if k < 0:
                continue
            if self.count[k] % self.interval == 0:
                share = self.momentum if self.count[k] else 1.0
                self.mean[k] = (1 - share) * self.mean[k] + share * x[i]
                self.scale[k] = (1 - share) * self.scale[k] + share * np.abs(x[i])
            self.count[k] += 1
            distances.append(np.abs(x[i] - self.mean[k]))
            scale += (np.abs(x[i]) + self.scale[k]).mean()
        np.testing.assert_array_equal(variables["response_memory"]["count"], self.count)
        close(variables["response_memory"]["mean"], self.mean, self.scale)
        close(terms["arr"], np.mean(distances) if distances else 0.0, scale / max(len(distances), 1))

    pooled = staticmethod(np.positive)


class Aiec:
    """The mechanism sample by sample."""

    interval = 2
    pooled = staticmethod(lambda x: np.maximum(x, 0))  # it pools what it gives: minus infinity is 0 there

    def __init__(self, num_classes):
        variables, _ = compiled(make_aiec, num_classes)
        self.weights = np.asarray(variables["params"]["decision_weights"], np.float64)
        self.active, self.inhibited = (np.zeros((num_classes, C), int) for _ in range(2))
        self.total, self.step = np.ones(num_classes, int), 0

    def __call__(self, x, labels, gradients, variables, terms):
        self.step = (self.step + 1) % self.interval
        values = np.where(labels[:, None] < 0, 0.0, np.where(x > 0, x, 0.0))
        logits = values @ self.weights.T
        entropies, largest = [], 1.0
        for i, k in enumerate(labels):
            if k < 0:
                continue
            top = logits[i].max()
            entropies.append(top + np.log(np.exp(logits[i] - top).sum()) - logits[i, k])
            largest = max(largest, np.abs(logits[i]).max())
            if self.step == 0 and np.argmax(logits[i]) == k:
                self.active[k] += values[i] > 0
                self.inhibited[k] += values[i] == 0
                self.total[k] += 1
        irrelevant = (self.active <= self.inhibited) & (self.weights <= 0)
        mask = irrelevant[labels] & (labels >= 0)[:, None]
        counters = variables["activity_counters"]
        for name in ("active", "inhibited", "total"):
            np.testing.assert_array_equal(counters[name], getattr(self, name))
        close(terms["aux"], np.mean(entropies) if entropies else 0.0, largest)
        expected = mean_square(values, mask)
        close(terms["gate"], expected, expected)


def make_dpa(num_classes):
    return dpa_jax.DPA(num_classes, momentum=Dpa.momentum, update_interval=Dpa.interval, pool="none")


def make_arr(num_classes):
    return dpa_jax.ARR(num_classes, momentum=Arr.momentum, update_interval=Arr.interval, pool="none")


def make_aiec(num_classes):
    return dpa_jax.AIEC(num_classes, update_interval=Aiec.interval, pool="none")


@pytest.mark.parametrize(("make", "loop"), [(make_dpa, Dpa), (make_arr, Arr), (make_aiec, Aiec)])
def test_memories_are_those_of_a_loop_over_samples(case, make, loop):
    @settings(max_examples=120, derandomize=True, deadline=None)
    @given(batches())
    def equal(drawn_batches):
        case.tried += 1
        num_classes, steps = drawn_batches
        follow(make, num_classes, steps, loop(num_classes))

    equal()
