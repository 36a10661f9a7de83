"""What the mechanisms cost: training steps of one ViT with different activations, interleaved in one process.

    python benchmarks/activation_overhead.py [--model NAME] [--batch_size 32] [--rounds 20] [--json PATH]

Every round runs one update interval of steps (forward, backward, optimiser, memories) of each mechanism, in an
order that turns, on the same data. The table gives the median over rounds of the time of a step, and the
medians of the ratios to ReLU's and GELU's in the same round: machines drift, and neighbours in time drift together.
DPA and AIEC stand in for ReLU, DNRT for GELU.
"""

import argparse
import json
import platform
import statistics
import time

import jax
import numpy as np

import dpa_jax
from dpa_jax.config import default_config
from dpa_jax.data.batch import Batch
from dpa_jax.training.optimizer import make_optimizer
from dpa_jax.training.state import create_model, create_state
from dpa_jax.training.step import make_train_step

INTERVAL = 5  # DPA's: a round has one step that updates the memories


def training_step(mechanism: str, args: argparse.Namespace, **model_options):
    """The step (state, batch) -> (state, metrics) of a configuration, and what makes its first state."""
    config = default_config()
    config.mechanism, config.model, config.precision = mechanism, args.model, args.precision
    config.model_options.update(model_options)
    model = create_model(config, args.num_classes, in_channels=3)
    optimizer = make_optimizer(config, lambda step: 1e-4)
    step = make_train_step(
        model, optimizer, lambda key, batch: batch.inputs.astype(np.float32) / 255, config.coefficients
    )
    return step, lambda: create_state(model, optimizer, (), 0)


def random_batch(args: argparse.Namespace) -> Batch:
    """Images and labels of the model's sizes."""
    size = dpa_jax.models.create(args.model, args.num_classes).image_size
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (args.batch_size, size, size, 3), np.uint8)
    labels = random.integers(0, args.num_classes, args.batch_size).astype(np.int32)
    index = np.zeros(args.batch_size, np.int32)
    return Batch(images, labels, index, index)


def prepare(mechanism: str, args: argparse.Namespace, batch: Batch, **model_options):
    """The compiled step, its state, the seconds that compiling took, and the compiler's account of memory."""
    step, make_state = training_step(mechanism, args, **model_options)
    state = jax.jit(make_state)()
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    begin = time.perf_counter()
    compiled = lowered.compile()
    return compiled, state, time.perf_counter() - begin, compiled.memory_analysis()


def interleave(programs: dict, batch: Batch, rounds: int) -> dict[str, list[float]]:
    """{name: seconds of a step in each round} of programs made by `prepare`."""
    names = list(programs)
    states = {name: state for name, (_, state, _, _) in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds + 1):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            compiled, state = programs[name][0], states[name]
            begin = time.perf_counter()
            for _ in range(INTERVAL):
                state, _ = compiled(state, batch)
            jax.block_until_ready(state)
            states[name] = state
            if round_number:  # the first is a warm-up
                seconds[name].append((time.perf_counter() - begin) / INTERVAL)
    return seconds


def ratios(seconds: list[float], baseline: list[float]) -> list[float]:
    """The quartiles of the ratio, round by round."""
    return statistics.quantiles([a / b for a, b in zip(seconds, baseline, strict=True)], n=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch4_32")
    parser.add_argument("--mechanisms", default="relu,gelu,dpa,aiec,dnrt")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_classes", type=int, default=100)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()

    names = args.mechanisms.split(",")
    if not {"relu", "gelu"} <= set(names):
        parser.error("--mechanisms needs relu and gelu, which the others are compared with")
    batch = jax.device_put(random_batch(args))
    programs = {name: prepare(name, args, batch) for name in names}
    seconds = interleave(programs, batch, args.rounds)

    rows = {}
    for name in names:
        _, _, compile_seconds, memory = programs[name]
        rows[name] = {
            "step_ms": 1e3 * statistics.median(seconds[name]),
            "ratio_to_relu": ratios(seconds[name], seconds["relu"]),
            "ratio_to_gelu": ratios(seconds[name], seconds["gelu"]),
            "compile_seconds": compile_seconds,
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
            "arguments_mib": memory.argument_size_in_bytes / 2**20,
        }

    device = jax.devices()[0].device_kind
    print(f"{args.model}, batch {args.batch_size}, {args.num_classes} classes, {args.precision}, {args.rounds} rounds")
    print(f"{device}, jax {jax.__version__}, Python {platform.python_version()}")
    print(f"{'':8}{'step ms':>9}{'/ relu (quartiles)':>24}{'/ gelu (quartiles)':>24}", end="")
    print(f"{'compile s':>11}{'temp MiB':>10}{'args MiB':>10}")
    for name, row in rows.items():
        print(f"{name:8}{row['step_ms']:9.1f}", end="")
        for baseline in ("relu", "gelu"):
            low, middle, high = row[f"ratio_to_{baseline}"]
            print(f"{f'{middle:.3f} ({low:.3f} - {high:.3f})':>24}", end="")
        print(f"{row['compile_seconds']:11.1f}{row['temporary_mib']:10.1f}{row['arguments_mib']:10.1f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"device": device, "jax": jax.__version__, **vars(args), "results": rows}, file, indent=1)


if __name__ == "__main__":
    main()
