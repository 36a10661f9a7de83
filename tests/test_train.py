"""The command line: what it prints and how it ends."""

import contextlib
import io
import json
import logging
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dpa_jax import command_line, train
from dpa_jax.config import default_config, each_key
from tests.helpers import told

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


def run(command, *arguments):
    """The ended process of a command with these arguments, on one device."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, *command.split(), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def refused(*arguments, traced=False):
    """The error that the command ends with, in this process: before it at most header and notes, and nothing compiles.

    Args:
        *arguments: of the command line.
        traced: whether functions may have been traced, to learn the shapes of a state.
    """
    printed, logged = io.StringIO(), []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    try:
        with jax.log_compiles():
            with (
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
                pytest.raises(SystemExit) as ended,
            ):
                train.main(["train.py", *map(str, arguments)])
            assert not [line for line in logged if not (traced and line.startswith("Finished tracing"))]
            jax.jit(lambda x: x + 1)(jnp.zeros(3))
            assert any(line.startswith("Compiling") for line in logged)  # it would have been seen
    finally:
        logging.getLogger("jax").removeHandler(handler)
    assert all(line.startswith("note: ") for line in told(printed.getvalue()))
    assert isinstance(ended.value.code, str)  # Python prints it to stderr, and ends with code 1
    return ended.value.code


def write_config(folder, change=""):
    path = folder / "small.py"
    path.write_text(SMALL.replace("CHANGE", change))
    return path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The configuration file, the folder and the output of a run that has ended."""
    folder = tmp_path_factory.mktemp("trained")
    config, workdir = write_config(folder), folder / "run"
    ended = run("train.py", "--config", config, "--workdir", workdir)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"curves, metrics and checkpoints are in {workdir}\n"
    return config, workdir, ended.stderr


def test_a_run_says_what_it_is_before_it_trains(trained):
    _, workdir, output = trained
    device, *header, compiling, first, last, epoch = output.splitlines()[:9]
    assert re.match(rf"device: 1 x cpu \(\d+ cores\), jax {jax.__version__}, float32$", device)
    parameters = 16 * 8 + 8 + 8 + 5 * 8 + 2 * 16 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 16 + 36
    assert header == [
        f"model: vit with dpa, {parameters:,} parameters",
        "data: synthetic, 48 training and 40 evaluation examples, 4 classes",
        "training: 2 epochs, 6 steps of 16, adamw, learning rate 0.01 (cosine)",
        f"folder: {workdir}",
    ]
    assert compiling == "compiling the training step"
    assert re.match(r"epoch 1/2, step 1/3: loss \S+, top-1 \S+%, compiled in \d\d:\d\d$", first)
    assert last.startswith("epoch 1/2, step 3/3: ")
    assert re.match(r"epoch 1/2: loss \S+, top-1 \S+% \| eval: loss \S+, top-1 \S+% \| \S+ images/s$", epoch)


def test_eval_prints_what_training_found_and_touches_nothing(trained):
    config, workdir, _ = trained
    before = contents(workdir)
    ended = run("-m dpa_jax.train", "--config", config, "--workdir", workdir, "--eval")
    assert ended.returncode == 0, ended.stderr
    assert contents(workdir) == before

    head, *rows = [line.split() for line in ended.stdout.splitlines()]
    assert head[0] == "step" and head[-1] == "6"
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {row[0] for row in rows} == {key[5:] for key in last if key.startswith("eval_")}
    for name, *unit, figure in [(*row[: -len(head) + 1], row[-1]) for row in rows]:
        assert float(figure) == pytest.approx(last[f"eval_{name}"] * (100 if unit else 1), abs=5.1e-5), name


