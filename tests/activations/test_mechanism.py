"""What all mechanisms share: pools, rows, records that are fed back, and mechanisms of one's own."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dpa_jax
import dpa_jax.nnx
from dpa_jax.activations import Mechanism, Ratio, Summary, Variable, registry
from dpa_jax.activations.mechanism import outermost_module, warn_of_first_token
from dpa_jax.activations.penalties import RECORDS

K, C, B = 4, 6, 12
MECHANISMS = {
    "dpa": lambda **options: dpa_jax.DPA(K, update_interval=1, criterion="all", **options),
    "arr": lambda **options: dpa_jax.ARR(K, **options),
    "aiec": lambda **options: dpa_jax.AIEC(K, update_interval=1, **options),
}


def batch(seed, *shape):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, *shape, C)).astype(np.float32), rng.integers(-1, K, B).astype(np.int32)


def train_call(act, variables, x, labels, **options):
    """The output, the penalties, the new state and the gradients of a training call."""

    @jax.jit
    def call(variables, x):
        def loss_fn(x, backward_memory):
            learned = {"backward_memory": backward_memory} if backward_memory else {}
            y, mutated = act.apply({**variables, **learned}, x, labels, train=True, mutable=dpa_jax.MUTABLE, **options)
            terms = dpa_jax.penalties(mutated)
            state = {name: value for name, value in mutated.items() if name != RECORDS}
            return jnp.sum(jnp.sin(y)) + sum(terms.values()), (y, terms, state)

        backward_memory = variables.get("backward_memory", {})
        return jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(x, backward_memory)

    return call(variables, x)


# ---------------- pools ----------------


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize(("shape", "pool"), [((), "none"), ((5,), "token"), ((2, 3), "mean")])
def test_auto_goes_by_the_rank_and_a_call_may_say_what_the_attribute_does(name, shape, pool):
    x, labels = batch(0, *shape)
    by_attribute = MECHANISMS[name](pool=pool)
    variables = by_attribute.init(jax.random.key(0), x)
    expected = train_call(by_attribute, variables, x, labels)
    assert all(jnp.any(term > 0) for term in expected[1][1].values())
    for act, options in [
        (MECHANISMS[name](pool="auto"), {}),
        (MECHANISMS[name](), {"pool": "auto"}),
        (MECHANISMS[name](), {"pool": pool}),
    ]:
        found = train_call(act, act.init(jax.random.key(0), x, **options), x, labels, **options)
        chex.assert_trees_all_equal(found, expected)


def test_without_a_word_the_pool_is_the_token():
    x, labels = batch(0, 5)
    expected, found = (
        train_call(act, act.init(jax.random.key(0), x), x, labels)
        for act in (dpa_jax.DPA(K, pool="token"), dpa_jax.DPA(K))
    )
    chex.assert_trees_all_equal(found, expected)


def test_a_pool_is_said_once():
    act = dpa_jax.DPA(K, pool="mean")
    with pytest.raises(ValueError, match="pool"):
        act.init(jax.random.key(0), jnp.zeros((B, 3, C)), pool="token")
    with pytest.raises(ValueError, match="pool must be one of token, mean, none, auto; got 'means'"):
        dpa_jax.DPA(K).init(jax.random.key(0), jnp.zeros((B, 3, C)), pool="means")


@pytest.mark.parametrize("name", MECHANISMS)
def test_rows_find_their_sample(name):
    """TNT's inner blocks: the N patches of a sample are N rows, and its pixels are pooled over all of them."""
    rows = 5
    x, labels = batch(1, rows, 3)
    act = MECHANISMS[name](pool="mean")
    variables = act.init(jax.random.key(0), x)
    (grad_x, update), (y, terms, state) = train_call(act, variables, x, labels)
    flat = x.reshape(B * rows, 3, C)
    fresh = act.init(jax.random.key(0), flat, rows_per_sample=rows)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, variables)
    (flat_grad, flat_update), (flat_y, *rest) = train_call(act, variables, flat, labels, rows_per_sample=rows)
    np.testing.assert_array_equal(flat_y, y.reshape(flat.shape))
    np.testing.assert_allclose(flat_grad, grad_x.reshape(flat.shape), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (flat_update, *rest), (update, terms, state))


