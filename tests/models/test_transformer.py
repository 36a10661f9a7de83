"""What the transformers have in common: precision, blocks in a scan, places of mechanisms, an ARR behind blocks."""

import functools

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dpa_jax

pytestmark = pytest.mark.usefixtures("compile_quickly")

K = 5
EQUAL_BLOCKS = {"image_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
STAGES = {"embed_dims": (4, 8), "num_heads": (1, 2), "mlp_ratios": (2, 2), "depths": (2, 2), "reductions": (2, 1)}
SIZES = {
    "cait": {**EQUAL_BLOCKS, "layer_scale": 1.0},  # 1e-5 would leave nothing of the branches
    "deit": EQUAL_BLOCKS,
    "pvt": {"image_size": 16, "patch_size": 4, **STAGES},
    "tnt": {**EQUAL_BLOCKS, "inner_dim": 8},
}
# The paths of all activations, and the width of each.
PLACES = {
    "cait": {"blocks/mlp": 48, "class_blocks/mlp": 48},
    "deit": {"blocks/mlp": 48},
    "pvt": {"blocks1/mlp": 8, "blocks2/mlp": 16},
    "tnt": {"blocks/inner/mlp": 32, "blocks/outer/mlp": 48},
}
# Those of an ARR behind the blocks.
RESPONSES = {
    "cait": {"blocks": 12, "class_blocks": 12},
    "deit": {"blocks": 12},
    "pvt": {"blocks1": 4, "blocks2": 8},
    "tnt": {"blocks/outer": 12},
}


@pytest.fixture(params=SIZES)
def name(request):
    return request.param


def small(name, **options):
    return dpa_jax.models.create(name, K, **SIZES[name], **options)


def images(model, size=6):
    shape = (size, *model.example_inputs.shape[1:])
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def variables(model):
    return jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)


def widths(tree):
    """{path of a module: last axis of its memory}; there are K rows for each of two blocks."""
    flat = {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items() if path.endswith("/mean")}
    assert all(shape[:2] == (2, K) for shape in flat.values())
    return {path.rsplit("/", 2)[0]: shape[2] for path, shape in flat.items()}


def test_mechanisms_are_in_all_blocks_and_an_arr_is_behind_each(name):
    found = variables(small(name, activation=dpa_jax.activation("dpa", num_classes=K), arr=True))
    assert widths(found["backward_memory"]) == PLACES[name]
    assert widths(found["response_memory"]) == RESPONSES[name]


def test_a_mechanism_is_put_into_the_inner_blocks_alone():
    dpa = dpa_jax.activation("dpa", num_classes=K)
    found = variables(small("tnt", activation=dpa, activation_places="blocks/inner/*"))
    assert widths(found["backward_memory"]) == {"blocks/inner/mlp": 32}


def test_bfloat16_compute_keeps_float32_parameters_and_logits(name):
    model, reference = small(name, dtype=jnp.bfloat16), small(name)
    x = images(model)

    @jax.jit
    def run():
        start = model.init(jax.random.key(0), x)
        return start, model.apply(start, x), reference.apply(start, x)

    start, logits, exact = run()
    assert {leaf.dtype for leaf in jax.tree.leaves((start, logits))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, exact, atol=0.03 * np.abs(exact).max())
    assert not np.array_equal(logits, exact)


def test_bfloat16_is_what_nearly_all_is_computed_in(name):
    model = small(name, dtype=jnp.bfloat16)
    wide = float32_products(jax.make_jaxpr(model.apply)(variables(model), model.example_inputs).jaxpr)
    # The heads of the model and, in CaiT, what mixes the heads of the attention before and after the softmax.
    assert wide == {"cait": 3, "deit": 2, "pvt": 1, "tnt": 1}[name]


def float32_products(jaxpr):
    """How many matrix products and convolutions have a float32 operand."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            count += any(variable.aval.dtype == jnp.float32 for variable in equation.invars)
        for inner in jex.core.jaxprs_in_params(equation.params):
            count += float32_products(inner)
    return count


def test_scanned_and_unrolled_blocks_are_the_same_model(name):
    """Parameters, and logits in training with dropout and stochastic depth."""
    models = [small(name, dropout=0.2, stochastic_depth=0.5, scan=scan) for scan in (True, False)]
    x = images(models[0])

    @jax.jit
    def run():
        start = [model.init(jax.random.key(0), x) for model in models]
        keys = {"dropout": jax.random.key(1)}
        return start, [
            model.apply(jax.tree.map(lambda leaf: 5 * leaf, start[0]), x, train=True, rngs=keys) for model in models
        ]

    (scanned, unrolled), logits = run()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), unrolled, scanned)
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


def test_a_batch_on_explicit_axes_has_the_logits_of_one_device_and_gradients(name):
    """Eight devices; the training call, whose backward pass is traced only."""
    model = small(name, dropout=0.1, stochastic_depth=0.1)
    x = images(model, 8)
    start = jax.jit(model.init)(jax.random.key(0), x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    replicated, spread = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    def total(variables, x):
        return jnp.sum(model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)}))

    apply = jax.jit(model.apply)
    with jax.set_mesh(mesh):
        variables, inputs = jax.device_put(start, replicated), jax.device_put(x, spread)
        logits = apply(variables, inputs)
        gradients = jax.eval_shape(jax.grad(total), variables, inputs)
    assert logits.sharding.spec[0] == "data"
    np.testing.assert_allclose(logits, apply(start, x), rtol=0, atol=1e-6)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, start)


def test_an_empty_batch_has_no_logits(name):
    model = small(name)
    empty = jax.ShapeDtypeStruct((0, *model.example_inputs.shape[1:]), jnp.float32)
    assert jax.eval_shape(model.apply, variables(model), empty).shape == (0, K)


def test_images_of_another_shape_are_refused_with_both_shapes(name):
    model = small(name)
    side = model.image_size
    with pytest.raises(ValueError, match=rf"images must be \[B, {side}, {side}, 3\]; got \(2, 5, 5, 3\)"):
        model.init(jax.random.key(0), jnp.zeros((2, 5, 5, 3)))
