import json
import signal
import subprocess
import sys
import warnings

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpa_jax.training import checkpoint
from dpa_jax.training.checkpoint import Checkpoints, DamagedCheckpointError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    memory: dict
    optimizer: tuple
    key: jax.Array


def make_state(seed=0, classes=5):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "body": {"kernel": jax.random.normal(keys[0], (32, 48)), "bias": jnp.zeros(48)},
        "head": {"kernel": jax.random.normal(keys[1], (48, classes), jnp.bfloat16)},
    }
    return State(
        step=jnp.int32(seed),
        params=params,
        memory={"mean": jax.random.normal(keys[2], (classes, 48))},
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
        key=jax.random.key_data(keys[0]),
    )


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_equal(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for (path, got), want in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype, path
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want), err_msg=jax.tree_util.keystr(path))


def save_all(directory, steps, *, keep=10, metrics=None):
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), (metrics or {}).get(step))


def test_nothing_saved_restores_nothing(tmp_path):
    with Checkpoints(tmp_path / "none", keep=1) as checkpoints:
        assert checkpoints.restore(abstract(make_state())) is None
        assert checkpoints.latest_step is None
        assert checkpoints.best_step is None


def test_what_is_saved_is_restored_bit_for_bit(tmp_path):
    state = make_state(3)
    save_all(tmp_path, [1, 3])
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        step, restored = checkpoints.restore(abstract(state))
        assert step == 3
        assert_equal(restored, state)
        step, older = checkpoints.restore(abstract(state), step=1)
        assert step == 1
        assert_equal(older, make_state(1))


def test_saves_by_one_device_restore_onto_eight_and_back(tmp_path):
    state = {"memory": jnp.arange(16 * 24, dtype=jnp.float32).reshape(16, 24), "step": jnp.int32(1)}
    eight = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, state)
        wanted = abstract(state, eight) | {"memory": abstract(state["memory"], rows)}
        _, spread = checkpoints.restore(wanted)
        assert spread["memory"].sharding == rows
        assert spread["step"].sharding == eight
        assert_equal(spread, state)
        checkpoints.save(2, spread | {"step": spread["step"] + 1})
        step, back = checkpoints.restore(abstract(state))
        assert step == back.pop("step") == 2
        state.pop("step")
        assert back["memory"].devices() == {jax.devices()[0]}
        assert_equal(back, state)


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    scale = jax.jit(lambda x: x * 0.5 + 1, donate_argnums=0)
    arrays = [jax.random.normal(jax.random.key(i), (512, 1024)) for i in range(4)]
    expected = [np.array(x) for x in arrays]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"arrays": arrays})
        arrays = [scale(x) for x in arrays]
        arrays = [scale(x) for x in arrays]
        _, restored = checkpoints.restore({"arrays": abstract(arrays)})
    for got, want in zip(restored["arrays"], expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got), want)