def test_rows_that_do_not_divide_and_labels_for_rows_are_refused():
    act = dpa_jax.DPA(K, pool="mean")
    variables = act.init(jax.random.key(0), jnp.zeros((B, 3, C)))
    call = lambda labels, rows: act.apply(  # noqa: E731
        variables, jnp.zeros((B, 3, C)), labels, True, rows_per_sample=rows, mutable=dpa_jax.MUTABLE
    )
    with pytest.raises(ValueError, match="5 rows per sample do not divide the input's 12"):
        call(jnp.zeros(2, int), 5)
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\), one per sample .* got \(12,\)"):
        call(jnp.zeros(B, int), 4)
    with pytest.raises(ValueError, match="rows_per_sample must be at least 1; got 0"):
        call(jnp.zeros(B, int), 0)


# ---------------- a label for each token ----------------


@pytest.mark.parametrize("shape", [(5,), (2, 3), (3, 2, 4)], ids=["tokens", "two-axes", "pooled"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_labels_of_tokens_are_those_of_samples(name, shape):
    """[B, N] of [B, N, C], [B, H, W] of [B, H, W, C], and [B, T] of [B, T, H, W, C], of which a sample is [H, W, C]."""
    sample_axes = 2 if len(shape) == 3 else 1 + len(shape)
    x, _ = batch(1, *shape)
    labels = np.random.default_rng(2).integers(-1, K, x.shape[:sample_axes]).astype(np.int32)
    act = MECHANISMS[name]()
    flat = x.reshape(labels.size, *x.shape[sample_axes:])
    variables = act.init(jax.random.key(0), flat)
    (expected_grad, expected_update), (expected_y, *expected) = train_call(act, variables, flat, labels.reshape(-1))
    (grad, update), (y, *found) = train_call(act, variables, x, labels)
    np.testing.assert_array_equal(y, expected_y.reshape(x.shape))
    np.testing.assert_allclose(grad, expected_grad.reshape(x.shape), rtol=1e-6)
    chex.assert_trees_all_equal((update, found), (expected_update, expected))
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(found[1]) if leaf.ndim)


def test_labels_of_tokens_from_outside_and_in_nnx():
    """A language model's: nothing folded by hand, and padding has no label."""
    x, _ = batch(1, 5)
    labels = np.where(np.arange(5) < 3, np.arange(B)[:, None] % K, -1)
    act = dpa_jax.DPA(K, update_interval=1)
    variables = act.init(jax.random.key(0), x)
    with dpa_jax.supervise(labels, train=True):
        _, mutated = act.apply(variables, x, mutable=dpa_jax.MUTABLE)
        module = dpa_jax.nnx.DPA(K, C, update_interval=1)
        dpa_jax.nnx.recorded(module)(x)
    expected = jnp.zeros((K, C))
    for value, label in zip(x[:, :3].reshape(-1, C), labels[:, :3].reshape(-1), strict=True):
        expected = expected.at[label].add(0.9 * (value - expected[label]))
    np.testing.assert_allclose(mutated["forward_memory"]["mean"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(module.forward_memory[...], mutated["forward_memory"]["mean"])


@pytest.mark.parametrize(
    ("labels", "rows", "shape"),
    [((B, 4), 1, "(12, 4)"), ((B, 5, C), 1, "(12, 5, 6)"), ((3, 5), 4, "(3, 5)"), ((B, 5), 4, "(12, 5)")],
)
def test_labels_of_tokens_that_do_not_fit(labels, rows, shape):
    act = dpa_jax.DPA(K)
    x, _ = batch(1, 5)
    variables = act.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=f"labels must have shape .*; got {re.escape(shape)}"):
        act.apply(variables, x, np.zeros(labels, int), True, rows_per_sample=rows, mutable=dpa_jax.MUTABLE)


def test_the_first_of_tokens_that_are_none_of_a_square_image_warns_once():
    x, labels = batch(0, 16)  # 4 x 4 patches, without a class token

    def call(act, labels=labels, x=x):
        variables = act.init(jax.random.key(0), x)
        act.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)
        act.apply(variables, x)

    warn_of_first_token.cache_clear()
    with pytest.warns(UserWarning, match="DPA: the first of 16 tokens is taken for the sample.*pool='mean'") as warned:
        for _ in range(2):
            call(dpa_jax.DPA(K))
    assert len(warned) == 1
    warn_of_first_token.cache_clear()
    call(dpa_jax.DPA(K, pool="token"))  # meant
    call(dpa_jax.DPA(K), np.zeros((B, 16), int))  # none is left out
    call(dpa_jax.DPA(K), x=np.zeros((B, 17, C), np.float32))  # with a class token


# ---------------- samples that take no part ----------------

ODD = [np.nan, np.inf, [1.0, np.nan, 1.0, -1.0, np.inf, 1.0]]


def with_odd_samples(value):
    """A batch with samples that are not finite, labelled and not, and the same with finite ones without a label."""
    x, labels = batch(2)
    labels[:6] = [1, 2, -1, 1, K, 2]
    odd, unlabelled = x.copy(), labels.copy()
    odd[[0, 2, 4, 8]], unlabelled[[0, 2, 4, 8]] = value, -1
    return (odd, labels), (x, unlabelled)


def trained_variables(act, steps=2):
    variables = act.init(jax.random.key(0), jnp.zeros((B, C)))
    for t in range(steps):
        x, labels = batch(t)
        (_, update), (_, _, state) = train_call(act, variables, x, labels)
        variables = {**variables, **state}
        if "backward_memory" in variables:
            variables["backward_memory"] = optax.apply_updates(variables["backward_memory"], update)
    return variables


@pytest.mark.parametrize("value", ODD, ids=["nan", "inf", "some"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_a_sample_that_is_not_finite_takes_no_part(name, value):
    """Not in the memories, the penalties and their gradients: it is as if it had no label."""
    act = MECHANISMS[name](pool="none")
    variables = trained_variables(act)
    (x, labels), (finite, unlabelled) = with_odd_samples(value)
    (grad_x, update), (_, terms, state) = train_call(act, variables, x, labels)
    (grad_finite, *expected), (_, *rest) = train_call(act, variables, finite, unlabelled)
    chex.assert_trees_all_equal((update, terms, state), (*expected, *rest))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((update, terms, state)))
    others = np.isfinite(x).all(axis=1)
    np.testing.assert_array_equal(grad_x[others], grad_finite[others])


@pytest.mark.parametrize("name", MECHANISMS)
def test_nor_does_it_on_other_devices_or_in_evaluation(name):
    (x, labels), (finite, unlabelled) = with_odd_samples(np.nan)
    act, spread = MECHANISMS[name](pool="none"), MECHANISMS[name](pool="none", axis_name="data")
    variables = trained_variables(act)

    def shares(x, labels, train):
        def call(x, labels):
            _, mutated = spread.apply(variables, x, labels, train=train, mutable=dpa_jax.MUTABLE)
            return dpa_jax.penalties(mutated), {n: v for n, v in mutated.items() if n != RECORDS}

        return jax.vmap(call, axis_name="data")(x.reshape(3, -1, C), labels.reshape(3, -1))

    for train in (True, False):
        found, expected = shares(x, labels, train), shares(finite, unlabelled, train)
        chex.assert_trees_all_equal(found, expected)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("name", MECHANISMS)
def test_nor_does_it_in_nnx(name):
    nnx_class = {"dpa": dpa_jax.nnx.DPA, "arr": dpa_jax.nnx.ARR, "aiec": dpa_jax.nnx.AIEC}[name]
    options = {} if name == "arr" else {"update_interval": 1}
    found, expected = (nnx_class(K, C, pool="none", rngs=nnx.Rngs(0), **options) for _ in range(2))

    def loss_fn(act, x, labels):
        y, records = dpa_jax.nnx.recorded(act)(x, labels, train=True)
        return jnp.sum(jnp.sin(y)), dpa_jax.penalties(records)

    calls = zip((found, expected), with_odd_samples(np.nan), strict=True)
    values = [dpa_jax.nnx.value_and_grad(loss_fn, has_aux=True)(act, *inputs)[0][1] for act, inputs in calls]
    chex.assert_trees_all_equal(*values)
    states = [nnx.to_pure_dict(nnx.state(act)) for act in (found, expected)]
    chex.assert_trees_all_equal(*states)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states))


