"""The command line: what it prints and how it ends."""

import json
import os
import pathlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

ROOT = pathlib.Path(__file__).parents[1]

SMALL = """
from dpa_jax.config import default_config

def get_config():
    config = default_config()
    config.model_options = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    config.data.update(name="synthetic", image_size=8, channels=1, num_classes=4)
    config.data.update(train_examples=48, test_examples=40)
    config.update(batch_size=16, eval_batch_size=16, epochs=2)
    config.optimizer.learning_rate = 0.01
    CHANGE
    return config
"""


def train(*arguments, **environment):
    """The ended process of `python train.py` with these arguments, on one device."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | environment
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def write_config(folder, change=""):
    path = folder / "small.py"
    path.write_text(SMALL.replace("CHANGE", change))
    return path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The configuration file and the folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("trained")
    config, workdir = write_config(folder), folder / "run"
    ended = train("--config", config, "--workdir", workdir, JAX_LOG_COMPILES="1")
    assert ended.returncode == 0, ended.stderr
    assert "Compiling" in ended.stderr
    assert ended.stdout == f"curves, metrics and checkpoints are in {workdir}\n"
    return config, workdir


def test_eval_prints_what_training_found_and_touches_nothing(trained):
    config, workdir = trained
    before = contents(workdir)
    ended = train("--config", config, "--workdir", workdir, "--eval")
    assert ended.returncode == 0, ended.stderr
    assert contents(workdir) == before

    head, *rows = [line.split() for line in ended.stdout.splitlines()]
    assert head[0] == "step" and head[-1] == "6"
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {row[0] for row in rows} == {key[5:] for key in last if key.startswith("eval_")}
    for name, *unit, figure in [(*row[: -len(head) + 1], row[-1]) for row in rows]:
        assert float(figure) == pytest.approx(last[f"eval_{name}"] * (100 if unit else 1), abs=5.1e-5), name


def test_eval_without_a_checkpoint(trained, tmp_path):
    config, _ = trained
    ended = train("--config", config, "--workdir", tmp_path / "nothing", "--eval")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"error: no checkpoint in {tmp_path}/nothing/checkpoints; train first, without --eval\n"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("flags", "change", "leaf", "there", "here"),
    [
        (["--eval"], "data.num_classes=5", "params/head/bias", "float32[4]", "float32[5]"),
        ([], "model_options.embed_dim=4", "params/block0/attention/projection/bias", "float32[8]", "float32[4]"),
    ],
    ids=["classes", "width"],
)
def test_a_checkpoint_of_another_model(trained, flags, change, leaf, there, here):
    config, workdir = trained
    before = contents(workdir)
    ended = train("--config", config, "--workdir", workdir, f"--config.{change}", *flags)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: checkpoint {workdir}/checkpoints/6 is of another model or configuration: ")
    assert f"{leaf} is {there} there and {here} here" in line
    assert contents(workdir) == before


# A line in the configuration file, arguments, and what the one line of the error says.
MISTAKES = [
    ("", "--config.batch_sise=3", r"there is no key batch_sise\. Did you mean batch_size\?"),
    ("", "--config.learning_rate=3", r"there is no key learning_rate\. Did you mean optimizer\.learning_rate\?"),
    ("", "--config.augment.flp=0.5", r"there is no key augment\.flp\. Did you mean augment\.flip\?"),
    ("", "--config.epochs.warmup=3", r"epochs is no group of keys; got epochs\.warmup"),
    ("", "--config.optimizer.learning_rte=3", r"Did you mean optimizer\.learning_rate\?"),
    ("", "--config.optimzer.name=sgd", r"there is no key optimzer\. Did you mean optimizer\?"),
    ("", "--config.epochs=many", r"flag --config\.epochs=many: invalid literal for int"),
    ("config.batch_sise = 3", "", r'small\.py, line 11: Key "batch_sise" .* Did you mean "batch_size"'),
    ("config.epochs = 2.5", "", r"small\.py.*'epochs'.*2\.5.*float.*int"),
    ("", "--config=nowhere.py", r"--config: there is no file nowhere\.py"),
    ("", "--wrkdir=x", r"Unknown command line flag 'wrkdir'\. Did you mean: workdir"),
    ("", "configs/digits_vit.py", r"unknown argument 'configs/digits_vit\.py'; .* after --config"),
    ("", "--config.mechanism=dpaa", r"config: mechanism must be one of .*'dpaa'\. Did you mean 'dpa'"),
    ("", "--config.mechanism_options.tua=1.0", r"a key of mechanism_options must be .*Did you mean 'tau'"),
    ("", "--config.coefficients.chanel=1.0", r"a key of coefficients .*'chanel'\. Did you mean 'channel'"),
    ("", "--config.model=vit_tinny", r"config: model must be one of .*vit_tiny_patch4_32.*; got 'vit_tinny'"),
    ("", "--config.data.image_size=16", r"'vit' takes images of shape \(8, 8, 1\); .*\(16, 16, 1\)\. Set config\."),
]


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """The ended processes, one for each of MISTAKES."""

    def run(mistake):
        change, argument, _ = mistake
        folder = tmp_path_factory.mktemp("mistake")
        arguments = [f"--config={write_config(folder, change)}", argument][argument.startswith("--config=") :]
        ended = train(f"--workdir={folder}/run", *filter(None, arguments), JAX_LOG_COMPILES="1")
        assert not (folder / "run").exists(), mistake
        return ended

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MISTAKES, pool.map(run, MISTAKES), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: " ".join(mistake[:2]).strip())
def test_a_mistake_is_one_line_before_anything_compiles(mistaken, mistake):
    ended = mistaken[mistake]
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()  # with JAX_LOG_COMPILES there would be others
    assert re.match(f"error: .*{mistake[2]}", line), line


def test_missing_data_comes_with_the_command_that_gets_it(tmp_path):
    ended = train("--config=configs/cifar100_vit.py", f"--config.data.dir={tmp_path}", f"--workdir={tmp_path}/run")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ") and "Traceback" not in ended.stderr
    assert str(tmp_path) in ended.stderr
    assert "train.py --config configs/cifar100_vit.py --config.data.download=True --config.data.dir=" in ended.stderr
