"""Weights from PyTorch and back. The recordings in test_vit.py are loaded by the same."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

import dpa_jax
from dpa_jax.models import MODELS, to_torch, variables_from_torch
from dpa_jax.models.torch import _places, match
from tests.models import zoo


def small(num_classes=5, **options):
    sizes = {"image_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return dpa_jax.models.create("vit", num_classes, **{**sizes, **options})


def torch_arrays(**changes):
    """Arrays under PyTorch names for `small()`, made from its shapes."""
    block = {
        "norm1.weight": (12,), "norm1.bias": (12,), "attn.qkv.weight": (36, 12), "attn.qkv.bias": (36,),
        "attn.proj.weight": (12, 12), "attn.proj.bias": (12,), "norm2.weight": (12,), "norm2.bias": (12,),
        "mlp.fc1.weight": (48, 12), "mlp.fc1.bias": (48,), "mlp.fc2.weight": (12, 48), "mlp.fc2.bias": (12,),
    }  # fmt: skip
    shapes = {
        "cls_token": (1, 1, 12),
        "pos_embed": (1, 5, 12),
        "patch_embed.proj.weight": (12, 3, 4, 4),
        "patch_embed.proj.bias": (12,),
        **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()},
        "norm.weight": (12,),
        "norm.bias": (12,),
        "head.weight": (5, 12),
        "head.bias": (5,),
    }
    generator = np.random.default_rng(0)
    return {name: generator.random(shape, np.float32) for name, shape in {**shapes, **changes}.items()}


def loaded(model, source):
    """What comes from the source, by path."""
    return flatten_dict(variables_from_torch(model, source, {}), sep="/")


def random_variables(model):
    """Variables of a model with random numbers, without compiling anything."""
    generator = np.random.default_rng(0)
    abstract = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)
    return jax.tree.map(lambda leaf: generator.random(leaf.shape, np.float32).astype(leaf.dtype), abstract)


# ---------------- every model ----------------


# They differ from others in their sizes alone, and take long.
LARGE = [name for name in MODELS if name.endswith("224") or name == "bert_base_uncased"]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in LARGE])
def test_the_round_trip_is_exact(name):
    """There and back, with a mechanism that has parameters."""
    model = dpa_jax.models.create(name, 7, activation=dpa_jax.activation("raa"))
    variables = random_variables(model)
    arrays = to_torch(model, variables)
    back = variables_from_torch(model, arrays, jax.tree.map(np.zeros_like, variables))
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), dict(back), variables)
    without = {name: array for name, array in arrays.items() if "shift_" not in name}
    assert len(without) < len(arrays)
    assert match(model, without).summary.endswith("not there: fresh")


@pytest.mark.parametrize("name", LARGE)
def test_every_variable_of_a_large_model_has_a_name_of_its_own(name):
    model = dpa_jax.models.create(name, 7)
    abstract = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)
    wanted = flatten_dict({name: abstract[name] for name in ("params", "batch_stats") if name in abstract}, sep="/")
    places = _places(model, wanted)
    numbers = dict.fromkeys(wanted, 0)
    for path, shape in places.values():
        numbers[path] += int(np.prod(shape))
    assert numbers == {path: int(np.prod(leaf.shape)) for path, leaf in wanted.items()}


def test_the_round_trip_through_a_file_is_exact(tmp_path):
    variables = random_variables(small())
    safetensors.numpy.save_file(to_torch(small(), variables), tmp_path / "model.safetensors")
    back = variables_from_torch(small(), tmp_path / "model.safetensors", {})
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), back["params"], variables["params"])


def test_what_is_given_is_copied():
    arrays = torch_arrays()
    variables = variables_from_torch(small(), arrays, {})
    before = jax.tree.map(np.array, variables)
    for array in arrays.values():
        array[...] = 0
    jax.tree.map(np.testing.assert_array_equal, variables, before)


# ---------------- what is wrong ----------------


def test_what_is_wrong_is_named():
    arrays = torch_arrays()
    assert loaded(small(), arrays)["params/blocks/attention/qkv/kernel"].shape == (2, 12, 36)
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(5, 9\); ViT wants \(5, 12\) for 'params/head/ker"):
        loaded(small(), torch_arrays(**{"head.weight": (5, 9)}))
    with pytest.raises(
        ValueError, match=r"'blocks.2.norm1.weight' is no parameter of ViT; are these the weights of an"
    ):
        loaded(small(), torch_arrays(**{"blocks.2.norm1.weight": (12,)}))
    with pytest.raises(ValueError, match=r"'blocks.1.attn.qkv.bias' has shape \(7,\); ViT wants \(36,\)"):
        loaded(small(), torch_arrays(**{"blocks.1.attn.qkv.bias": (7,)}))
    with pytest.raises(ValueError, match=r"'norm.bias' has numbers that are not finite"):
        loaded(small(), {**arrays, "norm.bias": np.full(12, 1e300)})
    with pytest.raises(ValueError, match=r"'norm.bias' must be an array of floating numbers; got int64"):
        loaded(small(), {**arrays, "norm.bias": np.zeros(12, int)})
    for missing in ("norm.bias", "blocks.1.mlp.fc1.weight"):
        others = {name: array for name, array in arrays.items() if name != missing}
        with pytest.raises(ValueError, match=rf"no array given for '{missing}' \(1 of 32 are missing\)"):
            loaded(small(), others)
    with pytest.raises(TypeError, match="takes a mapping of arrays by name or the path of a file; got a list"):
        variables_from_torch(small(), [])


def test_what_is_wrong_on_the_way_back_is_named():
    variables = random_variables(small())
    assert to_torch(small(), {}) == {}
    head = variables["params"].pop("head")
    with pytest.raises(ValueError, match="the variables have no 'params/head/bias', which ViT has"):
        to_torch(small(), variables)
    variables["params"]["head"] = {"bias": head["bias"], "kernel": head["kernel"].T}
    with pytest.raises(ValueError, match=r"'params/head/kernel' has shape \(5, 12\); ViT wants \(12, 5\)"):
        to_torch(small(), variables)
    variables["params"]["head"] = {**head, "scale": head["bias"]}
    with pytest.raises(ValueError, match="'params/head/scale' is no variable of ViT"):
        to_torch(small(), variables)


def test_a_model_without_pytorch_names_is_refused():
    with pytest.raises(ValueError, match="Dense has no PyTorch names"):
        variables_from_torch(nn.Dense(3), {})


# ---------------- what is bridged ----------------


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "_orig_mod."])
@pytest.mark.parametrize("nested", [False, True])
def test_prefixes(prefix, nested):
    arrays = {f"{prefix}{name}": array for name, array in torch_arrays().items()}
    found = loaded(small(), {"model": arrays, "epoch": 3} if nested else arrays)
    np.testing.assert_array_equal(found["params/head/kernel"], torch_arrays()["head.weight"].T)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_dtypes_become_float32(dtype):
    arrays = {name: array.astype(dtype) for name, array in torch_arrays().items()}
    (kernel,) = [array for path, array in loaded(small(), arrays).items() if path == "params/head/kernel"]
    np.testing.assert_array_equal(kernel, arrays["head.weight"].T.astype(np.float32), strict=True)


def test_another_number_of_classes_leaves_the_head_fresh():
    model, fresh = small(7), random_variables(small(7))
    with pytest.warns(UserWarning, match=r"^head is for 5 classes, not 7: it stays fresh$"):
        variables = variables_from_torch(model, torch_arrays(), fresh)
    assert variables["params"]["head"]["kernel"] is not None
    jax.tree.map(np.testing.assert_array_equal, variables["params"]["head"], fresh["params"]["head"])
    np.testing.assert_array_equal(variables["params"]["norm"]["bias"], torch_arrays()["norm.bias"])


def test_a_mechanism_stays_fresh_where_it_is_not_in_the_file():
    model = small(activation=dpa_jax.activation("raa"), arr=True)
    fresh = random_variables(model)
    variables = flatten_dict(variables_from_torch(model, torch_arrays(), fresh), sep="/")
    kept = [path for path, array in flatten_dict(fresh, sep="/").items() if np.array_equal(variables[path], array)]
    assert sorted(kept) == [
        "params/blocks/mlp/activation/shift_bias",
        "params/blocks/mlp/activation/shift_kernel",
        "response_memory/blocks/arr/count",
        "response_memory/blocks/arr/mean",
    ]
    assert match(model, torch_arrays()).summary == (
        "32 of 36 arrays loaded; blocks.mlp.activation.shift_bias, blocks.mlp.activation.shift_kernel not there: fresh"
    )
    with pytest.raises(ValueError, match=r"no array given for 'blocks.1.mlp.act.shift_proj_weight' \(1 of 36"):
        loaded(model, torch_arrays(**{"blocks.0.mlp.act.shift_proj_weight": (1, 48)}))


@pytest.mark.parametrize("sizes", ["14_8_1", "8_14_1", "4_6_2", "7_2_0", "6_1_1"])
def test_position_embeddings_are_interpolated_as_in_timm(golden, sizes):
    """Recorded with timm 1.0.31: numbers of patches a side there and here, tokens before them."""
    recorded = golden("torch_positions")
    _, side, others = map(int, sizes.split("_"))
    there, here = recorded[f"in_{sizes}"], recorded[f"out_{sizes}"]

    class Positions(nn.Module):
        num_classes: int = 1
        example_inputs = jax.ShapeDtypeStruct((1, 5), jnp.float32)
        torch_names = {"positions": "pos_embed"}  # noqa: RUF012

        @nn.compact
        def __call__(self, x):
            return self.param("positions", nn.initializers.zeros, (1, others + side**2, 5), jnp.float32)

    found = match(Positions(), {"pos_embed": there})
    np.testing.assert_allclose(found.arrays["params/positions"], here, rtol=0, atol=2e-6)
    assert (
        found.summary
        == f"1 of 1 arrays loaded; pos_embed interpolated from {there.shape[1]} to {here.shape[1]} positions"
    )
    with pytest.raises(ValueError, match="'pos_embed' has shape"):
        match(Positions(), {"pos_embed": np.zeros((1, others + side**2 + 1, 5), np.float32)})


class Classifier(nn.Module):
    """A convolution, a BatchNorm and a dense layer on flattened maps [H, W, C]."""

    num_classes: int = 3
    example_inputs = jax.ShapeDtypeStruct((1, 4, 5, 2), jnp.float32)
    torch_names = {"conv": "features.0", "norm": "features.1", "hidden": "classifier.0", "head": "classifier.2"}  # noqa: RUF012
    torch_flattened = {"hidden": (6, 4, 5)}  # noqa: RUF012

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), feature_group_count=2, name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return nn.Dense(self.num_classes, name="head")(nn.Dense(7, name="hidden")(x.reshape(len(x), -1)))


def classifier_arrays():
    generator = np.random.default_rng(0)
    shapes = {
        "features.0.weight": (6, 1, 3, 3), "features.0.bias": (6,), "features.1.weight": (6,), "features.1.bias": (6,),
        "features.1.running_mean": (6,), "features.1.running_var": (6,), "classifier.0.weight": (7, 120),
        "classifier.0.bias": (7,), "classifier.2.weight": (3, 7), "classifier.2.bias": (3,),
    }  # fmt: skip
    return {name: generator.random(shape, np.float32) for name, shape in shapes.items()}


def test_running_statistics_and_flattened_maps():
    arrays = classifier_arrays()
    variables = variables_from_torch(Classifier(), {**arrays, "features.1.num_batches_tracked": np.int64(4)})
    np.testing.assert_array_equal(variables["batch_stats"]["norm"]["mean"], arrays["features.1.running_mean"])
    np.testing.assert_array_equal(variables["batch_stats"]["norm"]["var"], arrays["features.1.running_var"])
    np.testing.assert_array_equal(variables["params"]["conv"]["kernel"][:, :, 0, 4], arrays["features.0.weight"][4, 0])
    # One row of PyTorch's, [C, H, W], on maps [H, W, C].
    maps = np.random.default_rng(1).random((4, 5, 6), np.float32)
    expected = arrays["classifier.0.weight"] @ maps.transpose(2, 0, 1).ravel()
    np.testing.assert_allclose(maps.ravel() @ variables["params"]["hidden"]["kernel"], expected, rtol=1e-5)
    back = to_torch(Classifier(), variables)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array, strict=True)
        assert back[name].flags.c_contiguous
    assert to_torch(Classifier(), {"params": variables["params"]}).keys() == {n for n in arrays if "running" not in n}


def test_timms_vgg():
    """Its dense layers are convolutions over all of the map, under other names."""
    arrays = zoo.under(zoo.recording("vgg11_imagenet")[1], "init/")
    plan = [int(array.shape[0]) for name, array in arrays.items() if name.startswith("features.") and array.ndim == 4]
    widths = (plan[:1], plan[1:2], plan[2:4], plan[4:6], plan[6:])
    model = dpa_jax.models.create("vgg11_224", 6, widths=widths, hidden=24)
    names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
    others = {functools.reduce(lambda n, pair: n.replace(*pair), names.items(), n): a for n, a in arrays.items()}
    others["pre_logits.fc1.weight"] = others["pre_logits.fc1.weight"].reshape(24, -1, 7, 7)
    others["pre_logits.fc2.weight"] = others["pre_logits.fc2.weight"][:, :, None, None]
    jax.tree.map(np.testing.assert_array_equal, loaded(model, others), loaded(model, arrays))
    with pytest.raises(ValueError, match=r"'classifier\.0\.bias' is given twice"):
        loaded(model, {**others, "classifier.0.bias": arrays["classifier.0.bias"]})
    others["pre_logits.fc1.weight"] = np.zeros((24, 8, 6, 7), np.float32)
    with pytest.raises(ValueError, match=r"'classifier.0.weight' has shape \(24, 8, 6, 7\); VGG wants \(24, 392\)"):
        loaded(model, others)
