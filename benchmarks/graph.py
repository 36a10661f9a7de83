"""A made-up graph of DGraph's size: seconds a training step, and the memory that it takes.

    python benchmarks/graph.py [--mechanisms relu,dpa] [--model graphsage] [--steps 3] [--scale 1.0] [--json PATH]

The graph has 3.7 million nodes, 4.3 million random edges and 17 features; 858,000 nodes are labelled in training, of
two classes. Each mechanism runs in a process of its own, whose greatest memory is told. The first step, which
compiles, is not counted.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time

import numpy as np

NODES, EDGES, FEATURES, LABELLED = 3_700_550, 4_300_999, 17, 857_899


def measure(mechanism: str, args: argparse.Namespace) -> dict[str, float]:
    import jax

    from dpa_jax.config import default_config
    from dpa_jax.data import sources
    from dpa_jax.data.graphs import graph
    from dpa_jax.data.sources.graph_source import GraphSource
    from dpa_jax.training.run import build

    nodes, edges, labelled = (round(args.scale * count) for count in (NODES, EDGES, LABELLED))
    random = np.random.default_rng(0)

    def made_up(data):
        features = random.standard_normal((nodes, FEATURES), np.float32)
        labels = (random.random(nodes) < 0.0127).astype(np.int32)
        parts = np.split(random.permutation(nodes), [labelled, labelled + 100, labelled + 200])
        splits = dict(zip(("train", "valid", "eval"), parts, strict=False))
        made = graph(features, random.integers(0, nodes, (edges, 2)), keep_loops=True)
        return GraphSource("made_up", made, labels, splits, ("normal", "fraud"))

    sources.register("made_up", made_up)
    config = default_config()
    config.update(mechanism=mechanism, model=args.model, batch_size=1, eval_batch_size=1, epochs=100, clip_norm=0.0)
    config.model_options = {"hidden": 128, "dropout": 0.0}
    config.data.name = "made_up"
    config.optimizer.update(name="adam", learning_rate=0.01, weight_decay=5e-7)
    config.schedule.name = "constant"
    run = build(config)
    run.load()
    state, seconds = run.init(), []
    for number in range(args.steps + 1):
        begin = time.perf_counter()
        state, metrics = run.step(state, number)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": statistics.median(seconds[1:]), "slowest": max(seconds[1:]), "peak_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanisms", default=["relu", "dpa"], type=lambda names: names.split(","))
    parser.add_argument("--model", default="graphsage", choices=["gcn", "graphsage"])
    parser.add_argument("--steps", type=int, default=5, help="DPA updates its memories in every fifth")
    parser.add_argument("--scale", type=float, default=1.0, help="of nodes and edges")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()

    rows = {}
    for mechanism in args.mechanisms:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = rows[mechanism] = pool.apply(measure, (mechanism, args))
        print(
            f"{mechanism:8} {row['seconds']:.2f} s a step (slowest {row['slowest']:.2f}), {row['peak_gib']:.1f} GiB",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**vars(args), "results": rows}, file, indent=1)


if __name__ == "__main__":
    main()
