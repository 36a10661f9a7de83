"""What the augmentation costs: each operation alone, the whole recipe, and a training step with it and without.

    python benchmarks/input_pipeline.py [--sizes 32,224] [--workers 0,2] [--model NAME] [--rounds 5] [--json PATH]

The recipe is the papers': random resized crop, flip, RandAugment rand-m9-mstd0.5-inc1, normalisation, erasing with
probability 0.25. The first table is of programs under jit and vmap on the default device, from uint8 images that are
there already; where timm can be imported, its recipe for the same images stands beside them: PIL images to
normalised tensors, on the CPU, in this one process. The second is of the host's part for images that are read at
every step: JPEGs of 500 x 400 on disk are decoded, cut to 224 and put on the device. The third is of a model's
training step; without the recipe the images are normalised and no more.

Every round runs each program once, a training step `INTERVAL` times, in an order that turns. Figures are medians over
the rounds, ratios those to the neighbour in the same round: machines drift, and neighbours in time drift together.
"""

import argparse
import functools
import importlib
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

import dpa_jax
from dpa_jax.config import default_config
from dpa_jax.data import augment
from dpa_jax.data.augment.operations import WITHOUT_ARGUMENT
from dpa_jax.data.augment.policy import arguments_of
from dpa_jax.data.batch import Batch
from dpa_jax.data.feeds import make_feed
from dpa_jax.data.sources import open_source
from dpa_jax.training.optimizer import make_optimizer
from dpa_jax.training.state import create_model, create_state
from dpa_jax.training.step import make_train_step

INTERVAL = 5  # DPA's: so many steps have one that updates the memories
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICY, ERASE = "rand-m9-mstd0.5-inc1", 0.25
WHOLE, TIMM = "whole recipe", "timm's recipe"


def made_batch(count: int, size: int, num_classes: int) -> Batch:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, size, size, 3), np.uint8)
    labels = random.integers(0, num_classes, count).astype(np.int32)
    index = np.arange(count, dtype=np.int32)
    return jax.device_put(Batch(images, labels, index, np.zeros_like(index)))


def recipe() -> Callable[[jax.Array, Batch], jax.Array]:
    part = default_config().augment
    part.update(crop="resized", flip=0.5, rand_augment=POLICY, erase=ERASE)
    return augment.train_transform(part, MEAN, STD)