def test_keeps_the_last_and_the_best(tmp_path):
    top1 = {10: 0.2, 20: 0.9, 30: 0.5, 40: float("nan"), 50: 0.6}
    save_all(tmp_path, top1, keep=2, metrics={step: {"eval_top1": value} for step, value in top1.items()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "40", "50"]
    with Checkpoints(tmp_path, keep=2) as checkpoints:  # a later run still knows the best of the earlier one
        assert (checkpoints.best_step, checkpoints.latest_step) == (20, 50)
        checkpoints.save(60, make_state(60))
        checkpoints.save(70, make_state(70), {"eval_top1": 0.9})
        checkpoints.wait()
        assert checkpoints.best_step == 70  # of equals, the newest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["60", "70"]


def test_saving_a_step_again_adds_metrics_and_nothing_else(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.save(1, make_state(2))
        assert checkpoints.best_step is None
        assert_equal(checkpoints.restore(abstract(make_state()))[1], make_state(1))
        checkpoints.save(1, make_state(1), {"eval_top1": 0.5})
        checkpoints.wait()
        assert checkpoints.best_step == 1
        checkpoints.save(1, make_state(2), {"eval_top1": 0.7})
        assert_equal(checkpoints.restore(abstract(make_state()))[1], make_state(1))


def garble(path, how):
    data = path.read_bytes()
    middle = len(data) // 2
    if how == "gone":
        path.unlink()
    elif how == "half":
        path.write_bytes(data[:middle])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        block = bytes(byte ^ 0x5A for byte in data[middle : middle + 16])
        path.write_bytes(data[:middle] + block + data[middle + 16 :])


# Orbax's own notes beside the arrays: times and class names. The run doesn't depend on them.
HARMLESS = {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.mark.parametrize("how", ["gone", "half", "empty", "flipped"])
def test_damage_to_any_file_is_noticed_and_the_one_before_is_used(tmp_path, how):
    metrics = {step: {"eval_top1": step / 10} for step in (1, 2)}
    save_all(tmp_path / "whole", [1, 2], metrics=metrics)
    newest = tmp_path / "whole" / "2"
    names = [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file()]
    assert len(names) > 10
    for number, name in enumerate(names):
        directory = tmp_path / str(number)
        subprocess.run(["cp", "-r", tmp_path / "whole", directory], check=True)
        garble(directory / "2" / name, how)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with Checkpoints(directory, keep=2) as checkpoints:
                step, state = checkpoints.restore(abstract(make_state()))
        assert_equal(state, make_state(step))
        if str(name) in HARMLESS:
            assert (step, len(caught)) == (2, 0), name
            continue
        assert step == 1, name
        assert len(caught) == 1, name
        assert str(directory / "2") in str(caught[0].message)
        assert name.name in str(caught[0].message) or name.name == "digest.json"
        assert sorted(path.name for path in directory.iterdir()) == ["1", "damaged-2"]


def test_a_run_goes_on_after_damage_and_keeps_every_damaged_folder(tmp_path):
    save_all(tmp_path, [1, 2])
    for expected in ("damaged-2", "damaged-2-2"):
        garble(next((tmp_path / "2" / "state" / "d").iterdir()), "half")
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            with pytest.warns(RuntimeWarning, match=f"bytes instead of .* moved to {expected}$"):
                step, _ = checkpoints.restore(abstract(make_state()))
            assert step == 1
            checkpoints.save(2, make_state(2))
            checkpoints.wait()
            assert checkpoints.latest_step == 2
            assert_equal(checkpoints.restore(abstract(make_state()))[1], make_state(2))
        assert (tmp_path / expected / "digest.json").exists()


def test_damaged_checkpoints_alone_are_an_error_now_and_next_time(tmp_path):
    save_all(tmp_path, [1, 2])
    for step in "12":
        garble(tmp_path / step / "state" / "manifest.ocdbt", "empty")
    with Checkpoints(tmp_path, keep=2) as checkpoints, pytest.warns(RuntimeWarning) as caught:
        with pytest.raises(DamagedCheckpointError, match=r"\[1, 2\].*remove these folders"):
            checkpoints.restore(abstract(make_state()))
        assert len(caught) == 2
    with (
        Checkpoints(tmp_path, keep=2) as checkpoints,
        pytest.raises(DamagedCheckpointError, match="damaged-1"),
    ):
        checkpoints.restore(abstract(make_state()))


def test_another_model_is_an_error_that_names_the_leaf_and_moves_nothing(tmp_path):
    save_all(tmp_path, [4])
    wide = make_state(4, classes=7)
    narrow = make_state(4)
    halved = narrow.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), narrow.params))
    cases = [
        (wide, r"params/head/kernel is bfloat16\[48, 5\] there and bfloat16\[48, 7\] here"),
        (halved, r"params/body/bias is float32\[48\] there and bfloat16\[48\] here"),
        (narrow.replace(memory={}), r"memory/mean is float32\[5, 48\] there and absent here"),
        (
            narrow.replace(memory={**narrow.memory, "step": narrow.step}),
            r"memory/step is absent there and int32\[\]",
        ),
    ]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for state, message in cases:
            with pytest.raises(ValueError, match=message):
                checkpoints.restore(abstract(state))
        assert_equal(checkpoints.restore(abstract(narrow))[1], narrow)
    assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"keep must be at least 1.*got 0"):
        Checkpoints(tmp_path, keep=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)})
        with pytest.raises(ValueError, match="abstract_state: x needs a sharding"):
            checkpoints.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .* there are \[1\]"):
            checkpoints.restore(abstract({"x": jnp.zeros(3)}), step=5)


