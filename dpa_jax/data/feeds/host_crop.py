"""Crops on the host: Pillow cuts images of any size to the size that a batch has."""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dpa_jax.data.boxes import BOX_DRAWS, box_from_draws

DRAWS = BOX_DRAWS + 1  # and one for the interpolation

_LONGEST = 64  # times the shorter side; longer images are cut before they are resized

_METHODS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclasses.dataclass(frozen=True)
class TrainCrop:
    """The crop of training images to a square of this size."""

    size: int
    crop: str  # "resized" (a random box, resized) or "none" (the whole image, resized)
    scale: tuple[float, float]  # least and greatest area of the box, as a fraction of the image's
    ratio: tuple[float, float]  # its least and greatest width divided by height
    interpolation: str  # of "resized": "bilinear", "bicubic", or "random" for one of the two with equal chances

    @classmethod
    def from_config(cls, augment: ConfigDict) -> TrainCrop:
        """From the configuration's `augment` part; ValueError where that needs images of one size."""
        if augment.crop == "pad":
            raise ValueError(
                "augment.crop=pad needs images of one size in memory; for images that are read at every step take "
                "resized or none"
            )
        return cls(_size(augment), augment.crop, tuple(augment.scale), tuple(augment.ratio), augment.interpolation)

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Cuts an image uint8 [H, W, 3] to uint8 [size, size, 3]; draws float32 [DRAWS] are uniform in [0, 1)."""
        method = "bilinear"
        cut = Image.fromarray(image)
        if self.crop == "resized":
            box = box_from_draws(draws[:BOX_DRAWS], image.shape[0], image.shape[1], self.scale, self.ratio)
            top, left, height, width = box.tolist()
            cut = cut.crop((left, top, left + width, top + height))
            method = self.interpolation
            if method == "random":
                method = "bicubic" if draws[BOX_DRAWS] < 0.5 else "bilinear"
        return np.asarray(cut.resize((self.size, self.size), _METHODS[method]))


@dataclasses.dataclass(frozen=True)
class EvalCrop:
    """The crop of evaluation images: the shorter side is resized to `resize`, then the middle `size` is cut out."""

    size: int
    resize: int

    @classmethod
    def from_config(cls, augment: ConfigDict) -> EvalCrop:
        """From the configuration's `augment` part; ValueError where its sizes contradict each other."""
        size = _size(augment)
        if 0 < augment.eval_resize < size:
            raise ValueError(
                f"augment.eval_resize must be 0 or at least augment.image_size, {size}; got {augment.eval_resize}"
            )
        return cls(size, augment.eval_resize or size)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Cuts an image uint8 [H, W, 3] to uint8 [size, size, 3]."""
        shorter = min(image.shape[:2])
        # The ends of a very long image are cut off first: resized it might not fit into memory.
        top, left = (max(0, side - _LONGEST * shorter) // 2 for side in image.shape[:2])
        image = image[top : top + _LONGEST * shorter, left : left + _LONGEST * shorter]
        height, width = (self.resize * side // shorter for side in image.shape[:2])
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(resized.crop((left, top, left + self.size, top + self.size)))


def _size(augment: ConfigDict) -> int:
    if not augment.image_size:
        raise ValueError(
            "augment.image_size must be set for images of any size, which the model cannot take as they are stored; "
            "for example --config.augment.image_size=224"
        )
    return augment.image_size