def test_a_gradient_that_is_no_number_has_no_sign():
    act = dpa_jax.DPA(K, update_interval=1, momentum=0.5, pool="none")
    variables = dict(act.init(jax.random.key(0), jnp.ones((2, C))))
    variables["backward_memory"] = {"mean": jnp.ones((K, C))}

    def loss_fn(backward_memory):
        learned = {**variables, "backward_memory": backward_memory}
        y, _ = act.apply(learned, jnp.ones((2, C)), jnp.array([1, 2]), train=True, mutable=dpa_jax.MUTABLE)
        return jnp.sum(y * jnp.array([np.nan, -3.0])[:, None])

    update = jax.grad(loss_fn)(variables["backward_memory"])
    rows = optax.apply_updates(variables["backward_memory"], update)["mean"][:, 0]
    np.testing.assert_array_equal(rows, [1.0, 0.5, 0.0, 1.0])


# ---------------- dtypes and shapes ----------------


@pytest.mark.parametrize("name", MECHANISMS)
def test_labels_of_narrow_and_wide_integers(name):
    """Labels that wrap around would be other classes."""
    act = {"dpa": dpa_jax.DPA, "arr": dpa_jax.ARR, "aiec": dpa_jax.AIEC}[name](200, pool="none")
    x, variables = batch(0)[0][:4], act.init(jax.random.key(0), jnp.zeros((4, C)))

    def call(labels):
        mutated = act.apply(variables, x, labels, True, mutable=dpa_jax.MUTABLE)[1]
        (record,) = mutated.pop(RECORDS)["record"].records
        return mutated, record.seen

    expected = call(np.array([3, -1, 127, 3], np.int32))
    chex.assert_trees_all_equal(call(np.array([3, -1, 127, 3], np.int8)), expected)
    chex.assert_trees_all_equal(call(np.array([3, 255, 127, 3], np.uint8)), expected)
    chex.assert_trees_all_equal(call(np.array([3, 2**32, 127, 3])), expected)


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("dtype", [np.int32, bool, np.complex64])
def test_inputs_that_are_not_floating_are_refused(name, dtype):
    act = MECHANISMS[name](pool="none")
    with pytest.raises(ValueError, match=f"{type(act).__name__}: the input must be floating; got {np.dtype(dtype)}"):
        act.init(jax.random.key(0), np.ones((B, C), dtype))