def test_read_only_touches_nothing(tmp_path):
    save_all(tmp_path, [1, 2], metrics={1: {"eval_top1": 0.8}, 2: {"eval_top1": 0.4}})
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # a training that runs is saving
    garble(tmp_path / "2" / "metrics" / "metrics", "half")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with Checkpoints(tmp_path, keep=1, read_only=True) as checkpoints:
        with pytest.warns(RuntimeWarning, match="left where it is"):
            assert checkpoints.best_step == 1
        step, state = checkpoints.restore(abstract(make_state()))
        assert step == 1
        assert_equal(state, make_state(1))
        with pytest.raises(RuntimeError, match="read-only"):
            checkpoints.save(4, make_state(4))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    with Checkpoints(tmp_path / "absent", keep=1, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(make_state())) is None
    assert not (tmp_path / "absent").exists()


def test_a_save_that_fails_is_reported_and_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    save_all(tmp_path, [1])

    def full(path):
        raise OSError("No space left on device")

    checkpoints = Checkpoints(tmp_path, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_fingerprint", full)
        checkpoints.save(2, make_state(2))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    with Checkpoints(tmp_path, keep=2) as again:
        step, state = again.restore(abstract(make_state()))
    assert step == 1
    assert_equal(state, make_state(1))


KILLED = """
import os, signal, sys
import jax, jax.numpy as jnp
from dpa_jax.training import checkpoint

directory, moment = sys.argv[1:]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
state = lambda step: {"memory": jnp.full((256, 512), step, jnp.float32), "step": jnp.int32(step)}
checkpoints = checkpoint.Checkpoints(directory, keep=1)
checkpoints.save(1, state(1), {"eval_top1": 0.1})
checkpoints.wait()
checkpoints.save(2, state(2), {"eval_top1": 0.2})
checkpoints.wait()
if moment == "before the digest":
    checkpoint._fingerprint = die
elif moment == "before the commit":
    write = checkpoints._before_commit
    checkpoints._manager._checkpointer._post_finalization_callback = lambda: (write(), die())
elif moment == "while the old one is deleted":
    checkpoint.shutil.rmtree = die
checkpoints.save(3, state(3), {"eval_top1": 0.3})
if moment == "while it is written":
    die()
checkpoints.wait()
if moment == "after the commit":
    die()
checkpoints.save(4, state(4))
checkpoints.wait()
"""


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    moments = {
        "while it is written": {2, 3},
        "before the digest": {2},
        "before the commit": {2},
        "after the commit": {3},
        "while the old one is deleted": {2},
    }
    running = {
        moment: subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / moment), moment]) for moment in moments
    }
    wanted = abstract({"memory": jnp.zeros((256, 512)), "step": jnp.int32(0)})
    for moment, steps in moments.items():
        assert running[moment].wait() == -signal.SIGKILL, moment
        with Checkpoints(tmp_path / moment, keep=1) as checkpoints:
            step, state = checkpoints.restore(wanted)
            assert step in steps, moment
            np.testing.assert_array_equal(np.asarray(state["memory"]), np.full((256, 512), step))
            assert checkpoints.best_step == step
            checkpoints.save(9, state, {"eval_top1": 0.9})
        assert [path.name for path in (tmp_path / moment).iterdir()] == ["9"], moment


def test_the_digest_names_every_file_of_the_arrays_and_the_metrics(tmp_path):
    save_all(tmp_path, [1], metrics={1: {"eval_top1": 0.25, "eval_loss": 1.5}})
    digest = json.loads((tmp_path / "1" / "digest.json").read_text())
    files = {str(p.relative_to(tmp_path / "1")) for p in (tmp_path / "1").rglob("*") if p.is_file()}
    assert files == set(digest) | HARMLESS | {"digest.json"}
    assert json.loads((tmp_path / "1" / "metrics" / "metrics").read_text()) == {
        "eval_top1": 0.25,
        "eval_loss": 1.5,
    }


# ---------------- What is no checkpoint ----------------


