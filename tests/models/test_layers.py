"""Parts that models share."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import dpa_jax
from dpa_jax.models import create
from dpa_jax.models.layers import activate

K, B, ROWS, N, C = 3, 6, 4, 5, 8
LABELS = jnp.arange(B) % K


class Place(nn.Module):
    """One place of a model whose rows are patches, ROWS of them for each sample, as TNT's inner blocks have them."""

    module: nn.Module

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        return activate(self.module, x, labels, train, "mean", rows_per_sample=ROWS)


def memory_of(module, x):
    """The forward memory after one training call."""
    variables = Place(module).init(jax.random.key(0), x)
    _, mutated = Place(module).apply(variables, x, LABELS, True, mutable=dpa_jax.MUTABLE)
    return mutated["forward_memory"]["module"]["mean"]


@pytest.mark.parametrize(("pool", "shape"), [(None, (N, C)), ("mean", (N, C)), ("token", (C,))])
def test_a_place_says_how_to_pool_unless_the_mechanism_does(pool, shape):
    x = np.random.default_rng(0).normal(size=(B * ROWS, *shape)).astype(np.float32)
    found = memory_of(dpa_jax.DPA(K, momentum=1.0, update_interval=1, pool=pool), x)
    samples = x.reshape(B, ROWS, *shape)
    vectors = samples[:, 0] if pool == "token" else samples.mean(axis=(1, 2))
    np.testing.assert_allclose(found, vectors[-K:], rtol=1e-5)  # at momentum 1 a class's last sample is all of its row


def test_other_activations_are_called_plainly():
    x = jnp.linspace(-1, 1, B * ROWS * N * C).reshape(B * ROWS, N, C)
    np.testing.assert_array_equal(Place(dpa_jax.activation("relu")()).apply({}, x, LABELS, True), jnp.maximum(x, 0))


@pytest.mark.parametrize("activation", ["relu", jax.nn.relu, dpa_jax.DPA(K), dpa_jax.DPA])
def test_what_makes_no_activations_is_refused(activation):
    with pytest.raises(TypeError, match="ViT: activation must be a factory of modules, such as"):
        dpa_jax.models.create("vit", K, activation=activation)


def sites(places, **options):
    """The paths of the mechanisms in a small ResNet whose mechanism is put at these places."""
    dpa = dpa_jax.activation("dpa", num_classes=K)
    model = dpa_jax.models.create("resnet", K, activation=dpa, stage_sizes=(1, 2), width=2, image_size=8, **options)
    model = model.clone(activation_places=places) if places else model
    variables = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)
    return {"/".join(path[:-1]) for path in flatten_dict(variables.get("backward_memory", {}))}


def test_an_activation_is_put_where_the_model_is_told():
    last = {"stage1_block1/activation1", "stage1_block1/activation2"}
    assert sites(None) == sites("last") == last
    assert len(sites("all")) == 7 and last < sites("all")
    assert sites("activation, stage0*/activation2") == {"activation", "stage0_block0/activation2"}


def test_the_native_activation_stays_elsewhere():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
    options = {"stage_sizes": (1, 1), "width": 2, "image_size": 8, "in_channels": 1}
    model = dpa_jax.models.create("resnet", K, native=dpa_jax.activation("tanh"), **options)
    variables = model.init(jax.random.key(0), x)
    logits = model.apply(variables, x)
    everywhere = model.clone(native=dpa_jax.activation("relu"), activation=dpa_jax.activation("tanh"))
    np.testing.assert_array_equal(everywhere.clone(activation_places="all").apply(variables, x), logits)
    assert not np.array_equal(everywhere.apply(variables, x), logits)


def test_places_that_a_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"activation_places stage9\* fits none of its activations: activation, stage"):
        sites("stage9*")
    with pytest.raises(ValueError, match="ViT: activation_places must be 'all' or patterns; its blocks are one loop"):
        dpa_jax.models.create("vit", K, activation_places="last")


@pytest.mark.parametrize("dtype", [jnp.int32, "float33", None])
def test_what_is_no_compute_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match="ViT: dtype must be floating; got"):
        dpa_jax.models.create("vit", K, dtype=dtype)


@pytest.mark.usefixtures("compile_quickly")
def test_an_empty_batch_has_no_logits_and_no_statistics():
    sizes = {"image_size": 8, "in_channels": 1}
    vit = dpa_jax.models.create("vit", K, patch_size=4, embed_dim=8, depth=1, num_heads=1, **sizes)
    resnet = dpa_jax.models.create("resnet", K, stage_sizes=(1,), width=2, **sizes)
    empty = jax.ShapeDtypeStruct((0, 8, 8, 1), jnp.float32)
    for model in (vit, resnet):
        variables = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)
        assert jax.eval_shape(model.apply, variables, empty).shape == (0, K)
    with pytest.raises(ValueError, match="ResNet: an empty batch has no statistics to train with"):
        jax.eval_shape(lambda v, x: resnet.apply(v, x, train=True, mutable=True), variables, empty)


@pytest.mark.usefixtures("compile_quickly")
def test_blocks_that_are_computed_again_give_the_same():
    """The gradients, and each memory once: also the one that its gradient updates."""
    images, labels = jax.random.normal(jax.random.key(0), (8, 8, 8, 1)), jnp.arange(8) % K
    options = {"image_size": 8, "in_channels": 1, "embed_dim": 8, "num_heads": 2, "depth": 2, "arr": True}
    options |= {"activation": dpa_jax.activation("dpa", num_classes=K, update_interval=1), "dropout": 0.1}

    def results(remat):
        model = create("vit", K, remat=remat, stochastic_depth=0.1, **options)
        variables = model.init(jax.random.key(1), images)
        state = {name: value for name, value in variables.items() if name not in ("params", "backward_memory")}

        def loss_fn(params, backward_memory):
            variables = {**state, "params": params, "backward_memory": backward_memory}
            logits, mutated = model.apply(
                variables, images, labels, train=True, mutable=dpa_jax.MUTABLE, rngs={"dropout": jax.random.key(2)}
            )
            terms = dpa_jax.penalties(mutated)
            return jnp.sum(logits**2) + terms["channel"] + terms["arr"], {name: mutated[name] for name in state}

        step = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
        lowered = step.lower(variables["params"], variables["backward_memory"])
        return lowered.compile()(variables["params"], variables["backward_memory"]), lowered.as_text()

    (kept, fewer), (again, more) = results(False), results(True)
    assert more.count("dot_general") > fewer.count("dot_general")
    chex.assert_trees_all_close(again, kept, rtol=1e-6, atol=1e-6)
    (_, mutated), (_, updates) = again
    assert all(leaf.any() for leaf in jax.tree.leaves((mutated, updates)) if leaf.ndim > 1)
