"""A graph convolutional network on scikit-learn's handwritten digits, each joined to the 8 most like it.

    python train.py --config configs/digits_gcn.py [--config.mechanism=relu]

Needs no download. Cost: COST. Expected: EXPECTED.
"""

from ml_collections import ConfigDict

from dpa_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model = "gcn"
    config.data.name = "digits_graph"
    config.batch_size = 1
    config.eval_batch_size = 1
    config.epochs = 200
    config.early_stopping = 10
    config.coefficients.channel = 1.0
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 0.0005
    config.optimizer.decayed = "W0"
    config.schedule.name = "constant"
    config.clip_norm = 0.0
    config.checkpoint.keep = 1
    config.checkpoint.every_epochs = 50
    return config
