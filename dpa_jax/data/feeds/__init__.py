"""How the examples of a source come to the devices, batch by batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpa_jax.extras import require_train

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from dpa_jax.data.feeds.base import BaseFeed
    from dpa_jax.data.sources import Source

require_train(__name__)


def make_feed(source: Source, mesh: Mesh, batch_size: int, config: ConfigDict, split: str) -> BaseFeed:
    """The feed of a split: from memory, one that reads images at every step, or that of a whole graph.

    Nothing is loaded or put on a device yet; of images in files the headers may be read, to compare their sizes.

    Args:
      source: where the examples come from.
      mesh: has the one axis `"data"`, which batches are sharded over; its devices need not be there.
      batch_size: the global batch size, a multiple of the mesh's devices.
      config: a run's configuration; `seed`, `augment` and of `data` `resident`, `corrupt` and `workers` count.
      split: "train", or one of the spec's `splits`; what is done about corrupt images depends on it.

    Raises:
      ValueError: the batch size does not divide, or the configuration does not suit the source.
      CorruptImageError: no image's header can be read.
    """
    # Not above: worker processes, which import this package, should not import JAX.
    from dpa_jax.data.feeds.memory import MemoryFeed
    from dpa_jax.data.images import ImageSpec

    if isinstance(source.spec, ImageSpec) and source.spec.encoded:
        from dpa_jax.data.feeds.stream import make_image_feed

        return make_image_feed(source, mesh, batch_size, config, split)
    if source.spec.whole:
        from dpa_jax.data.feeds.whole import WholeFeed

        return WholeFeed(source, mesh, batch_size, config, split)
    return MemoryFeed(source, mesh, batch_size, config, split)
