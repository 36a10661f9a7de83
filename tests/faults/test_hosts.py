"""Two processes of one run: what differs, what fails, what is killed. The environment says what a cluster would."""

import random
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from tests.faults.harness import ROOT, TINY, Fault
from tests.helpers import free_port

_KILLS = 12  # of one process of two, at random moments


def start(case, *each, env=({}, {}), only=(0, 1)):
    """Starts two processes of one run, as Slurm would, each with its own arguments and environment; or one alone."""
    cluster = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    cluster["JAX_COORDINATOR_PORT"] = str(free_port())
    return [
        case.start(
            "dpa_jax.train",
            *("--distributed", "--workdir=run", *TINY, *arguments),
            env={**cluster, "SLURM_PROCID": str(index), **more},
        )
        for index, (arguments, more) in enumerate(zip(each, env, strict=True))
        if index in only
    ]


def end(programs, seconds):
    """Each must end within so many seconds of now."""
    deadline = time.monotonic() + seconds
    return [program.wait(max(deadline - time.monotonic(), 0.1)) for program in programs]


def refused(case, programs, *words, seconds=40):
    """Both end with a line of all the words, a few seconds after the start; imports and slow machines included."""
    for ended in end(programs, seconds):
        case.refused(ended, *words)


# ---------------- What differs ----------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.learning_rate", "0.5"),
        ("optimizer.name", "sgd"),
        ("optimizer.weight_decay", "0.1"),
        ("seed", "1"),
        ("batch_size", "16"),
        ("eval_batch_size", "4"),
        ("epochs", "3"),
        ("mechanism", "relu"),
        ("model_options.depth", "2"),
        ("precision", "bfloat16"),
        ("label_smoothing", "0.1"),
        ("clip_norm", "0.5"),
        ("augment.flip", "0.5"),
        ("eval_every_epochs", "2"),
        ("checkpoint.every_steps", "2"),
        ("data.train_examples", "56"),
        ("data.test_examples", "28"),
        ("data.num_classes", "5"),
    ],
)
def test_another_value_in_one_process(case, key, value):
    refused(case, start(case, [], [f"--config.{key}={value}"]), f"config.{key} is ", f"{value}", "in process 1")


@pytest.mark.parametrize("package", ["optax", "flax", "orbax_checkpoint", "numpy"])
def test_another_version_in_one_process(case, package):
    fake = case.folder / "packages" / f"{package}-99.9.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 99.9\n")
    programs = start(case, [], [], env=({}, {"PYTHONPATH": f"{fake.parent}:{ROOT}"}))
    refused(case, programs, package.replace("_", "-"), "99.9", "in process 1")


def test_another_command_in_one_process(case):
    refused(case, start(case, [], ["--eval"]), "the command is 'training' in process 0 and 'evaluation' in process 1")


def test_another_platform_in_one_process(case):
    refused(case, start(case, [], [], env=({}, {"JAX_PLATFORMS": "tpu"})), "JAX_PLATFORMS", "cpu", "tpu")


def test_a_work_folder_that_is_not_shared(case):
    programs = start(case, [], [f"--workdir={case.folder / 'another'}"])
    refused(case, programs, "not shared", "another")


def test_what_may_differ(case):
    arguments = ["--config.log_every_seconds=1", "--config.data.dir=elsewhere", "--config.data.workers=1"]
    for ended in end(start(case, [], arguments), 90):
        case.finished(ended)


# ---------------- What fails in one process ----------------


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.batch_size=0"], ("batch_size", "at least 1")),
        (["--config.nonsense=1"], ("no key nonsense",)),
        (["--config=nowhere.py"], ("nowhere.py",)),
        (["--config.mechanism=nonsense"], ("nonsense",)),
        (["--config.data.name=folder", "--config.data.dir=nowhere"], ("nowhere",)),
    ],
)
def test_a_mistake_in_one_process(case, which, arguments, words):
    each = [arguments if index == which else [] for index in (0, 1)]
    first, second = end(start(case, *each), 40)
    case.refused(first, *words, *(["process 1: "] if which == 1 else []))
    case.refused(second, *words, *(["process 0: "] if which == 0 else []))


