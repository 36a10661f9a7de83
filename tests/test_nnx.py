"""The NNX modules against the linen ones, in training steps and under NNX's transformations."""

import functools
import pathlib
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
from dpa_jax.activations import Record
from dpa_jax.activations.penalties import RECORDS

K, C, B = 4, 6, 16
COEFFICIENTS = {"channel": 5.0, "arr": 2.0, "aux": 1.0, "gate": 10.0}
DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "nnx.md"


def batch(t):
    rng = np.random.default_rng(t)
    labels = rng.integers(-1, K, B).astype(np.int32)
    offsets = np.random.default_rng(99).normal(size=(K + 1, C))[labels]
    return (rng.normal(size=(B, C)) + offsets).astype(np.float32), labels


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, labels=None, train=False):
        x = dpa_jax.DPA(K, update_interval=2, pool="none", name="dpa")(nn.Dense(C, name="first")(x), labels, train)
        for kind in ("vector", "elementwise", "scalar"):
            x = dpa_jax.RAA(kind, name=f"raa_{kind}")(x)
        x = dpa_jax.ARR(K, pool="none", name="arr")(nn.Dense(C, name="second")(x), labels, train)
        x = dpa_jax.AIEC(K, update_interval=2, pool="none", name="aiec")(x, labels, train)
        return nn.Dense(C, name="third")(x)


class NnxNet(nnx.Module):
    def __init__(self, *, rngs):
        self.first, self.second, self.third = (nnx.Linear(C, C, rngs=rngs) for _ in range(3))
        self.dpa = dpa_jax.nnx.DPA(K, C, update_interval=2, pool="none")
        self.raa_vector = dpa_jax.nnx.RAA(C, kind="vector")
        self.raa_elementwise = dpa_jax.nnx.RAA(C, kind="elementwise")
        self.raa_scalar = dpa_jax.nnx.RAA(C, kind="scalar")
        self.arr = dpa_jax.nnx.ARR(K, C, pool="none")
        self.aiec = dpa_jax.nnx.AIEC(K, C, update_interval=2, pool="none", rngs=rngs)

    def __call__(self, x, labels=None, train=False):
        x = self.dpa(self.first(x), labels, train)
        x = self.raa_scalar(self.raa_elementwise(self.raa_vector(x)))
        return self.third(self.aiec(self.arr(self.second(x), labels, train), labels, train))


# Where linen's variables that are not parameters stand in NNX.
ATTRIBUTES = {
    ("forward_memory", "mean"): ("forward_memory", dpa_jax.nnx.ForwardMemory),
    ("forward_memory", "step"): ("step", dpa_jax.nnx.ForwardMemory),
    ("backward_memory", "mean"): ("backward_memory", dpa_jax.nnx.BackwardMemory),
    ("response_memory", "mean"): ("mean", dpa_jax.nnx.ResponseMemory),
    ("response_memory", "count"): ("count", dpa_jax.nnx.ResponseMemory),
    **{
        ("activity_counters", name): (name, dpa_jax.nnx.ActivityCounter)
        for name in ("active", "inhibited", "total", "step")
    },
}


def as_linen(model):
    """The model's state as linen's variables."""
    variables = {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}
    for (collection, name), (attribute, kind) in ATTRIBUTES.items():
        for owner in ("dpa", "arr", "aiec"):
            variable = getattr(getattr(model, owner), attribute, None)
            if type(variable) is kind:
                variables.setdefault(collection, {}).setdefault(owner, {})[name] = variable[...]
    return variables


def loss_of(x, y, terms):
    return jnp.mean(jnp.square(y - jnp.roll(x, 1, axis=1))) + sum(COEFFICIENTS[name] * terms[name] for name in terms)


@jax.jit
def linen_step(variables, x, labels):
    state = {name: variables[name] for name in variables if name not in ("params", "backward_memory")}

    def loss_fn(params, backward_memory):
        variables = {"params": params, "backward_memory": backward_memory, **state}
        y, mutated = LinenNet().apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)
        terms = dpa_jax.penalties(mutated)
        return loss_of(x, y, terms), (y, terms, mutated)

    gradients_of = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)
    (gradients, update), (y, terms, mutated) = gradients_of(variables["params"], variables["backward_memory"])
    new = {
        "params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients),
        "backward_memory": optax.apply_updates(variables["backward_memory"], update),
        **{name: mutated[name] for name in state},
    }
    return new, (y, terms, gradients)


