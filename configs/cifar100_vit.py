"""ViT-Tiny on CIFAR-100 with the papers' recipe (Dual-Perspective Activation, NeurIPS 2024).

    python train.py --config configs/cifar100_vit.py --config.data.dir=DIR [--config.data.download=True]

`--config.mechanism=dnrt`, or `relu` and `gelu` for the baselines. `--config.model=resnet18` or another of the papers'
models (docs/models.md). The learning rate follows the batch size.
Cost: 300 epochs of 50,000 images, 58,594 steps of a 5.4 million parameter model: a run for a GPU or a TPU.
Expected: the papers' top-1 is 70.5% for DPA, 71.4% for DNRT, 65.7% for ReLU and 65.4% for GELU.
"""

from ml_collections import ConfigDict

from dpa_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model = "vit_tiny_patch4_32"
    config.model_options = {"stochastic_depth": 0.1}
    config.coefficients = {"channel": 5.0, "arr": 20.0, "aux": 1.0, "gate": 200.0}
    config.precision = "bfloat16"

    config.batch_size = 256
    config.epochs = 300
    config.clip_norm = 1.0
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = config.get_ref("batch_size").to_float() * (0.0005 / 512)
    config.optimizer.weight_decay = 0.05
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 20
    config.schedule.warmup_learning_rate = 1e-6
    config.schedule.min_learning_rate = 1e-5

    config.data.name = "cifar100"
    config.augment.image_size = 32
    config.augment.crop = "resized"
    config.augment.scale = (0.08, 1.0)
    config.augment.ratio = (3 / 4, 4 / 3)
    config.augment.interpolation = "random"
    config.augment.flip = 0.5
    config.augment.rand_augment = "rand-m9-mstd0.5-inc1"
    config.augment.erase = 0.25
    config.augment.eval_resize = 36
    return config
