"""How a run is spread over its devices: one mesh, and the rules that say which arrays are shared over it.

The mesh has one axis. Batches are shared over it by their first axis, always. The state (parameters, the optimiser's
moments, memories) is whole on every device, or shared as well: fully sharded data parallelism, also known as ZeRO
(Rajbhandari et al., 2020). The compiler then gathers what a layer needs when it needs it. Either way a run computes the
same, but for the order in which sums are rounded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dpa_jax.activations.mechanism import Mechanism

AXIS = "data"
LEAST = 2**14
"""Elements that an array must have to be shared: of smaller ones the transfer costs more than the memory is worth."""


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of a run, on devices that need not be here."""
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def known(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, in which mechanisms know the mesh, and so how the batch is spread, while it is traced."""

    def traced(*arguments: Any) -> Any:
        if jax.sharding.get_abstract_mesh().manual_axes:  # of `over_members`: a device has all of its members' batches
            return function(*arguments)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def whole(mesh: Mesh) -> NamedSharding:
    """Of what every device has all of."""
    return NamedSharding(mesh, PartitionSpec())


def of_state(abstract: Any, mesh: Mesh, sharding: str, leading: tuple[str | None, ...] = ()) -> Any:
    """The sharding of each array of a state.

    Args:
        abstract: the state of one member, a pytree of `jax.ShapeDtypeStruct`.
        mesh: of `make_mesh`.
        sharding: ``config.sharding``: ``"data"``, all of it is whole on every device; ``"fsdp"``, each array is shared
            as `spec` says.
        leading: how axes that the arrays have in front of the member's are spread.
    """

    def one(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        own = spec(leaf.shape, mesh.size) if sharding == "fsdp" else PartitionSpec()
        return NamedSharding(mesh, PartitionSpec(*leading, *own))

    return jax.tree.map(one, abstract)


def spec(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """How a parameter, a moment or a memory of this shape is shared: along its longest axis that the devices divide.

    So a moment is shared like its parameter, and memories [K, C] by classes or channels. Of axes of one length it is
    the last. An array of fewer than `LEAST` elements, or without such an axis, is whole on every device.
    """
    lengths = [length if length % devices == 0 else 0 for length in shape]
    if devices == 1 or math.prod(shape) < LEAST or not any(lengths):
        return PartitionSpec()
    axis = max(range(len(shape)), key=lambda i: (lengths[i], i))
    return PartitionSpec(*(AXIS if i == axis else None for i in range(len(shape))))


def of_members(seeds: int, mesh: Mesh, config: ConfigDict) -> tuple[str | None, ...]:
    """How the axis of a run's members is spread, as `of_state` takes it; one member has none.

    Where the devices divide their number, each device has members of its own, with their whole batches, and no step
    waits for another device. Otherwise, and where batches or states are shared otherwise, each has a part of all.
    """
    if seeds == 1:
        return ()
    own = mesh.size > 1 and seeds % mesh.size == 0 and config.sharding == "data" and config.accumulate == 1
    return (AXIS,) if own else (None,)


def over_members(function: Callable[..., Any], mesh: Mesh, leading: tuple[str | None, ...]) -> Callable[..., Any]:
    """``function``, of one member, for arrays that have several in front, spread as `of_members` says.

    Where a device has members of its own, they are all that its program knows of: one member's is that of its run
    alone. The batches go there before.
    """
    if AXIS not in leading:
        return jax.vmap(function)

    def own(call: Callable[..., Any], arguments: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
        # A mechanism asks which axis its batch is spread over where a mesh is mapped. Here it is over none.
        if isinstance(context.module, Mechanism) and getattr(context.module, "axis_name", ()) is None:
            object.__setattr__(context.module, "axis_name", ())
        return call(*arguments, **options)

    def on_each(*arguments: Any) -> Any:
        with nn.intercept_methods(own):
            if len(jax.tree.leaves(arguments)[0]) > 1:
                return jax.vmap(function)(*arguments)
            result = function(*jax.tree.map(lambda leaf: leaf[0], arguments))
            return jax.tree.map(lambda leaf: leaf[None], result)

    shared = PartitionSpec(AXIS)
    return jax.shard_map(on_each, mesh=mesh, in_specs=shared, out_specs=shared, check_vma=False)


def over_samples(function: Callable[..., Any], mesh: Mesh, sharding: str) -> Callable[..., Any]:
    """A function that calls a linen model, in which the devices share every module's output by its first axis.

    With ``"fsdp"`` the compiler could spread features over the devices instead, as their weights are, and gather the
    whole batch on each. This makes it gather the weights.
    """
    if sharding != "fsdp":
        return function
    samples = NamedSharding(mesh, PartitionSpec(AXIS))

    def share(leaf: Any) -> Any:
        is_batch = isinstance(leaf, jax.Array) and leaf.ndim > 1 and leaf.shape[0] % mesh.size == 0
        return jax.lax.with_sharding_constraint(leaf, samples) if is_batch else leaf

    def shared(call: Callable[..., Any], arguments: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*arguments, **options)
        return jax.tree.map(share, result) if context.method_name == "__call__" else result

    @functools.wraps(function)
    def inside(*arguments: Any) -> Any:
        with nn.intercept_methods(shared):
            return function(*arguments)

    return inside


def split(batch: Any, mesh: Mesh, number: int) -> Any:
    """Micro-batches of a pytree of arrays, in the order of the batch: [B, ...] -> [N, B / N, ...].

    The devices share each of them by its second axis, for which samples move between the devices once.
    """
    shared = NamedSharding(mesh, PartitionSpec(None, AXIS))

    def one(leaf: jax.Array) -> jax.Array:
        parts = leaf.reshape(number, leaf.shape[0] // number, *leaf.shape[1:])
        return jax.lax.with_sharding_constraint(parts, shared)

    return jax.tree.map(one, batch)


def placed(abstract: Any, shardings: Any, leading: tuple[int, ...] = ()) -> Any:
    """A pytree of `jax.ShapeDtypeStruct` with their shardings, and axes of these lengths in front."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct((*leading, *leaf.shape), leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def bytes_per_device(abstract: Any) -> int:
    """What a device has of a pytree of `jax.ShapeDtypeStruct`; those without a sharding are whole on it."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(abstract)))
