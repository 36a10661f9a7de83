"""One training step and one evaluation step: pure functions, compiled once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from dpa_jax.activations import summarize
from dpa_jax.activations.penalties import RECORDS, Ratio
from dpa_jax.data.batch import Batch, Mixed
from dpa_jax.training.accumulation import Seen, gradients_of
from dpa_jax.training.metrics import Classification, cross_entropy
from dpa_jax.training.state import TrainState


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    transform: Callable[[jax.Array, Batch], jax.Array],
    coefficients: Mapping[str, float],
    label_smoothing: float = 0.0,
    mix: Callable[[jax.Array, jax.Array, jax.Array], Mixed] | None = None,
    accumulate: int = 1,
    split: Callable[[Any], Any] = lambda batch: batch,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The training step of a model: (state, batch) -> (state, metrics); the state's averages stay as they are.

    The metrics are float32 scalars: ``loss``, each of its terms as ``loss_NAME``, ``top1``, ``gradient_norm`` before
    clipping and, where a mechanism masks, ``masked_fraction``. The model gives logits [B, K]; ``transform`` and ``mix``
    are those of `dpa_jax.data.batch.Transforms`. Of mixed inputs a mechanism and ``top1`` see the label of the greater
    part. ``coefficients`` has the weight of each penalty in the loss.

    The model is given ``accumulate`` micro-batches one after the other (`dpa_jax.training.accumulation`), which
    ``split`` makes of a pytree of arrays over the batch, in its order: [B, ...] -> [N, B / N, ...].
    """

    def train_step(state: TrainState, batch: Batch):
        base_key = jax.random.wrap_key_data(state.key)
        augment_key, dropout_key, mix_key = jax.random.split(base_key, 3)
        inputs, labels, others = transform(augment_key, batch), batch.labels, None
        if mix:
            mixed = mix(jax.random.fold_in(mix_key, state.step), inputs, labels)
            inputs, labels, others = mixed.inputs, mixed.labels, mixed.others
        dropout_key = jax.random.fold_in(dropout_key, state.step)
        parts = (inputs, labels, others), dropout_key
        if accumulate > 1:
            parts = split(parts[0]), jax.random.split(dropout_key, accumulate)

        def forward(params, backward_memory, model_state, part) -> Seen:
            (inputs, labels, others), key = part
            logits, mutated = model.apply(
                state.replace(params=params, backward_memory=backward_memory, model_state=model_state).variables,
                inputs,
                labels,
                train=True,
                mutable=[RECORDS, *model_state, *(["backward_memory"] if accumulate > 1 else [])],
                rngs={"dropout": key},
            )
            summary = summarize(mutated)
            total, count = cross_entropy(logits, labels, label_smoothing)
            if others is not None:
                other, _ = cross_entropy(logits, others, label_smoothing)
                total = mixed.weight * total + (1 - mixed.weight) * other
            return Seen(
                terms={"cross_entropy": Ratio(total, count), **summary.terms},
                figures={"top1": _top1(logits, labels), **summary.figures},
                model_state={name: mutated.get(name, old) for name, old in model_state.items()},
                backward_memory=mutated.get("backward_memory", {}),
            )

        def loss_of(terms: Mapping[str, Ratio]) -> jax.Array:
            return _weighted({name: ratio.value() for name, ratio in terms.items()}, coefficients)

        seen, gradients, memory_update = gradients_of(
            forward, loss_of, state.params, state.backward_memory, state.model_state, parts, accumulate
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)

        metrics = {
            "loss": loss_of(seen.terms),
            **{f"loss_{name}": ratio.value() for name, ratio in seen.terms.items()},
            **{name: ratio.value() for name, ratio in seen.figures.items()},
            "gradient_norm": optax.tree.norm(gradients),
        }
        return state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            backward_memory=optax.apply_updates(state.backward_memory, memory_update),
            model_state=seen.model_state,
            opt_state=opt_state,
        ), metrics

    return train_step


@struct.dataclass
class Evaluation:
    """Sums over an evaluation, batch by batch; padded samples (label -1) count nowhere."""

    classification: Classification
    terms: dict[str, Ratio]  # of the loss

    def compute(self, coefficients: Mapping[str, float]) -> dict[str, jax.Array]:
        """``loss``, ``loss_NAME``, ``top1``, ``top5``, ``recall``, ``precision`` and ``f1`` of the whole split."""
        terms = {name: ratio.value() for name, ratio in self.terms.items()}
        loss = _weighted(terms, coefficients)
        named = {f"loss_{name}": term for name, term in terms.items()}
        return {"loss": loss, **named, **self.classification.compute()}


def make_eval_step(
    model: nn.Module, transform: Callable[[Batch], jax.Array], scores: bool = False
) -> Callable[[dict[str, Any], Batch], tuple[Evaluation, list[tuple[jax.Array, jax.Array]]]]:
    """The evaluation of one batch: (variables, batch) -> (Evaluation, scores).

    ``transform`` makes the model's inputs of a batch. The evaluations of a split's batches are added up with
    ``jax.tree.map(jnp.add, ...)``. The list of scores has one entry, (logits [B, K], labels [B]), or none where
    ``scores`` is not set.
    """

    def eval_step(variables: dict[str, Any], batch: Batch) -> tuple[Evaluation, list[tuple[jax.Array, jax.Array]]]:
        logits, mutated = model.apply(variables, transform(batch), batch.labels, mutable=[RECORDS])
        terms = {"cross_entropy": Ratio(*cross_entropy(logits, batch.labels)), **summarize(mutated).terms}
        return Evaluation(Classification.of(logits, batch.labels), terms), [(logits, batch.labels)] * scores

    return eval_step


def _top1(logits: jax.Array, labels: jax.Array) -> Ratio:
    numbers = ~jnp.any(jnp.isnan(logits), axis=-1)  # argmax would take the first that is none
    correct = (jnp.argmax(logits, axis=-1) == labels) & (labels >= 0) & numbers
    return Ratio(jnp.sum(correct, dtype=jnp.float32), jnp.sum(labels >= 0, dtype=jnp.float32))


def _weighted(terms: Mapping[str, jax.Array], coefficients: Mapping[str, float]) -> jax.Array:
    """The loss: cross-entropy plus every penalty times its coefficient."""
    loss = jnp.zeros((), jnp.float32)
    for name, term in terms.items():
        if name == "cross_entropy":
            loss += term
        elif name in coefficients:
            loss += coefficients[name] * term
        else:
            raise ValueError(f"config.coefficients has no entry for the penalty {name!r}")
    return loss
