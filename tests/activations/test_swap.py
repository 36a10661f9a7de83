"""`dpa_jax.swap` on models in the styles that public ones are written in, none of which knows of us."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.nn import gelu, relu

import dpa_jax

TABLE = {"relu": nn.relu, "swish": nn.swish}  # as models that take an activation by its name have it
PLAIN = dpa_jax.activation("relu")
DPA = dpa_jax.activation("dpa", num_classes=3)
KEY = jax.random.key(0)
LABELS = jnp.array([0, 1, 2, 0])
IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
TOKENS = jax.random.normal(jax.random.key(1), (4, 5, 8))


class ResNetBlock(nn.Module):
    """An activation in a field, a convolution and a norm in others."""

    filters: int
    conv: Any
    norm: Any
    act: Callable = nn.relu

    @nn.compact
    def __call__(self, x):
        y = self.act(self.norm()(self.conv(self.filters)(x)))
        return self.act(x + self.norm()(self.conv(self.filters)(y)))


class ResNet(nn.Module):
    """Convolutions and dense layers, BatchNorm, and fields that are handed on."""

    act: Callable = nn.relu

    @nn.compact
    def __call__(self, x, train=True):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.max_pool(self.act(norm()(conv(4)(x))), (2, 2), (2, 2))
        x = ResNetBlock(4, conv, norm, self.act)(x).mean((1, 2))
        return nn.Dense(3)(relu(nn.Dense(6)(x)))


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(12)(x)))


class EncoderBlock(nn.Module):
    """Hard-coded in a submodule; the shape that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _=None):
        x += nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + MlpBlock()(nn.LayerNorm()(x)), None


class ViT(nn.Module):
    """Blocks one after the other, rematerialised, or scanned."""

    kind: str = "loop"
    axes: Any = ()

    @nn.compact
    def __call__(self, x):
        if self.kind == "scan":
            variable_axes = {"params": 0, **dict.fromkeys(self.axes, 0)}
            x, _ = nn.scan(EncoderBlock, variable_axes, split_rngs={"params": True}, length=2)()(x, None)
        else:
            block = {"loop": EncoderBlock, "remat": nn.remat(EncoderBlock), "jit": nn.jit(EncoderBlock)}[self.kind]
            for i in range(2):
                x, _ = block(name=f"block{i}")(x)
        return nn.Dense(3)(x[:, 0])


class Decoder(nn.Module):
    """Everything in `setup`: a list of layers, helper methods, a default argument, a table."""

    def setup(self):
        self.up, self.gate, self.head = nn.Dense(6), nn.Dense(6), nn.Dense(3)
        self.layers = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8), functools.partial(nn.gelu, approximate=False)])

    def gated(self, x, act=nn.silu):
        return act(self.gate(x)) * self.up(x)

    def encode(self, x):
        return TABLE["swish"](self.layers(x))

    def __call__(self, x):
        return self.head(gelu(self.gated(self.encode(x)))[:, 0])


def make_closure():
    act = nn.relu

    class Closure(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(act(nn.Dense(8)(x)))[:, 0]

    return Closure()


MODELS = {
    "resnet": (
        ResNet(),
        IMAGES,
        {"relu_0": 4, "ResNetBlock_0/relu_0": 4, "ResNetBlock_0/relu_1": 4, "relu_1": 2},
    ),
    "vit": (ViT(), TOKENS, {f"block{i}/MlpBlock_0/gelu_0": 3 for i in range(2)}),
    "remat": (ViT("remat"), TOKENS, {f"block{i}/MlpBlock_0/gelu_0": 3 for i in range(2)}),
    "scan": (ViT("scan", dpa_jax.COLLECTIONS), TOKENS, {"ScanEncoderBlock_0/MlpBlock_0/gelu_0": 3}),
    "setup": (
        Decoder(),
        TOKENS,
        dict.fromkeys(("layers/relu_0", "layers/gelu_0", "encode_silu_0", "gated_silu_0", "gelu_0"), 3),
    ),
    "closure": (make_closure(), TOKENS, {"relu_0": 3}),
}


@pytest.fixture(params=MODELS)
def public(request):
    """(a model, its input, {path of a site: the rank there})"""
    return MODELS[request.param]


def test_every_call_becomes_an_activation_with_memories(public):
    model, x, expected = public
    plain = model.init(KEY, x)
    with dpa_jax.swap(DPA) as sites:
        variables = model.init(KEY, x)
    assert {path: len(site.shape) for path, site in sites.items()} == expected
    assert str(sites).count("\n") == len(expected) - 1 and all(path in str(sites) for path in expected)
    # Every site has its memories, and nothing else has changed.
    memories = jax.tree_util.tree_leaves_with_path(variables["backward_memory"])
    assert {"/".join(key.key for key in path[:-1]) for path, _ in memories} == set(expected)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], plain["params"])
    assert variables.keys() - plain.keys() == {"backward_memory", "forward_memory"}


