"""Data sets by their names."""

from __future__ import annotations

from dpa_jax.extras import require_train

require_train(__name__)

import functools
from collections.abc import Callable

from ml_collections import ConfigDict

from dpa_jax.data.sources.base import Source as Source
from dpa_jax.data.sources.cifar import CIFAR10, CIFAR100, open_cifar
from dpa_jax.data.sources.digits import open_digits
from dpa_jax.data.sources.folder import open_folder
from dpa_jax.data.sources.long_tail import long_tailed
from dpa_jax.data.sources.parquet import open_parquet
from dpa_jax.data.sources.synthetic import open_synthetic
from dpa_jax.data.sources.tfds import open_tfds
from dpa_jax.data.sources.tokens import open_tokens

SOURCES: dict[str, Callable[[ConfigDict], Source]] = {
    "digits": open_digits,
    "cifar10": functools.partial(open_cifar, CIFAR10),
    "cifar100": functools.partial(open_cifar, CIFAR100),
    "imagenet": open_folder,
    "imagenet100": open_folder,
    "folder": open_folder,
    "parquet": open_parquet,
    "tfds:NAME": open_tfds,
    "r8": open_tokens,
    "mr": open_tokens,
    "20news": open_tokens,
    "text:NAME": open_tokens,
    "synthetic": open_synthetic,
    "fake_data": open_synthetic,
}


def register(name: str, open_function: Callable[[ConfigDict], Source]) -> None:
    """Makes a function of the configuration's `data` part known under a name; ValueError where that is taken.

    The name is for `config.data.name`; `PREFIX:NAME` stands for every name with this prefix.
    """
    if name in SOURCES:
        raise ValueError(f"register: there is a data source {name!r} already")
    SOURCES[name] = open_function


def open_source(data: ConfigDict) -> Source:
    """A data set by its name; nothing is loaded yet.

    Args:
      data: the configuration's `data` part: `name`, `dir`, `download` and what else the source takes, `imbalance` (see
        `long_tail`), and `mean` and `std` of images in place of the source's own.

    Raises:
      ValueError: the name is unknown, or the data is not what it should be.
      FileNotFoundError: the data is needed to describe it, and is not there; the message says how to get it.
    """
    from dpa_jax.checks import check_choice  # not above: it imports JAX, which worker processes should not

    prefix, colon, _ = data.name.partition(":")
    name = f"{prefix}:NAME" if colon else data.name
    if name not in SOURCES:
        check_choice("config", "data.name", data.name, SOURCES)
    source = SOURCES[name](data)
    source.spec = source.spec.configured(data)
    return source if data.imbalance == 1 else long_tailed(source, data.imbalance)
