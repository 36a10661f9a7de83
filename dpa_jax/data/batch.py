"""What a training or evaluation step is given."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class Batch:
    """One global batch; axis 0 of every leaf is sharded over the mesh axis `"data"`.

    Attributes:
      inputs: what the model is given, a pytree of arrays [B, ...]; images are uint8 [B, H, W, C] until the
        augmentation has seen them.
      labels: int32 [B]; -1 is padding, which counts nowhere.
      index: int32 [B], the examples' positions in their split.
      epoch: int32 [B], the epoch each example belongs to.
    """

    inputs: Any
    labels: jax.Array
    index: jax.Array
    epoch: jax.Array
