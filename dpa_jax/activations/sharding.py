"""Meshes with Explicit axes, where every operation must tell how its result is spread over the devices.

A sort by class, or a sum over the batch, cannot tell. It runs with those axes Auto: the compiler then decides as it
does on a mesh of Auto axes, with the same numbers.
"""

from collections.abc import Callable
from typing import Any

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
