"""Runs that are killed at a hundred random moments, and end as if nobody had touched them."""

import functools
import random
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.faults.harness import TINY, Case

KILLS = 100
_OFTEN = (*TINY, "--config.checkpoint.every_steps=4", "--config.epochs=3")
_DROPOUT = ("--config.model_options.dropout=0.1", "--config.model_options.stochastic_depth=0.1")
# What is killed: the mechanisms with all that is drawn at random, and every kind of run there is.
KINDS = {
    "dpa": (*_OFTEN, *_DROPOUT, "--config.augment.crop=pad", "--config.augment.padding=1", "--config.augment.flip=0.5"),
    "dnrt": (*_OFTEN, *_DROPOUT, "--config.mechanism=dnrt"),
    "aiec": (*_OFTEN, *_DROPOUT, "--config.mechanism=aiec"),
    "batchnorm": (
        *(argument for argument in _OFTEN if "model_options" not in argument),
        "--config.model=resnet18",
        "--config.model_options={'image_size': 8, 'stage_sizes': (1, 1), 'width': 4}",
    ),
    "mixing": (*_OFTEN, "--config.augment.mixup=0.8", "--config.augment.cutmix=1.0", "--config.label_smoothing=0.1"),
    "streamed": (
        *(argument for argument in _OFTEN if "data" not in argument and "crop" not in argument),
        "--config.data.name=folder",
        "--config.data.dir=images",
        "--config.data.workers=1",
        "--config.model_options.image_size=8",
        "--config.augment.image_size=8",
        "--config.augment.crop=resized",
        "--config.augment.eval_resize=10",
    ),
    "comparison": (*_OFTEN, "--mechanisms=relu,dpa", "--seeds=2"),
}


def make_images(folder):
    """40 images to train on and 10 to evaluate, of two classes."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 120, (*noise.integers(12, 30, 2), 3), np.uint8) + np.uint8(120 * label)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")


def start(case, kind):
    case.folder.mkdir(exist_ok=True)
    if kind == "streamed" and not (case.folder / "images").exists():
        make_images(case.folder / "images")
    if kind == "comparison":
        return case.start("dpa_jax.compare.__main__", "--config=digits_vit", "--workdir=run", *KINDS[kind])
    return case.start("dpa_jax.train", "--workdir=run", *KINDS[kind])


def left(case):
    """All that a run, or a comparison's runs, leaves: {folder: (record, {step: arrays})}."""
    found = {}
    for path in sorted(case.workdir.rglob("metrics.jsonl")):
        found[path.parent.relative_to(case.workdir)] = case.record(path.parent)
    for path in sorted(case.workdir.rglob("checkpoints")):
        found[path.relative_to(case.workdir)] = case.states(path.parent)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(kind) -> what a run leaves that nothing happens to, and the seconds that it takes."""

    @functools.cache
    def run(kind):
        case = Case(tmp_path_factory.mktemp(kind))
        case.finished(start(case, kind).wait(300))  # compiles
        wanted = left(case)
        shutil.rmtree(case.workdir)
        ended = start(case, kind).wait(300)
        case.finished(ended)
        assert left(case) == wanted  # two runs agree, so that what differs below comes of the kill
        return wanted, ended.seconds

    return run


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_and_started_again(case, undisturbed, number):
    draw = random.Random(number)
    kind = list(KINDS)[number % len(KINDS)]
    wanted, seconds = undisturbed(kind)
    for _ in range(draw.choice((1, 1, 2, 3))):
        program = start(case, kind)
        program.wait_for(lambda: False, draw.uniform(0, seconds))
        program.kill()
        program.wait()
    case.finished(start(case, kind).wait(300))
    found = left(case)
    if found.keys() != wanted.keys():
        case.lost(f"{kind}: {wanted.keys() ^ found.keys()}")
    for name, part in wanted.items():
        if name.name == "checkpoints":  # a kill can leave an older one that would have been deleted next
            assert all(found[name].get(step) == arrays for step, arrays in part.items()), (kind, name)
        else:
            assert found[name] == part, (kind, name)
