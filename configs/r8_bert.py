"""BERT on R8, Reuters' news in 8 classes: a small one from scratch, or a published one fine-tuned.

    python train.py --config configs/r8_bert.py --config.data.dir=DIR [--config.mechanism=gelu] [--workdir DIR]

DIR has R8.split.txt and R8.clean.txt, or is the folder data of https://github.com/yao8839836/text_gcn.
`--config.data.name=mr` (20news, text:PATH) takes other documents. BERT base from a Hugging Face folder (config.json,
model.safetensors, vocab.txt) is fine-tuned, on a GPU, as BertGCN's authors do (Lin et al., 2021):

    python train.py --config configs/r8_bert.py --config.data.dir=DIR --config.model=bert_base_uncased \\
        --config.init_from=FOLDER --config.data.vocab=FOLDER --config.batch_size=128 --config.epochs=60 \\
        --config.optimizer.name=adam --config.optimizer.learning_rate=1e-4 --config.optimizer.weight_decay=0.0 \\
        --config.schedule.name=multistep --config.schedule.milestones="(30,)" --config.schedule.warmup_epochs=0

Published for that: 97.8% top-1. The small one from scratch:
"""

from ml_collections import ConfigDict

from dpa_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model = "bert"  # 2 layers of width 128
    config.batch_size = 32
    config.eval_batch_size = 256
    config.epochs = 5
    config.optimizer.learning_rate = 1e-3
    config.schedule.warmup_epochs = 1
    config.data.name = "r8"
    config.data.max_length = 128
    return config
