"""TextGCN on R8: 7,674 news of an agency in 8 classes, 5,485 of them to learn from.

    python train.py --config configs/r8_textgcn.py --config.data.dir=DIR [--config.mechanism=relu]

DIR has the files of TextGCN's authors: git clone https://github.com/yao8839836/text_gcn, then text_gcn/data. The recipe
is theirs: at most 200 epochs, fewer where the loss on a tenth of the training documents rises.
Cost and accuracy were not measured yet; published for ReLU: 97.07%.
"""

from ml_collections import ConfigDict

from dpa_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model = "textgcn"
    config.data.name = "r8_graph"
    config.batch_size = 1
    config.eval_batch_size = 1
    config.epochs = 200
    config.early_stopping = 10
    config.coefficients.channel = 1.0
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.02
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "constant"
    config.clip_norm = 0.0
    config.checkpoint.keep = 1
    config.checkpoint.every_epochs = 50
    return config
