"""Texts as tokens: what is known of them before loading.

Nothing here imports JAX, so that the loader's worker processes need not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dpa_jax.data.batch import ArraySpec, Spec


@dataclasses.dataclass(frozen=True)
class TextSpec(Spec):
    """What is known of a set of texts; `inputs` is {"input_ids", "attention_mask", "token_type_ids"}, int32 [L] each.

    Attributes:
      vocab_size: ids are below it.
    """

    vocab_size: int = 0

    def model_options(self) -> dict[str, Any]:
        """The number of tokens that there are, `vocab_size`, and that of an example, `sequence_length`."""
        return {"vocab_size": self.vocab_size, "sequence_length": self.inputs["input_ids"].shape[0]}


def text_spec(
    name: str, length: int, vocab_size: int, class_names: tuple[str, ...], train_examples: int, test_examples: int
) -> TextSpec:
    """A `TextSpec` of texts of so many tokens, padding included."""
    inputs = {
        key: ArraySpec((length,), np.dtype(np.int32)) for key in ("input_ids", "attention_mask", "token_type_ids")
    }
    return TextSpec(name, inputs, len(class_names), class_names, train_examples, test_examples, vocab_size=vocab_size)