def nnx_loss(model, x, labels):
    y, records = dpa_jax.nnx.recorded(model)(x, labels, train=True)
    terms = dpa_jax.penalties(records)
    return loss_of(x, y, terms), (y, terms)


@nnx.jit
def nnx_step(model, optimizer, x, labels):
    (_, (y, terms)), gradients = dpa_jax.nnx.value_and_grad(nnx_loss, has_aux=True)(model, x, labels)
    optimizer.update(model, gradients)
    return y, terms, nnx.to_pure_dict(gradients)


def assert_close(ours, theirs):
    chex.assert_trees_all_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.fixture(scope="module")
def trained():
    """A model trained in step with the linen one, and the linen one's variables."""
    model = NnxNet(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    variables = as_linen(model)
    shapes = jax.eval_shape(LinenNet().init, jax.random.key(0), jnp.zeros((B, C)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, dict(shapes))
    structure = jax.tree.structure(nnx.state(model))
    for t in range(4):
        variables, expected = linen_step(variables, *batch(t))
        assert_close(nnx_step(model, optimizer, *batch(t)), expected)
        assert_close(as_linen(model), variables)
    assert jax.tree.structure(nnx.state(model)) == structure, "records stay in their call"
    assert expected[1].keys() == COEFFICIENTS.keys()
    assert all(term > 0 for term in expected[1].values())
    assert np.abs(variables["backward_memory"]["dpa"]["mean"]).max() > 0
    return model, variables


@pytest.mark.core
def test_training_steps_equal_those_of_linen(trained):
    _, variables = trained
    assert (variables["activity_counters"]["aiec"]["total"] > 1).any()


def test_evaluation_reads_and_never_writes(trained):
    model, variables = nnx.clone(trained[0]), trained[1]
    x, labels = batch(7)

    @nnx.jit
    def ours(model):
        y, records = dpa_jax.nnx.recorded(model)(x, labels)
        return y, dpa_jax.summarize(records)

    @jax.jit
    def theirs(variables):
        y, mutated = LinenNet().apply(variables, x, labels, mutable=dpa_jax.MUTABLE)
        return y, dpa_jax.summarize(mutated)

    _, expected = theirs(variables)
    assert expected.figures["masked_fraction"].total > 0
    assert_close(ours(model), theirs(variables))
    assert_close(as_linen(model), variables)


def test_without_labels_nothing_is_recorded_or_touched(trained):
    model, variables = nnx.clone(trained[0]), trained[1]
    x, labels = batch(7)
    y, records = dpa_jax.nnx.recorded(model)(x)
    assert dpa_jax.penalties(records) == {}
    np.testing.assert_array_equal(model(x, labels), y)  # labels in evaluation, nobody asking for records
    assert_close(as_linen(model), variables)


def test_supervise_hands_the_labels_down(trained):
    given, supervised = nnx.clone(trained[0]), nnx.clone(trained[0])
    x, labels = batch(8)

    @nnx.jit
    def under_supervision(model, x, labels):
        with dpa_jax.supervise(labels, train=True):
            y, records = dpa_jax.nnx.recorded(model)(x)
        return y, dpa_jax.penalties(records)

    _, expected = nnx.jit(nnx_loss)(given, x, labels)
    assert_close(under_supervision(supervised, x, labels), expected)
    assert_close(as_linen(supervised), as_linen(given))
    assert not np.array_equal(given.arr.count[...], trained[0].arr.count[...])


def test_counters_return_to_the_start_and_nothing_else_changes(trained):
    model, variables = nnx.clone(trained[0]), trained[1]
    dpa_jax.nnx.reset_counters(model)
    assert_close(as_linen(model), dpa_jax.reset_counters(variables))
    assert model.aiec.total[...].tolist() == [1] * K
    plain = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    dpa_jax.nnx.reset_counters(plain)  # a model without counters is left as it is


# ---------------- under transformations ----------------


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(C, C, rngs=rngs)
        self.dpa = dpa_jax.nnx.DPA(K, C, update_interval=2, pool="none")
        self.aiec = dpa_jax.nnx.AIEC(K, C, update_interval=2, pool="none", rngs=rngs)

    def __call__(self, x, labels, train):
        return x + self.aiec(self.dpa(self.linear(x), labels, train), labels, train)


class Stack(nnx.Module):
    """Layers made by ``nnx.vmap``, called by ``nnx.scan`` with ``nnx.remat``, or one after the other."""

    def __init__(self, layers, *, rngs, scan):
        self.scan = scan
        blocks = nnx.split_rngs(splits=layers)(nnx.vmap(Block))(rngs)
        if not scan:
            graph, state = nnx.split(blocks)
            pick = lambda i: jax.tree.map(lambda leaf: leaf[i], state)  # noqa: E731
            blocks = nnx.List([nnx.merge(graph, pick(i)) for i in range(layers)])
        self.blocks = blocks

    def __call__(self, x, labels=None, train=False):
        if not self.scan:
            for block in self.blocks:
                x = block(x, labels, train)
            return x

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def layers(block, x):
            return block(x, labels, train)

        return layers(self.blocks, x)


def test_scan_and_remat_over_layers_equal_a_loop():
    def run(scan):
        model = Stack(2, rngs=nnx.Rngs(0), scan=scan)
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        steps = [nnx_step(model, optimizer, *batch(t))[:2] for t in range(4)]
        blocks = nnx.to_pure_dict(nnx.state(model.blocks))
        return steps, blocks if scan else jax.tree.map(lambda *layers: jnp.stack(layers), *blocks.values())

    looped, scanned = run(scan=False), run(scan=True)
    assert_close(scanned, looped)
    assert np.abs(looped[1]["dpa"]["backward_memory"]).max(axis=(1, 2)).all()
    assert all(term > 0 for term in looped[0][-1][1].values())


def test_a_module_used_twice_records_and_learns_twice():
    act = dpa_jax.nnx.DPA(K, C, update_interval=1, pool="none")
    x, labels = batch(0)

    class Twice(nnx.Module):
        def __init__(self, act):
            self.act = act

        def __call__(self, x, labels, train):
            return self.act(x, labels, train) + self.act(-x, labels, train)

    def loss_fn(model):
        y, records = dpa_jax.nnx.recorded(model)(x, labels, train=True)
        assert len(jax.tree.leaves(records, is_leaf=lambda node: isinstance(node, Record))) == 2
        return jnp.sum(y)

    dpa_jax.nnx.value_and_grad(loss_fn)(Twice(act))
    one_by_one = dpa_jax.nnx.DPA(K, C, update_interval=1, pool="none")
    for _ in range(2):
        dpa_jax.nnx.value_and_grad(lambda act: jnp.sum(act(x, labels, train=True)))(one_by_one)
    np.testing.assert_allclose(act.backward_memory[...], one_by_one.backward_memory[...], rtol=1e-6)
    assert np.abs(act.backward_memory[...]).max() > 0


def test_records_do_not_outlive_a_call_that_fails():
    model = NnxNet(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="labels must be integers"):
        dpa_jax.nnx.recorded(model)(jnp.zeros((B, C)), jnp.zeros(B), train=True)
    assert not jax.tree.leaves(nnx.state(model, dpa_jax.nnx.PenaltyRecords))


def test_methods_and_gradients_of_chosen_variables():
    class Encoder(NnxNet):
        def encode(self, x, labels):
            return self.dpa(self.first(x), labels, train=True)

    model = Encoder(rngs=nnx.Rngs(0))
    x, labels = batch(0)

    def loss_fn(model, scale):
        y, records = dpa_jax.nnx.recorded(model.encode)(x, labels)
        return scale * jnp.sum(y) + dpa_jax.penalties(records)["channel"]

    biases = nnx.All(nnx.Param, nnx.PathContains("bias"))
    loss, gradients = dpa_jax.nnx.value_and_grad(loss_fn, wrt=biases)(model, 2.0)
    assert loss.shape == ()
    assert nnx.to_pure_dict(gradients).keys() == {"first", "second", "third"}
    assert gradients["first"].keys() == {"bias"}


# ---------------- bad input ----------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dpa_jax.nnx.DPA(K, C, tau=-1), ValueError, "DPA: tau must be at least 0; got -1"),
        (lambda: dpa_jax.nnx.DPA(K, 0), ValueError, "DPA: num_features must be at least 1; got 0"),
        (lambda: dpa_jax.nnx.ARR(K, C, pool="tokens"), ValueError, "ARR: pool must be one of .* Did you mean 'token'"),
        (lambda: dpa_jax.nnx.AIEC(0, C, rngs=nnx.Rngs(0)), ValueError, "AIEC: num_classes must be at least 1; got 0"),
        (lambda: dpa_jax.nnx.RAA(C, kind="vectors"), ValueError, "RAA: kind must be one of .* Did you mean 'vector'"),
        (lambda: dpa_jax.nnx.DPA(K, C, taus=1), TypeError, "taus"),
        (lambda: dpa_jax.nnx.recorded(jnp.tanh), TypeError, "takes an nnx.Module or a method of one"),
    ],
)
def test_impossible_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_inputs_that_do_not_fit_are_refused():
    x = jnp.zeros((B, C + 1))
    for act in (
        dpa_jax.nnx.DPA(K, C, pool="none"),
        dpa_jax.nnx.ARR(K, C, pool="none"),
        dpa_jax.nnx.AIEC(K, C, pool="none", rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(ValueError, match=r"7 channels needs a memory of shape \(4, 7\); .* has \(4, 6\)"):
            act(x, jnp.zeros(B, int), train=True)
    with pytest.raises(ValueError, match="labels must have shape"):
        dpa_jax.nnx.DPA(K, C, pool="none")(x[:, :C], jnp.zeros(B - 1, int), train=True)


# ---------------- documentation ----------------


def test_the_documented_example_learns(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    exec(compile(example, str(DOCUMENT), "exec"), {"__name__": "__main__"})
    (accuracy,) = re.findall(r"eval accuracy ([\d.]+)", capsys.readouterr().out)
    assert float(accuracy) > 0.8


class _Public(nnx.Module):
    """Functions in attributes, in a list, in a partial, and where `swap` cannot reach them."""

    def __init__(self, rngs):
        self.act, self.unused = nnx.relu, nnx.silu
        gelu = functools.partial(nnx.gelu, approximate=False)
        self.seq = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 3, rngs=rngs), gelu)
        self.norm, self.pair = nnx.BatchNorm(3, rngs=rngs), (nnx.silu, nnx.relu)

    def __call__(self, x):
        return self.pair[0](self.norm(self.seq(nnx.relu(self.act(x)))))


def test_swap_replaces_what_modules_hold_and_names_what_they_call():
    model, plain = _Public(nnx.Rngs(0)), _Public(nnx.Rngs(0))
    x, labels = jax.random.normal(jax.random.key(0), (6, 4)), jnp.arange(6) % 3
    first = _Public.__call__.__code__.co_firstlineno + 1
    with pytest.warns(UserWarning, match="no attribute of the model holds these") as warned:
        sites = dpa_jax.nnx.swap(
            model, functools.partial(dpa_jax.nnx.DPA, 3, pool="none"), jax.ShapeDtypeStruct(x.shape, x.dtype)
        )
    assert str(warned[0].message).count(f"test_nnx.py, line {first}") == 2  # nnx.relu, and the one in a tuple
    assert {path: (site.function, site.shape) for path, site in sites.items()} == {
        "act": ("relu", (6, 4)),
        "seq/layers/1": ("relu", (6, 6)),
        "seq/layers/3": ("gelu", (6, 3)),
    }
    assert model.unused is nnx.silu and model.pair == (nnx.silu, nnx.relu)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m, (nnx.Param, nnx.BatchStat))) for m in (model, plain)), strict=True):
        np.testing.assert_array_equal(a, b)

    @nnx.jit
    def step(model, x, labels):
        def loss_fn(model):
            with dpa_jax.supervise(labels, train=True):
                y, records = dpa_jax.nnx.recorded(model)(x)
            return jnp.sum(y**2) + dpa_jax.penalties(records)["channel"]

        return dpa_jax.nnx.value_and_grad(loss_fn)(model)[0]

    for _ in range(5):
        step(model, x, labels)
    assert all(np.any(memory) for memory in jax.tree.leaves(nnx.state(model, dpa_jax.nnx.BackwardMemory)))


