"""A model against its recording in tests/golden/zoo: a small copy of it that PyTorch ran.

A test file says how its model is made, `small(**options)`, with the recording's sizes, and calls the checks.
Recordings are under PyTorch's names; a model's ``torch_names`` say what they are here, the activations' included.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

import dpa_jax
from dpa_jax.activations.diagnose import _records
from dpa_jax.activations.dpa import joint_mask
from dpa_jax.activations.penalties import stack_alike
from dpa_jax.config import default_config
from dpa_jax.models import layers, to_torch, variables_from_torch
from dpa_jax.models.torch import torch_name
from dpa_jax.training.optimizer import make_optimizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "zoo"
Arrays = dict[str, np.ndarray]
Make = Callable[..., nn.Module]
"""``small(**options)`` of a test file: the model of the recording's sizes, without dropout."""


@functools.cache
def recording(name: str) -> tuple[dict[str, Any], Arrays]:
    """Its configuration and its arrays."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop("config"))), arrays


def under(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays whose names start so, without the start."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def batch(arrays: Arrays, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [B, H, W, C] and labels of a step; of recordings with one batch, that one."""
    images, labels = arrays["images_nchw"], arrays["labels"].astype(np.int32)
    images, labels = (images[step], labels[step]) if images.ndim == 5 else (images, labels)
    return np.moveaxis(images, 1, -1), labels


def by_layer(model: nn.Module, tree: Mapping[str, Any]) -> dict[str, Any]:
    """{PyTorch's name: array} of what modules keep, the layers of a stack one by one."""
    found = {}
    for path, leaf in flatten_dict(tree, sep=".").items():
        name = torch_name(path, model.torch_names)
        found |= {name.replace("*", str(i)): part for i, part in enumerate(leaf)} if "*" in name else {name: leaf}
    return found


