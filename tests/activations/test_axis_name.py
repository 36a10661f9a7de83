"""A batch spread over eight devices under shard_map, pmap and a known mesh: the numbers are those of one device."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import dpa_jax
from dpa_jax.activations import arr, memory
from dpa_jax.activations.sharding import batch_axes
from dpa_jax.training.cost import count_collectives

K, C, DEVICES, STEPS = 4, 6, 8, 4
B = 3 * DEVICES
COEFFICIENTS = {"channel": 5.0, "arr": 2.0, "aux": 1.0, "gate": 10.0}


class Block(nn.Module):
    axis_name: str | None

    @nn.compact
    def __call__(self, x, labels, train):
        shared = {"pool": "none", "axis_name": self.axis_name}
        x = dpa_jax.DPA(K, update_interval=2, **shared)(nn.Dense(C)(x), labels, train)
        x = dpa_jax.AIEC(K, update_interval=2, **shared)(nn.Dense(C)(x), labels, train)
        return dpa_jax.ARR(K, update_interval=2, **shared)(x, labels, train), None


class Net(nn.Module):
    """Once the block, or its rematerialised layers under ``nn.scan``."""

    scan: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        block = Block(self.axis_name)
        if self.scan:
            block = nn.scan(
                nn.remat(Block, static_argnums=(3,)),
                variable_axes={"params": 0, **dict.fromkeys(dpa_jax.COLLECTIONS, 0)},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=2,
            )(self.axis_name)
        return block(x, labels, train)[0]


def batch(t):
    """A few classes, so every one comes several times and on several devices; some samples have no label."""
    rng = np.random.default_rng(t)
    labels = rng.integers(-1, K, B).astype(np.int32)
    labels[-3:] = -1  # one device has no labels at all
    offsets = np.random.default_rng(99).normal(size=(K + 1, C))[labels]
    return (rng.normal(size=(B, C)) + offsets).astype(np.float32), labels


def make_step(model, mean_loss=lambda loss: loss, mean_gradients=lambda gradients: gradients):
    """A user's training step, on the batch of one device."""

    def step(variables, x, labels):
        state = {name: variables[name] for name in variables if name not in ("params", "backward_memory")}

        def loss_fn(params, backward_memory):
            y, mutated = model.apply(
                {"params": params, "backward_memory": backward_memory, **state},
                x,
                labels,
                train=True,
                mutable=dpa_jax.MUTABLE,
            )
            penalties = dpa_jax.penalties(mutated)
            loss = jnp.mean(jnp.square(y - jnp.roll(x, 1, axis=1)))
            loss += sum(COEFFICIENTS[name] * penalty for name, penalty in penalties.items())
            masked = dpa_jax.summarize(mutated).figures["masked_fraction"]
            return mean_loss(loss), (mutated, y, penalties, masked)

        gradients_of = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, (mutated, y, penalties, masked)), gradients = gradients_of(
            variables["params"], variables["backward_memory"]
        )
        gradients, update = mean_gradients(gradients)
        new = {
            "params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients),
            "backward_memory": optax.apply_updates(variables["backward_memory"], update),
            **{name: mutated[name] for name in state},
        }
        return new, y, (loss, penalties, masked, gradients)

    return step


def mean_over_data(tree):
    return jax.lax.pmean(tree, "data")


def one_copy(tree):
    """Of arrays stacked over devices the first, all being the same."""

    def first(leaf):
        leaf = np.asarray(leaf)
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        return leaf[0]

    return jax.tree.map(first, tree)


def with_mean_of_figures(step):
    """Losses, penalties and counts are each device's share; gradients are whole, and their mean changes nothing."""

    def shared(*inputs):
        new, y, figures = step(*inputs)
        return new, y, mean_over_data(figures)

    return shared


REPLICATED, SPREAD = PartitionSpec(), PartitionSpec("data")


