"""Class-wise memories: the mathematics, without state.

A memory is a [K, C] float32 array, a running mean for each of K classes over C channels. The samples of a
batch enter it one after the other, each moving the row of its own class:

    memory[y_i] <- memory[y_i] + momentum * (value_i - memory[y_i])

Nothing here loops over samples. With r_i the rank of sample i among its class and n_k the class's count in the
batch, the rows after the batch are ``(1-m)^n_k * old + sum_i m (1-m)^(n_k - r_i) value_i``: one product of a
[B, K] matrix that follows from the labels alone with the values. That is linear in the batch and, sharded over
it, one sum over devices. The rows that each sample sees on the way are a segmented scan (`prefix_means`).

Labels outside 0..K-1 (-1 by convention: padding, unlabelled) take no part, and neither does a sample whose values are
not all finite: in a product with the weights of other classes, 0 times NaN is NaN.

Inside of ``shard_map``, ``pmap`` or ``vmap`` an ``axis_name`` says over which mapped axis the batch is spread: each
device holds B samples of a global batch, which is the devices' batches one after the other. None and () are no axis.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpa_jax.activations.sharding import LAYERS_SAMPLES, SAMPLES, WHOLE, by_shards

POOLS = ("token", "mean", "none", "auto")
NO_AXIS = (None, ())


def pool(x: jax.Array, how: str, rows_per_sample: int = 1, sample_axes: int = 1) -> jax.Array:
    """One float32 vector per sample, [B, C]; `DPA` says how. ``x`` [B * R, ...] of R rows per sample is [B, R, ...].

    Where several axes of ``x`` count samples, B is their product; a sample that is a vector [C] is itself what it
    becomes, however it should be pooled.

    Raises ValueError if the rank of ``x`` does not fit the pool.
    """
    if rows_per_sample > 1:
        x = x.reshape(x.shape[0] // rows_per_sample, rows_per_sample, *x.shape[1:])
    if sample_axes > 1:
        x = x.reshape(math.prod(x.shape[:sample_axes]), *x.shape[sample_axes:])
        how = "none" if x.ndim == 2 else how
    if how == "auto":
        how = {2: "none", 3: "token"}.get(x.ndim, "mean")
    if how == "token" and x.ndim == 3:
        return x[:, 0].astype(jnp.float32)
    if how == "mean" and x.ndim >= 3:
        return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), dtype=jnp.float32)
    if how == "none" and x.ndim == 2:
        return x.astype(jnp.float32)
    wanted = {"token": "[B, N, C]", "mean": "[B, ..., C] of rank 3 or more", "none": "[B, C]"}
    raise ValueError(
        f"pool={how!r} takes an input of shape {wanted[how]}; got {x.shape}. pool='auto' goes by the number of axes"
    )


def taking_part(values: jax.Array, labels: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """The values [B, C] and labels [B] with zeros and -1 for the samples that take no part."""
    part = valid_labels(labels, num_classes) & jnp.all(jnp.isfinite(values), axis=-1)
    return jnp.where(part[:, None], values, 0.0), jnp.where(part, labels, -1)


def gather_labels(labels: jax.Array, axis_name: str | tuple | None = None) -> jax.Array:
    """The labels of the global batch, [B] -> [devices * B], the same array on every device."""
    return by_shards(_gather_labels, labels, axis_name=axis_name, in_specs=(SAMPLES,), out_specs=WHOLE)


def _gather_labels(axis_name: str | tuple | None, labels: jax.Array) -> jax.Array:
    if axis_name in NO_AXIS:
        return labels
    size = labels.shape[0]
    places = jnp.zeros(jax.lax.axis_size(axis_name) * size, labels.dtype)
    places = jax.lax.dynamic_update_slice_in_dim(places, labels, jax.lax.axis_index(axis_name) * size, axis=0)
    # A sum and not all_gather: shard_map then knows that all devices have the same, and so the memories.
    return jax.lax.psum(places, axis_name)


def sum_devices(tree: Any, axis_name: str | tuple | None) -> Any:
    """The sum of each array over the devices; the arrays themselves without an axis."""
    return tree if axis_name in NO_AXIS else jax.lax.psum(tree, axis_name)


@struct.dataclass
class UpdateWeights:
    """What the labels of a batch do to a memory: ``new = keep[:, None] * old + add.T @ values``.

    ``keep`` [K] float32, what is left of each row; ``add`` [B, K] float32, the weight of each sample in each row.
    """

    keep: jax.Array
    add: jax.Array
    axis_name: str | tuple | None = struct.field(pytree_node=False, default=None)


def class_ranks(
    labels: jax.Array, num_classes: int, axis_name: str | tuple | None = None
) -> tuple[jax.Array, jax.Array]:
    """0-based rank of each sample among the earlier ones of its class [B], and the class counts [K + 1].

    Samples without a valid label are of class K. Over the devices of an axis, ranks and counts are the global batch's.
    """
    none = jnp.zeros(num_classes + 1, jnp.int32)
    counts = none.at[labels].add(1)
    starts = jnp.cumsum(counts) - counts
    # Where each sample stands once the batch is sorted by class; stable, so batch order holds within a class.
    position = jnp.argsort(jnp.argsort(labels, stable=True)).astype(jnp.int32)
    ranks = position - starts[labels]
    if axis_name in NO_AXIS:
        return ranks, counts
    everybody = _gather_labels(axis_name, labels)
    earlier = jnp.arange(everybody.size) < jax.lax.axis_index(axis_name) * labels.size
    return ranks + none.at[everybody].add(earlier.astype(jnp.int32))[labels], none.at[everybody].add(1)


def valid_labels(labels: jax.Array, num_classes: int) -> jax.Array:
    """[B] bool: the samples with a label in 0..K-1."""
    return (labels >= 0) & (labels < num_classes)


def update_weights(
    labels: jax.Array, num_classes: int, momentum: float, axis_name: str | tuple | None = None
) -> UpdateWeights:
    """The closed form's weights of labels [B], exact for repeated classes; linear in the batch but for a sort."""

    def weights_of(axis_name: str | tuple | None, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        labels = jnp.where(valid_labels(labels, num_classes), labels, num_classes)
        ranks, counts = class_ranks(labels, num_classes, axis_name)
        decay = 1.0 - momentum
        later = counts[labels] - ranks - 1  # samples of the same class still to come
        weights = momentum * jnp.power(decay, later.astype(jnp.float32))
        keep = jnp.power(decay, counts[:num_classes].astype(jnp.float32))
        return keep, weight_matrix(labels, weights, num_classes)

    keep, add = by_shards(weights_of, labels, axis_name=axis_name, in_specs=(SAMPLES,), out_specs=(WHOLE, SAMPLES))
    return UpdateWeights(keep, add, axis_name)


def weight_matrix(labels: jax.Array, weights: jax.Array, num_classes: int) -> jax.Array:
    """`UpdateWeights.add` [B, K] from the labels and the weights of samples."""
    return jnp.where(labels[:, None] == jnp.arange(num_classes)[None, :], weights[:, None], 0.0)


def update_memory(memory: jax.Array, values: jax.Array, weights: UpdateWeights) -> jax.Array:
    """The memory [K, C] after all samples of the batch, whose values are [B, C]; the same on all devices."""
    # HIGHEST: accelerators would round the values to bfloat16 or TF32 in a default product.
    sums = jnp.matmul(weights.add.T, values, precision=jax.lax.Precision.HIGHEST)
    return weights.keep[:, None] * memory + sum_devices(sums, weights.axis_name)


def recall(memory: jax.Array, labels: jax.Array) -> jax.Array:
    """Each sample's row of its own class: [K, C], [B] -> [B, C]; zeros where the label is invalid."""
    return memory.at[jnp.where(labels < 0, memory.shape[0], labels)].get(mode="fill", fill_value=0.0)


def prefix_means(
    recalled: jax.Array, values: jax.Array, labels: jax.Array, momentum: float, axis_name: str | tuple | None = None
) -> jax.Array:
    """Each sample's row of its class right after its own update, as `prefix_rows` has them."""
    decay = jnp.full(values.shape[:2], 1.0 - momentum, jnp.float32)
    return prefix_rows(recalled, decay, momentum * values, labels, axis_name)


def prefix_rows(
    recalled: jax.Array, factors: jax.Array, terms: jax.Array, labels: jax.Array, axis_name: str | tuple | None = None
) -> jax.Array:
    """Each sample's row right after its own step, ``row <- factor_i * row + term_i`` on the row of its class.

    A segmented linear recurrence over the batch sorted by class, as an associative scan: work linear in the
    batch, depth logarithmic, no B x B matrix. Of L layers at once: ``terms``, ``recalled``, the rows before the batch,
    and what is returned are [L, B, C], ``factors`` [L, B]. ``labels`` [L, B] are the global batch's (`gather_labels`):
    over devices each scans all samples of its share of the channels.
    """
    if labels.size == 0:
        return recalled
    in_specs = (LAYERS_SAMPLES, LAYERS_SAMPLES, LAYERS_SAMPLES, WHOLE)
    arguments = recalled, factors, terms, labels
    return by_shards(_prefix_rows, *arguments, axis_name=axis_name, in_specs=in_specs, out_specs=LAYERS_SAMPLES)


def _prefix_rows(
    axis_name: str | tuple | None, recalled: jax.Array, factors: jax.Array, terms: jax.Array, labels: jax.Array
) -> jax.Array:
    places = jnp.broadcast_to(jnp.arange(labels.shape[1]), labels.shape)
    in_order, order = jax.lax.sort_key_val(labels, places, is_stable=True)
    first = jnp.concatenate([jnp.ones_like(labels[:, :1], bool), in_order[:, 1:] != in_order[:, :-1]], axis=1)
    if axis_name in NO_AXIS:
        back = jnp.argsort(order)
        factors, terms = _started(jnp.take_along_axis(first, back, axis=1), recalled, factors, terms)
        factors, terms = (jax.vmap(lambda array, order: array[order])(array, order) for array in (factors, terms))
        return jax.vmap(lambda array, back: array[back])(_scan(factors, terms, axis=1), back)

    devices, (layers, samples, channels) = jax.lax.axis_size(axis_name), terms.shape
    # What is received is transposed: the i-th samples of all devices come after each other, then the next ones.
    order = (order % samples) * devices + order // samples
    back = jnp.argsort(order)
    own = back.reshape(layers, samples, devices)[..., jax.lax.axis_index(axis_name)]
    factors, terms = _started(jnp.take_along_axis(first, own, axis=1), recalled, factors, terms)
    share = -(-channels // devices)
    terms = jnp.pad(terms.reshape(-1, channels), ((0, 0), (0, share * devices - channels))).T
    sent = jnp.concatenate([terms.reshape(devices, -1), jnp.tile(factors.reshape(1, -1), (devices, 1))], axis=1)
    got = _exchange(sent, axis_name).T.reshape(share + 1, *labels.shape)
    # Sorted, with the keys once for each row: with few channels TPUs do that faster than they gather.
    got = jax.lax.sort_key_val(jnp.broadcast_to(back, got.shape), got)[1]
    rows = _scan(got[share:], got[:share], axis=2)
    rows = jax.lax.sort_key_val(jnp.broadcast_to(order, rows.shape), rows)[1]
    rows = _exchange(rows.reshape(-1, devices).T, axis_name)
    return rows.reshape(devices * share, -1)[:channels].T.reshape(recalled.shape)


def _started(
    first: jax.Array, recalled: jax.Array, factors: jax.Array, terms: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factors [L, B, 1] and terms where a class's first sample starts from the memory, not from its neighbour."""
    first, factors = first[..., None], factors[..., None]
    return jnp.where(first, 0.0, factors), terms + jnp.where(first, factors * recalled, 0.0)


def _scan(factors: jax.Array, terms: jax.Array, axis: int) -> jax.Array:
    """The rows of ``row <- factor * row + term`` along an axis, from a first factor of 0 on."""

    def compose(earlier, later):
        return earlier[0] * later[0], earlier[1] * later[0] + later[1]

    return jax.lax.associative_scan(compose, (factors, terms), axis=axis)[1]


def _exchange(rows: jax.Array, axis_name: str | tuple) -> jax.Array:
    """Sends the i-th of the rows [devices, n] to the i-th device; those received are in the order of the devices."""
    return jax.lax.all_to_all(rows, axis_name, split_axis=0, concat_axis=0, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def remember_gradient(update: Callable[..., Any], y: jax.Array, memory: Any, *arguments: Any) -> tuple[jax.Array, Any]:
    """The identity on ``y`` and ``memory``; the gradient with respect to ``memory`` is its update.

    ``memory`` is a float array or a pytree of them. Its cotangent is ``update(gradient of y, memory, *arguments)``,
    the new memory minus the old one. Being a difference, a branch that is not run or a stopped gradient leaves the
    memory alone. No gradient reaches the arguments, pytrees of arrays.

    The memory that is returned is for the next use in the same loss. Gradients come in the reverse order of the uses:
    what the later ones have changed is the returned memory's cotangent, and ``update`` gets the memory with it. So the
    update of all uses is what they make of the memory one after the other, the last first. Uses that are all given
    the first memory add up instead.
    """
    del update, arguments
    return y, memory


def _remember_forward(update, y, memory, *arguments):
    del update
    return (y, memory), (memory, arguments)


def _remember_backward(update, residuals, gradients):
    (memory, arguments), (grad_y, changed) = residuals, gradients
    changes = update(grad_y, jax.tree.map(jnp.add, memory, changed), *arguments)
    return grad_y, jax.tree.map(jnp.add, changed, changes), *[None] * len(arguments)


remember_gradient.defvjp(_remember_forward, _remember_backward)


def sign_update(
    pool: Callable[[jax.Array], jax.Array], grad_y: jax.Array, memory: jax.Array, weights: UpdateWeights, due: jax.Array
) -> jax.Array:
    """How a backward memory changes when it has taken in the signs of the pooled gradients (DPA, section 3).

    A sign is +1 where the gradient is positive, else -1, and 0 where it is no number. The change is zero unless
    ``due``. On the devices of the weights' axis the result is the global batch's, and the same everywhere: neither a
    sum nor a mean over devices is due, and a mean does no harm. (``shard_map`` itself sums a replicated input's
    cotangents where they differ between devices; this one is a sum already, and of a type that says so.)
    """
    gradients = pool(grad_y)
    signs = jnp.where(gradients > 0, 1.0, jnp.where(jnp.isnan(gradients), 0.0, -1.0))
    return jnp.where(due, update_memory(memory, signs, weights) - memory, 0.0)
