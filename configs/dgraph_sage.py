"""GraphSAGE on DGraph-Fin: 3.7 million users of a lender, 4.3 million edges; which of them are frauds?

    python train.py --config configs/dgraph_sage.py --config.data.dir=DIR [--config.mechanism=relu]

DIR has dgraphfin.npz, which takes a registration. The recipe is the data set's own; the figure is the area under the
ROC curve on the evaluation nodes, of the epoch that is best on the validation nodes: the best checkpoint is that one.
"""

from ml_collections import ConfigDict

from dpa_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model = "graphsage"
    config.model_options = {"hidden": 128, "dropout": 0.0}
    config.checkpoint.best = "auc"
    config.data.name = "dgraph"
    config.batch_size = 1
    config.eval_batch_size = 1
    config.epochs = 200
    config.early_stopping = 0
    config.coefficients.channel = 1.0
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 5e-07
    config.optimizer.decayed = "*"
    config.schedule.name = "constant"
    config.clip_norm = 0.0
    config.checkpoint.keep = 1
    config.checkpoint.every_epochs = 50
    return config