def shard_mapped(model):
    """As the documentation says: the loss is averaged, shard_map's own transposition does the rest."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    return jax.jit(
        jax.shard_map(
            with_mean_of_figures(make_step(model, mean_loss=mean_over_data)),
            mesh=mesh,
            in_specs=(REPLICATED, SPREAD, SPREAD),
            out_specs=(REPLICATED, SPREAD, REPLICATED),
        )
    )


def shard_mapped_copies(model, check_vma):
    """Every device with its own copy of the state, and gradients averaged by hand."""
    step = with_mean_of_figures(make_step(model, mean_gradients=mean_over_data))
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))

    def stacked(variables, x, labels):
        if check_vma:
            variables = jax.lax.pcast(variables, "data", to="varying")
        new, y, figures = step(variables, x, labels)
        return jax.tree.map(lambda leaf: leaf[None], new), y, figures

    mapped = jax.jit(
        jax.shard_map(
            stacked,
            mesh=mesh,
            in_specs=(REPLICATED, SPREAD, SPREAD),
            out_specs=(SPREAD, SPREAD, REPLICATED),
            check_vma=check_vma,
        )
    )

    def whole(variables, x, labels):
        new, y, figures = mapped(variables, x, labels)
        return one_copy(new), y, figures

    return whole


def pmapped(model):
    step = with_mean_of_figures(make_step(model, mean_gradients=mean_over_data))
    mapped = jax.pmap(step, axis_name="data", in_axes=(None, 0, 0), devices=jax.devices()[:DEVICES])

    def whole(variables, x, labels):
        new, y, figures = mapped(variables, x.reshape(DEVICES, -1, C), labels.reshape(DEVICES, -1))
        return one_copy(new), np.asarray(y).reshape(B, C), one_copy(figures)

    return whole


def under_a_mesh(model, *sizes, batch_over=None):
    """Nothing is mapped: the batch is spread over a mesh that was entered, if the devices divide it."""
    axes = ("data", "model")[: len(sizes)]
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(sizes))
    over = SPREAD if B % sizes[0] == 0 else REPLICATED
    step = jax.jit(make_step(model))

    def whole(variables, x, labels):
        x, labels = jax.device_put((x, labels), NamedSharding(mesh, over))
        rules = nn.logical_axis_rules([("batch", batch_over)]) if batch_over else contextlib.nullcontext()
        with jax.set_mesh(mesh), rules:
            assert batch_axes(B) == (("data",) if over == SPREAD and (len(sizes) == 1 or batch_over) else ())
            return step(jax.device_put(variables, NamedSharding(mesh, REPLICATED)), x, labels)

    return whole


def run(step, variables):
    steps = []
    for t in range(STEPS):
        variables, *rest = step(variables, *batch(t))
        steps.append((variables, *rest))
    return steps


@pytest.fixture(scope="module")
def one_device():
    def made(scan):
        model = Net(scan=scan)
        variables = dict(model.init(jax.random.key(1), jnp.zeros((B, C))))
        return variables, run(jax.jit(make_step(model)), variables)

    return {scan: made(scan) for scan in (False, True)}


@pytest.mark.parametrize(
    ("transform", "scan"),
    [
        (shard_mapped, False),
        (shard_mapped, True),
        (functools.partial(shard_mapped_copies, check_vma=True), False),
        (functools.partial(shard_mapped_copies, check_vma=False), False),
        (pmapped, False),
    ],
    ids=["shard_map", "shard_map-layers", "shard_map-copies", "shard_map-unchecked", "pmap"],
)
def test_many_devices_equal_one(one_device, transform, scan):
    variables, expected = one_device[scan]
    assert_equal_steps(run(transform(Net(scan=scan, axis_name="data")), variables), expected)


@pytest.mark.parametrize(
    ("sizes", "batch_over", "scan"),
    [((8,), None, False), ((8,), None, True), ((4, 2), "data", False), ((4, 2), None, False), ((5,), None, False)],
    ids=["one-axis", "layers", "two-axes", "two-axes-unnamed", "undivided"],
)
def test_a_known_mesh_equals_one_device(one_device, sizes, batch_over, scan):
    variables, expected = one_device[scan]
    assert_equal_steps(run(under_a_mesh(Net(scan=scan), *sizes, batch_over=batch_over), variables), expected)


def assert_equal_steps(steps, expected):
    for ours, theirs in zip(steps, expected, strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, theirs)
    new, _, (_, penalties, masked, _) = expected[-1]
    assert all(penalty > 0 for penalty in penalties.values())
    assert masked.total > 0
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(new["backward_memory"]))


def test_evaluation_reads_what_all_devices_have(one_device):
    variables, steps = one_device[False]
    variables = steps[-1][0]
    x, labels = batch(9)

    def penalties(model, variables, x, labels):
        return dpa_jax.penalties(model.apply(variables, x, labels, mutable=dpa_jax.MUTABLE)[1])

    expected = jax.jit(functools.partial(penalties, Net()))(variables, x, labels)
    share = functools.partial(penalties, Net(axis_name="data"))
    shares = jax.jit(jax.vmap(share, in_axes=(None, 0, 0), axis_name="data"))(
        variables, x.reshape(DEVICES, -1, C), labels.reshape(DEVICES, -1)
    )
    assert expected.keys() == COEFFICIENTS.keys()
    for name, penalty in expected.items():
        assert penalty > 0
        np.testing.assert_allclose(shares[name].mean(), penalty, rtol=1e-5)


def test_an_axis_that_no_transformation_binds_is_an_error():
    act = dpa_jax.DPA(K, pool="none", axis_name="data")
    x, labels = batch(0)
    variables = act.init(jax.random.key(0), x)  # outside of the transformation, as for flax's BatchNorm
    with pytest.raises(NameError, match="data"):
        act.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)


@pytest.mark.parametrize("mechanism", [dpa_jax.DPA, dpa_jax.ARR, dpa_jax.AIEC])
def test_a_forgotten_axis_name_is_an_error(mechanism):
    x, labels = batch(0)
    act = mechanism(K, pool="none")

    def one_step(x, labels):
        variables = act.init(jax.random.key(0), x)
        return act.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)[0]

    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    with pytest.raises(ValueError, match=f"{mechanism.__name__}: inside of shard_map or pmap .* axis_name='data'"):
        jax.jit(jax.shard_map(one_step, mesh=mesh, in_specs=SPREAD, out_specs=SPREAD))(x, labels)
    shared = x.reshape(DEVICES, -1, C), labels.reshape(DEVICES, -1)
    with pytest.raises(ValueError, match="axis_name='batch'"):
        jax.pmap(one_step, axis_name="batch")(*shared)
    with pytest.raises(ValueError, match="axis_name=the axis_name of pmap"):
        jax.pmap(one_step)(*shared)


def test_a_model_of_its_own_on_each_device():
    x, labels = batch(0)
    x, labels = x.reshape(DEVICES, -1, C), labels.reshape(DEVICES, -1)
    variables = Net().init(jax.random.key(1), x[0])

    def step(axis_name, x, labels):
        return make_step(Net(axis_name=axis_name))(dict(variables), x, labels)

    alone = jax.jit(jax.vmap(functools.partial(step, None)))(x, labels)
    members = jax.pmap(functools.partial(step, ()))(x, labels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), members, alone)


@pytest.mark.parametrize("channels", [C, 16, 2 * DEVICES + 1])
def test_shards_give_the_bits_of_one_device(channels):
    rng = np.random.default_rng(channels)
    labels, count = rng.integers(-1, K + 1, (2, B)), rng.integers(0, 3, K)  # K is no class either
    recalled, terms = rng.normal(size=(2, 2, B, channels)).astype(np.float32)
    factors = rng.uniform(size=(2, B)).astype(np.float32)

    def computed(labels, count, recalled, factors, terms):
        weights = memory.update_weights(labels[0], K, 0.9)
        rows = memory.prefix_rows(recalled, factors, terms, jax.vmap(memory.gather_labels)(labels))
        return weights, arr.response_steps(labels[0], count, 0.1, 2), rows

    arguments = labels, count, recalled, factors, terms
    expected = jax.jit(computed)(*arguments)
    with jax.set_mesh(jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))):
        compiled = jax.jit(computed).lower(*arguments).compile()
        assert "all-to-all" in compiled.as_text()
        jax.tree.map(np.testing.assert_array_equal, compiled(*arguments), expected)


@pytest.mark.parametrize("mechanism", [dpa_jax.DPA, dpa_jax.ARR, dpa_jax.AIEC])
def test_samples_that_are_not_finite_take_no_part_on_any_device(mechanism):
    act, (x, labels) = mechanism(K, update_interval=1, pool="none"), batch(1)
    x[3, 2], x[-5, 0] = np.nan, np.inf
    variables = act.init(jax.random.key(0), x)

    def seen(x, labels):
        _, mutated = act.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)
        return dpa_jax.penalties(mutated), {name: mutated.get(name) for name in variables}

    expected = jax.jit(seen)(x, labels)
    with jax.set_mesh(jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))):
        found = jax.jit(seen)(x, labels)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


def test_more_layers_make_no_more_exchanges():
    def exchanges(depth):
        model = nn.Sequential([dpa_jax.DPA(K, pool="none") for _ in range(depth)])
        variables = model.init(jax.random.key(0), jnp.zeros((B, C)))

        def penalty(x, labels):
            with dpa_jax.supervise(labels, train=True):
                _, mutated = model.apply(variables, x, mutable=dpa_jax.MUTABLE)
            return dpa_jax.penalties(mutated)["channel"]

        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
        inputs = jax.device_put(batch(0), NamedSharding(mesh, SPREAD))
        with jax.set_mesh(mesh):
            counts = count_collectives(jax.jit(penalty).lower(*inputs).compile().as_text())
        return {kind: count for kind, count in counts.items() if kind != "all-reduce"}  # the compiler joins those

    assert exchanges(1) == exchanges(3) == {"all-to-all": 2}
