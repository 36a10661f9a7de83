"""ViT against the authors' program, its sizes, its initialisation and its options."""

import contextlib
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpa_jax
from dpa_jax.config import default_config
from dpa_jax.data.batch import Batch
from dpa_jax.models import layers
from dpa_jax.training.optimizer import make_optimizer
from dpa_jax.training.state import create_model, create_state
from dpa_jax.training.step import make_eval_step, make_train_step


def small(**options):
    sizes = {"image_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return dpa_jax.models.create("vit", 5, **{**sizes, **options})


def initial(model):
    """The model's first variables, compiled as one program: op by op takes far longer."""
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros(model.example_inputs.shape))


# ---------------- the authors' program ----------------


def run_config(recorded):
    """The recording's configuration as a run's."""
    config = default_config()
    config.mechanism = recorded["mechanism"]
    config.coefficients = dict(zip(recorded["loss_names"][1:], recorded["coefs"], strict=True))
    config.model_options = {
        "image_size": recorded["img_size"],
        **{name: recorded[name] for name in ("patch_size", "embed_dim", "depth", "num_heads")},
        "mlp_ratio": float(recorded["mlp_ratio"]),
    }
    config.clip_norm = recorded["clip_max_norm"]
    config.optimizer.update(name=recorded["optimizer"], eps=recorded["eps"], weight_decay=recorded["weight_decay"])
    config.optimizer.beta1, config.optimizer.beta2 = recorded["betas"]
    return config


def memories(state, i):
    """{name in the recording: array} of everything that the i-th block remembers."""
    found = {}
    names = {"active": "activation_counts", "inhibited": "inhibition_counts", "total": "total_counts"}
    for collection, tree in {**state.model_state, "backward_memory": state.backward_memory}.items():
        blocks = tree.get("blocks", {})
        for name, value in (blocks.get("arr") or blocks.get("mlp", {}).get("activation", {})).items():
            if name in names or name == "mean":
                found[names.get(name, collection.removesuffix("_memory"))] = value[i]
    return found


@pytest.mark.core
@pytest.mark.parametrize("mechanism", ["dpa", "dnrt", "aiec"])
def test_training_follows_the_authors_program(golden, mechanism):
    """The project's own step, optimiser and model, from the recorded start, over the recorded batches."""
    arrays = golden(f"vit_{mechanism}")
    recorded = json.loads(str(arrays["config"]))
    config = run_config(recorded)
    model = create_model(config, recorded["num_classes"], in_channels=3)
    optimizer = make_optimizer(config, lambda step: recorded["lr"])
    state = jax.jit(lambda: create_state(model, optimizer, (), seed=0))()
    init = {name.removeprefix("init/"): arrays[name] for name in arrays if name.startswith("init/")}
    params = dpa_jax.models.variables_from_torch(model, init)["params"]
    state = state.replace(params=params, opt_state=optimizer.init(params))

    images = np.moveaxis(arrays["images_nchw"], 2, -1)
    step = jax.jit(make_train_step(model, optimizer, lambda key, batch: batch.inputs, config.coefficients))
    names = [{"ce": "cross_entropy"}.get(name, name) for name in recorded["loss_names"]]
    for t in range(recorded["steps"]):
        nothing = np.zeros(images.shape[1], np.int32)
        state, metrics = step(state, Batch(images[t], arrays["labels"][t].astype(np.int32), nothing, nothing))
        close = functools.partial(np.testing.assert_allclose, rtol=5e-5, atol=0, err_msg=f"step {t}")
        close([metrics[f"loss_{name}"] for name in names], arrays["losses"][t])
        close(metrics["gradient_norm"], arrays["grad_norm"][t])

    def close(actual, desired):
        np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-4)

    blocks = range(recorded["depth"])
    remembered = {f"memory/{i}/{name}": found for i in blocks for name, found in memories(state, i).items()}
    assert remembered.keys() == {name for name in arrays if name.startswith("memory/")}
    for name, found in remembered.items():
        close(found, np.nan_to_num(arrays[name]))  # a class that has not been seen has no row there, and zeros here
    close(model.apply(state.variables, images[-1]), arrays["eval_logits"])
    final = {name.removeprefix("final/"): arrays[name] for name in arrays if name.startswith("final/")}
    expected = dpa_jax.models.variables_from_torch(model, final, {})["params"]
    width = recorded["embed_dim"]
    for params in (expected, state.params):
        # A key's bias shifts all of a query's scores alike: its gradient is rounding, which Adam makes steps of.
        qkv = params["blocks"]["attention"]["qkv"]
        qkv["bias"] = np.delete(qkv["bias"], np.s_[width : 2 * width], axis=-1)
    jax.tree.map(close, state.params, expected)


