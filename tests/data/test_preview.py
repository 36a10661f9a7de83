import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from dpa_jax.config import default_config
from dpa_jax.data import preview
from dpa_jax.data.sources import open_source
from dpa_jax.data.sources.folder import FolderSplit

ROOT = pathlib.Path(__file__).parents[2]
TABLES = ("AutoContrast", "Equalize", "Invert", "PosterizeIncreasing 1", "SolarizeIncreasing 26", "SolarizeAdd 99")
BLENDS = ("Contrast", "Brightness", "Color", "Sharpness")
WARPS = ("Rotate 27 / -27", "ShearX 0.27 / -0.27", "ShearY 0.27 / -0.27")
SHIFTS = ("TranslateXRel 0.405 / -0.405", "TranslateYRel 0.405 / -0.405")
DRAWS = [f"whole recipe, draw {number}" for number in (1, 2, 3, 4)]


@pytest.fixture(scope="module", autouse=True)
def _quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def colour():
    """The rows of a configuration with everything in it, and the statistics that its images are normalised with."""
    config = default_config()
    config.data.update(name="synthetic", image_size=20, train_examples=32, test_examples=8)
    part = config.augment
    part.update(crop="resized", flip=0.5, rand_augment="rand-m9-mstd0.5-inc1", color_jitter=(0.4, 0.4, 0.4, 0.1))
    part.update(erase=0.25, mixup=0.8, cutmix=1.0)
    source = open_source(config.data)
    train, _ = source.load()
    batch = preview.pick(train, 5, 0, seed=3)
    assert np.array_equal(batch.inputs, train.inputs[batch.index])
    assert np.array_equal(batch.labels, train.labels[batch.index])
    assert len(set(batch.index.tolist())) == 5
    rows = preview.treatments(part, source.spec.mean, source.spec.std)
    key = jax.random.key(0)
    return np.asarray(batch.inputs), {title: np.asarray(treatment(key, batch)) for title, treatment in rows.items()}


def test_there_is_a_row_for_everything_configured(colour):
    originals, rows = colour
    blends = [f"{name}Increasing 1.81 / 0.19" for name in BLENDS]
    others = ["random resized crop", "horizontal flip", "colour jitter", "random erasing", "mixup", "CutMix"]
    assert list(rows) == ["original", *TABLES, *blends, *WARPS, *SHIFTS, *others, *DRAWS, "evaluation"]
    assert all(row.shape == originals.shape and row.dtype == np.uint8 for row in rows.values())
    assert len({row.tobytes() for row in rows.values()}) == len(rows) - 1
    assert np.array_equal(rows["evaluation"], rows["original"])  # nothing to resize


def test_rows_hold_what_they_say(colour):
    originals, rows = colour
    assert np.array_equal(rows["original"], originals)
    assert np.array_equal(rows["Invert"], 255 - originals)
    assert np.array_equal(rows["SolarizeIncreasing 26"], np.where(originals < 26, originals, 255 - originals))
    assert np.array_equal(rows["horizontal flip"], originals[:, :, ::-1])
    mean = (127, 127, 127)  # comes in from outside
    for place, image in enumerate(originals):
        turned = Image.fromarray(image).rotate((27, -27)[place % 2], Image.Resampling.BILINEAR, fillcolor=mean)
        assert np.abs(rows["Rotate 27 / -27"][place].astype(int) - np.asarray(turned)).max() <= 1
        changed = (rows["random erasing"][place] != image).any(-1)
        (top, bottom), (left, right) = (np.flatnonzero(changed.any(axis))[[0, -1]] for axis in (1, 0))
        assert changed[top : bottom + 1, left : right + 1].mean() > 0.95 and changed.mean() < 0.4


def test_mixed_rows_hold_both_images_of_a_pair(colour):
    originals, rows = colour
    own, other = originals.astype(int), originals[[1, 0, 3, 2, 4]].astype(int)
    cut = rows["CutMix"]
    from_other = (cut == other) & (own != other)
    assert ((cut == own) | (cut == other)).all() and from_other.any()
    assert ((cut == own) & (own != other)).any()
    low, high = np.minimum(own, other), np.maximum(own, other)
    assert ((rows["mixup"] >= low) & (rows["mixup"] <= high)).all()


