"""A look at the augmentation: a few training images under each operation alone and under the whole recipe.

python -m dpa_jax.data.preview --config NAME [--output preview.png] [--images 8] [--config.KEY=VALUE ...]
"""

from __future__ import annotations

from dpa_jax.extras import require_train

require_train("dpa_jax.data.preview")

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dpa_jax import command_line
from dpa_jax.checks import check_range
from dpa_jax.config import validate
from dpa_jax.data import augment
from dpa_jax.data.augment.operations import WITHOUT_ARGUMENT
from dpa_jax.data.augment.policy import arguments_of
from dpa_jax.data.batch import Batch
from dpa_jax.data.feeds.sampler import Sampler
from dpa_jax.data.images import EncodedSplit, ImageSpec
from dpa_jax.data.sources import open_source
from dpa_jax.data.splits import ArraySplit

Treatment = Callable[[jax.Array, Batch], jax.Array]

CELL, GAP = 96, 4  # pixels
DRAWS = 4  # of the whole recipe
_OFF = {"crop": "none", "flip": 0.0, "rand_augment": "", "color_jitter": (), "erase": 0.0, "mixup": 0.0, "cutmix": 0.0}
# What timm gives another name where they grow with the magnitude.
_INCREASING = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")


def pick(split: ArraySplit | EncodedSplit, count: int, size: int, seed: int) -> Batch:
    """The first images of a training run, cut to `size` x `size` in the middle where they are not in memory.

    Raises:
      ValueError: there are fewer images than `count`, or no size to cut to, or one is damaged.
      OSError: an image cannot be read.
    """
    check_range("preview", "the number of images", count, low=1, high=len(split))
    index, epoch = Sampler(len(split), count, seed).indices(0)
    if isinstance(split, ArraySplit):
        images = split.inputs[index]
    else:
        check_range("config", "augment.image_size", size, low=1)
        images = np.stack([np.asarray(ImageOps.fit(Image.fromarray(split.read(i)), (size, size))) for i in index])
    return Batch(*map(jnp.asarray, (images, split.labels[index], index, epoch)))


def treatments(config: ConfigDict, mean: Sequence[float], std: Sequence[float]) -> dict[str, Treatment]:
    """What a configuration does to training images, step by step and as a whole.

    The config is a configuration's `augment` part; mean and std are per channel, in units of [0, 1].

    Returns:
      {title: compiled (key, batch) -> uint8 [N, H, W, C]}: the originals; the operations of RandAugment at its
      mean magnitude, every second image the other way; what else is configured, with certainty; draws of the
      whole recipe; the evaluation transform.
    """

    def levels(values: jax.Array) -> jax.Array:
        """Undoes the normalisation; noise may lie outside of the levels there are."""
        scale, offset = (jnp.array(x, jnp.float32)[None, None, None] for x in (std, mean))
        return jnp.clip(jnp.round(255 * (values * scale + offset)), 0, 255).astype(jnp.uint8)

    def recipe(**changes: object) -> Treatment:
        part = config.copy_and_resolve_references()
        part.update(changes)
        transform = augment.train_transform(part, mean, std)

        def apply(key: jax.Array, batch: Batch) -> jax.Array:
            values = transform(key, batch)
            if part.mixup or part.cutmix:
                values = augment.mix(key, values, batch.labels, part.mixup, part.cutmix).inputs
            return levels(values)

        return jax.jit(apply)

    rows: dict[str, Treatment] = {"original": lambda _, batch: batch.inputs}
    if config.rand_augment:
        rows |= _operations(augment.parse_policy(config.rand_augment), mean)
    alone: dict[str, tuple[bool, dict[str, object]]] = {
        "random resized crop": (config.crop == "resized", {"crop": "resized"}),
        "random crop": (config.crop == "pad", {"crop": "pad"}),
        "horizontal flip": (config.flip > 0, {"flip": 1.0}),
        "colour jitter": (any(config.color_jitter), {"color_jitter": config.color_jitter}),
        "random erasing": (config.erase > 0, {"erase": 1.0}),
        "mixup": (config.mixup > 0, {"mixup": config.mixup}),
        "CutMix": (config.cutmix > 0, {"cutmix": config.cutmix}),
    }
    rows |= {title: recipe(**_OFF | changes) for title, (configured, changes) in alone.items() if configured}
    whole, evaluation = recipe(), augment.eval_transform(config, mean, std)

    def draw(number: int) -> Treatment:
        return lambda key, batch: whole(jax.random.fold_in(key, number), batch)

    rows |= {f"whole recipe, draw {number}": draw(number) for number in range(1, DRAWS + 1)}
    return rows | {"evaluation": jax.jit(lambda _, batch: levels(evaluation(batch.inputs)))}


