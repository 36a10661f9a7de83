"""ViT-Tiny on ImageNet-1k at 224 x 224 with the papers' recipe.

    python train.py --config configs/imagenet_vit.py --config.data.dir=DIR

DIR holds train/CLASS/IMAGE and val/CLASS/IMAGE. Images are decoded and cropped on the host, by
`--config.data.workers` processes; the devices do the rest. Set the workers to what the machine has cores for.
Cost: 300 epochs of 1,281,167 images, 1,501,368 steps of 256; `--config.batch_size` shares larger batches among more
devices, and the learning rate follows it.
Expected: not known here. lambda is that of CIFAR-100.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    base = runpy.run_path(str(pathlib.Path(__file__).with_name("cifar100_vit.py")))
    config = base["get_config"]()
    config.model = "vit_tiny_patch16_224"
    config.data.name = "imagenet"
    config.data.workers = 8
    config.augment.image_size = 224
    config.augment.eval_resize = 256
    return config
