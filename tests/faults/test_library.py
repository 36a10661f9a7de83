"""Mistakes in a user's own program: what the library says to each."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dpa_jax
import dpa_jax.nnx
from dpa_jax.activations import registry
from dpa_jax.training.state import create_state
from dpa_jax.training.step import make_train_step

K, C, B = 4, 6, 5
X, LABELS = np.ones((B, C), np.float32), np.arange(B, dtype=np.int32) % K
MECHANISMS = {"DPA": dpa_jax.DPA, "ARR": dpa_jax.ARR, "AIEC": dpa_jax.AIEC}
NNX = {"DPA": dpa_jax.nnx.DPA, "ARR": dpa_jax.nnx.ARR, "AIEC": dpa_jax.nnx.AIEC}
NAN, INFINITE = float("nan"), float("inf")


@functools.cache
def first_variables(name, **options):
    return MECHANISMS[name](K, pool="none", **options).init(jax.random.key(0), X)


def call(name, x=X, labels=LABELS, *, num_classes=K, pool="none", change=None, mutable=dpa_jax.MUTABLE, **options):
    """A training call of a mechanism, with its first variables but for a change of them."""
    variables = dict(first_variables(name))
    if change:
        variables = change(variables)
    return MECHANISMS[name](num_classes, pool=pool).apply(variables, x, labels, train=True, mutable=mutable, **options)


def nnx_call(name, x=X, labels=LABELS, **options):
    return NNX[name](K, C, pool="none", rngs=nnx.Rngs(0))(x, labels, train=True, **options)


# ---------------- settings ----------------

COUNTS = (0, -1, 2.0, 2.5, True, NAN, INFINITE, "5", None, 2**31, [3])
SETTINGS = [
    *[(name, "num_classes", value) for name in MECHANISMS for value in COUNTS],
    *[(name, "update_interval", value) for name in MECHANISMS for value in COUNTS],
    *[(name, "momentum", value) for name in ("DPA", "ARR") for value in (-0.1, 1.1, NAN, INFINITE, True, "0.9", None)],
    *[(name, "tau", value) for name in ("DPA", "AIEC") for value in (-0.1, NAN, INFINITE, -INFINITE, False, "0", None)],
    *[(name, "pool", value) for name in MECHANISMS for value in ("tokens", "", 1, True, ["mean"], np.array(["mean"]))],
    *[("DPA", "criterion", value) for value in ("both", "", 1, None, ["all"])],
    *[(name, "axis_name", value) for name in MECHANISMS for value in (["data"], {})],
]


@pytest.mark.parametrize(("name", "setting", "value"), SETTINGS)
def test_a_setting_out_of_its_range(case, name, setting, value):
    with case.raises(name, setting):
        MECHANISMS[name](**{"num_classes": K, setting: value})


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "6", None])
@pytest.mark.parametrize("name", [*NNX, "RAA"])
def test_a_number_of_features_out_of_its_range(case, name, value):
    with case.raises(name, "num_features"):
        (dpa_jax.nnx.RAA(value) if name == "RAA" else NNX[name](K, value, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("value", [NAN, INFINITE, "1", True, None])
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("elu", "alpha"),
        ("leaky_relu", "negative_slope"),
        ("prelu", "initial_slope"),
        ("learnable_swish", "initial_beta"),
        ("gdn", "initial_gamma"),
    ],
)
def test_a_number_of_a_plain_activation(case, name, setting, value):
    with case.raises(setting):
        dpa_jax.activation(name, **{setting: value})


# ---------------- inputs ----------------

INPUTS = [
    (np.ones((B, C), np.int32), ("floating", "int32")),
    (np.ones((B, C), np.uint8), ("floating", "uint8")),
    (np.ones((B, C), bool), ("floating", "bool")),
    (np.ones((B, C), np.complex64), ("floating", "complex64")),
    (np.float32(1.0), ("channels", "()")),
    (np.ones((B, 0), np.float32), ("channels", "(5, 0)")),
    (None, ("must be an array", "NoneType")),
    ("x", ("must be an array", "str")),
    ([[1.0, 2.0], [3.0]], ("must be an array", "list")),
    (np.array([[None] * C] * B), ("must be an array",)),
]
MISFITS = [
    (np.ones(C, np.float32), ("shape", "(6,)")),
    (np.ones((B, 2, C), np.float32), ("shape", "(5, 2, 6)")),
    (np.ones((B, C + 1), np.float32), ("(4, 7)", "(4, 6)")),
    (np.ones((B - 1, C), np.float32), ("labels", "(4,)", "(5,)")),
    (np.ones((0, C), np.float32), ("labels", "(0,)", "(5,)")),
]


@pytest.mark.parametrize(("x", "words"), [*INPUTS, *MISFITS])
@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("apply", [call, nnx_call], ids=["linen", "nnx"])
def test_an_input_that_does_not_fit(case, apply, name, x, words):
    with case.raises(*words):
        apply(name, x)


@pytest.mark.parametrize(("x", "words"), INPUTS)
@pytest.mark.parametrize("name", ["dpa", "aiec", "raa", "gdn", "prelu", "learnable_swish", "relu", "elu", "softplus"])
def test_a_first_input_that_does_not_fit(case, name, x, words):
    options = {"num_classes": K, "pool": "none"} if name in ("dpa", "aiec") else {}
    with case.raises(*words):
        dpa_jax.activation(name, **options)().init(jax.random.key(0), x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": "tokens"}, ("pool", "tokens", "token")),
        ({"pool": 3}, ("pool", "3")),
        ({"rows_per_sample": 0}, ("rows_per_sample", "0")),
        ({"rows_per_sample": 2.0}, ("rows_per_sample", "2.0")),
        ({"rows_per_sample": True}, ("rows_per_sample", "True")),
        ({"rows_per_sample": 2}, ("2 rows", "5")),
    ],
)
@pytest.mark.parametrize("name", MECHANISMS)
def test_options_of_a_call(case, name, options, words):
    with case.raises(name, *words):
        MECHANISMS[name](K).init(jax.random.key(0), np.ones((B, 3, C), np.float32), **options)


# ---------------- labels ----------------


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(B, np.float32), ("integers", "float32")),
        (np.zeros(B, bool), ("integers", "bool")),
        (np.zeros(B, np.complex64), ("integers", "complex64")),
        (np.array(["a"] * B), ("integers", "<U1")),
        (np.array([None] * B), ("integers", "object")),
        (np.zeros((B, 1), np.int32), ("(5,)", "(5, 1)")),
        (np.zeros((B, K), np.int32), ("(5,)", "(5, 4)")),
        (np.int32(0), ("(5,)", "()")),
        (3, ("(5,)", "()")),
        ("labels", ("(5,)", "()")),
        ([0, 1], ("(5,)", "(2,)")),
        ([[0], [1, 2]], ("labels must be an array",)),
    ],
)
@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("apply", [call, nnx_call], ids=["linen", "nnx"])
def test_labels_that_do_not_fit(case, apply, name, labels, words):
    with case.raises(name, *words):
        apply(name, labels=labels)


# ---------------- variables ----------------


def without(collection):
    return lambda variables: {name: value for name, value in variables.items() if name != collection}


def with_array(collection, name, value):
    return lambda variables: {**variables, collection: {**variables[collection], name: value}}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("DPA", without("forward_memory"), ("forward_memory", "missing")),
        ("DPA", without("backward_memory"), ("backward_memory", "missing")),
        ("ARR", without("response_memory"), ("response_memory", "missing")),
        ("AIEC", without("activity_counters"), ("activity_counters", "missing")),
        ("AIEC", without("params"), ("params", "missing")),
        ("DPA", lambda variables: {}, ("forward_memory", "missing")),
        ("DPA", lambda v: {**v, "forward_memory": {}}, ("forward_memory", "missing")),
        ("DPA", with_array("forward_memory", "mean", np.zeros((K, C - 1))), ("(4, 6)", "(4, 5)")),
        ("DPA", with_array("forward_memory", "mean", np.zeros((K + 1, C))), ("(4, 6)", "(5, 6)")),
        ("DPA", with_array("forward_memory", "mean", np.zeros((C, K))), ("(4, 6)", "(6, 4)")),
        ("DPA", with_array("backward_memory", "mean", np.zeros(C)), ("(4, 6)", "(6,)")),
        ("DPA", with_array("forward_memory", "step", np.zeros(1, int)), ("()", "(1,)")),
        ("DPA", with_array("forward_memory", "step", np.float32(1)), ("step", "int32", "float32")),
        ("DPA", with_array("forward_memory", "mean", np.zeros((K, C), int)), ("float32", "int")),
        ("ARR", with_array("response_memory", "mean", 0.0), ("(4, 6)", "()")),
        ("ARR", with_array("response_memory", "count", np.zeros((K, 1), int)), ("(4,)", "(4, 1)")),
        ("ARR", with_array("response_memory", "count", np.zeros(K)), ("count", "int32", "float")),
        ("AIEC", with_array("activity_counters", "active", np.zeros((K, C))), ("active", "int32", "float")),
        ("AIEC", with_array("params", "decision_weights", np.zeros((C, K), np.float32)), ("(4, 6)", "(6, 4)")),
    ],
)
def test_variables_that_do_not_fit(case, name, change, words):
    with case.raises(*words):
        call(name, change=change)


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("num_classes", [K - 1, K + 1])
def test_another_number_of_classes_than_at_the_start(case, name, num_classes):
    with case.raises(name, f"({num_classes}, 6)", "(4, 6)"):
        call(name, num_classes=num_classes)


@pytest.mark.parametrize("mutable", [False, ["penalty_records"], ["batch_stats"]])
@pytest.mark.parametrize("name", MECHANISMS)
def test_training_with_memories_that_are_not_mutable(case, name, mutable):
    with case.raises(name, "mutable=dpa_jax.MUTABLE"):
        call(name, mutable=mutable)


# ---------------- functions ----------------

NAMES = [
    (lambda: dpa_jax.activation("gleu"), ("gleu", "gelu")),
    (lambda: dpa_jax.activation(3), ("name", "3")),
    (lambda: dpa_jax.activation(None), ("name", "None")),
    (lambda: dpa_jax.activation(["relu"]), ("name", "relu")),
    (lambda: dpa_jax.activation("relu", slope=1), ("slope",)),
    (lambda: dpa_jax.activation("dpa"), ("num_classes",)),
    (lambda: dpa_jax.activation("dpa", num_classes=0), ("num_classes", "0")),
    (lambda: dpa_jax.activation("dpa", num_classes=K, interval=2), ("interval",)),
    (lambda: dpa_jax.activation("raa", kind="matrix"), ("kind", "matrix")),
    (lambda: dpa_jax.activation("raa", kind=None), ("kind", "None")),
    (lambda: dpa_jax.activation("raa", base=1), ("base", "1")),
    (lambda: dpa_jax.activation("gdn", initial_gamma=-1), ("initial_gamma", "-1")),
    (lambda: dpa_jax.register("relu", nn.PReLU), ("relu", "taken")),
    (lambda: dpa_jax.register("mine", 3), ("factory", "3")),
    (lambda: dpa_jax.register("mine", None), ("factory", "None")),
    (lambda: dpa_jax.register(3, nn.PReLU), ("name", "3")),
    (lambda: dpa_jax.register(None, nn.PReLU), ("name", "None")),
    (lambda: dpa_jax.models.register("vit", nn.Dense), ("vit", "taken")),
    (lambda: dpa_jax.models.register("mine", "vit"), ("factory", "vit")),
    (lambda: dpa_jax.models.register(("a",), nn.Dense), ("name",)),
]
READERS = [
    (lambda: dpa_jax.penalties(None), ("NoneType", "mutable=dpa_jax.MUTABLE")),
    (lambda: dpa_jax.penalties(X), ("ndarray", "mutable=dpa_jax.MUTABLE")),
    (lambda: dpa_jax.penalties(call("DPA")), ("tuple", "returned second")),
    (lambda: dpa_jax.summarize([1]), ("list", "mutable=dpa_jax.MUTABLE")),
    (lambda: dpa_jax.summarize(3.0), ("float", "mutable=dpa_jax.MUTABLE")),
    (lambda: dpa_jax.summarize(dpa_jax.DPA(K)), ("DPA", "mutable=dpa_jax.MUTABLE")),
    (lambda: dpa_jax.reset_counters(None), ("reset_counters", "NoneType")),
    (lambda: dpa_jax.reset_counters(X), ("reset_counters", "ndarray")),
    (lambda: dpa_jax.reset_counters(dpa_jax.AIEC(K)), ("reset_counters", "AIEC")),
]
NNX_CASES = [
    (lambda: dpa_jax.nnx.DPA(), ("num_features", "missing")),
    (lambda: dpa_jax.nnx.DPA(K), ("num_features", "missing")),
    (lambda: dpa_jax.nnx.DPA(num_features=C), ("num_classes",)),
    (lambda: dpa_jax.nnx.DPA(K, C, 3), ("at most", "num_features")),
    (lambda: dpa_jax.nnx.DPA(K, C, num_classes=3), ("num_classes", "twice")),
    (lambda: dpa_jax.nnx.ARR(K, C, num_features=3), ("num_features", "twice")),
    (lambda: dpa_jax.nnx.DPA(K, C, taus=1), ("taus",)),
    (lambda: dpa_jax.nnx.AIEC(K, C), ("rngs", "decision_weights")),
    (lambda: dpa_jax.nnx.AIEC(K, C, rngs=0), ("rngs", "0")),
    (lambda: dpa_jax.nnx.AIEC(K, C, rngs=jax.random.key(0)), ("rngs",)),
    (lambda: dpa_jax.nnx.RAA(C, kind="rows"), ("kind", "rows")),
    (lambda: dpa_jax.nnx.RAA(C)(np.ones((B, C), np.int32)), ("floating", "int32")),
    (lambda: dpa_jax.nnx.RAA(C)(np.ones((B, C + 1), np.float32)), ("6 features", "(5, 7)")),
    (lambda: dpa_jax.nnx.recorded(jnp.tanh), ("recorded", "nnx.Module")),
    (lambda: dpa_jax.nnx.recorded(None), ("recorded", "nnx.Module")),
    (lambda: dpa_jax.nnx.recorded(dpa_jax.DPA(K)), ("recorded", "nnx.Module")),
    (lambda: dpa_jax.nnx.reset_counters(None), ("reset_counters", "nnx.Module")),
    (lambda: dpa_jax.nnx.reset_counters({"a": X}), ("reset_counters", "nnx.Module")),
    (lambda: dpa_jax.nnx.value_and_grad(None), ("value_and_grad", "None")),
    (lambda: dpa_jax.nnx.value_and_grad(lambda model: 0.0)(X), ("value_and_grad", "nnx.Module")),
]


@pytest.mark.parametrize(("mistake", "words"), [*NAMES, *READERS, *NNX_CASES])
def test_a_function_is_given_something_else(case, monkeypatch, mistake, words):
    monkeypatch.setattr(registry, "ACTIVATIONS", dict(registry.ACTIVATIONS))
    monkeypatch.setattr(dpa_jax.models, "MODELS", dict(dpa_jax.models.MODELS))
    with case.raises(*words):
        mistake()


@pytest.mark.parametrize("factory", [lambda **options: 3, lambda **options: None, lambda **options: nn.relu])
def test_a_registered_factory_makes_no_module(case, monkeypatch, factory):
    monkeypatch.setattr(registry, "ACTIVATIONS", dict(registry.ACTIVATIONS))
    monkeypatch.setattr(dpa_jax.models, "MODELS", dict(dpa_jax.models.MODELS))
    dpa_jax.register("odd", factory)
    dpa_jax.models.register("odd", factory)
    with case.raises("odd", "module"):
        dpa_jax.activation("odd")
    with case.raises("odd", "module"):
        dpa_jax.models.create("odd", K)


# ---------------- models ----------------

VIT = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
RESNET = {"image_size": 8, "stage_sizes": (1,), "width": 4}
OPTIONS = {"vit": VIT, "resnet": RESNET}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vitt", {}, ("vitt", "vit")),
        (3, {}, ("name", "3")),
        *[("vit", {"num_classes": value}, ("num_classes",)) for value in (0, -1, 2.0, True, "10", None, NAN)],
        *[("vit", {"activation": value}, ("activation", "factory")) for value in ("dpa", 3, None, nn.relu, jnp.tanh)],
        ("vit", {"activation": dpa_jax.DPA(K)}, ("activation", "factory")),
        ("vit", {"activation": dpa_jax.DPA}, ("activation", "num_classes")),
        ("vit", {"dtype": jnp.int32}, ("dtype", "int32")),
        ("vit", {"dtype": "float33"}, ("dtype", "float33")),
        ("vit", {"dtype": 3}, ("dtype", "3")),
        ("vit", {"depths": 3}, ("depths", "depth")),
        ("vit", {"depth": 2.0}, ("depth", "2.0")),
        ("vit", {"depth": 0}, ("depth", "0")),
        ("vit", {"num_heads": 3}, ("num_heads 3", "8")),
        ("vit", {"patch_size": 0}, ("patch_size", "0")),
        ("vit", {"patch_size": 3}, ("patch_size 3", "8")),
        ("vit", {"mlp_ratio": NAN}, ("mlp_ratio",)),
        ("vit", {"dropout": 1.0}, ("dropout", "1.0")),
        ("vit", {"stochastic_depth": -0.1}, ("stochastic_depth", "-0.1")),
        ("vit", {"scan": "yes"}, ("scan", "yes")),
        ("vit", {"arr": 1}, ("arr", "1")),
        ("resnet", {"stage_sizes": ()}, ("stage_sizes",)),
        ("resnet", {"stage_sizes": (0,)}, ("stage_sizes", "0")),
        ("resnet", {"stage_sizes": 3}, ("stage_sizes", "3")),
        ("resnet", {"width": 0}, ("width", "0")),
        ("resnet", {"image_size": 0}, ("image_size", "0")),
    ],
)
def test_a_model_that_cannot_be(case, name, options, words):
    with case.raises(*words):
        dpa_jax.models.create(name, **{"num_classes": K, **OPTIONS.get(name, {}), **options})


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((B, 8, 8)), ("(5, 8, 8)", "8, 8, 3")),
        (np.zeros((8, 8, 3)), ("(8, 8, 3)",)),
        (np.zeros((B, 3, 8, 8)), ("(5, 3, 8, 8)",)),
        (np.zeros((B, 8, 8, 1)), ("(5, 8, 8, 1)",)),
        (np.zeros((B, 16, 16, 3)), ("(5, 16, 16, 3)",)),
        (np.zeros((B, 8, 8, 3), np.complex64), ("real", "complex64")),
        (np.array([[[["a"] * 3] * 8] * 8]), ("images",)),
        (3.0, ("images", "()")),
        (None, ("images", "NoneType")),
    ],
)
@pytest.mark.parametrize("name", OPTIONS)
def test_images_that_do_not_fit(case, name, images, words):
    model = dpa_jax.models.create(name, K, **OPTIONS[name])
    variables = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)
    with case.raises(*words):
        jax.eval_shape(lambda variables: model.apply(variables, images), variables)


def test_an_empty_batch_has_no_statistics(case):
    model = dpa_jax.models.create("resnet", K, **RESNET)
    variables = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)
    with case.raises("ResNet", "empty batch"):
        jax.eval_shape(lambda v: model.apply(v, np.zeros((0, 8, 8, 3)), train=True, mutable=["batch_stats"]), variables)


def torch_arrays():
    """What a ViT takes: some are wrong, or one is missing."""
    model = dpa_jax.models.create("vit", K, **VIT)
    return model, {"cls_token": np.zeros((1, 1, 8)), "head.weight": np.zeros((K, 8))}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ("missing",)),
        ({"head.wieght": np.zeros((K, 8))}, ("head.wieght", "no parameter")),
        ({3: np.zeros((K, 8))}, ("3", "no parameter")),
        ({"head.weight": np.zeros((8, K))}, ("head.weight", "(4, 8)", "(8, 4)")),
        ({"head.weight": np.zeros(8)}, ("head.weight", "(8,)")),
        ({"head.weight": 1.0}, ("head.weight", "()")),
        ({"head.weight": "a"}, ("head.weight", "numbers")),
        ({"head.weight": None}, ("head.weight",)),
        ({"head.weight": [[1], [2, 3]]}, ("head.weight", "numbers")),
    ],
)
def test_parameters_of_pytorch_that_do_not_fit(case, change, words):
    model, arrays = torch_arrays()
    with case.raises(*words):
        dpa_jax.models.variables_from_torch(model, {**arrays, **change})


@pytest.mark.parametrize(
    ("model", "arrays", "words"),
    [(3, {}, ("int", "PyTorch")), (nn.Dense(3), {}, ("Dense", "PyTorch")), (None, [X], ("mapping", "list"))],
)
def test_parameters_of_pytorch_of_something_else(case, model, arrays, words):
    with case.raises(*words[1:]):
        dpa_jax.models.variables_from_torch(model or torch_arrays()[0], arrays)


# ---------------- training ----------------


@pytest.mark.parametrize("coefficients", [{}, {"chanel": 5.0}, {"arr": 1.0}])
def test_a_penalty_without_a_coefficient(case, coefficients):
    class Model(nn.Module):
        example_inputs = jax.ShapeDtypeStruct((1, C), jnp.float32)

        @nn.compact
        def __call__(self, x, labels=None, train=False):
            return dpa_jax.DPA(K, pool="none")(nn.Dense(K)(x), labels, train)

    from dpa_jax.data.batch import Batch

    optimizer = optax.sgd(0.1)
    state = create_state(Model(), optimizer, (), seed=0)
    step = make_train_step(Model(), optimizer, lambda key, batch: batch.inputs, coefficients)
    with case.raises("coefficients", "channel"):
        jax.eval_shape(step, state, Batch(X, LABELS, LABELS, LABELS))


# ---------------- what is right although it looks wrong ----------------


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint8, np.uint16, np.uint32, np.int64, np.uint64, list])
@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("jitted", [False, True])
def test_labels_of_any_integers(case, name, dtype, jitted):
    """200 classes, which int8 does not reach; a label that is no class is none."""
    x = np.linspace(-1, 1, 4 * C, dtype=np.float32).reshape(4, C)
    labels = np.array([3, 100, 127, 3])
    act = MECHANISMS[name](200, pool="none")
    variables = act.init(jax.random.key(0), x)

    def state(variables, labels):
        return act.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)[1]

    run = jax.jit(state) if jitted and dtype is not list else state
    found, expected = run(variables, labels.tolist() if dtype is list else labels.astype(dtype)), run(variables, labels)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("label", [-1, -2, -128, K, K + 1, 127, 2**31 - 1, -(2**31), 2**31, 2**32, 2**32 + 1, -(2**32)])
@pytest.mark.parametrize("name", MECHANISMS)
def test_a_label_that_is_no_class_is_none(case, name, label):
    found = call(name, labels=np.array([0, 1, label, 2, 2]))[1]
    expected = call(name, labels=np.array([0, 1, -1, 2, 2]))[1]
    jax.tree.map(
        np.testing.assert_array_equal,
        (dpa_jax.penalties(found), {n: v for n, v in found.items() if n != "penalty_records"}),
        (dpa_jax.penalties(expected), {n: v for n, v in expected.items() if n != "penalty_records"}),
    )


@pytest.mark.parametrize("shape", [(0, C), (0, 3, C), (0, 2, 2, C)])
@pytest.mark.parametrize("name", MECHANISMS)
def test_an_empty_batch_changes_nothing(case, name, shape):
    act = MECHANISMS[name](K, pool="auto", update_interval=1)
    x, labels = np.zeros(shape, np.float32), np.zeros(0, np.int32)
    variables = act.init(jax.random.key(0), x)
    y, mutated = act.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)
    assert y.shape == shape
    assert all(term == 0 for term in dpa_jax.penalties(mutated).values())
    for collection, tree in mutated.items():
        if collection != "penalty_records":
            jax.tree.map(np.testing.assert_array_equal, tree, variables[collection])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_inputs_of_any_float(case, name, dtype):
    x = jnp.asarray(X, dtype) if dtype == "bfloat16" else X.astype(dtype)
    y, mutated = call(name, x)
    assert y.dtype == (jnp.float32 if dtype == "float64" else dtype)  # JAX has no 64 bits here
    kept = {name: value for name, value in mutated.items() if name != "penalty_records"}
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert all(term.dtype == jnp.float32 for term in dpa_jax.penalties(mutated).values())


@pytest.mark.parametrize("value", [np.float32(0.9), np.float64(0.9)])
@pytest.mark.parametrize("name", ["DPA", "ARR"])
def test_a_number_of_numpy_is_a_number(case, name, value):
    act = MECHANISMS[name](np.int64(K), momentum=value, update_interval=np.int32(1), pool="none")
    assert type(act.momentum) is float and type(act.num_classes) is int
    hash(act)


def test_labels_may_be_missing(case):
    for name in MECHANISMS:
        y, mutated = call(name, labels=None)
        assert y.shape == X.shape and dpa_jax.penalties(mutated) == {}
        for collection, tree in mutated.items():
            jax.tree.map(np.testing.assert_array_equal, tree, first_variables(name)[collection])
