import os
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import pytest
from jax._src import distributed

from dpa_jax.training import hosts, run
from tests.faults.harness import TINY, environment
from tests.helpers import free_port, tiny_config


def test_jax_keeps_its_client_where_it_is_looked_for():
    # Private to JAX: where this fails, `hosts.runtime` needs the new place.
    state = distributed.global_state
    assert (state.client, state.process_id, state.num_processes) == (None, 0, 1)
    for name in ("key_value_set", "blocking_key_value_get"):
        assert callable(getattr(distributed._jax.DistributedRuntimeClient, name))


def test_one_process_agrees_with_itself_at_once(tmp_path):
    hosts.agree({"seed": 1}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_named_with_both_values_and_the_process():
    first = {"config.seed": 1, "config.epochs": 2}
    assert hosts._difference(first, {1: dict(first), 2: dict(first)}) == ""
    said = hosts._difference(first, {1: dict(first), 2: first | {"config.seed": 7}, 3: first | {"config.seed": 8}})
    assert said == "the processes of the run differ: config.seed is 1 in process 0 and 7 in process 2 and 1 more"


def test_facts_hold_what_changes_figures_and_when_to_save():
    config = tiny_config()
    facts = hosts.facts_of(config, run.build(config).spec, "training")
    assert facts["config.optimizer.learning_rate"] == 0.01
    assert facts["config.model_options.depth"] == 1
    assert facts["the number of training examples"] == 48
    assert {"config.checkpoint.every_steps", "config.checkpoint.keep"} <= set(facts)
    assert not {"config.data.dir", "config.log_every_seconds", "config.data.workers"} & set(facts)


def test_a_folder_that_is_not_shared_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "FOLDER_SECONDS", 0.2)
    (tmp_path / ".hosts-a").write_text("a")
    assert hosts._seen(tmp_path, "a") == "the same"
    assert str(tmp_path) in hosts._seen(tmp_path, "b")


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize\nmore"), AssertionError()])
def test_a_platform_without_devices_is_one_line(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ValueError, match=r"^no devices with JAX_PLATFORMS=cpu: .+$"):
        run.build(tiny_config())


def test_the_line_without_a_cluster_and_with_a_wrong_address():
    why = hosts.Hosts()._why_not_joined(ValueError("coordinator_address should be defined."))
    assert "Slurm" in why and "--coordinator=HOST:PORT --num_processes=N --process_id=I" in why
    for address in ("here", "here:0", "here:70000"):
        with pytest.raises(SystemExit, match=f"HOST:PORT; got '{address}'"):
            hosts.Hosts(address).__enter__()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(SystemExit, match=r"process 0 can't listen at --coordinator=localhost:.*Address already"):
            hosts.Hosts(f"localhost:{taken.getsockname()[1]}", 2, 0).__enter__()


def test_a_process_that_does_not_answer_is_found(monkeypatch):
    def get(key, milliseconds):
        if key != "told/1":
            raise RuntimeError("DEADLINE_EXCEEDED")
        return ""

    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 0.1)
    client = types.SimpleNamespace(blocking_key_value_get=get)
    assert hosts.Runtime(client, 0, 4).silent("told", lost=[3]) == [3, 2]


# ---------------- Two processes ----------------


def start(folder, *each, wait=True):
    """Trains in two processes, each with its own arguments; [(exit status, last line of standard error)]."""
    by_hand = ["--distributed", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    command = [sys.executable, "-m", "dpa_jax.train", *TINY, "--workdir=run", *by_hand]
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={index}", *arguments],
            cwd=folder,
            env=os.environ | environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, arguments in enumerate(each)
    ]
    return ended(processes) if wait else processes


def ended(processes):
    outputs = [process.communicate(timeout=100) for process in processes]
    assert not any("Traceback" in text for output in outputs for text in output), outputs
    return [(p.returncode, (err.splitlines() or [""])[-1]) for p, (_, err) in zip(processes, outputs, strict=True)]


def test_two_processes_are_started_by_hand_and_a_difference_ends_both(tmp_path):
    both = start(tmp_path, [], ["--config.optimizer.learning_rate=0.5"])
    line = "config.optimizer.learning_rate is 0.003 in process 0 and 0.5 in process 1"
    assert both == [(1, f"error: the processes of the run differ: {line}")] * 2
    assert list((tmp_path / "run").iterdir()) == []


def test_the_others_are_told_of_a_mistake_in_one_process(tmp_path):
    first, second = start(tmp_path, [], ["--config.batch_size=0"])
    assert first == (1, "error: process 1: config: batch_size must be at least 1; got 0")
    assert second == (1, "error: config: batch_size must be at least 1; got 0")


def test_a_killed_process_ends_the_other_and_both_go_on(tmp_path):
    processes = start(tmp_path, *[["--config.epochs=500", "--config.checkpoint.every_steps=1"]] * 2, wait=False)
    while not list(tmp_path.glob("run/checkpoints/[0-9]")):
        assert processes[0].poll() is None, ended(processes)
        time.sleep(0.01)
    processes[0].kill()
    since = time.monotonic()
    (killed, _), (status, line) = ended(processes)
    assert (killed, status) == (-signal.SIGKILL, 1) and time.monotonic() - since < 60
    assert line.startswith("error: ") and line.endswith("start all processes again to go on")
    again = ["--config.epochs=1", "--config.allow_change=epochs"]
    assert [status for status, _ in start(tmp_path, again, again)] == [0, 0]