def test_first_gradients_are_the_authors(golden):
    arrays = golden("vit_dpa")
    recorded = json.loads(str(arrays["config"]))
    model = create_model(run_config(recorded), recorded["num_classes"], in_channels=3)
    start, expected = (
        dpa_jax.models.variables_from_torch(
            model, {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
        )["params"]
        for prefix in ("init/", "grad0_clipped/")
    )
    images, labels = np.moveaxis(arrays["images_nchw"][0], 1, -1), arrays["labels"][0]

    def loss_fn(params):  # the memories are empty: no penalty in the first step
        logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    clip = optax.clip_by_global_norm(recorded["clip_max_norm"])
    clipped, _ = jax.jit(lambda params: clip.update(jax.grad(loss_fn)(params), clip.init(params)))(start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), clipped, expected)


# ---------------- sizes and initialisation ----------------


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        # 12 blocks of 444,864, a class token, positions, a patch embedding, a norm and a head at width 192.
        ("vit_tiny_patch4_32", 100, 5_380_132),
        ("vit_tiny_patch4_32", 10, 5_362_762),
        ("vit_tiny_patch16_224", 1000, 5_717_416),
    ],
)
def test_parameter_counts(name, num_classes, parameters):
    model = dpa_jax.models.create(name, num_classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_initialisation():
    model = dpa_jax.models.create("vit_tiny_patch4_32", 100, depth=2)
    params = initial(model)["params"]
    patch = params.pop("patch_embed")
    bound = (4 * 4 * 3) ** -0.5
    for leaf in patch.values():
        assert 0.95 * bound < np.abs(leaf).max() <= bound
    np.testing.assert_allclose(np.std(patch["kernel"]), bound / 3**0.5, rtol=0.02)
    assert 0 < np.abs(params.pop("class_token")).max() < 1e-5
    np.testing.assert_allclose(np.std(params.pop("position_embedding")), 0.02, rtol=0.03)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind = path[-1].key
        if kind == "kernel":
            np.testing.assert_allclose(np.std(leaf), 0.02, rtol=0.03)
            assert np.abs(leaf).max() < 0.12
        else:
            assert (leaf == {"bias": 0, "scale": 1}[kind]).all()


# ---------------- options ----------------


def test_bfloat16_compute_keeps_float32_parameters_memories_and_logits():
    factory = dpa_jax.activation("dpa", num_classes=5, update_interval=1)
    model, reference = small(activation=factory, dtype=jnp.bfloat16), small(activation=factory)
    images = jax.random.normal(jax.random.key(1), (6, 8, 8, 3))
    variables = initial(model)
    apply = functools.partial(model.apply, train=True, mutable=dpa_jax.MUTABLE)
    logits, mutated = jax.jit(apply)(variables, images, jnp.arange(6) % 5)
    assert logits.dtype == jnp.float32
    floats = {leaf.dtype for leaf in jax.tree.leaves((variables, mutated["forward_memory"]))}
    assert floats == {jnp.dtype("float32"), jnp.dtype("int32")}
    exact = jax.jit(reference.apply)(variables, images)
    np.testing.assert_allclose(logits, exact, atol=0.02)
    assert not np.array_equal(logits, exact)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    model = small(depth=2, stochastic_depth=0.5)
    images = jax.random.normal(jax.random.key(1), (1, 8, 8, 3)).repeat(64, axis=0)
    variables = initial(model)
    # A branch that is dropped or doubled: four outcomes of the last block, and none in evaluation.
    params = jax.tree.map(lambda leaf: 10 * leaf, variables["params"])
    apply = jax.jit(functools.partial(model.apply, train=True))
    logits = apply({"params": params}, images, rngs={"dropout": jax.random.key(2)})
    assert len(np.unique(np.round(logits[:, 0], 3))) == 4
    other = apply({"params": params}, images, rngs={"dropout": jax.random.key(3)})
    assert not np.array_equal(logits, other)
    still = jax.jit(model.apply)({"params": params}, images)
    np.testing.assert_allclose(still, np.broadcast_to(still[:1], still.shape), rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 3])
