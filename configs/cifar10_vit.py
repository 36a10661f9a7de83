"""ViT-Tiny on CIFAR-10 with the papers' recipe (Dual-Perspective Activation, NeurIPS 2024).

    python train.py --config configs/cifar10_vit.py --config.data.dir=DIR [--config.data.download=True]

The same as configs/cifar100_vit.py, also in cost, but for the data and lambda.
Expected: the papers' top-1 is 91.3% for DPA, 92.1% for DNRT, 89.9% for ReLU and 89.2% for GELU.
`--config.data.imbalance=10` (50, 100) gives DNRT's long-tailed CIFAR-10; its top-1 there is 56.5% (53.6, 47.3).
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    base = runpy.run_path(str(pathlib.Path(__file__).with_name("cifar100_vit.py")))
    config = base["get_config"]()
    config.coefficients.channel = 1.0
    config.coefficients.arr = 10.0
    config.data.name = "cifar10"
    return config
