"""Documents as WordPiece tokens, for BERT."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from dpa_jax.data.sources.base import Source
from dpa_jax.data.sources.documents import open_documents
from dpa_jax.data.sources.wordpiece import WordPiece, build_vocabulary, read_vocabulary
from dpa_jax.data.splits import ArraySplit
from dpa_jax.data.text import text_spec


def open_tokens(data: ConfigDict) -> Source:
    """The documents of `name` and `dir`, cut or padded to `max_length` tokens of `vocab`.

    An empty `vocab` is the vocabulary of the training documents.

    Raises:
      FileNotFoundError, ValueError: as `open_documents`, `read_vocabulary`, `build_vocabulary` and `WordPiece`.
    """
    documents = open_documents(data.name, data.dir)
    splits = [
        [text for text, of_train in zip(documents.texts, documents.train, strict=True) if of_train == wanted]
        for wanted in (True, False)
    ]
    try:
        tokenizer = WordPiece(read_vocabulary(data.vocab) if data.vocab else build_vocabulary(splits[0]))
    except (ValueError, FileNotFoundError) as error:
        where = f"data.vocab {data.vocab}" if data.vocab else data.name
        raise type(error)(f"{where}: {error}") from error
    spec = text_spec(data.name, data.max_length, tokenizer.size, documents.class_names, *map(len, splits))
    labels = documents.labels[documents.train], documents.labels[~documents.train]

    def read() -> tuple[ArraySplit, ArraySplit]:
        train, test = (
            ArraySplit(tokenizer.encode(texts, data.max_length), numbers)
            for texts, numbers in zip(splits, labels, strict=True)
        )
        return train, test

    return Source(spec, read, lambda: np.bincount(labels[0], minlength=spec.num_classes))