def test_stochastic_depth_rises_linearly_from_zero(depth, monkeypatch):
    def drop_path(module, x, rate, train):
        module.sow("rates", "rate", rate)
        return x

    monkeypatch.setattr(layers, "drop_path", drop_path)
    model = small(depth=depth, stochastic_depth=0.1)
    rates = initial(model)["rates"]["blocks"]["rate"]
    np.testing.assert_allclose(rates, [np.linspace(0, 0.1, depth)] * 2, rtol=1e-6)


def test_dropout_is_for_training_only():
    model = small(dropout=0.5)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = initial(model)
    apply = jax.jit(functools.partial(model.apply, train=True))
    a, b = (apply(variables, images, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1))
    assert not np.allclose(a, b)
    evaluate = jax.jit(model.apply)
    np.testing.assert_array_equal(evaluate(variables, images), evaluate(variables, images))


def test_activation_is_any_factory_of_modules():
    images = jnp.ones((2, 8, 8, 3))
    outputs = {}
    for name in ("relu", "gelu", "dpa"):
        options = {"num_classes": 5} if name == "dpa" else {}
        model = small(activation=dpa_jax.activation(name, **options))
        variables = initial(model)
        outputs[name] = jax.jit(model.apply)(variables, images)
        assert ("forward_memory" in variables) == (name == "dpa")
    np.testing.assert_array_equal(outputs["relu"], outputs["dpa"])  # tau = 0, no labels
    assert not np.allclose(outputs["relu"], outputs["gelu"])


def test_padded_samples_of_an_evaluation_change_nothing():
    model = small(activation=dpa_jax.activation("dpa", num_classes=5, update_interval=1))
    images = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    labels = jnp.arange(8) % 5
    variables = initial(model)
    memory = jax.tree.map(lambda leaf: leaf - (leaf.dtype == jnp.float32), variables["forward_memory"])
    backward = jax.tree.map(lambda leaf: leaf - 1, variables["backward_memory"])
    variables = {**variables, "forward_memory": memory, "backward_memory": backward}
    evaluate = jax.jit(lambda *given: make_eval_step(model, lambda batch: batch.inputs)(*given)[0])
    zeros = jnp.zeros(8, jnp.int32)
    padded = evaluate(variables, Batch(images, jnp.where(jnp.arange(8) < 5, labels, -1), zeros, zeros))
    few = evaluate(variables, Batch(images[:5], labels[:5], zeros[:5], zeros[:5]))
    assert few.terms["channel"].count > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), padded, few)


# ---------------- blocks in a scan ----------------


class AllMechanisms(nn.Module):
    """DPA and AIEC in one activation."""

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        for mechanism in (dpa_jax.DPA, dpa_jax.AIEC):
            x = mechanism(5, update_interval=1, pool="token")(x - 0.01, labels, train)
        return x


def test_scanned_and_unrolled_blocks_are_the_same_model():
    """Initialisation and two steps, with dropout and stochastic depth; both go on from the scanned form's state.

    The scanned form has its labels from `supervise`.
    """
    options = {"activation": AllMechanisms, "arr": True, "dropout": 0.2, "stochastic_depth": 0.5}
    models = [small(**options, scan=True), small(**options, scan=False)]
    images = jax.random.normal(jax.random.key(1), (12, 8, 8, 3))
    labels = jnp.arange(12) % 5

    def step(model, variables, key):
        def loss_fn(params, backward_memory):
            with dpa_jax.supervise(labels, train=True) if model.scan else contextlib.nullcontext():
                logits, mutated = model.apply(
                    {**variables, "params": params, "backward_memory": backward_memory},
                    images,
                    None if model.scan else labels,
                    train=True,
                    mutable=dpa_jax.MUTABLE,
                    rngs={"dropout": key},
                )
            penalties = dpa_jax.penalties(mutated)
            memories = {name: tree for name, tree in mutated.items() if name in variables}
            entropies = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(entropies) + sum(penalties.values()), (logits, penalties, memories)

        gradients_of = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)
        return gradients_of(variables["params"], variables["backward_memory"])

    def close(actual, desired):
        np.testing.assert_allclose(actual, desired, rtol=1e-5, atol=1e-6)

    variables, unrolled = map(initial, models)
    jax.tree.map(close, unrolled, variables)
    steps = [jax.jit(functools.partial(step, model)) for model in models]
    for t in range(2):
        scanned, unrolled = (run(variables, jax.random.key(t)) for run in steps)
        jax.tree.map(close, unrolled, scanned)
        (gradients, update), (_, _, memories) = scanned
        params = jax.tree.map(lambda a, b: a - 0.1 * b, variables["params"], gradients)
        backward_memory = optax.apply_updates(variables["backward_memory"], update)
        variables = {**variables, **memories, "params": params, "backward_memory": backward_memory}
    penalties = scanned[1][1]
    assert penalties.keys() == {"channel", "aux", "gate", "arr"} and min(penalties.values()) > 0


