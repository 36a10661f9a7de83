"""What a training step costs by the compiler's account: on the devices here, or on TPUs that need not be here."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dpa_jax.checks import host_memory
from dpa_jax.training.header import describe, model_line
from dpa_jax.training.run import Run, build

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


class Chip(NamedTuple):
    """What a maker says of an accelerator: dense bfloat16 FLOP/s, bytes/s and bytes of its memory."""

    flops: float
    bandwidth: float
    memory: float


CHIPS = {
    "TPU v5": Chip(459e12, 2765e9, 95 * 2**30),
    "TPU v5 lite": Chip(197e12, 819e9, 16 * 2**30),
    "TPU v6 lite": Chip(918e12, 1640e9, 32 * 2**30),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3350e9, 80e9),
    "NVIDIA H200": Chip(989e12, 4800e9, 141e9),
}
"""By JAX's ``device_kind``."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """The compiler's account of one training step, per device.

    Attributes:
        devices: how many share the batch.
        device_kind: as JAX names it.
        flops: floating point operations.
        bytes_accessed: bytes that operations read and write, each operation by itself.
        peak_bytes: memory for arguments, results, temporaries and the program itself; results that take an argument's
            place count once.
        argument_bytes: of the peak, state and batch.
        temporary_bytes: of the peak, what lives within the step.
        collectives: {kind: how many}, operations between devices, of those kinds that there are.
        memory_bytes: what a device has; None where that is not known.
        compile_seconds: the time that the compiler took.
    """

    devices: int
    device_kind: str
    flops: float
    bytes_accessed: float
    peak_bytes: int
    argument_bytes: int
    temporary_bytes: int
    collectives: dict[str, int]
    memory_bytes: int | None
    compile_seconds: float

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.bytes_accessed

    @property
    def ridge(self) -> float | None:
        """The intensity from which on the device's arithmetic is the limit and not its memory; None if not known."""
        chip = CHIPS.get(self.device_kind)
        return chip.flops / chip.bandwidth if chip else None

    @property
    def utilisation_ceiling(self) -> float | None:
        """The greatest share of the device's FLOP/s that the memory's bandwidth leaves possible; None if not known."""
        return min(1.0, self.intensity / self.ridge) if self.ridge else None

    @property
    def fits(self) -> bool | None:
        """Whether the step fits into the device's memory; None if that is not known."""
        return None if self.memory_bytes is None else self.peak_bytes <= self.memory_bytes

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        derived = ("intensity", "ridge", "utilisation_ceiling", "fits")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


def report(config: ConfigDict, topology: str | None = None, file: str | None = None) -> str:
    """Compiles a configuration's training step, and tells what it costs, also in a JSON ``file``.

    No data is read and nothing is computed. ``topology`` names TPUs, as `tpu_devices` has it; None: the devices here.

    Raises:
        ValueError: if the configuration can't run, or as `tpu_devices`.
        OSError: if there is no folder for the file.
    """
    if file is not None and not pathlib.Path(file).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json: there is no folder {pathlib.Path(file).parent}")
    run = build(config, None if topology is None else tpu_devices(topology))
    cost = compile_step(run)
    if file is not None:
        pathlib.Path(file).write_text(json.dumps({"topology": topology} | cost.to_json(), indent=1) + "\n")
    return table(run, cost)