def test_swap_refuses_one_activation_for_different_channels():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.act, self.linear = nnx.relu, nnx.Linear(4, 5, rngs=rngs)

        def __call__(self, x):
            return self.act(self.linear(self.act(x)))

    model = Shared(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"swap: act is called with \[4, 5\] channels"):
        dpa_jax.nnx.swap(model, functools.partial(dpa_jax.nnx.DPA, 3), jnp.ones((2, 4)))
    assert model.act is nnx.relu


def test_diagnose_tells_of_a_backward_memory_that_never_moved():
    x, labels = batch(0)

    def train(value_and_grad):
        model = nnx.Dict(act=dpa_jax.nnx.DPA(K, C, update_interval=2, pool="none"))
        before = dpa_jax.nnx.variables(model)

        def loss_fn(model):
            y, records = dpa_jax.nnx.recorded(model.act)(x, labels, train=True)
            return jnp.sum(jnp.square(y)), records

        for _ in range(4):
            (_, records), _ = value_and_grad(loss_fn, has_aux=True)(model)
        return dpa_jax.diagnose(before, dpa_jax.nnx.variables(model), records)

    (said,) = [line for line in train(nnx.value_and_grad) if "backward" in line]
    assert said.startswith("DPA 'act': its backward memory never moved")
    assert not [line for line in train(dpa_jax.nnx.value_and_grad) if "backward" in line]


