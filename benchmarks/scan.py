"""What blocks in a scan cost and save, beside the same blocks unrolled: training steps of one ViT.

    python benchmarks/scan.py [--mechanisms relu,gelu,dpa] [--batch_size 32] [--rounds 8] [--json PATH]
    python benchmarks/scan.py --topology v5e:16x16 --batch_size 4096 [--mechanisms relu,dpa] [--json PATH]

The first measures on the devices here, interleaved as in ``activation_overhead.py``: medians over rounds of a step's
time, and of its ratio to the unrolled form's.

The second compiles for TPUs that need not be there (the extra ``tpu-aot``), the batch sharded over all chips, and
prints the compiler's account of one chip: gigabytes read and written, floating point operations, memory for
temporaries, and the collective operations of a step. The compiler counts the body of a loop once; a second program
with two blocks in the body tells what one costs, and all are counted here.
"""

import argparse
import json
import re
import statistics
import time
from unittest import mock

from activation_overhead import interleave, prepare, random_batch, ratios, training_step

FORMS = {"unrolled": False, "scanned": True}


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Times of every mechanism in both forms, on the devices here."""
    import jax

    batch = jax.device_put(random_batch(args))
    names = [(mechanism, form) for mechanism in args.mechanisms for form in FORMS]
    programs = {(name, form): prepare(name, args, batch, scan=FORMS[form]) for name, form in names}
    seconds = interleave(programs, batch, args.rounds)
    return {
        f"{name} {form}": {
            "step_ms": 1e3 * statistics.median(seconds[name, form]),
            "ratio_to_unrolled": ratios(seconds[name, form], seconds[name, "unrolled"])[1],
            "ratio_to_first": ratios(seconds[name, form], seconds[names[0][0], form])[1],
            "compile_seconds": programs[name, form][2],
            "temporary_mib": programs[name, form][3].temp_size_in_bytes / 2**20,
        }
        for name, form in names
    }


def compile_for(topology: str, args: argparse.Namespace) -> dict[str, dict]:
    """The compiler's account of every mechanism in both forms, for a TPU topology."""
    import flax.linen as nn
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from dpa_jax.models import ViT
    from dpa_jax.training.cost import tpu_devices

    mesh = Mesh(np.asarray(tpu_devices(topology)).reshape(-1), ("data",))
    replicated, sharded = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    batch = jax.eval_shape(lambda: random_batch(args))

    def compiled(name, scan):
        step, make_state = training_step(name, args, scan=scan)
        jitted = jax.jit(step, in_shardings=(replicated, sharded), out_shardings=replicated, donate_argnums=0)
        lowered = jitted.lower(jax.eval_shape(make_state), batch)
        begin = time.perf_counter()
        program = lowered.compile()
        return program, time.perf_counter() - begin

    depth = ViT(args.num_classes).depth
    rows = {}
    for name in args.mechanisms:
        for form, scan in FORMS.items():
            program, seconds = compiled(name, scan)
            cost = program.cost_analysis()
            total = {key: cost[key] for key in ("bytes accessed", "flops")}
            if scan:
                with mock.patch.object(
                    nn, "scan", lambda *args, scan=nn.scan, **given: scan(*args, **given | {"unroll": 2})
                ):
                    cost = compiled(name, scan)[0].cost_analysis()
                total = {key: value + (depth - 1) * (cost[key] - value) for key, value in total.items()}
            rows[f"{name} {form}"] = {
                "gigabytes_accessed": total["bytes accessed"] / 1e9,
                "gigaflops": total["flops"] / 1e9,
                "temporary_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
                "compile_seconds": seconds,
                "collectives": collectives(program.as_text(), depth),
            }
    return rows


def collectives(program: str, depth: int) -> dict[str, int]:
    """How many of each kind a step runs: those in the body of a loop once a block."""
    from dpa_jax.training.cost import COLLECTIVES

    bodies = set(re.findall(r"body=%([\w.-]+)", program))
    # {channel: how often}: the compiler splits one collective over many instructions, under one channel.
    channels: dict[str, dict[str, int]] = {kind: {} for kind in COLLECTIVES}
    for computation in program.split("\n}"):
        header = re.search(r"^(?:ENTRY )?%([\w.-]+) \(", computation, re.MULTILINE)
        times = depth if header and header[1] in bodies else 1
        for kind, found in channels.items():
            for channel in re.findall(rf" {kind}(?:-start)?\(.*channel_id=(\d+)", computation):
                found[channel] = max(times, found.get(channel, 0))
    return {kind: sum(found.values()) for kind, found in channels.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch4_32")
    parser.add_argument("--mechanisms", default=["relu", "gelu", "dpa"], type=lambda names: names.split(","))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_classes", type=int, default=100)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--topology", help="compile for these TPUs instead, v5e:16x16 for example")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()

    rows = compile_for(args.topology, args) if args.topology else measure(args)
    for name, row in rows.items():
        print(f"{name:16}", "  ".join(f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float)))
        if "collectives" in row:
            print(f"{'':16}", "  ".join(f"{kind} {count}" for kind, count in row["collectives"].items()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**vars(args), "results": rows}, file, indent=1)


if __name__ == "__main__":
    main()