@pytest.fixture(scope="module")
def digits():
    """The sheet of three digits, which are grey."""
    config = default_config()
    config.data.name, config.augment.interpolation = "digits", "bilinear"
    config.augment.update(rand_augment="rand-m5", erase=0.5)
    return config, preview.preview(config, 3)


def cell(sheet, row, column, rows, columns):
    """The pixels of an image of 8 x 8 on a sheet; those of each are all the same."""
    step = preview.CELL + preview.GAP
    x, y = sheet.width - step * (columns - column), sheet.height - step * (rows - row)
    enlarged = np.asarray(sheet)[y : y + preview.CELL, x : x + preview.CELL]
    pixels = enlarged[::12, ::12]
    assert np.array_equal(np.kron(pixels, np.ones((12, 12, 1), np.uint8)), enlarged)
    return pixels


def test_cells_are_where_they_should_be(digits):
    config, sheet = digits
    batch = preview.pick(open_source(config.data).load()[0], 3, 0, config.seed)
    rows = 1 + 15 + 1 + preview.DRAWS + 1
    for column, image in enumerate(batch.inputs):
        expected = np.repeat(image, 3, axis=-1)
        assert np.array_equal(cell(sheet, 0, column, rows, 3), expected)
        assert np.array_equal(cell(sheet, 3, column, rows, 3), 255 - expected)
        assert np.array_equal(cell(sheet, rows - 1, column, rows, 3), expected)


def start(*arguments):
    command = [sys.executable, "-m", "dpa_jax.data.preview", "--config", "configs/digits_vit.py", *map(str, arguments)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command_draws_the_same_again(digits, tmp_path):
    config, sheet = digits
    part = {key: config.augment[key] for key in ("crop", "rand_augment", "erase")}
    same = [f"--config.augment.{key}={value}" for key, value in part.items()]
    ended = start("--output", tmp_path / "new" / "sheet.png", "--images=3", *same)
    assert (ended.returncode, ended.stdout) == (0, f"{tmp_path}/new/sheet.png: 3 training images\n"), ended.stderr
    with Image.open(tmp_path / "new" / "sheet.png") as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(sheet))


def test_another_seed_takes_other_images(digits):
    config, _ = digits
    split = open_source(config.data).load()[0]
    assert not np.array_equal(preview.pick(split, 3, 0, seed=0).index, preview.pick(split, 3, 0, seed=1).index)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "error: --output must be a file that ends in .png; got ''\n"),
        ("sheet.bmp", "error: --output must be a file that ends in .png; got 'sheet.bmp'\n"),
        ("README.md/sheet.png", "error: --output: the folder README.md cannot be made: File exists\n"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(output, message):
    ended = start("--output", output)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", message)


def test_what_cannot_be_shown():
    config = default_config()
    config.data.update(name="synthetic", train_examples=4, test_examples=4, channels=2)
    with pytest.raises(ValueError, match=r"of 1 or 3 channels can be shown, not uint8 \[32, 32, 2\]"):
        preview.preview(config, 2)
    config.data.channels = 3
    with pytest.raises(ValueError, match=r"the number of images must be in \[1, 4\]; got 8"):
        preview.preview(config)
    config.augment.crop = "middle"
    with pytest.raises(ValueError, match=r"augment.crop must be one of none, pad, resized"):
        preview.preview(config, 2)


def test_images_of_a_folder_are_cut_square(tmp_path):
    for name, shape in {"a": (20, 40, 3), "b": (60, 30, 3)}.items():
        pixels = np.zeros(shape, np.uint8)
        middle = [slice((side - min(shape[:2])) // 2, (side + min(shape[:2])) // 2) for side in shape[:2]]
        pixels[*middle] = 10, 200, 30
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    split = FolderSplit(tmp_path, {"a": ["0.png"], "b": ["0.png"]})
    batch = preview.pick(split, 2, 16, seed=0)
    assert batch.inputs.shape == (2, 16, 16, 3)
    assert (np.asarray(batch.inputs)[:, 2:-2, 2:-2] == (10, 200, 30)).all()  # the rim is blended with what lies outside
    assert np.array_equal(batch.labels, batch.index)
    with pytest.raises(ValueError, match=r"augment\.image_size must be at least 1; got 0"):
        preview.pick(split, 2, 0, seed=0)
