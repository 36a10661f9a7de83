"""Everyday mistakes with a mechanism, each told with the module and the remedy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import dpa_jax
from dpa_jax.activations import diagnose

LABELS = jnp.array([0, 1, 2, 0, 1, 2])
X = jax.random.normal(jax.random.key(0), (6, 5))


class Mlp(nn.Module):
    shared: bool = False

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        act = dpa_jax.DPA(3, pool="none", update_interval=2, name="act")
        x = act(nn.Dense(8)(x), labels, train)
        if self.shared:
            x = act(nn.Dense(8)(x), labels, train)
        return nn.Dense(3)(x)


def train(model=None, steps=8, labels=LABELS, wrong="", bias=0.0, x=X):
    """Some steps, with a mistake in them: (the variables before, after, the results of `apply`)."""
    model = model or Mlp()
    before = model.init(jax.random.key(1), X)
    before["params"]["Dense_0"]["bias"] += bias
    variables, results = before, []
    adam = optax.adam(3.0)
    opt_state = adam.init(variables["backward_memory"])
    mutable = dpa_jax.MUTABLE[:-1] if wrong == "no records" else dpa_jax.MUTABLE

    @jax.jit
    def gradients_of(variables):
        def loss_fn(params, backward):
            given = {**variables, "params": params, "backward_memory": backward}
            logits, mutated = model.apply(given, x, labels, train=wrong != "train not passed", mutable=mutable)
            channel = dpa_jax.penalties(mutated).get("channel", 0.0)
            return jnp.sum(jnp.square(logits)) + 0.1 * channel, mutated

        (_, update), mutated = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(
            variables["params"], variables["backward_memory"]
        )
        return update, mutated

    for _ in range(steps):
        update, mutated = gradients_of(variables)
        if wrong == "memory through Adam":
            update, opt_state = adam.update(update, opt_state)
        if wrong != "parameters only":
            backward = optax.apply_updates(variables["backward_memory"], update)
            variables = {**variables, "backward_memory": backward}
        variables = {**variables, **{name: v for name, v in mutated.items() if name in variables}}
        results.append(mutated)
    return before, variables, results


def test_a_right_training_has_nothing_to_say():
    before, after, results = train()
    assert any(dpa_jax.penalties(result)["channel"] > 0 for result in results)
    assert diagnose(before, after, *results) == []


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ({"wrong": "train not passed"}, "DPA 'act': it has remembered nothing. Call it with labels and train=True"),
        ({"wrong": "parameters only"}, "DPA 'act': its backward memory never moved. The gradient with respect to it"),
        ({"wrong": "memory through Adam"}, r"DPA 'act': its backward memory, a mean of signs, is \d+.* at its largest"),
        ({"wrong": "no records"}, "DPA 'act': it has recorded nothing. No labels reached it, the collection"),
        ({"labels": LABELS.at[1].set(7)}, "DPA 'act': the label 7 is no class of 0..2, and not -1"),
        ({"x": X.at[1, 0].set(jnp.nan)}, "DPA 'act': the values of 1 labelled samples were not finite"),
        ({"bias": -100.0}, "DPA 'act': none of its channels was ever on"),
        ({"bias": -100.0}, "the penalty 'channel' is zero in all of the 8 calls given"),
        ({"model": Mlp(shared=True)}, "'act' is called 2 times in one call of the model"),
    ],
)
def test_a_mistake_is_named(mistake, says):
    before, after, results = train(**mistake)
    said = diagnose(before, after, *results)
    with pytest.raises(ValueError, match=says):
        raise ValueError("\n".join(said))
    assert all("'act'" in line or "penalty" in line for line in said)


def test_a_memory_that_is_not_finite_is_named():
    before, after, _ = train(steps=1)
    after["forward_memory"]["act"]["mean"] = after["forward_memory"]["act"]["mean"].at[0].set(jnp.nan)
    assert any("forward_memory is not finite" in line for line in diagnose(before, after))


def test_variables_without_a_mechanism_are_refused():
    with pytest.raises(ValueError, match="diagnose: no variable of a mechanism"):
        diagnose({"params": {}}, {"params": {"kernel": X}})