def test_eval_without_a_checkpoint(trained, tmp_path):
    config, *_ = trained
    error = refused("--config", config, "--workdir", tmp_path / "nothing", "--eval", traced=True)
    assert error == f"error: no checkpoint in {tmp_path}/nothing/checkpoints; train first, without --eval"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("flags", "change", "leaf", "there", "here"),
    [
        (["--eval"], "data.num_classes=5", "params/head/bias", "float32[4]", "float32[5]"),
        ([], "model_options.embed_dim=4", "params/blocks/attention/projection/bias", "float32[1, 8]", "float32[1, 4]"),
    ],
    ids=["classes", "width"],
)
def test_a_checkpoint_of_another_model(trained, flags, change, leaf, there, here):
    config, workdir, _ = trained
    before, allowed = contents(workdir), f"--config.allow_change={change.partition('=')[0]}"
    error = refused("--config", config, "--workdir", workdir, f"--config.{change}", allowed, *flags, traced=True)
    (line,) = error.splitlines()
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
    ("", "--config.mechanism_options.axis_name=data", r"a key of mechanism_options must be .*; got 'axis_name'"),
    ("", "--config.model_options.dropout=1", r"dropout must be in \[0, 1\); got 1"),
    ("", "--config.model_options.scan=3", r"model_options\.scan must be bool \| None; got 3"),
    ("", "--config.mechanism_options.update_interval=9999999999", r"update_interval must be at most 2147483647"),
    (
        "",
        "--config.data.train_examples=2000000000",
        r"data\.train_examples 2000000000, .* would take .* GB; this machine",
    ),
    ("", "--config.schedule.milestones=((((1", r"milestones"),
    ("", "--config.schedule.milestones=" + "-" * 100_000 + "1", r"one of these arguments .*milestones"),
    ("", "--config", r"--config must be followed by the name of a configuration file"),
    ("", "--workdir=", r"flag --workdir=: it must be the name of a folder"),
    ("", "--config.optimizer.name=a\nb", r"optimizer\.name must be one of"),
    ("config.epochs = epohcs", "", r"small\.py, line 11: NameError: name 'epohcs' is not defined"),
    ("config.epochs == = 3", "", r"small\.py, line 11: SyntaxError: invalid syntax"),
    ("import no_such_module", "", r"small\.py, line 11: ModuleNotFoundError: No module named 'no_such_module'"),
    ("raise SystemExit(0)", "", r"small\.py, line 11: SystemExit: 0"),
    ("assert False", "", r"small\.py, line 11: AssertionError"),
    ("config = 3", "", r"small\.py, line 4: get_config\(\) must return what default_config\(\) makes; got int"),
    ("", "--config.data.image_size=16", r"'vit' takes inputs of shape \(8, 8, 1\); .*\(16, 16, 1\)\. Set config\."),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: " ".join(mistake[:2]).strip())
def test_a_mistake_is_one_line_before_anything_compiles(mistake, tmp_path):
    change, argument, message = mistake
    arguments = [f"--config={write_config(tmp_path, change)}", argument][
        re.match("--config(=|$)", argument) is not None :
    ]
    traced = "image_size" in argument  # what the model is given is known by tracing the transforms
    (line,) = refused(f"--workdir={tmp_path}/run", *filter(None, arguments), traced=traced).splitlines()
    assert re.match(f"error: .*{message}", line), line
    assert not (tmp_path / "run").exists()


TRACED = [
    ("--config.eval_batch_size=1000000000", r"config: a batch of eval_batch_size 1000000000 would take .* GB"),
    (
        "--config.epochs=1000000000",
        r"config: the steps of epochs 1000000000 must be at most 2147483647; got 3000000000",
    ),
    ("--config.augment.eval_resize=7", r"config: augment\.eval_resize must be 0 or at least the 8 pixels"),
    ("--config.augment.eval_resize=60000", r"config: a batch of 16 images by augment\.eval_resize 60000 would take"),
    ("--config.augment.rand_augment=rand-n1000000000", r"rand_augment: 'rand-n1000000000' is no RandAugment policy"),
    (
        "--config.augment.color_jitter=(0,0,0,0.1)",
        r"config: augment\.color_jitter changes the hue of colour images only",
    ),
    (
        "--config.model_options={'image_size': 8, 'embed_dim': 65536, 'depth': 65536, 'num_heads': 1}",
        r"by model_options, would",
    ),
]


