"""Batches of examples, and what is known of a data set before anything is loaded.

Nothing here imports JAX, so that the loader's worker processes need not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import jax
    from ml_collections import ConfigDict

    from dpa_jax.data.feeds.base import BaseFeed

Shape = tuple[int | None, ...]
SPLITS = ("train", "eval", "valid")
"""The splits of a data set, in the order of `Source.load`; the last may be missing."""


class Batch(NamedTuple):
    """One global batch; axis 0 of every array is sharded over the mesh axis `"data"`.

    Attributes:
      inputs: a pytree of arrays [B, ...]; images are uint8 [B, H, W, C] until they are augmented.
      labels: int32 [B]; -1 marks padding, which is ignored.
      index: int32 [B], the examples' positions in their split.
      epoch: int32 [B], the epoch each example belongs to.
    """

    inputs: Any
    labels: jax.Array
    index: jax.Array  # type: ignore[assignment]  # the method of tuples gives way
    epoch: jax.Array


class Mixed(NamedTuple):
    """A batch whose examples are mixed in pairs; the target is weight * labels + (1 - weight) * others."""

    inputs: Any  # a pytree of arrays [B, ...]
    labels: jax.Array  # int32 [B], of the example with the greater weight
    others: jax.Array  # int32 [B], of the other example
    weight: jax.Array  # float32 [], at least 0.5


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of an array of one example; a side that differs between examples is None."""

    shape: Shape
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{np.dtype(self.dtype)} [{', '.join(map(str, self.shape))}]"


class Transforms(NamedTuple):
    """What is done inside the compiled training and evaluation steps: a batch becomes the model's inputs.

    `mix` takes what `train` returns, and the labels; None: examples are not mixed.
    """

    train: Callable[[jax.Array, Batch], Any]  # the first argument is a random key, as that of `mix`
    evaluate: Callable[[Batch], Any]
    mix: Callable[[jax.Array, Any, jax.Array], Mixed] | None = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is loaded.

    Attributes:
      name: as `config.data.name` has it.
      inputs: a pytree of ArraySpec, one example as it is stored.
      num_classes: labels are 0 .. num_classes - 1.
      class_names: one a class, in the order of the labels.
      train_examples: the size of the training split.
      test_examples: that of the evaluation split.
      splits: what is evaluated: the evaluation split, and a validation split where there is one.
      auc: whether an evaluation reports the area under the ROC curve, too.
      whole: whether the set is one example that every step sees whole, and whose parts the devices share.
      unit: what an example is, in the plural.

    Raises:
      ValueError: another number of names than of classes, or a split without examples.
    """

    name: str
    inputs: Any
    num_classes: int
    class_names: tuple[str, ...]
    train_examples: int
    test_examples: int
    splits: tuple[str, ...] = ("eval",)
    auc: bool = False
    whole: bool = False
    unit: str = "images"

    def __post_init__(self) -> None:
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"{self.name}: {len(self.class_names)} class names for {self.num_classes} classes")
        for split, examples in (("train", self.train_examples), ("test", self.test_examples)):
            if examples < 1:
                raise ValueError(f"{self.name}: there are no examples in the split {split!r}")

    def configured(self, data: ConfigDict) -> Spec:
        """The spec with what the configuration's `data` part overrides."""
        return self

    def model_options(self) -> dict[str, Any]:
        """The options of a model that follow from the data."""
        return {}

    def example(self, inputs: Any) -> Any:
        """The shapes of one example, of a batch of the model's inputs; to be compared with its `example_inputs`."""
        import jax

        return jax.tree.map(lambda leaf: leaf.shape[1:], inputs)

    def describe(self) -> str:
        """The set in a line."""
        return (
            f"{self.name}, {self.train_examples:,} training and {self.test_examples:,} evaluation examples, "
            f"{self.num_classes:,} classes"
        )

    def transforms(self, config: ConfigDict, train_feed: BaseFeed, eval_feed: BaseFeed) -> Transforms:
        """What the training and the evaluation step of a run do to a batch that its feed gives: here nothing.

        Raises:
          ValueError: the configuration asks for an augmentation, which is for images.
        """
        from dpa_jax.config import default_config  # not above: it imports JAX

        for key, value in default_config().augment.items():
            if config.augment[key] != value:
                raise ValueError(f"config: augment.{key} is for images, which data {self.name!r} has not; leave it out")
        return Transforms(train=lambda _, batch: batch.inputs, evaluate=lambda batch: batch.inputs)