def test_inputs_without_channels_are_refused():
    for x in (jnp.float32(1), jnp.zeros((B, 0))):
        with pytest.raises(ValueError, match="must have an axis of channels"):
            dpa_jax.DPA(K, pool="none").init(jax.random.key(0), x)


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize(("shape", "rows"), [((0, C), 1), ((0, 5, C), 1), ((0, 5, C), 2)])
def test_an_empty_batch_changes_nothing(name, shape, rows):
    act = MECHANISMS[name](pool="auto")
    variables = act.init(jax.random.key(0), jnp.zeros(shape), rows_per_sample=rows)
    _, mutated = act.apply(
        variables, jnp.zeros(shape), np.zeros(0, int), True, rows_per_sample=rows, mutable=dpa_jax.MUTABLE
    )
    assert set(map(float, dpa_jax.penalties(mutated).values())) == {0.0}
    for collection in mutated.keys() - {RECORDS}:
        chex.assert_trees_all_equal(mutated[collection], variables[collection])


# ---------------- settings and memories that do not fit ----------------


@pytest.mark.parametrize("value", [2.5, 5.0, True, "5", float("nan"), 2**31])
@pytest.mark.parametrize("mechanism", [dpa_jax.DPA, dpa_jax.ARR, dpa_jax.AIEC])
@pytest.mark.parametrize("setting", ["num_classes", "update_interval"])
def test_counts_are_whole_numbers(mechanism, setting, value):
    with pytest.raises(ValueError, match=f"{mechanism.__name__}: {setting} must be"):
        mechanism(**{"num_classes": K, setting: value})


def test_numbers_of_numpy_are_numbers():
    act = dpa_jax.DPA(np.int64(K), momentum=np.float64(0.5), update_interval=np.int32(2))
    assert (type(act.num_classes), type(act.momentum), type(act.update_interval)) == (int, float, int)


def test_training_needs_memories_that_are_mutable():
    act, (x, labels) = dpa_jax.ARR(K, pool="none"), batch(0)
    variables = act.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="ARR '': training updates 'response_memory', which is not mutable"):
        act.apply(variables, x, labels, train=True)


def test_memories_of_another_kind_are_refused_and_wider_ones_narrowed():
    act, (x, labels) = dpa_jax.ARR(K, pool="none"), batch(0)

    def call(**memory):
        return act.apply({"response_memory": memory}, x, labels, True, mutable=dpa_jax.MUTABLE)[1]["response_memory"]

    with pytest.raises(ValueError, match="ARR: the memory count must be int32; the one given is float"):
        call(mean=np.zeros((K, C)), count=np.zeros(K))
    new = call(mean=np.zeros((K, C), np.float64), count=np.zeros(K, np.int64))
    assert (new["mean"].dtype, new["count"].dtype) == (jnp.float32, jnp.int32)