def _operations(policy: augment.Policy, mean: Sequence[float]) -> dict[str, Treatment]:
    """Each operation of RandAugment, forwards for the images at even places and backwards for the others."""
    fill = [min(255, round(255 * value)) for value in mean]
    magnitude = jnp.float32(min(policy.magnitude, policy.max_magnitude))
    arguments_2xO = np.stack([arguments_of(magnitude, jnp.float32(sign), policy.increasing) for sign in (1, -1)])

    def treatment(name: str, pair: np.ndarray) -> Treatment:
        apply = jax.vmap(functools.partial(augment.apply_op, name, fill=fill))
        return jax.jit(lambda _, batch: apply(batch.inputs, jnp.resize(pair, (len(batch.inputs),))))

    rows = {}
    for name, pair in zip(augment.OPERATIONS, arguments_2xO.T, strict=True):
        values = [] if name in WITHOUT_ARGUMENT else [f"{value:.3g}" for value in dict.fromkeys(pair.tolist())]
        title = f"{name}Increasing" if policy.increasing and name in _INCREASING else name
        rows[f"{title} {' / '.join(values)}".strip()] = treatment(name, pair)
    return rows


def contact_sheet(rows: Mapping[str, np.ndarray], names: Sequence[str]) -> Image.Image:
    """Draws rows of images with their titles at the left and a name above each column.

    The rows are {title: uint8 [N, H, W, C]} with C 1 or 3; sizes may differ from row to row. There are N names, cut off
    where they do not fit. Each image is `CELL` pixels wide and high, and the last ends `GAP` pixels from the edges.
    """
    font = ImageFont.truetype(str(pathlib.Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), 12)
    left, top, step = math.ceil(max(map(font.getlength, rows))) + 2 * GAP, 20, CELL + GAP
    sheet = Image.new("RGB", (left + step * len(names), top + step * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        while font.getlength(name) > CELL:
            name = name[:-1]
        pen.text((left + step * column + CELL / 2, top / 2), name, "black", font, anchor="mm")
    for row, (title, images) in enumerate(rows.items()):
        y = top + step * row
        pen.text((left - GAP, y + CELL / 2), title, "black", font, anchor="rm")
        for column, image in enumerate(images):
            # Enlarged it stays as sharp as it was, reduced it is averaged.
            cell = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
            sheet.paste(cell.resize((CELL, CELL), Image.Resampling.BOX), (left + step * column, y))
    return sheet


def preview(config: ConfigDict, count: int = 8) -> Image.Image:
    """The contact sheet of a configuration; the same for the same seed.

    Raises:
      ValueError: the configuration cannot run, or there are fewer images than `count`.
      OSError: the data is not there, or cannot be read.
    """
    validate(config)
    source = open_source(config.data)
    spec = source.spec
    if not isinstance(spec, ImageSpec) or spec.channels not in (1, 3):
        raise ValueError(f"preview: only images of 1 or 3 channels can be shown, not {spec.inputs}")
    size = max(config.augment.image_size, config.augment.eval_resize)
    batch = pick(source.load()[0], count, size, config.seed)
    rows = treatments(config.augment, spec.mean, spec.std)
    key = jax.random.key(config.seed)
    drawn = {title: np.asarray(treatment(key, batch)) for title, treatment in rows.items()}
    return contact_sheet(drawn, [spec.class_names[label] for label in batch.labels])


def main(argv: list[str] | None = None) -> None:
    """Writes the sheet as a command line says; see `command_line.run`."""
    command_line.run(_preview, _define_flags, argv)


def _define_flags(options: flags.FlagValues) -> None:
    flags.DEFINE_string("output", "preview.png", "The PNG file that is written.", flag_values=options)
    flags.DEFINE_integer("images", 8, "How many training images are shown.", flag_values=options)


def _preview(options: flags.FlagValues) -> None:
    output = pathlib.Path(options.output)
    if output.suffix != ".png":
        raise ValueError(f"--output must be a file that ends in .png; got {options.output!r}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output: the folder {output.parent} cannot be made: {error.strerror}") from error
    preview(options.config, options.images).save(output, optimize=True)
    print(f"{output}: {options.images} training images")


if __name__ == "__main__":
    main()
