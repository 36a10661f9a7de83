"""Compiled programs, kept in the user's cache folder for the next start."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import platform

import jax
import platformdirs


def keep_compiled() -> None:
    """Has JAX keep what takes it more than a second to compile, unless the user has said where: for a program's start.

    ``JAX_COMPILATION_CACHE_DIR`` names another folder, ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps nothing. Several
    processes may share a folder: JAX's keys hold all that decides a program but the features of this machine's
    processor, which are in the folder's name. Without a folder that can be written to nothing is kept.
    """
    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if given or not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return
    folder = platformdirs.user_cache_path("dpa_jax", appauthor=False) / f"compiled-{_processor()}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
    """What a program that is compiled for this processor needs it to have, as a short digest."""
    features = platform.processor()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