def tpu_devices(topology: str) -> list[jax.Device]:
    """The devices of TPUs that need not be here, to compile for: ``"v5e:16x16"``, ``"v6e:16x16"``, ``"v5p:4x4x4"``.

    Raises ValueError if libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("--topology needs TPUs' compiler: pip install 'dpa_jax[tpu-aot]'")
    from jax.experimental import topologies

    # The compiler asks for the machine's own TPUs, at an address that only Google's machines have.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--topology={topology}, as v5e:2x2 or v5p:4x4x4: {error}") from error


def compile_step(run: Run) -> Cost:
    """The cost of a run's training step, on its devices, which need not be here.

    The compiler counts a loop's body once. Where the run's model loops over its blocks, operations, bytes and
    collectives are therefore those of a second program, with one block after the other; the memory is the first's.
    """
    device = run.devices[0]
    scan = getattr(run.model, "scan", False)
    loops = device.platform != "tpu" if scan is None else scan
    begin = time.perf_counter()
    # A model that decides by itself asks which devices are here.
    program = _compiled(_with_scan(run, False) if scan is None and not loops else run)
    counted = _compiled(_with_scan(run, False)) if loops else program
    seconds = time.perf_counter() - begin
    memory, cost, text = program.memory_analysis(), counted.cost_analysis(), counted.as_text()
    if memory is None or cost is None or text is None:
        raise ValueError(f"the compiler for {device.device_kind} does not tell what a program costs")
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Cost(
        devices=len(run.devices),
        device_kind=device.device_kind,
        flops=cost["flops"],
        bytes_accessed=cost["bytes accessed"],
        peak_bytes=peak + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        collectives=count_collectives(text),
        memory_bytes=_memory(device),
        compile_seconds=seconds,
    )


def _compiled(run: Run) -> jax.stages.Compiled:
    # XLA can't read back its own programs for TPUs in which a SparseCore sorts (jaxlib 0.10.2).
    tpu: dict[str, str | bool] = {"xla_tpu_enable_offloading_sort_to_sparsecore": False}
    return run.lower().compile(compiler_options=tpu if run.devices[0].platform == "tpu" else None)


def _with_scan(run: Run, scan: bool) -> Run:
    """The same run, whose model loops over its blocks or does not."""
    config = run.config.copy_and_resolve_references()
    config.model_options["scan"] = scan
    return build(config, run.devices)


def count_collectives(program: str) -> dict[str, int]:
    """How many operations of each kind there are between devices, in the compiler's text of a program.

    The compiler splits one over many instructions, which are of one channel. Those of ``shard_map`` are not split, and
    are all of one channel.
    """
    channels = collections.defaultdict(set)
    pattern = rf"(\S+) = .* ({'|'.join(COLLECTIVES)})(?:-start)?\(.*channel_id=(\d+)(.*)"
    for name, kind, channel, rest in re.findall(pattern, program):
        channels[kind].add(name if "/shard_map/" in rest else channel)
    return {kind: len(channels[kind]) for kind in COLLECTIVES if kind in channels}


def _memory(device: jax.Device) -> int | None:
    """The bytes of memory that a device can use; of a CPU, its share of the machine's."""
    if device.platform == "cpu":
        return host_memory() // len(jax.local_devices())
    if device in jax.devices() and (limits := device.memory_stats()):
        return limits.get("bytes_limit")
    chip = CHIPS.get(device.device_kind)
    return int(chip.memory) if chip else None


def table(run: Run, cost: Cost) -> str:
    """The lines that a command prints."""
    counts = ", ".join(f"{count} {kind}" for kind, count in cost.collectives.items()) or "none"
    memory = f"{cost.peak_bytes / 1e9:,.3f} GB"
    if cost.memory_bytes is not None:
        memory += f" of {cost.memory_bytes / 1e9:,.1f}: {'fits' if cost.fits else 'does not fit'}"
    limit = "not known for this device"
    if (ridge := cost.ridge) and (ceiling := cost.utilisation_ceiling):
        limit = f"at most {100 * ceiling:.1f} % of the arithmetic, which is the limit from {ridge:.0f} on"
    rows = {
        "memory": f"{memory} (arguments {cost.argument_bytes / 1e9:,.3f}, "
        f"temporaries {cost.temporary_bytes / 1e9:,.3f})",
        "operations": f"{cost.flops / 1e9:,.2f} GFLOP",
        "bytes": f"{cost.bytes_accessed / 1e9:,.3f} GB read and written",
        "collectives": counts,
        "intensity": f"{cost.intensity:.1f} FLOP a byte",
        "utilisation": limit,
        "compiled in": f"{cost.compile_seconds:.1f} s",
    }
    head = [
        f"device: {describe(run.devices)}, jax {jax.__version__}, {run.config.precision}",
        model_line(run),
        f"a training step of {run.config.batch_size:,}, per device:",
    ]
    return "\n".join(head + [f"  {name:<12}{value}" for name, value in rows.items()])
