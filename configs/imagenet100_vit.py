"""ViT-Tiny on ImageNet-100, a hundred classes of ImageNet-1k, at 224 x 224 with the papers' recipe.

    python train.py --config configs/imagenet100_vit.py --config.data.dir=DIR

The same as configs/imagenet_vit.py but for the data: DIR holds the folders of the hundred classes alone.
Cost: 300 epochs of about 126,689 images, depending on which classes are taken. Expected: not known here.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    base = runpy.run_path(str(pathlib.Path(__file__).with_name("imagenet_vit.py")))
    config = base["get_config"]()
    config.data.name = "imagenet100"
    return config
