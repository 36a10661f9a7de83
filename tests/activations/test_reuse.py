"""One memory that is used several times before it is updated."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dpa_jax

B, C, K = 6, 4, 3
LABELS = jnp.array([0, 1, 1, 2, -1, 1])
RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(size=(2, B, C)).astype(np.float32)  # two inputs, whose outputs' gradients are themselves
START = {"mean": jnp.asarray(RNG.uniform(-1, 1, size=(K, C)), jnp.float32)}
OPTIONS = {"num_classes": K, "momentum": 0.7, "update_interval": 1, "pool": "none"}


def signs_entered(memory, *gradients):
    """The memory after the signs of these gradients [B, C], sample by sample."""
    memory = np.array(memory, np.float64)
    for gradient in gradients:
        for label, row in zip(LABELS, gradient, strict=True):
            if label >= 0:
                memory[label] += 0.7 * (np.where(row > 0, 1.0, -1.0) - memory[label])
    return memory


class Twice(nn.Module):
    """One activation at two places, each in a rematerialized part if asked for."""

    remat: bool = False

    def setup(self):
        self.act = dpa_jax.DPA(**OPTIONS)

    def __call__(self, first, second, labels=None, train=False):
        use = nn.remat(Twice.use, static_argnums=(3,)) if self.remat else Twice.use
        return use(self, first, labels, train) + use(self, second, labels, train)

    def use(self, x, labels, train):
        return jnp.sum(x * self.act(x, labels, train))


def updated(loss):
    """The memory with the gradient of ``loss(variables) -> scalar`` added."""
    variables = dpa_jax.DPA(**OPTIONS).init(jax.random.key(0), FIRST)
    update = jax.jit(jax.grad(lambda memory: loss(variables | {"backward_memory": memory})))(START)
    return dpa_jax.apply_updates(START, update)["mean"]


@pytest.mark.parametrize("remat", [False, True])
def test_two_places_of_one_call_are_one_after_the_other_the_last_first(remat):
    model = Twice(remat)

    def loss(variables):
        variables = {name: {"act": tree} for name, tree in variables.items()}
        return model.apply(variables, FIRST, SECOND, LABELS, True, mutable=dpa_jax.MUTABLE)[0]

    np.testing.assert_allclose(updated(loss), signs_entered(START["mean"], SECOND, FIRST), atol=1e-6)


def two_calls(mutable, joined):
    """Two calls of the model in one loss; the second gets what the first returned, if joined."""
    model = dpa_jax.DPA(**OPTIONS)

    def loss(variables):
        first, mutated = model.apply(variables, FIRST, LABELS, train=True, mutable=mutable)
        variables = {**variables, **mutated} if joined else variables
        second, _ = model.apply(variables, SECOND, LABELS, train=True, mutable=mutable)
        return jnp.sum(first * FIRST) + jnp.sum(second * SECOND)

    return updated(loss)


def test_two_calls_are_one_after_the_other_where_the_memory_is_handed_on():
    found = two_calls(dpa_jax.COLLECTIONS, joined=True)
    np.testing.assert_allclose(found, signs_entered(START["mean"], SECOND, FIRST), atol=1e-6)


@pytest.mark.parametrize("joined", [False, True])
def test_the_changes_of_two_calls_with_one_memory_add_up_within_its_range(joined):
    start = np.asarray(START["mean"], np.float64)
    changes = sum(signs_entered(start, gradients) - start for gradients in (FIRST, SECOND))
    assert np.max(np.abs(start + changes)) > 1
    found = two_calls(dpa_jax.MUTABLE, joined)
    np.testing.assert_allclose(found, np.clip(start + changes, -1, 1), atol=1e-6)


def test_a_memory_that_is_used_twice_stays_a_mean_of_signs():
    model, memory = Twice(), {"act": START}
    variables = model.init(jax.random.key(0), FIRST, SECOND)

    @jax.jit
    def change(memory, variables, first, second):
        def loss(memory):
            given = {**variables, "backward_memory": memory}
            return model.apply(given, first, second, LABELS, True, mutable=dpa_jax.MUTABLE)

        return jax.grad(loss, has_aux=True)(memory)

    for step in range(50):
        inputs = jax.random.normal(jax.random.key(step), (2, B, C))
        update, mutated = change(memory, variables, *inputs)
        memory = jax.tree.map(jnp.add, memory, update)
        variables = {**variables, "forward_memory": mutated["forward_memory"]}
        assert jnp.max(jnp.abs(memory["act"]["mean"])) <= 1 + 1e-6


def test_nnx_hands_the_memory_on_by_itself():
    act = dpa_jax.nnx.DPA(num_features=C, **OPTIONS)
    act.backward_memory[...] = START["mean"]

    @dpa_jax.nnx.value_and_grad
    def gradients_of(act):
        first, second = act(FIRST, LABELS, train=True), act(SECOND, LABELS, train=True)
        return jnp.sum(first * FIRST) + jnp.sum(second * SECOND)

    nnx.jit(gradients_of)(act)
    np.testing.assert_allclose(act.backward_memory[...], signs_entered(START["mean"], SECOND, FIRST), atol=1e-6)


def test_updates_leave_what_has_no_bounds_alone():
    memory = {"layer": {"mean": jnp.array([0.5, -0.5])}, "other": {"pull": jnp.array([0.5])}}
    update = {"layer": {"mean": jnp.array([1.0, 0.25])}, "other": {"pull": jnp.array([1.0])}}
    new = dpa_jax.apply_updates(memory, update)
    assert new["layer"]["mean"].tolist() == [1.0, -0.25]
    assert new["other"]["pull"].tolist() == [1.5]
    with pytest.raises(ValueError, match="layer"):
        dpa_jax.apply_updates(memory, {"layer": {"mean": jnp.zeros(2)}})