def first_file_left_out(digest):
    return dict(list(digest.items())[1:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda digest: {}, "digest.json does not name"),
        (lambda digest: [], "digest.json is unreadable"),
        (first_file_left_out, "digest.json does not name"),
        (
            lambda digest: digest | {"../1/metrics/metrics": digest["metrics/metrics"]},
            "../1/metrics/metrics is missing",
        ),
        (lambda digest: digest | {"/etc/hosts": [1, "0"]}, "/etc/hosts is missing"),
        (lambda digest: digest | {"metrics": [1, "0"]}, "metrics is missing"),
        (lambda digest: dict.fromkeys(digest, 3), "digest.json is unreadable"),
        (None, "digest.json is unreadable"),
    ],
    ids=["empty", "list", "a file left out", "outside", "absolute", "a folder", "numbers", "nested"],
)
def test_a_digest_that_is_none(tmp_path, change, reason):
    save_all(tmp_path, [1, 2], metrics={step: {"eval_top1": 0.5} for step in (1, 2)})
    path = tmp_path / "2" / "digest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))) if change else "[" * 100_000)
    for read_only in (True, False):
        with (
            pytest.warns(RuntimeWarning) as caught,
            Checkpoints(tmp_path, keep=2, read_only=read_only) as checkpoints,
        ):
            step, state = checkpoints.restore(abstract(make_state()))
        assert step == 1
        assert_equal(state, make_state(1))
        (warning,) = caught
        assert reason in str(warning.message) and str(warning.message).count("\n") == 0


def test_a_state_of_another_step_is_no_checkpoint(tmp_path):
    save_all(tmp_path, [1, 2])
    (tmp_path / "2").rename(tmp_path / "30")
    with (
        pytest.warns(RuntimeWarning, match="checkpoint .*/30 is damaged: the state in it is that of step 2; moved to"),
        Checkpoints(tmp_path, keep=2) as checkpoints,
    ):
        step, state = checkpoints.restore(abstract(make_state()))
    assert step == 1
    assert_equal(state, make_state(1))


@pytest.mark.parametrize("name", ["030", "\u0663\u0660", "\u00b3", "step_30"])
def test_a_name_in_other_digits_is_no_step(tmp_path, name):
    save_all(tmp_path, [1])
    subprocess.run(["cp", "-r", tmp_path / "1", tmp_path / name], check=True)
    with (
        pytest.warns(RuntimeWarning, match=f"{name} is damaged: it is named as no step is; it is left"),
        Checkpoints(tmp_path, keep=2, read_only=True) as checkpoints,
    ):
        assert (checkpoints.latest_step, checkpoints.best_step) == (1, None)
        checkpoints.restore(abstract(make_state()))
    with pytest.warns(RuntimeWarning, match=f"named as no step is; moved to damaged-{name}$"):
        save_all(tmp_path, [2])
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", f"damaged-{name}"}


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_step_that_is_no_folder_is_no_checkpoint(tmp_path, kind):
    save_all(tmp_path, [1])
    if kind == "file":
        (tmp_path / "2").write_text("")
    else:
        (tmp_path / "2").symlink_to("1")
    with (
        pytest.warns(RuntimeWarning, match=f"/2 is damaged: it is a {kind}; moved to damaged-2$"),
        Checkpoints(tmp_path, keep=2) as checkpoints,
    ):
        assert checkpoints.restore(abstract(make_state()))[0] == 1
    assert (tmp_path / "1" / "digest.json").exists()


def test_checkpoints_that_are_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    for read_only in (True, False):
        with pytest.raises(NotADirectoryError, match="checkpoints must be a folder and is a file"):
            Checkpoints(tmp_path / "checkpoints", keep=1, read_only=read_only)


def test_the_best_whose_metrics_are_damaged_is_warned_of(tmp_path):
    save_all(tmp_path, [1, 2], metrics={1: {"eval_top1": 0.8}, 2: {"eval_top1": 0.4}})
    garble(tmp_path / "1" / "metrics" / "metrics", "flipped")
    with (
        pytest.warns(RuntimeWarning, match="/1 is damaged: metrics/metrics has other contents"),
        Checkpoints(tmp_path, keep=1, read_only=True) as checkpoints,
    ):
        assert checkpoints.best_step == 2


FULL = """
import resource, sys
import jax.numpy as jnp
from dpa_jax.training.checkpoint import Checkpoints

with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
    checkpoints.save(2, {f"memory {i}": jnp.arange(5000.0) + i for i in range(20)})
    try:
        checkpoints.wait()
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error)
"""


def test_a_disk_that_is_full_is_told_of_in_one_line_without_tracebacks(tmp_path):
    save_all(tmp_path, [1])
    ended = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(
        f"the checkpoint of step 2 could not be written to {tmp_path}: File too large. Those"
    )
    assert ended.stdout.count("\n") == 1
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(make_state()))[0] == 1
