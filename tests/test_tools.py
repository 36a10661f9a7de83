import os
import pathlib
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SLICE = {"POD": "pod", "ZONE": "us-west4-a", "ACCELERATOR": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite"}
SLICE["WORKDIR"] = "gs://bucket/run"

# Writes down how it was called; asked for its state, the slice is there at the second time.
STUB = r"""#!/bin/bash
{ printf '%q ' "${0##*/}" "$@"; echo; } >>"$CALLS"
if [[ $* == *describe* ]]; then grep -c describe "$CALLS" | sed 's/^1$/WAITING_FOR_RESOURCES/; s/^2$/ACTIVE/'; fi
"""


@pytest.fixture
def tool(tmp_path):
    """tool(name, *arguments, **environment) -> what it prints and the commands it has called."""
    for name in ("gcloud", "git", "mkdir", "rm", "sleep", "srun"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"

    def call(name, *arguments, status=0, **environment):
        calls.write_text("")
        env = os.environ | SLICE | environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
        command = ["bash", ROOT / "tools" / name, *arguments]
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=20)
        assert ended.returncode == status, ended
        return ended.stdout + ended.stderr, [shlex.split(line) for line in calls.read_text().splitlines()]

    return call


GCLOUD = ["gcloud", "compute", "tpus"]
QUEUE = [*GCLOUD, "queued-resources"]
SSH = [*GCLOUD, "tpu-vm", "ssh", "pod", "--zone=us-west4-a"]
DELETE = [*QUEUE, "delete", "pod", "--zone=us-west4-a", "--force", "--quiet"]
DESCRIBE = [*QUEUE, "describe", "pod", "--zone=us-west4-a", "--format=value(state.state)"]
CREATE = [*QUEUE, "create", "pod", "--zone=us-west4-a", "--node-id=pod"]
CREATE += ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
INSTALL = [
    ["git", "archive", "--format=tar.gz", "--output=dpa_jax.tar.gz", "HEAD"],
    [*GCLOUD, "tpu-vm", "scp", "dpa_jax.tar.gz", "pod:", "--zone=us-west4-a", "--worker=all"],
    ["rm", "dpa_jax.tar.gz"],
    [
        *[*SSH, "--worker=all"],
        "--command=mkdir -p dpa_jax && tar -xzf dpa_jax.tar.gz -C dpa_jax && cd dpa_jax && python3 -m pip install "
        "--user --quiet uv && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 && "
        "~/.local/bin/uv pip install --quiet --editable '.[train,tpu,gcs]'",
    ],
]
TRAINING = ["--config", "cifar100_vit", "--config.data.dir=a folder"]
START = (
    r"--command=cd dpa_jax && { nohup .venv/bin/python train.py --distributed --workdir=gs://bucket/run --config "
    r"cifar100_vit --config.data.dir=a\ folder >run.log 2>&1 </dev/null & echo $! >run.pid; }"
)
COMMANDS = {
    "create": (["--spot"], [CREATE, DESCRIBE]),
    "install": ([], INSTALL),
    "run": (["ls", "data"], [[*SSH, "--worker=all", "--command=cd dpa_jax && ls data"]]),
    "start": (TRAINING, [[*SSH, "--worker=all", START]]),
    "log": ([], [[*SSH, "--worker=0", "--command=tail -n 100 -F dpa_jax/run.log"]]),
    "stop": ([], [[*SSH, "--worker=0", "--command=kill -TERM $(cat dpa_jax/run.pid)"]]),
    "resume": (["--spot"], [DELETE, CREATE, DESCRIBE, *INSTALL]),
    "fetch": (
        [],
        [["mkdir", "-p", "runs/run"], ["gcloud", "storage", "rsync", "--recursive", "gs://bucket/run", "runs/run"]],
    ),
    "delete": ([], [DELETE]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_pods_commands_and_what_their_dry_run_prints(tool, command):
    arguments, wanted = COMMANDS[command]
    printed, called = tool("tpu_pod.sh", "--dry_run", command, *arguments)
    assert called == []
    assert [shlex.split(line, comments=True) for line in printed.splitlines()] == wanted
    said, called = tool("tpu_pod.sh", command, *arguments)
    if DESCRIBE in wanted:  # it waits
        at = wanted.index(DESCRIBE)
        wanted = [*wanted[: at + 1], ["sleep", "30"], *wanted[at:]]
        assert said == "pod is WAITING_FOR_RESOURCES\n"
    assert called == wanted


def test_what_the_environment_lacks_is_named(tool):
    assert "POD: must be the name of the slice" in tool("tpu_pod.sh", "log", POD="", status=1)[0]
    assert "WORKDIR: must be the folder of the run" in tool("tpu_pod.sh", "start", WORKDIR="", status=1)[0]
    assert "there is no command nonsense" in tool("tpu_pod.sh", "nonsense", status=1)[0]
    listed = [line.split()[0] for line in tool("tpu_pod.sh", POD="")[0].splitlines() if line.startswith("  ")]
    assert set(COMMANDS) < set(listed)


def test_slurm_starts_one_process_for_each_gpu(tool):
    printed, called = tool("slurm.sh", "--dry_run", *TRAINING, PYTHON="python3")
    assert called == []
    wanted = ["srun", "--kill-on-bad-exit=0", "python3", "train.py", "--distributed", *TRAINING]
    assert shlex.split(printed) == wanted
    assert tool("slurm.sh", *TRAINING, PYTHON="python3") == ("", [wanted])
    flags = dict(
        line[8:].split("=")
        for line in (ROOT / "tools/slurm.sh").read_text().splitlines()
        if "#SBATCH --" in line and "=" in line
    )
    assert flags["--ntasks-per-node"] == flags["--gpus-per-node"] and flags["--signal"] == "TERM@300"