def close(found: Arrays, expected: Arrays, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Within ``atol``, or ``rtol`` of each array's largest entry; the same names."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, array in expected.items():
        tolerance = max(atol, rtol * np.abs(array).max(initial=0.0))
        np.testing.assert_allclose(found[name], array, rtol=0, atol=tolerance, err_msg=name)


# ---------------- the checks ----------------


def check_outputs(name: str, small: Make, kind: str) -> None:
    """Logits of evaluation and training, gradients, and the running statistics after a training call.

    ``kind`` is the activation, everywhere in the model.
    """
    _, arrays = recording(name)
    model, expected = small(native=dpa_jax.activation(kind)), under(arrays, f"{kind}/")
    variables = variables_from_torch(model, under(arrays, "init/"), {})
    images, labels = batch(arrays, 0)

    @jax.jit  # one program: where evaluation is what training is, it is compiled once
    def run(variables):
        def loss_fn(params):
            logits, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, new)

        return model.apply(variables, images), jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])

    evaluated, ((loss, (logits, new)), gradients) = run(variables)
    np.testing.assert_allclose(evaluated, expected["eval_logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits, expected["train_logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    gradients = to_torch(model, {"params": gradients})
    recorded = under(expected, "grad/")  # of the *_imagenet recordings only some
    # Where the exact gradient is 0, as that of a key's bias, both have rounding.
    close({name: gradients[name] for name in recorded}, recorded, rtol=1e-4, atol=1e-6)
    norms = {name: np.linalg.norm(array) for name, array in gradients.items()}
    names = map(str, expected["grad_norm_names"])
    close(norms, dict(zip(names, expected["grad_norm"], strict=True)), rtol=1e-4, atol=1e-6)
    close(to_torch(model, new), under(expected, "bn_after/"), atol=1e-5)


def check_dpa(name: str, small: Make, run: str = "dpa", **options: Any) -> None:
    """Six training steps with DPA where it is by default: losses, masks, memories, parameters and logits.

    ``run`` is the recording's, ``options`` are the model's, for another place than the default.
    """
    config, arrays = recording(name)
    settings, expected = config[run], under(arrays, f"{run}/")
    dpa = dpa_jax.activation("dpa", num_classes=config["num_classes"], update_interval=settings["update_interval"])
    model = small(native=dpa_jax.activation(settings["other_activations"]), activation=dpa, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)
    variables = {name: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree) for name, tree in shapes.items()}
    variables = variables_from_torch(model, under(arrays, "init/"), variables)
    optimizer = _optimizer(settings)
    opt_state = optimizer.init(variables["params"])
    # Convolutions of float64 are XLA's own, too slow without its optimisation.
    optimized = {"xla_backend_optimization_level": 1} if jax.config.jax_enable_x64 else None
    step = jax.jit(functools.partial(_dpa_step, model, optimizer, settings["coefs"][0]), compiler_options=optimized)
    for t in range(settings["steps"]):
        variables, opt_state, seen = step(variables, opt_state, *batch(arrays, t))
        # Compared are losses by rtol, or absolutely where they are under 0.01.
        np.testing.assert_allclose(seen["losses"], expected["losses"][t], rtol=2e-5, atol=2e-7, err_msg=f"step {t}")
        np.testing.assert_allclose(seen["norm"], expected["grad_norm"][t], rtol=5e-5, err_msg=f"step {t}")
        seen_by = {path.replace("/", ".") + ".mean": counts for path, counts in seen["masked"].items()}
        masked = {name.removesuffix(".mean"): int(np.sum(n)) for name, n in by_layer(model, seen_by).items()}
        assert [masked[layer] for layer in settings["pools"]] == expected["masked_count"][t].tolist(), f"step {t}"
        assert len(masked) == len(settings["pools"])

    for kind, tolerance in (("forward", 3e-5), ("backward", 1e-6)):
        memory = by_layer(model, variables[f"{kind}_memory"])
        found = {layer: memory[f"{layer}.mean"] for layer in settings["pools"]}
        close(found, {layer: np.nan_to_num(expected[f"memory/{layer}/{kind}"]) for layer in found}, atol=tolerance)
    logits = jax.jit(model.apply)(variables, batch(arrays, -1)[0])
    np.testing.assert_allclose(logits, expected["eval_logits"], rtol=0, atol=2e-5)
    if final := under(expected, "final/"):
        close(to_torch(model, variables), final, atol=2e-5)


def _optimizer(settings: Mapping[str, Any]) -> optax.GradientTransformation:
    """The project's, with a recording's settings."""
    config = default_config()
    config.clip_norm = settings["clip_max_norm"]
    config.optimizer.update(name=settings["optimizer"], eps=settings["eps"], weight_decay=settings["weight_decay"])
    config.optimizer.beta1, config.optimizer.beta2 = settings["betas"]
    return make_optimizer(config, lambda step: settings["lr"])


def _dpa_step(model, optimizer, coefficient, variables, opt_state, images, labels):
    trained = {name: variables[name] for name in ("params", "backward_memory")}

    def loss_fn(trained):
        mutable = [*dpa_jax.MUTABLE, "batch_stats"]
        logits, mutated = model.apply({**variables, **trained}, images, labels, train=True, mutable=mutable)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        channel = dpa_jax.penalties(mutated)["channel"]
        masked = {
            path: jnp.sum(joint_mask(stack_alike([record])[0]), axis=(1, 2)) for path, record in _records(mutated)
        }
        return entropy + coefficient * channel, (mutated, jnp.stack([entropy, channel]), masked)

    (_, (mutated, losses, masked)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    updates, opt_state = optimizer.update(gradients["params"], opt_state, variables["params"])
    new = {name: mutated.get(name, old) for name, old in variables.items()}
    new["params"] = optax.apply_updates(variables["params"], updates)
    new["backward_memory"] = optax.apply_updates(variables["backward_memory"], gradients["backward_memory"])
    return new, opt_state, {"losses": losses, "norm": optax.tree.norm(gradients["params"]), "masked": masked}


def count_parameters(name: str, num_classes: int) -> int:
    """Of a registered model; nothing is computed."""
    model = dpa_jax.models.create(name, num_classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def initial(model: nn.Module, *paths: str) -> Arrays:
    """Fresh parameters by their dotted paths. The program has nothing else in it, so that it compiles fast."""

    def values():
        variables = model.init(jax.random.key(0), jnp.zeros(model.example_inputs.shape))
        return {path: flatten_dict(variables["params"], sep=".")[path] for path in paths}

    return {path: np.asarray(leaf) for path, leaf in jax.jit(values)().items()}


def drop_rates(model: nn.Module, monkeypatch: Any) -> dict[str, np.ndarray]:
    """{path of a block, or of a stack of blocks: rates of stochastic depth, [2, layers]}; nothing is dropped."""

    def drop_path(module, x, rate, train):
        if rate is not None:
            module.sow("rates", "rate", rate)
        return x

    monkeypatch.setattr(layers, "drop_path", drop_path)
    images = jnp.zeros(model.example_inputs.shape)
    rates = jax.jit(lambda: model.init(jax.random.key(0), images)["rates"])()
    return {path.removesuffix("/rate"): np.stack(pair) for path, pair in flatten_dict(rates, sep="/").items()}
