"""Models that never heard of labels: a ResNet that takes ``act=``, a transformer with a compact MLP."""

import functools
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import dpa_jax
from dpa_jax.activations.penalties import RECORDS

K, B = 4, 8


class ResidualBlock(nn.Module):
    """In the style of Flax's examples: ``act`` is a function."""

    filters: int
    act: Callable = nn.relu

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(self.filters, (3, 3), use_bias=False)(x)
        y = self.act(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.Conv(self.filters, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=not train)(y)
        return self.act(x + y)


class ResNet(nn.Module):
    act: Callable = nn.relu
    block: type[nn.Module] = ResidualBlock

    @nn.compact
    def __call__(self, x, train):
        x = self.act(nn.Conv(6, (3, 3))(x))
        for _ in range(2):
            x = self.block(6, self.act)(x, train)
        return nn.Dense(K)(jnp.mean(x, axis=(1, 2)))


class EncoderBlock(nn.Module):
    act: Callable = nn.gelu

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm(use_fast_variance=False)(x))
        y = nn.Dense(16)(nn.LayerNorm(use_fast_variance=False)(x))
        return x + nn.Dense(x.shape[-1])(self.act(y))


class Transformer(nn.Module):
    act: Callable = nn.gelu
    scan: bool = False

    @nn.compact
    def __call__(self, x):
        if self.scan:
            block = nn.scan(
                lambda block, carry, _: (block(carry), None),
                variable_axes={"params": 0, **dict.fromkeys(dpa_jax.COLLECTIONS, 0)},
                split_rngs={"params": True},
                length=2,
            )
            x, _ = block(EncoderBlock(self.act, name="blocks"), x, None)
        else:
            for _ in range(2):
                x = EncoderBlock(self.act)(x)
        return nn.Dense(K)(x[:, 0])


def data(seed, *shape):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, B).astype(np.int32)
    return (rng.normal(size=(B, *shape)) + labels.reshape(B, *[1] * len(shape)) / K).astype(np.float32), labels


def make(kind, **options):
    if kind == "resnet":
        factory = dpa_jax.activation("dpa", num_classes=K, pool="mean", update_interval=1, **options)
        model = ResNet(act=factory)
        return model, functools.partial(model.apply, train=True), lambda seed: data(seed, 6, 6, 3)
    model = Transformer(act=dpa_jax.activation("dpa", num_classes=K, update_interval=1, **options))
    return model, model.apply, lambda seed: data(seed, 5, 8)


def init(model, x):
    extra = (False,) if isinstance(model, ResNet) else ()
    return dict(jax.jit(lambda key: model.init(key, x, *extra))(jax.random.key(0)))


def step_of(apply):
    """A plain optax loop's step: (variables, x, labels) -> (new variables, penalty)."""

    def step(variables, x, labels):
        params, backward_memory = variables["params"], variables["backward_memory"]
        state = {name: value for name, value in variables.items() if name not in ("params", "backward_memory")}

        def loss_fn(params, backward_memory):
            with dpa_jax.supervise(labels, train=True):
                logits, mutated = apply(
                    {"params": params, "backward_memory": backward_memory, **state},
                    x,
                    mutable=[*state, *dpa_jax.MUTABLE],
                )
            ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            penalty = dpa_jax.penalties(mutated)["channel"]
            return ce + 5.0 * penalty, (mutated, penalty)

        (grads, update), (mutated, penalty) = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(params, backward_memory)
        return {
            "params": jax.tree.map(lambda p, g: p - 0.05 * g, params, grads),
            "backward_memory": optax.apply_updates(backward_memory, update),
            **{name: mutated[name] for name in state},
        }, penalty

    return step


@pytest.mark.parametrize("kind", ["resnet", "transformer"])
def test_a_model_without_labels_learns_its_memories(kind):
    model, apply, draw = make(kind)
    variables = init(model, draw(0)[0])
    places = jax.tree.leaves(variables["backward_memory"])
    assert len(places) == (5 if kind == "resnet" else 2)
    step = jax.jit(step_of(apply))
    penalties = []
    for t in range(6):
        variables, penalty = step(variables, *draw(t))
        penalties.append(float(penalty))
    assert max(penalties) > 0
    for collection in ("forward_memory", "backward_memory"):
        for leaf in jax.tree.leaves(variables[collection]):
            assert leaf.ndim == 0 or np.abs(leaf).max() > 0