def in_rounds(programs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """The seconds that each program takes, round by round."""
    names = list(programs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds + 1):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            jax.block_until_ready(programs[name]())
            if round_number:  # the first compiles, and warms up
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratios(seconds: list[float], baseline: list[float]) -> list[float]:
    """The quartiles of the ratio, round by round."""
    return statistics.quantiles([a / b for a, b in zip(seconds, baseline, strict=True)], n=4)


# ---------------- Augmentation alone ----------------


def augmentations(batch: Batch) -> dict[str, Callable[[], jax.Array]]:
    """What is measured of `dpa_jax.data.augment`, each ready to run on the batch."""
    images, key = batch.inputs, jax.random.key(0)
    keys, size = jax.random.split(key, len(images)), images.shape[1]
    normalized = jax.jit(jax.vmap(lambda image: augment.normalize(image, MEAN, STD)))

    def of_images(operation: Callable, *batches: jax.Array) -> Callable[[], jax.Array]:
        return functools.partial(jax.jit(jax.vmap(operation)), *batches)

    programs = {}
    for name, argument in zip(augment.OPERATIONS, arguments_of(np.float32(9), np.float32(1), True), strict=True):
        given = [] if name in WITHOUT_ARGUMENT else [jax.numpy.full(len(images), argument)]
        programs[name] = of_images(functools.partial(augment.apply_op, name), images, *given)
    return programs | {
        "random resized crop": of_images(lambda k, image: augment.random_resized_crop(k, image, size), keys, images),
        "flip": of_images(augment.random_flip, keys, images),
        "RandAugment": of_images(lambda k, image: augment.rand_augment(k, image, POLICY), keys, images),
        "normalisation": functools.partial(normalized, images),
        "erasing": of_images(lambda k, image: augment.random_erasing(k, image, ERASE), keys, normalized(images)),
        WHOLE: functools.partial(jax.jit(recipe()), key, batch),
    }


def timms_recipe(batch: Batch) -> Callable[[], object]:
    """timm's transform of the same images."""
    from timm.data import create_transform

    images = [Image.fromarray(image) for image in np.asarray(batch.inputs)]
    transform = create_transform(
        images[0].width,
        is_training=True,
        auto_augment=f"{POLICY}-mmax9",  # at 10 timm posterises to 0 bits, which newer Pillows refuse
        re_prob=ERASE,
        re_mode="pixel",
        interpolation="random",
        mean=MEAN,
        std=STD,
    )
    return lambda: [transform(image) for image in images]


def without_timm() -> str:
    """Why timm cannot be had; empty where it can."""
    try:
        importlib.import_module("timm.data")
    except Exception as error:  # torchvision raises what it likes where it does not fit its torch
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def measure_augmentation(args: argparse.Namespace, with_timm: bool) -> dict[str, dict[str, dict[str, float]]]:
    tables = {}
    for size in map(int, filter(None, args.sizes.split(","))):
        batch = made_batch(args.images, size, args.num_classes)
        programs = augmentations(batch)
        if with_timm:
            programs[TIMM] = timms_recipe(batch)
        seconds = in_rounds(programs, args.rounds)
        table = {}
        for name, taken in seconds.items():
            median = statistics.median(taken)
            table[name] = {"images_per_second": args.images / median, "microseconds": 1e6 * median / args.images}
        if with_timm:
            table[TIMM]["ratio_to_whole"] = ratios(seconds[TIMM], seconds[WHOLE])
        tables[str(size)] = table
    return tables


# ---------------- The host's part ----------------


def measure_host(args: argparse.Namespace) -> dict[str, float]:
    """Images a second, by where they are decoded, over batches that come one after the other."""
    random, names = np.random.default_rng(0), [f"{i}.jpg" for i in range(64)]
    config = default_config()
    config.augment.update(crop="resized", image_size=224)
    config.data.resident = "host"
    mesh, figures = Mesh(np.array(jax.devices()[:1]), ("data",)), {}
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            (pathlib.Path(folder) / split / "class").mkdir(parents=True)
        for name in names:
            # Coarse noise, enlarged: about as many bytes as a photograph has.
            image = Image.fromarray(random.integers(0, 256, (100, 125, 3), np.uint8)).resize((500, 400))
            image.save(pathlib.Path(folder) / "train" / "class" / name, quality=90)
        image.save(pathlib.Path(folder) / "val" / "class" / name)
        config.data.update(name="folder", dir=folder)
        source = open_source(config.data)
        for workers in map(int, args.workers.split(",")):
            config.data.workers = workers
            feed = make_feed(source, mesh, len(names), config, "train")
            seconds = []
            for step in range(2 + 4 * args.rounds):
                begin = time.perf_counter()
                jax.block_until_ready(feed.train(step))
                seconds.append(time.perf_counter() - begin)
            feed.close()
            where = f"{workers} processes" if workers else f"threads of {os.cpu_count()} cores"
            figures[where] = len(names) * len(seconds[2:]) / sum(seconds[2:])
    return figures


# ---------------- A training step ----------------


def training_step(mechanism: str, transform: Callable, args: argparse.Namespace, batch: Batch) -> Callable[[], object]:
    """Runs `INTERVAL` steps, from where the last call left the state."""
    config = default_config()
    config.update(mechanism=mechanism, model=args.model, precision=args.precision)
    model = create_model(config, args.num_classes, in_channels=3)
    optimizer = make_optimizer(config, lambda step: 1e-4)
    train_step = make_train_step(model, optimizer, transform, config.coefficients)
    metrics = jax.eval_shape(train_step, jax.eval_shape(lambda: create_state(model, optimizer, (), 0)), batch)[1]
    state = jax.jit(lambda: create_state(model, optimizer, tuple(metrics), 0))()
    compiled = jax.jit(train_step, donate_argnums=0)

    def run() -> object:
        nonlocal state
        for _ in range(INTERVAL):
            state, _ = compiled(state, batch)
        return state

    return run


def measure_steps(args: argparse.Namespace) -> dict[str, dict[str, object]]:
    size = dpa_jax.models.create(args.model, args.num_classes).image_size
    batch = made_batch(args.batch_size, size, args.num_classes)
    transforms = {"without": augment.train_transform(default_config().augment, MEAN, STD), "with": recipe()}
    mechanisms = args.mechanisms.split(",")
    programs = {
        f"{mechanism} {which}": training_step(mechanism, transform, args, batch)
        for mechanism in mechanisms
        for which, transform in transforms.items()
    }
    seconds = in_rounds(programs, args.rounds)
    return {
        mechanism: {
            "without_ms": 1e3 * statistics.median(seconds[f"{mechanism} without"]) / INTERVAL,
            "with_ms": 1e3 * statistics.median(seconds[f"{mechanism} with"]) / INTERVAL,
            "ratio": ratios(seconds[f"{mechanism} with"], seconds[f"{mechanism} without"]),
        }
        for mechanism in mechanisms
    }


def shown(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.3f} ({low:.3f} - {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", default="32,224", help="of the images that are augmented, between commas; empty: none"
    )
    parser.add_argument("--images", type=int, default=64, help="augmented at a time")
    parser.add_argument("--workers", default="0,2", help="that decode on the host, between commas; empty: none")
    parser.add_argument("--model", default="vit_tiny_patch4_32", help="empty: no training steps")
    parser.add_argument("--mechanisms", default="relu,dpa")
    parser.add_argument("--batch_size", type=int, default=32, help="of the training step")
    parser.add_argument("--num_classes", type=int, default=100)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: quartiles need them")

    device, versions = jax.devices()[0].device_kind, {"python": platform.python_version(), "jax": jax.__version__}
    missing = without_timm()
    if not missing:
        versions |= {name: importlib.import_module(name).__version__ for name in ("torch", "timm", "PIL")}
    described = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{device}, {os.cpu_count()} cores, {described}; {args.rounds} rounds")
    if missing:
        print(f"timm's recipe is left out ({missing})")

    tables = measure_augmentation(args, with_timm=not missing)
    if tables:
        print(f"\naugmentation, {args.images} images at a time")
        print(f"{'':20}" + "".join(f"{f'{size}: images/s':>16}{'us/image':>12}" for size in tables))
    for name in next(iter(tables.values()), {}):
        rows = [table[name] for table in tables.values()]
        cells = (f"{row['images_per_second']:16,.0f}{row['microseconds']:12,.1f}" for row in rows)
        print(f"{name:20}" + "".join(cells))
    if not missing:
        for size, table in tables.items():
            print(f"time of timm's recipe / ours at {size} pixels: {shown(table[TIMM]['ratio_to_whole'])}")

    host = measure_host(args) if args.workers else {}
    for where, rate in host.items():
        print(f"decoded and cut to 224 by {where}: {rate:,.0f} images/s")

    steps = measure_steps(args) if args.model else {}
    if steps:
        print(f"\ntraining step of {args.model}, batch {args.batch_size}, {args.precision}")
        print(f"{'':8}{'without, ms':>13}{'with, ms':>13}{'with / without (quartiles)':>30}")
    for mechanism, row in steps.items():
        print(f"{mechanism:8}{row['without_ms']:13.1f}{row['with_ms']:13.1f}{shown(row['ratio']):>30}")
    if args.json:
        setting = {"device": device, "cores": os.cpu_count(), "versions": versions, **vars(args)}
        with open(args.json, "w") as file:
            json.dump({**setting, "augmentation": tables, "host": host, "steps": steps}, file, indent=1)


if __name__ == "__main__":
    main()
