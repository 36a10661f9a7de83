"""GraphSAGE on Cora: 2,708 papers in 7 classes, 140 of them to learn from.

    python train.py --config configs/cora_sage.py --config.data.dir=DIR [--config.mechanism=relu]

DIR has Planetoid's files, ind.cora.x and so on:
git clone https://github.com/kimiyoung/planetoid, then planetoid/data.
The recipe is that of Kipf and Welling: 200 epochs, or fewer where the loss on the validation nodes rises.
Cost and accuracy were not measured yet.
"""

from ml_collections import ConfigDict

from dpa_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model = "graphsage"
    config.data.name = "cora"
    config.batch_size = 1
    config.eval_batch_size = 1
    config.epochs = 200
    config.early_stopping = 10
    config.coefficients.channel = 1.0
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 0.0005
    config.optimizer.decayed = "W_self0,W_neigh0"
    config.schedule.name = "constant"
    config.clip_norm = 0.0
    config.checkpoint.keep = 1
    config.checkpoint.every_epochs = 50
    return config
