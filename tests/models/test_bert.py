"""BERT against Hugging Face's recorded numbers, its options, and weights from its folders."""

import functools
import json

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dpa_jax
from dpa_jax.config import default_config
from dpa_jax.data.batch import Batch
from dpa_jax.models import create, to_torch, variables_from_torch
from dpa_jax.models.bert import SIZES
from dpa_jax.training.optimizer import make_optimizer
from dpa_jax.training.state import create_model, create_state
from dpa_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("compile_quickly")

K = 5
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def recorded(golden):
    arrays = golden("graph/bert_tiny")
    return {**arrays, "config": json.loads(str(arrays["config"]))}


def sizes_of(recorded):
    return {name: recorded["config"][name] for name in SIZES} | WITHOUT_DROPOUT | {"sequence_length": 13}


def inputs_of(recorded):
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: recorded[name].astype(np.int32) for name in names}, recorded["labels"].astype(np.int32)


def part_of(recorded, prefix):
    return {name.removeprefix(prefix): array for name, array in recorded.items() if name.startswith(prefix)}


def small(**options):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 9}
    return create("bert", K, **{"vocab_size": 30, "sequence_length": 6, **sizes, **options})


def some(batch=4, length=6):
    """Token ids, and texts of different lengths."""
    rng = np.random.default_rng(0)
    ids, lengths = rng.integers(5, 30, (batch, length)).astype(np.int32), 2 + np.arange(batch) % (length - 1)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


# ---------------- the recorded numbers ----------------


@pytest.mark.core
def test_logits_hidden_states_loss_and_gradients_are_hugging_faces(recorded):
    model, (inputs, labels) = create("bert", K, **sizes_of(recorded)), inputs_of(recorded)
    params = variables_from_torch(model, part_of(recorded, "state/"), {})["params"]
    close = functools.partial(np.testing.assert_allclose, rtol=0)

    @jax.jit
    def run(params):
        def loss_fn(params):
            logits, seen = model.apply({"params": params}, inputs, capture_intermediates=True, mutable="intermediates")
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, (logits, seen["intermediates"])

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    (loss, (logits, seen)), gradients = run(params)
    close(loss, recorded["gelu/loss"], rtol=2e-6)
    close(logits, recorded["gelu/logits"], atol=1e-5)
    (embedded,), (layers,) = seen["norm"]["__call__"], seen["layers"]["__call__"]
    close(np.concatenate([embedded[None], layers[0]]), recorded["gelu/hidden_states"], atol=1e-5)
    close(np.tanh(seen["pooler"]["__call__"][0]), recorded["gelu/pooled"], atol=1e-5)
    gradients, expected = to_torch(model, {"params": gradients}), part_of(recorded, "gelu/grad/")
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        close(gradient, expected[name], atol=1e-6, err_msg=name)

    relu = create("bert", K, activation=dpa_jax.activation("relu"), **sizes_of(recorded))
    close(jax.jit(relu.apply)({"params": params}, inputs), recorded["relu/logits"], atol=1e-5)


@pytest.mark.core
def test_ten_steps_with_dpa_are_the_recorded_ones(recorded):
    """The project's own step, optimiser and model, from the recorded start."""
    config, told = default_config(), recorded["config"]
    config.model, config.mechanism = "bert", "dpa"
    options = sizes_of(recorded)
    from_data = {name: options.pop(name) for name in ("vocab_size", "sequence_length")}
    config.model_options, config.mechanism_options = options, {"update_interval": told["dpa"]["update_interval"]}
    config.coefficients.channel, config.clip_norm = told["dpa"]["coefficient"], 0.0
    config.optimizer.update(name="adamw", weight_decay=0.01)
    model = create_model(config, K, **from_data)
    optimizer = make_optimizer(config, lambda step: 1e-3)
    state = jax.jit(lambda: create_state(model, optimizer, (), seed=0))()
    params = variables_from_torch(model, part_of(recorded, "state/"), {})["params"]
    state = state.replace(params=params, opt_state=optimizer.init(params))
    step = jax.jit(make_train_step(model, optimizer, lambda key, batch: batch.inputs, config.coefficients))
    (inputs, labels), nothing = inputs_of(recorded), np.zeros(6, np.int32)
    for t, (total, entropy, channel, masked) in enumerate(recorded["dpa/losses"]):
        state, metrics = step(state, Batch(inputs, labels, nothing, nothing))
        found = [metrics[name] for name in ("loss", "loss_cross_entropy", "loss_channel")]
        np.testing.assert_allclose(found, [total, entropy, channel], rtol=2e-6, atol=4e-6, err_msg=f"step {t}")
        entries = 2 * 6 * told["intermediate_size"]
        np.testing.assert_allclose(metrics["masked_fraction"] * entries, masked, rtol=1e-6, err_msg=f"step {t}")
    memories = {"forward": state.model_state["forward_memory"], "backward": state.backward_memory}
    for name, memory in memories.items():
        for i, mean in enumerate(memory["layers"]["activation"]["mean"]):
            np.testing.assert_allclose(mean, recorded[f"dpa/{name}_memory/{i}"], rtol=0, atol=1e-5)
    logits = jax.jit(model.apply)(state.variables, inputs)
    np.testing.assert_allclose(logits, recorded["dpa/logits_final"], rtol=0, atol=1e-4)


