"""What a memory's update costs as the batch grows: it is linear, there is no B x B matrix.

    python benchmarks/batch_scaling.py [--largest 65536] [--json PATH]

One layer of C channels and K classes, in a step that updates: the forward memory, what each sample finds in it
(the penalty's mask), and the backward memory. Medians over repetitions; ns per sample stay flat
where the cost is linear.
"""

import argparse
import json
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from dpa_jax.activations import memory


def update(forward, backward, values, signs, labels, momentum=0.9):
    """All that a DPA does with its memories in one updating step."""
    weights = memory.update_weights(labels, forward.shape[0], momentum)
    (rows,) = memory.prefix_means(memory.recall(forward, labels)[None], values[None], labels[None], momentum)
    mask = (rows < 0) & (memory.recall(backward, labels) < 0) & (values > 0)
    penalty = jnp.sum(jnp.where(mask, values**2, 0)) / jnp.maximum(jnp.sum(mask), 1)
    return (
        memory.update_memory(forward, values, weights),
        memory.update_memory(backward, signs, weights),
        penalty,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smallest", type=int, default=256)
    parser.add_argument("--largest", type=int, default=65536)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--num_classes", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()

    memories = [jnp.zeros((args.num_classes, args.channels))] * 2
    rows = []
    print(
        f"C = {args.channels}, K = {args.num_classes}, {jax.devices()[0].device_kind}, jax {jax.__version__}, ",
        end="",
    )
    print(f"Python {platform.python_version()}")
    print(f"{'B':>8}{'ms':>10}{'ns/sample':>12}{'temp MiB':>10}")
    size = args.smallest
    while size <= args.largest:
        random = np.random.default_rng(0)
        values, signs = (jnp.asarray(random.normal(size=(size, args.channels)), jnp.float32) for _ in range(2))
        labels = jnp.asarray(random.integers(0, args.num_classes, size), jnp.int32)
        compiled = jax.jit(update).lower(*memories, values, signs, labels).compile()
        jax.block_until_ready(compiled(*memories, values, signs, labels))
        seconds = []
        for _ in range(args.repetitions):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*memories, values, signs, labels))
            seconds.append(time.perf_counter() - begin)
        row = {
            "batch_size": size,
            "ms": 1e3 * statistics.median(seconds),
            "ns_per_sample": 1e9 * statistics.median(seconds) / size,
            "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        }
        rows.append(row)
        print(f"{size:8}{row['ms']:10.2f}{row['ns_per_sample']:12.0f}{row['temporary_mib']:10.1f}")
        size *= 2
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                    **vars(args),
                    "results": rows,
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
