import os
import signal
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.preemption import Preemption


def test_sigterm_is_noticed_between_steps_and_the_handler_given_back():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("outside"))
    try:
        with Preemption() as preemption:
            assert not preemption.requested(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.requested(2)
            assert preemption.requested(3)
            assert seen == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["outside"]
        with Preemption() as again:
            assert not again.requested(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_is_noticed_as_sigterm_is_and_a_second_one_stops_at_once():
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested(1) and preemption.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat it
        assert preemption.signal == signal.SIGTERM


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not preemption.requested(1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_installs_nothing():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work():
        with Preemption() as preemption:
            inside.append((signal.getsignal(signal.SIGTERM), preemption.requested(1)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [(before, False)]


PROCESS = """
import os, signal, sys, time
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

index, address, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, 2, index)
from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.preemption import Preemption

rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
one = jax.make_array_from_process_local_data(rows, np.ones((4, 3), np.float32))
step = 0
add = jax.jit(lambda total, step: total + step, donate_argnums=0)
total = jax.jit(lambda x: x * 0)(one)
with Checkpoints(directory, keep=2) as checkpoints, Preemption() as preemption:
    while not preemption.requested(step):
        step += 1
        total = add(total, step)
        total.block_until_ready()
        if step == 3 and index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert step < 1000
    checkpoints.save(step, {"total": total})
    wanted = jax.ShapeDtypeStruct(total.shape, total.dtype, sharding=rows)
    found, state = checkpoints.restore({"total": wanted})
    assert found == step and state["total"].sharding == rows
print(f"stopped after {step}", flush=True)
jax.distributed.shutdown()
"""


def test_two_processes_stop_after_the_same_step_and_save_one_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [[sys.executable, "-c", PROCESS, str(index), address, str(tmp_path)] for index in (0, 1)]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    (step,) = {int(output.split("stopped after ")[1].split()[0]) for output in outputs}
    assert step >= 3  # never before the signal
    # Two processes with two devices each have written what one process with one device reads.
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        found, state = checkpoints.restore({"total": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=sharding)})
    assert found == step
    np.testing.assert_array_equal(np.asarray(state["total"]), np.full((8, 3), step * (step + 1) / 2))
