"""The script that packs a campaign for a bare machine: what it packs starts there without a network."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*command, **environment):
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def pack(*arguments):
    return run(sys.executable, "tools/pack.py", *arguments)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with the pieces of the papers' campaign and a little data, for a machine that has every package."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "data").mkdir()
    (folder / "data" / "noise").write_bytes(os.urandom(2 * 2**20))
    ended = pack("papers", "--have=all", "--data", folder / "data", "--to", folder / "pack", "--piece_mib=1")
    assert ended.returncode == 0, ended.stderr
    return folder


def test_a_dry_run_packs_nothing(tmp_path):
    ended = pack("papers", "--have=all", "--data", ROOT / "configs", "--to", tmp_path / "pack", "--dry_run")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "wheels: dpa_jax-" in ended.stdout and "nothing is packed" in ended.stdout
    assert not (tmp_path / "pack").exists()


def test_what_is_packed_starts_in_one_command(packed, tmp_path):
    names = sorted(path.name for path in (packed / "pack").iterdir())
    assert names == ["SHA256SUMS", "piece.000", "piece.001", "piece.002", "start.sh"]
    assert max(path.stat().st_size for path in (packed / "pack").iterdir()) <= 2**20
    there = tmp_path / "there"
    there.mkdir()
    for name in names:
        (there / name).write_bytes((packed / "pack" / name).read_bytes())
    for again in range(2):
        ended = run("bash", there / "start.sh", 1, tmp_path / "out", "--dry_run", PYTHON=sys.executable, PYTHONPATH="")
        assert ended.returncode == 0, (again, ended.stderr)
        assert "CIFAR-100, ViT-Tiny: relu, dpa, dnrt, aiec, gelu; 1 seeds of 300 epochs" in ended.stdout
    assert (there / "packages" / "dpa_jax").is_dir() and (there / "data" / "noise").is_file()


def test_missing_pieces_are_named(packed, tmp_path):
    for name in ("SHA256SUMS", "piece.000", "piece.002", "start.sh"):
        (tmp_path / name).write_bytes((packed / "pack" / name).read_bytes())
    ended = run("bash", tmp_path / "start.sh", 1, tmp_path / "out", PYTHON=sys.executable)
    assert ended.returncode == 1
    assert "piece.001" in ended.stderr and "error: pieces are missing or damaged" in ended.stderr


def test_mistakes_are_told_in_one_line(tmp_path):
    ended = pack("papers", "--have=all", "--data", tmp_path / "nowhere", "--to", tmp_path / "pack")
    assert (ended.returncode, ended.stderr) == (1, f"error: --data: there is no {tmp_path / 'nowhere'}\n")