def test_no_cluster(case):
    case.refused(case.train("--distributed", *TINY), "--distributed", "Slurm", "--coordinator=HOST:PORT")


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_platform_without_its_device(case, platform):
    case.refused(case.train(*TINY, env={"JAX_PLATFORMS": platform}), "no devices with JAX_PLATFORMS=" + platform)


@pytest.mark.parametrize("alone", [0, 1])
def test_the_other_process_never_starts(case, alone):
    (ended,) = end(start(case, [], [], only=[alone]), 110)
    case.refused(ended, f"process {alone} could not join", "127.0.0.1:")


# ---------------- What is killed, and goes on ----------------

_OFTEN = ("--config.checkpoint.every_steps=2", "--config.epochs=3")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The record and the states of a run of two processes that nobody has touched."""
    from tests.faults.harness import Case

    case = Case(tmp_path_factory.mktemp("undisturbed"))
    for ended in end(start(case, _OFTEN, _OFTEN), 120):
        case.finished(ended)
    return case.record(), last_state(case)


def last_state(case):
    """The step of the last checkpoint and its arrays, {name: bytes}, which two processes have written together."""
    folder = max((case.workdir / "checkpoints").glob("[0-9]*"), key=lambda folder: int(folder.name))
    handler, here = ocp.StandardCheckpointHandler(), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        dict(handler.metadata(epath.Path(folder / "state")).tree),
    )
    arrays = handler.restore(epath.Path(folder / "state"), args=ocp.args.StandardRestore(tree))
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return folder.name, {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def goes_on(case, undisturbed):
    for ended in end(start(case, _OFTEN, _OFTEN), 120):
        case.finished(ended)
    record, state = undisturbed
    if case.record() != record:
        case.lost("the record is another one")
    if last_state(case) != state:
        case.lost("the last checkpoint is another one")


@pytest.mark.parametrize("number", range(_KILLS))
def test_one_process_is_killed(case, undisturbed, number):
    """At a moment drawn from its number: within a minute the other ends with a line, and both go on."""
    draw = random.Random(number)
    which, after = number % 2, draw.choice(["join", "compilation", "a step", "a save"])
    programs = start(case, _OFTEN, _OFTEN)
    if after != "join":  # the folder is made when both have joined
        programs[0].wait_for(case.workdir.exists)
    if after in ("a step", "a save"):
        checkpoints = case.workdir / "checkpoints"
        wanted = draw.randrange(1, 9) if after == "a save" else 1
        programs[0].wait_for(lambda: len([*checkpoints.glob("*")]) >= min(wanted, 3))
    time.sleep(draw.uniform(0.0, 2.0))
    programs[which].kill()
    other = end(programs, 70)[1 - which]
    if other.status != 0:  # it had come to its end before
        case.refused(other)
    goes_on(case, undisturbed)


@pytest.mark.parametrize("which", [0, 1])
def test_sigterm_to_one_process_saves_both(case, undisturbed, which):
    programs = start(case, _OFTEN, _OFTEN)
    programs[0].wait_for(lambda: [*(case.workdir / "checkpoints").glob("2")])
    programs[which].kill(signal.SIGTERM)
    statuses = [ended.status for ended in end(programs, 60)]
    if statuses not in ([143, 143], [0, 0]):
        raise Fault("hang" if None in statuses else "lost", f"they ended with {statuses}")
    goes_on(case, undisturbed)


def test_one_process_is_slow(case):
    """Stopped for some seconds in the middle, it is waited for."""
    programs = start(case, [], [])
    programs[0].wait_for(case.workdir.exists)
    programs[1].kill(signal.SIGSTOP)
    time.sleep(8)
    programs[1].kill(signal.SIGCONT)
    for ended in end(programs, 90):
        case.finished(ended)