def test_penalties_of_something_else_are_refused():
    act, (x, labels) = dpa_jax.DPA(K, pool="none"), batch(0)
    result = act.apply(act.init(jax.random.key(0), x), x, labels, mutable=dpa_jax.MUTABLE)
    with pytest.raises(TypeError, match=r"takes the collections that .* returned second; got a tuple"):
        dpa_jax.penalties(result)
    with pytest.raises(TypeError, match="reset_counters: takes variables by collection; got a NoneType"):
        dpa_jax.reset_counters(None)


# ---------------- variables with mutated fed back ----------------


class Twice(nn.Module):
    """One AIEC called twice, rematerialised, and one after it."""

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        act = nn.remat(dpa_jax.AIEC, static_argnums=(3,))(K, update_interval=1, pool="none", name="twice")
        x = act(act(x, labels, train) + x, labels, train)
        return dpa_jax.AIEC(K, update_interval=1, pool="none", name="once")(nn.Dense(C)(x), labels, train)


class Scanned(nn.Module):
    """Two layers in a scan."""

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        layers = nn.scan(
            lambda act, x, _: (x + act(x, labels, train), None),
            variable_axes={"params": 0, **dict.fromkeys(dpa_jax.COLLECTIONS, 0)},
            split_rngs={"params": True},
            length=2,
        )
        return layers(dpa_jax.AIEC(K, update_interval=1, pool="none"), x, None)[0]


@pytest.mark.parametrize("model", [Twice(), Scanned()], ids=["twice", "scan"])
@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
def test_mutated_may_be_fed_back(model, jitted):
    """``{**variables, **mutated}``, Flax's common idiom: the records of an earlier call take no part."""
    traces = []

    def call(variables, x, labels):
        traces.append(x)
        _, mutated = model.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)
        return mutated, dpa_jax.penalties(mutated)

    call = jax.jit(call) if jitted else call
    fed_back = kept_apart = dict(model.init(jax.random.key(0), batch(0)[0]))
    for t in range(4):
        mutated, found = call(fed_back, *batch(t))
        fed_back = {**fed_back, **mutated}
        mutated, expected = call(kept_apart, *batch(t))
        kept_apart = {**kept_apart, "activity_counters": mutated["activity_counters"]}
        np.testing.assert_array_equal(found["aux"], expected["aux"])
        np.testing.assert_array_equal(found["gate"], expected["gate"])
    if jitted:
        assert len(traces) == 2  # without records, and with


def test_the_module_whose_apply_runs_is_found():
    """The one thing that is not in Flax's public API."""
    seen = []

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen.append(outermost_module())
            return x

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen.append(self)
            return nn.remat(Inner)(name="inner")(x)

    Outer().apply({}, 1.0)
    Outer().apply({}, 1.0)
    assert seen[0] is seen[1] and seen[2] is seen[3] and seen[0] is not seen[2]


# ---------------- one's own ----------------


class Counting(Mechanism):
    """Counts the labelled samples, with a penalty and a counter that resets; keys as DPA's forward memory has them."""

    num_classes: int
    pool: str | None = None

    kept = {  # noqa: RUF012
        "mean": Variable("sample_counts", "mean", "K", start=nn.initializers.ones, resets=True),
        "step": Variable("sample_counts", "step", "", jnp.int32),
    }
    coefficients = {"counting": 3.0}  # noqa: RUF012

    def plain(self, x):
        return x

    def observe(self, x, labels, state, train, pool):
        counts = jnp.zeros(self.num_classes).at[labels].add(jnp.where(labels < 0, 0.0, 1.0))
        return x, {"mean": state["mean"] + counts, "step": state["step"] + 1}, {"values": pool(x)}

    @staticmethod
    def summarize(records):
        (record,) = records
        return Summary(
            terms={"counting": Ratio(jnp.sum(record.seen["values"]), jnp.asarray(record.seen["values"].size))}
        )


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "ACTIVATIONS", dict(registry.ACTIVATIONS))
    dpa_jax.register("counting", Counting)


def test_collections_and_coefficients_follow_from_the_registered_mechanisms(registered):
    assert "sample_counts" in dpa_jax.MUTABLE and "sample_counts" in dpa_jax.COLLECTIONS
    assert set(dpa_jax.COLLECTIONS) - set(dpa_jax.MUTABLE) == {"backward_memory"}
    assert dpa_jax.activations.default_coefficients() == {
        "channel": 5.0, "arr": 20.0, "aux": 1.0, "gate": 200.0, "counting": 3.0,
    }  # fmt: skip


