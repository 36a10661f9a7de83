"""Batches that are spread over the devices of a mesh.

On Explicit axes every operation must tell how its result is spread. A sort by class, or a sum over the batch, cannot
tell. It runs with those axes Auto: the compiler then decides as it does on a mesh of Auto axes, with the same numbers.

On Auto axes the compiler decides badly about what goes from sample to sample: each device does the whole batch's work,
or a scan crosses the devices at every level. Where `batch_axes` tells how the batch lies, `by_shards` has each device
do its own samples' part, again with the same numbers.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def spec(x: jax.typing.ArrayLike) -> PartitionSpec:
    """How an array is spread over Explicit axes."""
    return jax.typeof(x).sharding.spec


def spec_of_samples(x: jax.Array, rows_per_sample: int) -> PartitionSpec:
    """How arrays of one row a sample are spread that go along with ``x`` [B * R, ...], of R rows a sample.

    Not at all where a device has a part of a sample.
    """
    rows = jax.typeof(x).sharding.shard_shape(x.shape)[0]
    return PartitionSpec() if rows % rows_per_sample else PartitionSpec(*spec(x)[:1])


def on_auto_axes(function: Callable[..., Any], *arguments: Any, specs: Callable[[Any], Any]) -> Any:
    """``function(*arguments)``, computed with Auto axes where the arguments, pytrees of arrays, have Explicit ones.

    ``specs`` makes of the result a pytree like it with the `PartitionSpec` of each array on the Explicit axes.
    """
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arguments))
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None:
        return function(*arguments)
    auto = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(auto):
        result = function(*jax.sharding.reshard(arguments, NamedSharding(auto, PartitionSpec())))
    shardings = jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), result, specs(result))
    return jax.sharding.reshard(result, shardings)


SAMPLES, LAYERS_SAMPLES, WHOLE = PartitionSpec("batch"), PartitionSpec(None, "batch"), PartitionSpec()
"""For `by_shards`: of arrays [B, ...] or [L, B, ...] of the batch's samples, and of those that all devices have."""


def batch_axes(samples: int) -> tuple[str, ...]:
    """The axes of the mesh, as `jax.set_mesh` has it, that so many samples are spread over; () where nobody knows.

    They are those of Flax's logical axis ``"batch"`` (`flax.linen.logical_axis_rules`), and without a rule for it the
    mesh's only axis. Nobody knows inside of ``shard_map``, or where the axes' devices do not divide the samples.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    named = (nn.logical_to_mesh_axes(("batch",)) or (None,))[0]
    axes = sizes if named is None else (named,) if isinstance(named, str) else named
    axes = tuple(axis for axis in axes if axis in sizes)
    known = mesh.are_all_axes_auto and (len(axes) == 1 or named is not None)
    return axes if known and samples % math.prod(sizes[axis] for axis in axes) == 0 else ()


def by_shards(
    function: Callable[..., Any], *arguments: jax.Array, axis_name: Any, in_specs: tuple[Any, ...], out_specs: Any
) -> Any:
    """``function(axis_name, *arguments)``, each device with its own samples where the mesh's axis of them is known.

    There the function runs under ``shard_map`` over that axis, whose name it gets. Where it is called inside of
    ``shard_map`` or the like already, which ``axis_name`` other than None says, or no axis is known, it runs as it is.
    ``in_specs`` and ``out_specs`` say of each array whether it is `SAMPLES`, `LAYERS_SAMPLES` or `WHOLE`.
    """
    dims = zip(arguments, map(tuple, in_specs), strict=True)
    samples = next(array.shape[spec.index("batch")] for array, spec in dims if "batch" in spec)
    axes = batch_axes(samples) if axis_name is None else ()
    if not axes:
        return function(axis_name, *arguments)
    takes, gives = jax.tree.map(
        lambda spec: PartitionSpec(*(axes if part == "batch" else part for part in spec)),
        (in_specs, out_specs),
        is_leaf=lambda spec: isinstance(spec, PartitionSpec),
    )
    return jax.shard_map(lambda *shards: function(axes, *shards), in_specs=takes, out_specs=gives)(*arguments)