def test_it_is_the_same_as_handing_labels_down():
    class Explicit(nn.Module):
        @nn.compact
        def __call__(self, x, labels=None, train=False):
            y = dpa_jax.DPA(K, pool="none", update_interval=1)(nn.Dense(6)(x), labels, train)
            return nn.Dense(K)(y)

    class Plain(nn.Module):
        act: Callable

        @nn.compact
        def __call__(self, x):
            y = self.act(nn.Dense(6)(x))
            return nn.Dense(K)(y)

    x, labels = data(0, 5)
    plain = Plain(dpa_jax.activation("dpa", num_classes=K, pool="none", update_interval=1))
    variables = dict(Explicit().init(jax.random.key(0), x))
    assert jax.tree.structure(variables) == jax.tree.structure(dict(plain.init(jax.random.key(0), x)))
    by_context = jax.jit(step_of(plain.apply))
    by_hand = jax.jit(
        lambda v, x, labels: step_of(lambda v, x, mutable: Explicit().apply(v, x, labels, True, mutable=mutable))(
            v, x, labels
        )
    )
    one = two = variables
    for t in range(3):
        x, labels = data(t, 5)
        (one, a), (two, b) = by_context(one, x, labels), by_hand(two, x, labels)
        np.testing.assert_array_equal(a, b)
    chex.assert_trees_all_equal(one, two)


def run(step, variables, draw, *labels):
    """Four steps, on the drawn labels or on the given ones: the variables and all penalties.

    Here rounding grows by a factor of six to ten with each step after that.
    """
    step, penalties = jax.jit(step), []
    for t in range(4):
        x, drawn = draw(t)
        variables, penalty = step(variables, x, *(labels or (drawn,)))
        penalties.append(penalty)
    assert np.max(penalties) > 0
    return variables, np.stack(penalties)


@pytest.fixture(scope="module")
def plain():
    model, apply, draw = make("transformer")
    variables = init(model, draw(0)[0])
    return model, draw, variables, *run(step_of(apply), variables, draw)


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_under_remat(plain):
    model, draw, variables, expected, penalties = plain

    def apply(variables, x, mutable):
        return jax.checkpoint(lambda v, x: model.apply(v, x, mutable=mutable))(variables, x)

    close(run(step_of(apply), variables, draw), (expected, penalties))


def test_under_scan_over_layers(plain):
    model, draw, variables, expected, penalties = plain

    def stacked(variables):
        blocks = {
            name: {"blocks": jax.tree.map(lambda *a: jnp.stack(a), tree["EncoderBlock_0"], tree["EncoderBlock_1"])}
            for name, tree in variables.items()
        }
        blocks["params"]["Dense_0"] = variables["params"]["Dense_0"]
        return blocks

    found = run(step_of(Transformer(act=model.act, scan=True).apply), stacked(variables), draw)
    close(found, (stacked(expected), penalties))


def test_under_vmap_over_models(plain):
    model, draw, variables, *_ = plain
    one, other = draw(0)[1], (draw(0)[1] + 1) % K
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)
    many = jax.vmap(step_of(model.apply), in_axes=(0, None, 0))
    found, penalties = run(many, both, draw, jnp.stack([one, other]))
    for i, labels in enumerate((one, other)):
        expected = run(step_of(model.apply), variables, draw, labels)
        close((jax.tree.map(lambda leaf, i=i: leaf[i], found), penalties[:, i]), expected)


# ---------------- the context itself ----------------

x0, labels0 = data(0, 6)
act = dpa_jax.DPA(K, pool="none", update_interval=1)
memories = act.init(jax.random.key(0), x0)


def call(variables, x):
    return act.apply(variables, x, mutable=dpa_jax.MUTABLE)[1]


def test_outside_of_it_the_threshold_is_plain():
    assert RECORDS not in call(memories, x0)
    with dpa_jax.supervise(labels0, train=True):
        assert RECORDS in call(memories, x0)
    assert RECORDS not in call(memories, x0)


def test_it_nests_and_an_error_ends_it():
    def seen():
        record = call(memories, x0).get(RECORDS)
        return None if record is None else np.asarray(record["record"].records[0].seen["labels"]).tolist()

    inner = np.flip(labels0)
    with dpa_jax.supervise(labels0):
        with dpa_jax.supervise(inner):
            assert seen() == inner.tolist()
            with dpa_jax.supervise(None):
                assert seen() is None
        assert seen() == labels0.tolist()
        with pytest.raises(RuntimeError), dpa_jax.supervise(inner):
            raise RuntimeError
        assert seen() == labels0.tolist()
    assert seen() is None


def test_labels_of_the_call_come_first():
    other = np.flip(labels0).copy()
    with dpa_jax.supervise(labels0, train=True):
        _, mutated = act.apply(memories, x0, other, mutable=dpa_jax.MUTABLE)
    np.testing.assert_array_equal(mutated[RECORDS]["record"].records[0].seen["labels"], other)
    np.testing.assert_array_equal(mutated["forward_memory"]["mean"], 0)  # and train comes with them