# ---------------- options ----------------


def test_sizes_and_what_they_are_by_name():
    shapes = jax.eval_shape(small().init, jax.random.key(0), small().example_inputs)["params"]
    assert shapes["layers"]["intermediate"]["kernel"].shape == (2, 8, 12)
    base = create("bert_base_uncased", 2)
    shapes = jax.eval_shape(base.init, jax.random.key(0), base.example_inputs)["params"]
    # 109,482,240 of BertModel, and a head of two classes.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 109_482_240 + 2 * 768 + 2


def test_what_padding_holds_changes_nothing():
    model, inputs = small(activation=dpa_jax.activation("dpa", num_classes=K)), some()
    variables = jax.jit(model.init)(jax.random.key(0), inputs)
    other = {**inputs, "input_ids": np.where(inputs["attention_mask"], inputs["input_ids"], 7)}
    longer = {name: np.pad(array, ((0, 0), (0, 3))) for name, array in inputs.items()}
    apply = jax.jit(model.apply)
    for changed in (other, longer):
        np.testing.assert_allclose(apply(variables, changed), apply(variables, inputs), rtol=0, atol=1e-6)


def test_dropout_of_the_attention_leaves_padding_out():
    model, inputs = small(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0), some()
    variables = jax.jit(model.init)(jax.random.key(0), inputs)
    apply = jax.jit(functools.partial(model.apply, train=True))
    a, b = (apply(variables, inputs, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1))
    assert not np.allclose(a, b)
    other = {**inputs, "input_ids": np.where(inputs["attention_mask"], inputs["input_ids"], 7)}
    np.testing.assert_array_equal(apply(variables, other, rngs={"dropout": jax.random.key(0)}), a)
    nothing = jax.tree.map(np.zeros_like, inputs)  # padding alone
    assert np.isfinite(apply(variables, nothing, rngs={"dropout": jax.random.key(0)})).all()


def test_mechanisms_are_in_every_layer_and_an_arr_is_behind_each():
    model = small(activation=dpa_jax.activation("dpa", num_classes=K), arr=True)
    found = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)
    assert found["forward_memory"]["layers"]["activation"]["mean"].shape == (2, K, 12)
    assert found["response_memory"]["layers"]["arr"]["mean"].shape == (2, K, 8)