def test_a_linen_model_goes_over_the_bridge():
    x, labels = batch(0)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, labels=None, train=False):
            act = dpa_jax.DPA(K, pool="none", update_interval=1, name="act")
            return act(nn.Dense(C)(x), labels, train)

    bridged = nnx.bridge.ToNNX(dpa_jax.nnx.ForBridge(Model()), rngs=nnx.Rngs(0)).lazy_init(x)
    kept = {"params": nnx.Param, "forward_memory": dpa_jax.nnx.ForwardMemory}
    variables = {name: nnx.to_pure_dict(nnx.state(bridged, kind))["inner"] for name, kind in kept.items()}
    memory = {"act": {"mean": bridged.inner["act"]["backward_mean"][...]}}

    def linen_loss(params, memory):
        given = {**variables, "params": params, "backward_memory": memory}
        y, mutated = Model().apply(given, x, labels, train=True, mutable=dpa_jax.MUTABLE)
        return jnp.sum(jnp.square(y)) + dpa_jax.penalties(mutated)["channel"]

    def bridged_loss(model):
        y = model(x, labels, train=True, mutable=list(dpa_jax.MUTABLE))
        records = {RECORDS: nnx.pop(model, dpa_jax.nnx.PenaltyRecords)}
        return jnp.sum(jnp.square(y)) + dpa_jax.penalties(records)["channel"]

    expected, (gradients, update) = jax.value_and_grad(linen_loss, argnums=(0, 1))(variables["params"], memory)
    for step in range(2):
        loss, found = dpa_jax.nnx.value_and_grad(bridged_loss)(bridged)
        if step == 0:
            np.testing.assert_allclose(loss, expected, rtol=1e-6)
            chex.assert_trees_all_close(nnx.to_pure_dict(found)["inner"], gradients, rtol=1e-5)
            after = memory["act"]["mean"] + update["act"]["mean"]
            np.testing.assert_allclose(bridged.inner["act"]["backward_mean"][...], after, rtol=1e-6)
    assert np.abs(after).max() > 0
