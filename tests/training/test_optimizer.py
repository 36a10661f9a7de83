import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpa_jax.config import default_config
from dpa_jax.training.optimizer import make_optimizer, make_schedule


def rates(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)))


def schedule_config(name, **options):
    config = default_config().schedule
    config.update(name=name, **options)
    return config


@pytest.mark.core
@pytest.mark.parametrize("name", ["cosine", "cosine_no_warmup", "multistep"])
def test_schedule_equals_the_recorded_one(golden, name):
    recorded = golden("schedule")
    run = json.loads(str(recorded[f"{name}/config"]))
    expected = recorded[f"{name}/lr_per_step"]
    config = schedule_config(
        name.split("_")[0],
        warmup_epochs=run["warmup_epochs"],
        warmup_learning_rate=run["warmup_lr"],
        min_learning_rate=run.get("min_lr", 0.0),
        milestones=tuple(run.get("milestones", ())),
        gamma=run.get("gamma", 0.1),
    )
    schedule = make_schedule(config, run["lr"], run["steps_per_epoch"], len(expected))
    np.testing.assert_allclose(rates(schedule, len(expected)), expected, rtol=2e-6, atol=1e-7 * run["lr"])


def test_step_schedule_is_multistep_at_each_multiple():
    options = {"warmup_epochs": 1, "warmup_learning_rate": 0.0, "gamma": 0.5}
    step = make_schedule(schedule_config("step", step_epochs=2, **options), 1.0, 2.0, 14)
    assert rates(step, 14).tolist() == [0, 0, 0, 0, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]


def test_epochs_of_a_broken_number_of_steps_begin_where_they_are_rounded_to():
    # Epochs of 2.5 steps end after 2, 5, 8 (7.5 to even) and 10 steps.
    multistep = make_schedule(schedule_config("multistep", milestones=(1, 2, 3)), 1.0, 2.5, 10)
    np.testing.assert_allclose(rates(multistep, 10), [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("name", ["step", "multistep", "cosine"])
def test_ten_million_epochs_are_not_listed(name, monkeypatch):
    config = schedule_config(name, step_epochs=1000, milestones=(10, 9_999_999), gamma=0.5)
    epochs, seen = 10**7, []
    monkeypatch.setattr("builtins.round", lambda number, rounded=round: seen.append(number) or rounded(number))
    schedule = make_schedule(config, 1.0, 2.5, 25_000_000)
    assert len(seen) <= 10_001 < epochs
    at = [0, 24, 25, 2499, 2500, 24_999_996, 24_999_999]
    wanted = {"step": [1, 1, 1, 1, 0.5, 0, 0], "multistep": [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]}
    if name in wanted:
        assert [float(schedule(step)) for step in at] == wanted[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_epochs": 1}, r"schedule\.step_epochs must be at least 10 for 10000000 epochs; got 1"),
        ({"warmup_epochs": 10**7}, r"schedule\.warmup_epochs must be at most 1000000"),
    ],
)
def test_a_rate_that_changes_too_often_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(schedule_config("step", **options), 1.0, 2.5, 25_000_000)


def test_constant_schedule_warms_up_and_stays():
    config = schedule_config("constant", warmup_epochs=1, warmup_learning_rate=0.0)
    assert rates(make_schedule(config, 1.0, 4, 8), 8).tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_a_single_epoch():
    for name in ("cosine", "step", "multistep", "constant"):
        assert rates(make_schedule(schedule_config(name), 0.5, 3.3, 3), 1).tolist() == [0.5]


RATES = [0.1, 0.05, 0.2, 0.02, 0.1]
DECAY, BETA1, BETA2, EPS, MOMENTUM = 0.03, 0.8, 0.95, 1e-3, 0.7


def by_hand(name, parameter, gradients):
    """The published rules, in float64: PyTorch's documentation of AdamW, Adam, SGD and RMSprop."""
    p = parameter.astype(np.float64)
    mean, square, velocity = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for t, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True), start=1):
        g = gradient.astype(np.float64)
        if name == "adamw":
            p = p - rate * DECAY * p
        else:
            g = g + DECAY * p
        mean = BETA1 * mean + (1 - BETA1) * g
        square = BETA2 * square + (1 - BETA2) * g * g
        if name in ("adamw", "adam"):
            p = p - rate * (mean / (1 - BETA1**t)) / (np.sqrt(square / (1 - BETA2**t)) + EPS)
        else:
            velocity = MOMENTUM * velocity + (g if name == "sgd" else g / (np.sqrt(square) + EPS))
            p = p - rate * velocity
    return p


def run(config, parameters, gradients):
    optimizer = make_optimizer(config, lambda step: jnp.array(RATES)[step])
    state = optimizer.init(parameters)

    @jax.jit
    def update(parameters, state, gradient):
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state

    for gradient in gradients:
        parameters, state = update(parameters, state, gradient)
    return parameters


def optimizer_config(name, clip_norm=0.0):
    config = default_config()
    config.clip_norm = clip_norm
    config.optimizer.update(name=name, weight_decay=DECAY, beta1=BETA1, beta2=BETA2, eps=EPS, momentum=MOMENTUM)
    return config


@pytest.fixture
def problem():
    """A kernel, a bias and a scalar, and five gradients of each."""
    random = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,), "scale": ()}

    def draw():
        return {
            name: np.asarray(random.normal(size=shape), np.float32).reshape(shape) for name, shape in shapes.items()
        }

    return draw(), [draw() for _ in RATES]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop"])
def test_optimizer_follows_the_published_rule_on_every_parameter(name, problem):
    parameters, gradients = problem
    result = run(optimizer_config(name), parameters, gradients)
    for key in parameters:
        expected = by_hand(name, parameters[key], [gradient[key] for gradient in gradients])
        np.testing.assert_allclose(result[key], expected, rtol=2e-5, atol=2e-6, err_msg=key)


def test_gradients_are_clipped_together_before_the_decay(problem):
    parameters, gradients = problem
    norms = [np.sqrt(sum(np.sum(leaf**2) for leaf in gradient.values())) for gradient in gradients]
    limit = float(np.median(norms))  # some are clipped, some are not
    scales = [min(1.0, limit / norm) for norm in norms]
    assert 1.0 in scales and min(scales) < 0.95
    result = run(optimizer_config("sgd", clip_norm=limit), parameters, gradients)
    for key in parameters:
        clipped = [scale * gradient[key] for scale, gradient in zip(scales, gradients, strict=True)]
        np.testing.assert_allclose(result[key], by_hand("sgd", parameters[key], clipped), rtol=2e-5, atol=2e-6)
