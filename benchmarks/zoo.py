"""The papers' models beside each other: parameters, MACs, and what a mechanism costs in a training step of each.

    python benchmarks/zoo.py [--models NAME,...] [--size 32] [--batch_size 16] [--rounds 8] [--json PATH]

MACs are half of the operations that the compiler counts in the forward pass of one image. Steps are timed as in
activation_overhead.py: of each model the native activation and the mechanisms are interleaved in one process, and the
ratios are medians over the rounds. DPA and AIEC are where the papers have them: in every block of a transformer, in the
last block of a CNN; DNRT is everywhere.
"""

import argparse
import json
import platform
import statistics

import jax
import numpy as np
from activation_overhead import interleave, prepare, random_batch, ratios

import dpa_jax
from dpa_jax.overrides import PAPERS

MECHANISMS = ("dpa", "aiec", "dnrt")
_NATIVE = {"mobilenet_v2": "relu6"}  # else GELU in a transformer, ReLU in a CNN


def sizes(name: str, num_classes: int) -> tuple[int, float]:
    """Parameters, and millions of multiplications and additions of one image's forward pass."""
    model = dpa_jax.models.create(name, num_classes)
    variables = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables["params"]))
    unrolled = {"scan": False} if hasattr(model, "scan") else {}  # the compiler counts the body of a loop once
    forward = jax.jit(model.clone(**unrolled).apply).lower(variables, model.example_inputs)
    return parameters, forward.compile().cost_analysis()["flops"] / 2e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PAPERS))
    parser.add_argument("--size", type=int, choices=(32, 224), default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_classes", type=int, default=100)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", help="write the figures to this file after every model")
    args = parser.parse_args()

    device = jax.devices()[0].device_kind
    print(f"{args.size} x {args.size}, batch {args.batch_size}, {args.num_classes} classes, {args.precision}")
    print(f"{device}, jax {jax.__version__}, Python {platform.python_version()}")
    print("| model | parameters | MMAC | step ms | DPA | AIEC | DNRT | compile s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    rows = {}
    for short in args.models.split(","):
        paper = PAPERS[short]
        args.model = paper.small if args.size == 32 else paper.large
        native = _NATIVE.get(short, "gelu" if paper.stochastic_depth else "relu")
        batch = jax.device_put(random_batch(args))
        programs = {name: prepare(name, args, batch) for name in (native, *MECHANISMS)}
        seconds = interleave(programs, batch, args.rounds)
        parameters, macs = sizes(args.model, args.num_classes)
        row = rows[args.model] = {
            "parameters": parameters,
            "mmac": macs,
            "native": native,
            "step_ms": 1e3 * statistics.median(seconds[native]),
            "ratios": {name: ratios(seconds[name], seconds[native]) for name in MECHANISMS},
            "compile_seconds": programs["dpa"][2],
        }
        middles = " | ".join(f"{row['ratios'][name][1]:.2f}" for name in MECHANISMS)
        print(
            f"| {args.model} | {parameters:,} | {macs:,.0f} | {row['step_ms']:,.0f} | {middles} "
            f"| {row['compile_seconds']:.0f} |",
            flush=True,
        )
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"device": device, "jax": jax.__version__, **vars(args), "results": rows}, file, indent=1)


if __name__ == "__main__":
    main()
