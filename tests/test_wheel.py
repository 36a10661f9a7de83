"""A built wheel, installed elsewhere: it does what the clone does, without the clone."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel is installed into; what it needs comes from the environment."""
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", wheels], cwd=ROOT, check=True)
    (wheel,) = wheels.glob("*.whl")
    install = ["install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target", folder, wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return folder


@pytest.fixture
def python(installed, tmp_path):
    """python(*arguments) -> what the interpreter prints with the installed package, in an empty folder."""
    environment = os.environ | {
        "PYTHONPATH": str(installed),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    def run(*arguments):
        ended = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run


SHORT = ["--config.epochs=1", "--config.schedule.warmup_epochs=0", "--config.batch_size=360"]
SHORT += ["--config.model_options.depth=1", "--config.model_options.embed_dim=8"]


def test_nothing_but_the_package_is_installed(installed):
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"dpa_jax"}
    assert (installed / "dpa_jax" / "py.typed").is_file()
    assert {path.name for path in (installed / "dpa_jax" / "configs").glob("*.py")} == {
        path.name for path in (ROOT / "configs").glob("*.py")
    }


def test_the_example_of_the_modules(installed, python):
    (example, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "modules.md").read_text(), re.DOTALL)
    short = example.replace("range(20)", "range(3)")
    assert short != example
    *_, accuracy, place = python("-c", short + "\nprint(dpa_jax.__file__)").split()
    assert float(accuracy) > 0.5
    assert pathlib.Path(place).is_relative_to(installed)


def test_training_and_preview(python, tmp_path):
    assert python("-m", "dpa_jax.train", *SHORT).startswith("curves, metrics and checkpoints are in runs/digits_vit,")
    (workdir,) = tmp_path.glob("runs/digits_vit,*")
    assert (workdir / "metrics.jsonl").read_text().count("\n") == 1

    assert (
        python("-m", "dpa_jax.data.preview", "--config=digits_vit", "--images=1") == "preview.png: 1 training images\n"
    )
    assert (tmp_path / "preview.png").is_file()


def test_comparison(python, tmp_path):
    table = python("-m", "dpa_jax.compare", "--config", "digits_vit", "--mechanisms=dpa", "--seeds=1", *SHORT)
    assert "| dpa | 1 |" in table
    assert next(tmp_path.glob("runs/compare_digits_vit,*/table.md")).is_file()


def test_a_configuration_that_builds_on_another(python):
    code = "from dpa_jax import command_line as c\n"
    code += "options = c.parse(lambda options: None, ['train', '--config=imagenet100_vit'])\n"
    code += "print(options.config.data.name, options.config.model, options.config.augment.rand_augment)"
    assert python("-c", code).split() == ["imagenet100", "vit_tiny_patch16_224", "rand-m9-mstd0.5-inc1"]
