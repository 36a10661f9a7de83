"""The rooms: which imports which, what an import brings along, and that the page shows it."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest

from dpa_jax.extras import TRAIN
from tests import architecture
from tests.architecture import LEVELS, PAGE, ROOT, contracted, imports, modules, reachable


def test_every_room_has_its_level():
    assert sorted(contracted("dpa_jax")) == sorted(room for level in LEVELS for room in level)


def test_arrows_point_downwards():
    height = {room: -index for index, level in enumerate(LEVELS) for room in level}
    upwards = [
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if (room := module.split(".")[1]) != (other := target.split(".")[1]) and height[other] >= height[room]
    ]
    assert not upwards


@pytest.mark.parametrize("package", sorted(name for name, file in modules().items() if file.stem == "__init__"))
def test_there_is_no_circle_within_a_package(package):
    graph = contracted(package)
    assert [part for part in graph if part in reachable(graph, part)] == []


def test_there_is_no_circle_of_modules():
    graph = imports()
    assert [module for module in graph if module in reachable(graph, module)] == []


def test_the_page_shows_the_imports():
    page = PAGE.read_text()
    assert architecture.drawn(page) == page, "draw it anew: python -m tests.architecture"


def python(code):
    """What a fresh interpreter prints."""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


LOADED = (
    "import sys; before = set(sys.modules)\n{}\nprint(*{{name.split('.')[0] for name in set(sys.modules) - before}})"
)


def test_importing_the_package_imports_nothing():
    third_party = set(python(LOADED.format("import dpa_jax; dir(dpa_jax)"))) - sys.stdlib_module_names
    assert third_party == {"dpa_jax"}


def test_the_modules_import_nothing_of_the_extra():
    uses = "import dpa_jax, dpa_jax.data.augment\ndpa_jax.DPA, dpa_jax.MUTABLE, dpa_jax.models.create, dpa_jax.nnx.DPA"
    imported = set(python(LOADED.format(uses)))
    assert {"jax", "flax"} <= imported
    assert imported & set(TRAIN) <= {"etils", "orbax"}  # which flax imports itself


@pytest.mark.parametrize("program", ["dpa_jax.train", "dpa_jax.compare.__main__", "dpa_jax.campaign.__main__"])
def test_a_program_imports_no_jax_of_its_own(program):
    """The loader's worker processes import the program anew."""
    assert not {"jax", "ml_collections"} & set(python(LOADED.format(f"import {program}")))


def test_importing_a_module_defines_no_flag():
    names = [name for name in modules() if not name.endswith("__main__")]
    code = "from absl import flags\n" + "\n".join(f"import {name}" for name in [*names, "dpa_jax.compare.__main__"])
    defined = python(code + "\nprint(*flags.FLAGS.flags_by_module_dict())")
    assert "absl.logging" in defined
    assert [module for module in defined if "dpa_jax" in module or module == "__main__"] == []


def test_the_extra_train_is_what_the_package_looks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", text)[0].lower() for text in project["optional-dependencies"]["train"]}
    brought = importlib.metadata.packages_distributions()
    found = {name.lower().replace("_", "-") for module in TRAIN for name in brought[module]}
    assert names - {"absl-py"} == found & names, "absl-py comes with optax"
