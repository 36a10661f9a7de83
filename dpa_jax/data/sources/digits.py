"""scikit-learn's 1,797 handwritten digits, 8 x 8 grey: 1,437 to train on, 360 to evaluate."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from dpa_jax.data.images import image_spec
from dpa_jax.data.sources.base import Source
from dpa_jax.data.splits import ArraySplit

_TRAIN_COUNTS = (142, 146, 142, 146, 145, 145, 145, 143, 139, 144)


def open_digits(data: ConfigDict) -> Source:
    """The digits; nothing of the configuration counts."""
    names = tuple(str(digit) for digit in range(10))
    spec = image_spec("digits", (8, 8, 1), names, 1437, 360, mean=(0.3053,), std=(0.3759,))
    return Source(spec, _read, lambda: list(_TRAIN_COUNTS))


def _read() -> tuple[ArraySplit, ArraySplit]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # Every fifth of the images in order of class: stratified, and always the same.
    evaluation = np.zeros(len(labels), bool)
    evaluation[np.argsort(labels, kind="stable")[::5]] = True
    return ArraySplit(images[~evaluation], labels[~evaluation]), ArraySplit(images[evaluation], labels[evaluation])
