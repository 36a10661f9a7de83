import json

import fsspec
import jax
import numpy as np
import pytest

from dpa_jax.compare import compare, parse_entries
from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.folder import folder_of, in_bucket, set_aside
from dpa_jax.training.loop import Preempted, train
from dpa_jax.training.preemption import Preemption
from dpa_jax.training.record import append, read_history
from dpa_jax.training.run import build
from tests.bucket import Bucket
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def bucket():
    """The bucket that ``gs://bucket`` stands for here; gcsfs, which knows one address for good, has one of them."""
    with Bucket() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield bucket


def test_a_run_in_a_bucket_is_that_of_a_local_folder(bucket, tmp_path, monkeypatch):
    config, there, seen = tiny_config(checkpoint__keep=1), folder_of("gs://bucket/runs/one"), {}
    run = build(config, jax.devices()[:1])
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(Preemption, "requested", lambda self, step: step == 8)
        train(run.with_seeds([0]), there, [there])
    # What a killed save leaves: no checkpoint, and taken away by the next start.
    bucket.put("runs/one/checkpoints/9/state/manifest.ocdbt", b"")
    with Checkpoints(there / "checkpoints", keep=1, read_only=True) as checkpoints:
        assert checkpoints.latest_step == 8
    append(there / "metrics.jsonl", b'{"step": 9}\n')
    for folder in (there, tmp_path):
        train(run.with_seeds([0]), folder, [folder])
        seen[folder] = [{k: v for k, v in r.items() if "second" not in k} for r in read_history(folder)]
    assert seen[there] == seen[tmp_path] and [record["step"] for record in seen[there]] == [6, 12]
    assert bucket.objects["runs/one/metrics.discarded.jsonl"][1] == b'{"step": 9}\n'
    states = []
    for folder in (there, tmp_path):
        with Checkpoints(folder / "checkpoints", keep=1, read_only=True) as checkpoints:
            assert (checkpoints.latest_step, checkpoints.best_step) == (12, 12)
            states.append(jax.tree.leaves(checkpoints.restore(run.abstract_state)))
    for ours, theirs in zip(*states, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)
    files = {"config.json", "curves.png", "metrics.jsonl", "metrics.discarded.jsonl", "position.json"}
    names = {name.removeprefix("runs/one/").split("/")[0] for name in bucket.names("runs/one/")}
    assert names == {"checkpoints", "tensorboard", *files}
    assert {name.split("/")[3] for name in bucket.names("runs/one/checkpoints/")} == {"12"}

    # The same run as the only one of a comparison, which trains nothing and writes its report.
    for name in ("metrics.jsonl", "config.json"):
        bucket.put(f"compared/dpa/seed-0/{name}", bucket.objects[f"runs/one/{name}"][1])
    assert compare(config, parse_entries("dpa", config), 1, "gs://bucket/compared")["dpa"][0] == read_history(there)
    names = {name.split("/")[1] for name in bucket.names("compared/")}
    assert names == {"dpa", "results.json", "table.md", "table.csv", "table.png", "curves.png"}
    assert json.loads(bucket.objects["compared/results.json"][1])["results"][0]["mechanism"] == "dpa"


def test_a_damaged_object_is_seen_and_the_checkpoint_set_aside(bucket):
    folder = folder_of("gs://bucket/damaged")
    tree = {"a": jax.ShapeDtypeStruct((3,), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"a": np.full(3, step, np.float32)})
    name = next(name for name in bucket.names("damaged/2/state/ocdbt") if "/d/" in name)
    content = bucket.objects[name][1]
    bucket.put(name, bytes([content[0] ^ 1]) + content[1:])
    with (
        Checkpoints(folder, keep=2) as checkpoints,
        pytest.warns(RuntimeWarning, match="has other contents .* moved to damaged-2"),
    ):
        step, state = checkpoints.restore(tree)
    assert step == 1 and np.asarray(state["a"]).tolist() == [1, 1, 1]
    assert bucket.names("damaged/damaged-2/") and not bucket.names("damaged/2/")


def test_files_in_a_bucket(bucket):
    folder = folder_of("gs://bucket/files")
    assert in_bucket(folder) and not in_bucket(folder_of("files")) and folder_of(folder) == folder
    for _ in range(2):
        append(folder / "a", b"line\n")
    assert bucket.objects["files/a"][1] == b"line\nline\n"
    for aside in ("damaged-a", "damaged-a-2"):
        append(folder / "a", b"x")
        assert set_aside(folder / "a").name == aside
    assert not bucket.names("files/a")
    with pytest.raises(OSError, match="gs://elsewhere/a could not be written: "):
        append(folder_of("gs://elsewhere") / "a", b"x")


def test_a_folder_of_no_file_system_is_one_line(monkeypatch):
    with pytest.raises(ValueError, match=r"^nonsense://a cannot be a run's folder: "):
        folder_of("nonsense://a")

    def absent(name):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(ValueError, match=r"install gcsfs \(pip install 'dpa_jax\[gcs\]'\)$"):
        folder_of("gs://bucket/run")