def test_a_step_learns_and_remembers(public):
    model, x, _ = public
    with dpa_jax.swap(DPA):
        variables = model.init(KEY, x)
    params, backward, memories = (variables.pop(name) for name in ("params", "backward_memory", "forward_memory"))

    @jax.jit
    def step(params, backward, memories):
        def loss_fn(params, backward):
            given = {"params": params, "backward_memory": backward, "forward_memory": memories, **variables}
            with dpa_jax.swap(DPA), dpa_jax.supervise(LABELS, train=True):
                logits, mutated = model.apply(given, x, mutable=[*dpa_jax.MUTABLE, "batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
            return loss + dpa_jax.penalties(mutated)["channel"], mutated

        (gradients, update), mutated = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(params, backward)
        return optax.apply_updates(backward, update), mutated["forward_memory"], gradients

    for _ in range(5):
        backward, memories, gradients = step(params, backward, memories)
    for leaf in jax.tree.leaves((backward, gradients)):
        assert np.all(np.isfinite(leaf)) and np.any(leaf)
    assert all(np.all(np.any(leaf, axis=-1)) for leaf in jax.tree.leaves(backward))  # every class
    assert all(np.any(leaf) for leaf in jax.tree.leaves(memories) if leaf.ndim > 1)


def test_swapped_for_the_same_function_a_model_is_itself(public):
    model, x, expected = public
    variables = model.init(KEY, x)
    expected_output = model.apply(variables, x, mutable=["batch_stats"])[0]
    with dpa_jax.swap(dpa_jax.activation("gelu"), include="nothing") as sites:
        left = model.apply(variables, x, mutable=["batch_stats"])[0]
    assert not sites
    np.testing.assert_array_equal(left, expected_output)
    only = [path for path in expected if "relu" in path]
    with dpa_jax.swap(PLAIN, include=only) as sites:
        same = model.apply(variables, x, mutable=["batch_stats"])[0]
    assert set(sites) == set(only)
    np.testing.assert_array_equal(same, expected_output)


def test_outside_of_the_block_nothing_is_changed():
    before = (nn.relu, jax.nn.gelu, relu, TABLE["swish"], Decoder.gated.__wrapped__.__defaults__)
    model = Decoder()
    variables = model.init(KEY, TOKENS)
    apply = jax.jit(lambda: model.apply(variables, TOKENS, mutable=dpa_jax.MUTABLE))
    plain = apply()
    with pytest.raises(ZeroDivisionError), dpa_jax.swap(DPA), dpa_jax.swap(PLAIN):
        assert nn.relu is not before[0] and TABLE["swish"] is not before[3]
        raise ZeroDivisionError
    assert before == (nn.relu, jax.nn.gelu, relu, TABLE["swish"], Decoder.gated.__wrapped__.__defaults__)
    assert np.array_equal(nn.relu(jnp.array([-1.0, 1.0])), [0, 1])
    # What JAX has traced outside is not used inside, and the other way round.
    swapped = dpa_jax.activation("dpa", num_classes=3)
    with dpa_jax.swap(swapped):
        variables = model.init(KEY, TOKENS)
        with dpa_jax.supervise(LABELS, train=True):
            _, mutated = apply()
    assert dpa_jax.penalties(mutated).keys() == {"channel"}
    again = apply()
    assert again[1] == plain[1] == {}
    np.testing.assert_array_equal(again[0], plain[0])


def test_equal_modules_under_nn_jit_are_traced_once_and_keep_their_own_memories():
    with dpa_jax.swap(DPA) as sites:
        variables = ViT("jit").init(KEY, TOKENS)
    assert set(sites) == {"block0/MlpBlock_0/gelu_0"}
    assert set(variables["backward_memory"]) == {"block0", "block1"}


def test_blocks_nest_and_the_innermost_counts():
    model = ViT()
    with dpa_jax.swap(DPA) as outer:
        with dpa_jax.swap(PLAIN) as inner:
            model.init(KEY, TOKENS)
        assert len(inner) == 2 and not outer
        assert "backward_memory" in model.init(KEY, TOKENS)
    assert len(outer) == 2


def test_include_exclude_and_pool():
    model, x, expected = MODELS["resnet"]
    with dpa_jax.swap(DPA, include=("ResNetBlock_*", "relu_1"), exclude="*_0/relu_1") as sites:
        variables = model.init(KEY, x)
    assert set(sites) == {"ResNetBlock_0/relu_0", "relu_1"}
    assert set(variables["backward_memory"]) == {"ResNetBlock_0", "relu_1"}
    pools = {}

    def by_rule(site):
        pools[site.path] = {2: "none", 4: "mean"}[len(site.shape)]
        return pools[site.path]

    with dpa_jax.swap(DPA, pool=by_rule):
        model.init(KEY, x)
    assert set(pools) == set(expected)
    with dpa_jax.swap(DPA, pool="token"), pytest.raises(ValueError, match=r"takes an input of shape \[B, N, C\]"):
        model.init(KEY, x)


def test_a_scan_without_axes_names_them():
    with (
        pytest.raises(ValueError, match=r"'forward_memory'.*variable_axes=\{.*dict.fromkeys\(dpa_jax.COLLECTIONS, 0\)"),
        dpa_jax.swap(DPA),
    ):
        ViT("scan").init(KEY, TOKENS)


def test_what_makes_no_modules_is_refused():
    for wrong in ("dpa", dpa_jax.DPA(3), None):
        with pytest.raises(TypeError, match="swap: factory must make modules"), dpa_jax.swap(wrong):
            pass
