"""Compiled programs are kept for the next start, where the user has not said otherwise."""

import os
import pathlib

import jax
import pytest

from dpa_jax.training.compiled import keep_compiled

DIR, ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder that is chosen, of a user whose cache folder is below the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = {name: getattr(jax.config, name) for name in (DIR, ENABLED)}

    def kept(enabled=True, given=None):
        jax.config.update(ENABLED, enabled)
        jax.config.update(DIR, given)
        keep_compiled()
        return getattr(jax.config, DIR)

    yield kept
    for name, value in before.items():
        jax.config.update(name, value)


def test_it_is_in_the_projects_cache_folder(kept, tmp_path):
    folder = pathlib.Path(kept())
    assert folder.is_dir() and folder.parent == tmp_path / "cache" / "dpa_jax"


def test_the_user_chooses_another_folder_or_none(kept, tmp_path):
    assert kept(given=str(tmp_path)) == str(tmp_path)
    assert kept(enabled=False) is None
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made_is_done_without(kept, tmp_path):
    (tmp_path / "cache").write_text("")
    assert kept() is None


def test_the_suite_keeps_nothing():
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"
