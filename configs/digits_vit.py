"""A small Vision Transformer on scikit-learn's handwritten digits: 1,437 images of 8 x 8 to learn from.

    python train.py --config configs/digits_vit.py [--config.mechanism=relu] [--workdir DIR]

Needs no download. It is what train.py runs when it is given no configuration.
Cost: about two minutes on two CPU cores. Expected: at least 97% top-1 on the 360 digits of the evaluation.
"""

from ml_collections import ConfigDict

from dpa_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model = "vit"
    config.model_options = {"image_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
    config.model_options.stochastic_depth = 0.1
    config.batch_size = 32
    config.eval_batch_size = 120
    config.epochs = 100
    config.coefficients.channel = 1.0
    config.coefficients.arr = 10.0
    config.optimizer.learning_rate = 3e-3
    config.schedule.warmup_epochs = 5
    config.schedule.min_learning_rate = 1e-5
    config.data.name = "digits"
    config.augment.crop = "resized"
    config.augment.scale = (0.5, 1.0)
    config.augment.interpolation = "bilinear"
    return config