def test_without_registration_nothing_of_it_is_there():
    assert set(dpa_jax.MUTABLE) == {"forward_memory", "response_memory", "activity_counters", RECORDS}
    assert "counting" not in dpa_jax.activations.default_coefficients()


def test_linen_and_nnx_keep_it_alike(registered):
    class Nnx(dpa_jax.nnx.Stateful):
        mechanism = Counting

    linen, ours = Counting(K, pool="none"), Nnx(K, C, pool="none")
    variables = dict(linen.init(jax.random.key(0), jnp.zeros((B, C))))
    for t in range(3):
        x, labels = batch(t)
        y, mutated = linen.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)
        z, records = dpa_jax.nnx.recorded(ours)(x, labels, train=True)
        variables = {**variables, **mutated}
        np.testing.assert_array_equal(y, z)
        np.testing.assert_allclose(dpa_jax.penalties(records)["counting"], dpa_jax.penalties(mutated)["counting"])
    counts = variables["sample_counts"]
    np.testing.assert_array_equal(ours.mean[...], counts["mean"])
    assert counts["mean"].sum() == K + sum((batch(t)[1] >= 0).sum() for t in range(3))
    assert type(ours.mean).__name__ == "SampleCounts"

    # Only what is in its collection resets: DPA's forward memory has the same names.
    memory = {"mean": jnp.ones((K, C)) * 7, "step": jnp.ones((), int)}
    reset = dpa_jax.reset_counters({"sample_counts": {"act": counts}, "forward_memory": {"act": memory}})
    np.testing.assert_array_equal(reset["sample_counts"]["act"]["mean"], np.ones(K))
    assert reset["sample_counts"]["act"]["step"] == 3
    np.testing.assert_array_equal(reset["forward_memory"]["act"]["mean"], memory["mean"])
    dpa_jax.nnx.reset_counters(ours)
    np.testing.assert_array_equal(ours.mean[...], np.ones(K))
    assert ours.step[...] == 3


def test_sizes_of_an_nnx_module_are_checked():
    with pytest.raises(TypeError, match="ARR: num_features is missing"):
        dpa_jax.nnx.ARR(K)
    with pytest.raises(TypeError, match="ARR: at most num_classes and num_features"):
        dpa_jax.nnx.ARR(K, C, 3)
    with pytest.raises(TypeError, match="AIEC: rngs is missing, which draws decision_weights"):
        dpa_jax.nnx.AIEC(K, C)


# ---------------- the documented one ----------------


@pytest.fixture
def documented(monkeypatch, request, capsys):
    """The names that docs/own_mechanism.md makes, and what it prints."""
    monkeypatch.setattr(registry, "ACTIVATIONS", dict(registry.ACTIVATIONS))
    page = (request.config.rootpath / "docs" / "own_mechanism.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks[0].splitlines()) < 50
    names = {"__name__": "own_mechanism"}
    for block in blocks:
        exec(compile(block, "own_mechanism.md", "exec"), names)
    return names, capsys.readouterr().out


def test_the_documented_tracker_tracks_in_linen_and_nnx(documented):
    names, printed = documented
    said = re.findall(r"(\w+): (\d+)% of the channels are dead", printed)
    assert {name for name, _ in said} == {"linen", "NNX"}
    assert all(0 < int(share) < 100 for _, share in said)
    # One more step by hand, from the state it has reached.
    variables, (images, labels) = names["variables"], (names["images"], names["labels"])
    params, tracker = variables["params"], names["nnx_model"].tracker
    x = nn.Dense(128).apply({"params": params["Dense_0"]}, images) - 1.0

    def loss_fn(y):
        logits = nn.Dense(10).apply({"params": params["Dense_1"]}, y)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = jax.grad(loss_fn)(jax.nn.relu(x))
    after, _ = names["train_step"](variables, images, labels)
    for new, old, seen in [
        (after["channel_statistics"], variables["channel_statistics"], x > 0),
        (after["backward_memory"], variables["backward_memory"], jnp.sign(gradient)),
    ]:
        ((name, value),) = new["tracker"].items()
        expected = old["tracker"][name] + 0.05 * (seen.mean(axis=0) - old["tracker"][name])
        np.testing.assert_allclose(value, expected, atol=2e-5)
    assert isinstance(tracker.pull, dpa_jax.nnx.BackwardMemory)
    assert np.abs(nnx.to_pure_dict(nnx.state(tracker))["pull"]).max() > 0.1