def test_a_batch_on_explicit_axes_has_the_logits_of_one_device_and_gradients():
    model = small(activation=dpa_jax.activation("dpa", num_classes=K, update_interval=1), arr=True)
    inputs, labels = some(8), np.arange(8) % K
    variables = jax.jit(model.init)(jax.random.key(0), inputs)

    def figures(inputs, labels):
        def loss_fn(params):
            apply = functools.partial(model.apply, train=True, mutable=dpa_jax.MUTABLE)
            logits, _ = apply({**variables, "params": params}, inputs, labels, rngs={"dropout": jax.random.key(1)})
            return (logits**2).mean(), logits

        return jax.jit(jax.grad(loss_fn, has_aux=True))(variables["params"])

    expected = figures(inputs, labels)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    placed = jax.device_put((inputs, labels), NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        spread = figures(*placed)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    jax.tree.map(close, jax.device_get(spread), jax.device_get(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads 3 does not divide hidden_size 8"),
        ({"sequence_length": 10}, "sequence_length 10 is more than max_position_embeddings 9"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\)"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"activation_places": "last"}, "activation_places must be 'all' or patterns"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_inputs_are_told():
    model, inputs = small(), some()
    for bad, message in (
        (inputs["input_ids"], "the inputs must be a mapping with input_ids, attention_mask, token_type_ids; got a nda"),
        ({"input_ids": inputs["input_ids"]}, r"got \['input_ids'\]"),
        (
            {**inputs, "attention_mask": inputs["attention_mask"][:, 1:]},
            r"attention_mask must be integers \[B, L\], al",
        ),
        ({**inputs, "input_ids": inputs["input_ids"] * 1.0}, "input_ids must be integers .* got float"),
        (some(length=10), "the length of input_ids 10 is more than max_position_embeddings 9"),
    ):
        with pytest.raises(ValueError, match=message):
            model.init(jax.random.key(0), bad)


# ---------------- folders of Hugging Face ----------------


@pytest.fixture(scope="module")
def published():
    """The model of a made-up folder, its variables, and its arrays by their names."""
    model = small()
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return model, variables, to_torch(model, variables)


def write(folder, arrays, **changes):
    """A folder as Hugging Face's, in which some of the configuration is changed."""
    model = small()
    told = {"model_type": "bert", "hidden_act": "gelu"} | {name: getattr(model, name) for name in SIZES} | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(told))
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    return folder


def test_a_folder_and_back(tmp_path, published):
    model, variables, arrays = published
    back = variables_from_torch(model, write(tmp_path / "bert", arrays), {})
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), back["params"], variables["params"])
    assert arrays["bert.encoder.layer.1.intermediate.dense.weight"].shape == (12, 8)
    (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "bert" / "pytorch_model.bin")  # read by its content
    again = variables_from_torch(model, tmp_path / "bert", {})
    jax.tree.map(np.testing.assert_array_equal, again["params"], back["params"])


def test_files_of_the_pretraining_have_other_heads_and_names(published):
    model, variables, arrays = published
    body = {name: array for name, array in arrays.items() if name.startswith("bert.")}
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in body.items()
    }
    ids = {"bert.embeddings.position_ids": np.arange(9)[None], "cls.predictions.bias": np.zeros(30, np.float32)}
    bare = {name.removeprefix("bert."): array for name, array in body.items()}
    assert old.keys() != body.keys()
    for given in (old | ids, bare | {"embeddings.position_ids": np.arange(9)[None]}):
        with pytest.warns(UserWarning, match="classifier is not there: it stays fresh"):
            back = variables_from_torch(model, given, jax.tree.map(np.zeros_like, variables))["params"]
        assert not np.any(back["classifier"]["kernel"])
        back["classifier"] = variables["params"]["classifier"]
        jax.tree.map(np.testing.assert_array_equal, back, variables["params"])


def test_folders_that_do_not_fit_are_told_in_one_line(tmp_path, published):
    model, _, arrays = published
    lacking = {name: array for name, array in arrays.items() if name != "bert.pooler.dense.bias"}

    def refused(folder, message, error=ValueError, model=model):
        with pytest.raises(error, match=message) as told:
            variables_from_torch(model, folder, {})
        assert "\n" not in str(told.value)

    folder = tmp_path / "bert"
    refused(write(folder, arrays, model_type="roberta"), "another architecture than Bert: model_type is 'roberta', not")
    refused(write(folder, arrays, hidden_act="relu"), "hidden_act is 'relu', not 'gelu'")
    refused(
        write(folder, arrays, num_attention_heads=4, vocab_size=31),
        r"config.json: vocab_size is 31, the model's 30, num_attention_heads is 4, the model's 2",
    )
    refused(write(folder, lacking), r"no array given for 'bert.pooler.dense.bias' \(1 of 41 are missing\)")
    image_model = create("vit", K, image_size=8)
    refused(write(folder, arrays), "bert is a folder, and ViT is loaded from files alone", model=image_model)
    (folder / "model.safetensors").unlink()
    refused(folder, "there is no model.safetensors or pytorch_model.bin in the folder", FileNotFoundError)
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json is damaged: it is no JSON object")
    (folder / "config.json").unlink()
    refused(folder, "there is no .*config.json, which says what", FileNotFoundError)
