"""Without the extra `train`: the modules work, the rest says in one line what to install.

Runs where jax, flax, optax and numpy are installed alone: CI makes such an environment from the wheel.
"""

import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ml_collections") is not None, reason="the extra train is installed"
)


def ten_clusters():
    """Stands in for scikit-learn's digits, which are not here."""
    generator = np.random.default_rng(0)
    target = generator.integers(0, 10, 1797)
    data = generator.uniform(0, 16, (10, 64))[target] + generator.normal(0, 1, (1797, 64))
    return types.SimpleNamespace(data=data, target=target)


def test_it_is_the_installed_package():
    import dpa_jax

    assert not pathlib.Path(dpa_jax.__file__).is_relative_to(ROOT)


def test_the_example_of_the_modules_learns(monkeypatch, capsys):
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(load_digits=ten_clusters))
    (example, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "modules.md").read_text(), re.DOTALL)
    exec(compile(example, "modules.md", "exec"), {"__name__": "__main__"})
    (accuracy,) = re.findall(r"eval accuracy ([\d.]+)", capsys.readouterr().out)
    assert float(accuracy) > 0.8


@pytest.mark.parametrize("module", ["activations", "nnx", "models", "data.augment"])
def test_modules_that_need_no_more(module):
    importlib.import_module(f"dpa_jax.{module}")


@pytest.mark.parametrize("package", ["training", "data.sources", "data.feeds", "data.preview", "compare", "campaign"])
def test_packages_that_need_more_name_the_extra(package):
    with pytest.raises(ImportError, match=r"^dpa_jax\.[\w.]+ needs .*tqdm.*: pip install 'dpa_jax\[train\]'$"):
        importlib.import_module(f"dpa_jax.{package}")


@pytest.mark.parametrize("command", ["train", "compare", "campaign", "data.preview"])
def test_commands_name_the_extra_in_one_line(command, tmp_path):
    ended = subprocess.run([sys.executable, "-m", f"dpa_jax.{command}"], cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(": pip install 'dpa_jax[train]'")