def test_a_function_jitted_outside_of_it_is_not_served_from_another_batch():
    step = jax.jit(lambda v, x: call(v, x)["forward_memory"]["mean"])
    plain = step(memories, x0)
    with dpa_jax.supervise(labels0, train=True):
        first = step(memories, x0)
    other = (labels0 + 1) % K
    with dpa_jax.supervise(other, train=True):
        second = step(memories, x0)
    np.testing.assert_array_equal(plain, 0)
    np.testing.assert_array_equal(np.roll(first, 1, axis=0), second)
    np.testing.assert_array_equal(step(memories, x0), plain)


def test_no_tracer_leaks_into_a_function_that_is_jitted_further_in():
    inner = jax.jit(lambda v, x: call(v, x)["forward_memory"]["mean"])

    def outer(v, x, labels):
        with dpa_jax.supervise(labels, train=True):
            return inner(v, x)

    first = jax.jit(outer)(memories, x0, labels0)
    second = jax.jit(lambda v, x, labels: outer(v, x, labels) + 0)(memories, x0, (labels0 + 1) % K)
    np.testing.assert_array_equal(np.roll(first, 1, axis=0), second)
    assert np.abs(first).max() > 0


def test_nothing_of_a_step_outlives_it():
    def step(v, x, labels):
        with dpa_jax.supervise(labels, train=True):
            return call(v, x)["forward_memory"]["mean"]

    with jax.checking_leaks():
        assert np.abs(jax.jit(step)(memories, x0, labels0)).max() > 0


def test_the_current_labels_are_those_of_the_innermost_block():
    assert dpa_jax.current_labels() is None
    with dpa_jax.supervise(labels0):
        assert dpa_jax.current_labels() is labels0
        with dpa_jax.supervise(None):
            assert dpa_jax.current_labels() is None
        assert dpa_jax.current_labels() is labels0
    assert dpa_jax.current_labels() is None


def test_a_frozen_teacher_inside_of_a_block_learns_nothing():
    """Distillation: the student takes the labels, and its teacher, with activations like it, is left as it is."""

    class Distilled(nn.Module):
        @nn.compact
        def __call__(self, x):
            student = Transformer(dpa_jax.activation("dpa", num_classes=K, update_interval=1), name="student")
            teacher = Transformer(dpa_jax.activation("dpa", num_classes=K, update_interval=1), name="teacher")
            with dpa_jax.supervise(None):
                taught = jax.lax.stop_gradient(teacher(x))
            return student(x), taught

    x, labels = data(0, 5, 8)
    variables = init(Distilled(), x)

    def loss_fn(backward_memory):
        with dpa_jax.supervise(labels, train=True):
            (own, taught), mutated = Distilled().apply(
                {**variables, "backward_memory": backward_memory}, x, mutable=dpa_jax.MUTABLE
            )
        return jnp.mean(jnp.square(own - taught)) + dpa_jax.penalties(mutated)["channel"], mutated

    update, mutated = jax.jit(jax.grad(loss_fn, has_aux=True))(variables["backward_memory"])
    chex.assert_trees_all_equal(mutated["forward_memory"]["teacher"], variables["forward_memory"]["teacher"])
    assert not any(leaf.any() for leaf in jax.tree.leaves(update["teacher"]))
    assert list(mutated[RECORDS]) == ["student"]
    for tree in (update, mutated["forward_memory"]):
        assert all(leaf.any() for leaf in jax.tree.leaves(tree["student"]) if leaf.ndim)


# ---------------- with Flax's own TrainState ----------------


def test_with_flax_train_state():
    class State(TrainState):
        backward_memory: dict
        model_state: dict

    model, apply, draw = make("resnet")
    variables = init(model, draw(0)[0])
    state = State.create(
        apply_fn=apply,
        params=variables.pop("params"),
        tx=optax.adam(3e-3),
        backward_memory=variables.pop("backward_memory"),
        model_state=variables,
    )

    @jax.jit
    def train_step(state, x, labels):
        def loss_fn(params, backward_memory):
            variables = {"params": params, "backward_memory": backward_memory, **state.model_state}
            with dpa_jax.supervise(labels, train=True):
                logits, mutated = state.apply_fn(variables, x, mutable=[*state.model_state, *dpa_jax.MUTABLE])
            ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return ce + dpa_jax.penalties(mutated)["channel"], (ce, mutated)

        (grads, update), (ce, mutated) = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(
            state.params, state.backward_memory
        )
        return state.apply_gradients(
            grads=grads,
            backward_memory=optax.apply_updates(state.backward_memory, update),
            model_state={name: mutated[name] for name in state.model_state},
        ), ce

    losses = []
    for t in range(30):
        state, loss = train_step(state, *draw(t % 3))
        losses.append(float(loss))
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert np.abs(state.backward_memory["DPA_0"]["mean"]).max() > 0
