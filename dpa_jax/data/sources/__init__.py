"""Data sets by their names."""

from __future__ import annotations

from dpa_jax.extras import require_train

require_train(__name__)

import functools
import importlib
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


def _importing(module: str, name: str, *arguments: str) -> Callable[[ConfigDict], Source]:
    """A function of a module here that imports JAX: not before it is called, for worker processes import this one."""

    def open_it(data: ConfigDict) -> Source:
        return getattr(importlib.import_module(f"dpa_jax.data.sources.{module}"), name)(*arguments, data)

    return open_it


SOURCES: dict[str, Callable[[ConfigDict], Source]] = {
    "digits": open_digits,
    "cifar10": functools.partial(open_cifar, CIFAR10),
    "cifar100": functools.partial(open_cifar, CIFAR100),
    "imagenet": open_folder,
    "imagenet100": open_folder,
    "folder": open_folder,
    "parquet": open_parquet,
    "tfds:NAME": open_tfds,
    "cora": _importing("planetoid", "open_planetoid", "cora"),
    "citeseer": _importing("planetoid", "open_planetoid", "citeseer"),
    "pubmed": _importing("planetoid", "open_planetoid", "pubmed"),
    "dgraph": _importing("npz_graph", "open_dgraph"),
    "npz:PATH": _importing("npz_graph", "open_npz"),
    "digits_graph": _importing("digits_graph", "open_digits_graph"),
    "r8_graph": _importing("text_graph", "open_text_graph"),
    "mr_graph": _importing("text_graph", "open_text_graph"),
    "20news_graph": _importing("text_graph", "open_text_graph"),
    "text_graph:PATH": _importing("text_graph", "open_text_graph"),
    "r8": open_tokens,
    "mr": open_tokens,
    "20news": open_tokens,
    "text:PATH": open_tokens,
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
    name = next((name for name in SOURCES if colon and name.startswith(f"{prefix}:")), data.name)
    if name not in SOURCES:
        check_choice("config", "data.name", data.name, SOURCES)
    source = SOURCES[name](data)
    source.spec = source.spec.configured(data)
    if data.imbalance == 1:
        return source
    if source.spec.whole:
        raise ValueError(f"config: data.imbalance takes examples away; data {data.name!r} is one: it must be 1.0")
    return long_tailed(source, data.imbalance)
