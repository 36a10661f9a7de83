"""What the host does between training steps: a model so small that it counts, one and several steps a dispatch.

    python benchmarks/dispatch.py [--steps 1,4,16] [--rounds 5]

The run is the digits' with a ViT of two blocks of width 16, batch 32. Each round trains 64 steps in each way, in turns,
with the loop's own calls: `Run.steps` (the batch's indices to the device, the compiled step) and `Run.seen` (figures
back). The table has medians over the rounds of a step's time, and of the part of it that is spent in the feed.
"""

import argparse
import platform
import statistics
import time

import jax

from dpa_jax.command_line import find_config, load_config
from dpa_jax.training.run import Run, build

STEPS = 64


def make(count: int) -> Run:
    config = load_config(find_config("digits_vit"))
    config.model_options.update(embed_dim=16, depth=2, num_heads=2)
    config.steps_per_dispatch = count
    run = build(config)
    run.load()
    return run


def timed(run: Run, count: int) -> tuple[float, float]:
    """Milliseconds of a step, and of its share of the feed."""
    state, feed, in_feed = run.init(), run.feeds[0], 0.0
    begin = time.perf_counter()
    for step in range(0, STEPS, count):
        state, metrics = run.steps(state, step, count)
        run.seen(metrics, count)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    for step in range(0, STEPS, count):
        jax.block_until_ready(feed.train(step) if count == 1 else feed.order(step, count, count))
    in_feed = time.perf_counter() - begin
    return 1e3 * seconds / STEPS, 1e3 * in_feed / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="1,4,16", help="steps a dispatch")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    runs = {count: make(count) for count in map(int, args.steps.split(","))}
    seen: dict[int, list[tuple[float, float]]] = {count: [] for count in runs}
    for round_number in range(args.rounds + 1):
        for count, run in runs.items():
            figures = timed(run, count)
            if round_number:  # the first compiles
                seen[count].append(figures)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, Python {platform.python_version()}")
    print("| steps a dispatch | ms a step | of it the feed |\n|---:|---:|---:|")
    for count, figures in seen.items():
        step, feed = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"| {count} | {step:.2f} | {feed:.2f} |")


if __name__ == "__main__":
    main()