@pytest.mark.parametrize(("argument", "message"), TRACED, ids=lambda text: text[:40])
def test_what_only_shapes_tell_is_refused_before_anything_compiles(argument, message, tmp_path):
    config = write_config(tmp_path)
    (line,) = refused(f"--workdir={tmp_path}/run", f"--config={config}", argument, traced=True).splitlines()
    assert re.match(f"error: .*{message}", line), line


def test_the_key_of_a_batch_that_the_devices_do_not_share_alike(tmp_path):
    line = refused(f"--config={write_config(tmp_path)}", "--config.eval_batch_size=12", traced=True)
    assert line == "error: eval_batch_size must be a positive multiple of the 8 devices, not 12"


def test_padding_that_could_hide_the_image(tmp_path):
    crop = ["--config.augment.crop=pad", "--config.augment.padding=8"]
    line = refused(f"--config={write_config(tmp_path)}", *crop, traced=True)
    assert line == "error: config: augment.padding must be less than the images' shorter side, 8; got 8"


def test_no_more_than_one_configuration():
    line = refused("--config=digits_vit", "--config", "cifar10_vit")
    assert line == "error: --config is given twice: digits_vit, cifar10_vit"


def test_a_long_error_is_cut():
    line = refused(f"--config.optimizer.name={'x' * 100_000}")
    assert line.startswith("error: config: optimizer.name must be one of ") and len(line) < 2100


