"""Synthetic images, noise over a coarse pattern of the class: of any shape and class count, and learnable."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from dpa_jax.data.images import image_spec
from dpa_jax.data.sources.base import Source
from dpa_jax.data.splits import ArraySplit

_BYTES_EACH = 64  # of a label, its place and a name, at least


def open_synthetic(data: ConfigDict) -> Source:
    """The images that `image_size`, `channels`, `num_classes`, `train_examples` and `test_examples` ask for.

    ValueError where this machine's memory is too small for them.
    """
    from dpa_jax.checks import check_memory  # not above: it imports JAX, which worker processes should not

    size, channels, classes = data.image_size, data.channels, data.num_classes
    counts = {"num_classes": classes, "train_examples": data.train_examples, "test_examples": data.test_examples}
    for key, count in counts.items():
        what = f"data.{key} {count}, images of data.image_size {size} and data.channels {channels},"
        check_memory("config", what, count * max(size * size * channels, _BYTES_EACH))
    names = tuple(f"class {i}" for i in range(classes))
    mean, std = (0.498,) * channels, (0.205,) * channels  # of the sum of two uniform values in 0 .. 127
    sizes = data.train_examples, data.test_examples
    spec = image_spec(data.name, (size, size, channels), names, *sizes, mean=mean, std=std)

    def read() -> tuple[ArraySplit, ArraySplit]:
        random = np.random.Generator(np.random.Philox(0))
        coarse = random.integers(0, 128, (classes, 4, 4, channels), np.uint8)
        cell = np.arange(size) * 4 // size
        patterns = coarse[:, cell[:, None], cell]

        def split(examples: int) -> ArraySplit:
            labels = random.permutation(_labels(examples, classes))
            images = patterns[labels]
            images += random.integers(0, 128, images.shape, np.uint8)
            return ArraySplit(images, labels)

        return split(spec.train_examples), split(spec.test_examples)

    return Source(spec, read, lambda: np.bincount(_labels(spec.train_examples, classes), minlength=classes))


def _labels(examples: int, classes: int) -> np.ndarray:
    return np.arange(examples, dtype=np.int32) % classes