def test_a_scan_is_a_loop_and_an_unrolled_one_is_none():
    def loops(model):
        variables = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)
        loss = jax.grad(lambda variables, images: jnp.sum(model.apply(variables, images, train=True)))
        return jax.jit(loss).lower(variables, model.example_inputs).as_text().count("stablehlo.while")

    assert loops(small(depth=3, scan=True)) == 2  # one there and one back
    assert loops(small(depth=3, scan=False)) == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_an_activation_of_ones_own_has_its_variables_stacked(depth):
    class Counting(nn.Module):
        """Parameters, a collection that nobody here knows, and a random stream of its own."""

        @nn.compact
        def __call__(self, x, labels=None, train=False):
            slope = self.param("slope", nn.initializers.normal(), (x.shape[-1],))
            calls = self.variable("usage", "calls", jnp.zeros, (), jnp.int32)
            if train:
                calls.value += 1
                x += jax.random.normal(self.make_rng("noise"), x.shape)
            self.sow("seen", "first", x[0, 0])
            return x * jnp.broadcast_to(slope, x.shape)

    model = small(depth=depth, activation=Counting)
    images = jnp.zeros((2, 8, 8, 3))
    variables = initial(model)
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["usage", "seen"]))
    _, mutated = apply(
        {name: variables[name] for name in ("params", "usage")}, images, rngs={"noise": jax.random.key(1)}
    )
    np.testing.assert_array_equal(mutated["usage"]["blocks"]["mlp"]["activation"]["calls"], np.ones(depth))
    # Every block draws its own parameters and its own noise.
    slopes = variables["params"]["blocks"]["mlp"]["activation"]["slope"]
    (seen,) = mutated["seen"]["blocks"]["mlp"]["activation"]["first"]
    for rows in (slopes, seen):
        assert rows.shape == (depth, 48) and len(np.unique(rows, axis=0)) == depth


# ---------------- names ----------------


def test_a_registered_model_is_known_by_name_and_takes_its_options(monkeypatch):
    monkeypatch.setattr(dpa_jax.models, "MODELS", dict(dpa_jax.models.MODELS))
    dpa_jax.models.register("narrow", functools.partial(dpa_jax.models.ViT, embed_dim=12))
    model = dpa_jax.models.create("narrow", 5, depth=2)
    assert (model.embed_dim, model.depth, model.num_classes) == (12, 2, 5)
    with pytest.raises(ValueError, match="'narrow' is taken"):
        dpa_jax.models.register("narrow", dpa_jax.models.ViT)
    with pytest.raises(TypeError, match="must be a module class"):
        dpa_jax.models.register("other", "vit")


# ---------------- bad input ----------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "patch_size 3 does not divide image_size 8"),
        ({"num_heads": 5}, "num_heads 5 does not divide embed_dim 12"),
        ({"widht": 3}, r"a key of options must be one of .*; got 'widht'"),
        ({"depth": 2.5}, "options.depth must be of type int; got 2.5"),
        ({"embed_dims": 3}, "Did you mean 'embed_dim'"),
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"depth": 10**9}, "depth must be at most 65536; got 1000000000"),
        ({"patch_size": 0}, "patch_size must be at least 1; got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1; got 0"),
        ({"embed_dim": -12}, "embed_dim must be at least 1; got -12"),
        ({"image_size": 0}, "image_size must be at least 1; got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1; got 0"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio must be in \[0\.08"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be a finite float"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1\.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\); got -0\.1"),
        ({"stochastic_depth": 1.0}, r"stochastic_depth must be in \[0, 1\); got 1\.0"),
        ({"stochastic_depth": 1 - 1e-12}, r"stochastic_depth must be in \[0, 1\)"),  # 1 in float32
        ({"scan": 3}, r"options\.scan must be bool \| None; got 3 of type int"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'vit_tiny_patch4_32'"):
        dpa_jax.models.create("vit_tiny_patch4", 10)


def test_images_of_another_shape_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"images must be \[B, 8, 8, 3\]; got \(2, 16, 16, 3\)"):
        small().init(jax.random.key(0), jnp.zeros((2, 16, 16, 3)))