def test_memory_that_runs_out_is_one_line(monkeypatch, tmp_path):
    def out_of_memory(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore.")

    monkeypatch.setattr("dpa_jax.training.loop.train_and_evaluate", out_of_memory)
    line = refused(f"--config={write_config(tmp_path)}")
    assert re.match(r"error: out of memory; .*: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\. More\.$", line)


def test_a_mistake_ends_the_process_with_its_line_alone():
    ended = run("train.py", "--config.batch_sise=3")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: config: there is no key batch_sise. Did you mean batch_size?\n"


def test_missing_data_comes_with_the_command_that_gets_it(tmp_path):
    arguments = ["--config=configs/cifar100_vit.py", f"--config.data.dir={tmp_path}", f"--workdir={tmp_path}/run"]
    error = refused(*arguments, traced=True)
    assert error.startswith("error: ") and "Traceback" not in error
    assert str(tmp_path) in error
    assert "train.py --config configs/cifar100_vit.py --config.data.download=True --config.data.dir=" in error


# ---------------- What a command line shows of itself ----------------


def printed(capsys, *arguments):
    """What the command prints, without a run."""
    train.main(["train.py", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_help_has_our_flags_and_every_key_with_its_value_and_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    out = printed(capsys, "--help", "--config.epochs=12")
    assert out == printed(capsys, "-h", "--config.epochs=12", "--config", "digits_vit")
    listed = dict(re.findall(r"^  (--\S+).*\n +(\S.*)$", out, re.MULTILINE))
    flags = ("config=NAME", "config.KEY=VALUE", "workdir=TEXT", "eval", "num_processes=N", "print_config", "helpfull")
    for flag in flags:
        assert f"--{flag}" in listed, flag
    last = max(file.stem for file in (ROOT / "configs").glob("*.py"))
    assert listed["--config=NAME"].endswith(f"{last} (default: digits_vit).")
    assert "undefok" not in out
    for path, key in each_key():
        value = {"epochs": 12, "schedule.warmup_epochs": 1}.get(path, key.default)
        assert f"--config.{path}" in out and key.about in out, path
        if path in ("epochs", "schedule.warmup_epochs", "precision"):
            assert listed[f"--config.{path}={value}"] == key.about
    assert "--config.model_options.depth=4\n" in out  # the file's
    full = printed(capsys, "--helpfull", "--config.epochs=12")
    assert "--undefok" in full and set(out.splitlines()) < set(full.splitlines())


def test_the_printed_configuration_is_the_one_of_the_run(capsys, tmp_path):
    changes = ["--config.data.mean=(0.5,)", "--config.model_options.depth=2", "--config.data.dir=a'b\n"]
    out = printed(capsys, f"--config={write_config(tmp_path)}", *changes, "--print_config", "--eval")
    config = default_config()
    exec(out, {"config": config})
    options = command_line.parse(
        lambda options: None, ["train.py", f"--config={write_config(tmp_path)}", *changes], default_config="digits_vit"
    )
    assert config.to_dict() == options.config.to_dict() != default_config().to_dict()
    assert not (tmp_path / "run").exists()
    line = refused("--print_config", "--config.batch_size=0")
    assert line == "error: config: batch_size must be at least 1; got 0"


def test_a_schedule_that_has_followed_epochs_is_told_of(tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr("dpa_jax.training.loop.train_and_evaluate", lambda *arguments: trained.append(arguments))
    config = write_config(tmp_path, "config.epochs = 20; config.schedule.warmup_epochs = 5")
    for epochs in (4, 20):
        train.main(["train.py", f"--config={config}", f"--workdir={tmp_path}", f"--config.epochs={epochs}"])
    assert [given.schedule.warmup_epochs for given, _ in trained] == [1, 5]
    note = "note: epochs changed from 20 to 4, and in proportion schedule.warmup_epochs from 5 to 1\n"
    assert capsys.readouterr().err == note


# ---------------- The folder of a run that is not given one ----------------


def workdir_of(*arguments):
    options = command_line.parse(lambda options: None, ["train.py", *arguments], default_config="digits_vit")
    return str(command_line.default_workdir(options))


def test_the_default_folder_tells_configurations_apart():
    assert workdir_of() == "runs/digits_vit"
    assert workdir_of("--config=cifar10_vit") == workdir_of("--config", "configs/cifar10_vit.py") == "runs/cifar10_vit"
    assert workdir_of("--config.seed=1", "--config.mechanism=relu") == "runs/digits_vit,mechanism=relu,seed=1"
    assert workdir_of("--config.mechanism=relu", "--config.seed", "1") == "runs/digits_vit,mechanism=relu,seed=1"
    assert workdir_of("--config.mechanism_options.tau=0.5") == "runs/digits_vit,mechanism_options.tau=0.5"


@pytest.mark.parametrize(
    "change",
    [
        "data.dir=x",
        "data.download=True",
        "data.workers=2",
        "checkpoint.keep=1",
        "allow_change=seed",
        "log_every_seconds=1",
    ],
)
def test_what_changes_no_figure_changes_no_folder(change):
    assert workdir_of(f"--config.{change}") == "runs/digits_vit"


def test_every_other_change_is_another_folder_with_a_plain_name():
    scales = [f"--config.augment.scale=({low},1.0)" for low in (0.1, 0.2)]
    long = [f"--config.model_options.{'wide' * 50}{n}=1" for n in (1, 2)]
    rates = [f"--config.optimizer.learning_rate={rate}" for rate in ("1e-3", "1e-4")]
    folders = [
        workdir_of(*arguments) for arguments in ([], *zip(scales), *zip(long), *zip(rates), scales[:1] + rates[:1])
    ]
    assert len(set(folders)) == len(folders)
    for folder in folders:
        assert re.fullmatch(r"runs/[\w.,=+-]{1,120}", folder), folder


def test_a_ctrl_c_that_comes_in_a_destructor_counts(tmp_path):
    """Python prints what is raised there, and goes on."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, weakref\n"
        "from dpa_jax import command_line\n"
        "def stop(_):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    sum(range(10**6))\n"
        "def main(options):\n"
        "    objects = [set()]\n"
        "    watched = weakref.ref(objects[0], stop)\n"
        "    objects.clear()\n"
        "    print('it went on', flush=True)\n"
        "command_line.run(main, lambda options: None, ['program'], default_config='digits_vit')\n"
    )
    ended = subprocess.run([sys.executable, program], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "stopped by Ctrl-C\n")


def test_a_hook_on_top_of_ours_outlasts_the_program(monkeypatch):
    """A failed save's threads still have something to say when the program is at its end."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    def above(unraisable):
        del unraisable

    def main(options):
        sys.unraisablehook = above

    command_line.run(main, lambda options: None, ["program"], default_config="digits_vit")
    assert sys.unraisablehook is above
    command_line.run(lambda options: None, lambda options: None, ["program"], default_config="digits_vit")
    assert sys.unraisablehook is above
