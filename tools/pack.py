"""Packs a campaign for a bare machine without a network, in pieces, with one command that starts it there.

    python tools/pack.py papers --data DIR --to PACK [--bundle DIR] [--python python3.12] [--have ...] [--dry_run]

PACK gets pieces of an archive (the project's wheel, the wheels that the machine lacks, the data, the campaign's file
and the bundle to go on from), SHA256SUMS and start.sh. Copy them into one folder there, and::

    bash start.sh MINUTES OUT

OUT then has the bundle to carry back. The machine needs Linux on x86-64, Python of that version with pip, and what
``--have`` names with all that it requires; nothing is installed outside of the folder.
"""

import argparse
import hashlib
import io
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
_PLATFORMS = ["manylinux2014", "manylinux_2_17", "manylinux_2_24", "manylinux_2_26", "manylinux_2_27", "manylinux_2_28"]
TARGET = ["--only-binary=:all:", *(f"--platform={name}_x86_64" for name in _PLATFORMS)]

START = """#!/usr/bin/env bash
# Goes on with the campaign that was packed at commit @COMMIT@: bash start.sh MINUTES OUT [more for dpa_jax.campaign]
# OUT is the bundle's folder. PYTHON names the interpreter, python3 where it is not set.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 2 ] || { echo "usage: bash start.sh MINUTES OUT [more for dpa_jax.campaign]" >&2; exit 1; }
minutes=$1 out=$2
shift 2
python=${PYTHON:-python3}
if [ ! -e "$here/unpacked" ]; then
    (cd "$here" && sha256sum --check --quiet SHA256SUMS) ||
        { echo "error: pieces are missing or damaged, see above; copy them to $here" >&2; exit 1; }
    unpack="import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode='r|*').extractall(sys.argv[1], filter='data')"
    cat "$here"/piece.* | "$python" -c "$unpack" "$here"
    if [ -e "$here/data.tar.xz" ]; then "$python" -c "$unpack" "$here" < "$here/data.tar.xz"; rm "$here/data.tar.xz"; fi
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$here/packages" \\
        "$here"/wheels/*.whl
    touch "$here/unpacked"
fi
mkdir -p "$out"
if [ -d "$here/bundle" ] && [ ! -e "$out/campaign.json" ]; then cp "$here"/bundle/* "$out"; fi
# What is compiled stays for the next call, as long as the machine does.
export JAX_COMPILATION_CACHE_DIR="$here/compiled" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=1
export PYTHONPATH="$here/packages${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m dpa_jax.campaign "$here/campaign.toml" --minutes "$minutes" --out "$out" @DATA@ "$@"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", help="a campaign's file, or the name of one in configs/campaigns")
    parser.add_argument("--to", type=pathlib.Path, required=True, help="the folder for the pieces, which must be new")
    parser.add_argument("--data", type=pathlib.Path, help="config.data.dir: a folder, which travels whole")
    parser.add_argument("--bundle", type=pathlib.Path, help="the bundle that an earlier call left")
    python = "an interpreter of the machine's version, with pip, that chooses the wheels (default: this one)"
    parser.add_argument("--python", default=sys.executable, help=python)
    have = "packages that the machine has, with what they require; '' for none, all for all (default: %(default)s)"
    parser.add_argument("--have", default="jax==0.11.2 flax", help=have)
    parser.add_argument("--piece_mib", type=int, default=60, help="a piece's size at most (default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="tell what would be packed, and end")
    options = parser.parse_args()
    try:
        pack(options)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


def pack(options: argparse.Namespace) -> None:
    campaign = pathlib.Path(options.campaign)
    if not campaign.is_file():
        campaign = ROOT / "configs" / "campaigns" / f"{options.campaign}.toml"
    named = {"the campaign": campaign, "--data": options.data, "--bundle": options.bundle}
    for name, path in named.items():
        if path is not None and not path.exists():
            raise ValueError(f"{name}: there is no {path}")
    if options.to.exists():
        raise ValueError(f"--to: {options.to} is there already; choose a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        wheels, data = pathlib.Path(temporary) / "wheels", pathlib.Path(temporary) / "data.tar.xz"
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (wheel,) = wheels.glob("*.whl")
        lacking = [] if options.have == "all" else missing(wheel, options.have.split(), options.python)
        print(f"wheels: {wheel.name}" + "".join(f", {name}" for name in lacking))
        for name in ("data", "bundle"):
            if (path := getattr(options, name)) is not None:
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                print(f"{name}: {path}, {size / 2**20:.1f} MiB")
        if options.dry_run:
            print(f"nothing is packed; without --dry_run: to {options.to}, at most {options.piece_mib} MiB a piece")
            return
        if lacking:
            pip(options.python, "download", "-qq", "--no-deps", "-d", str(wheels), *TARGET, *lacking)
        if options.data is not None:
            with tarfile.open(data, "w:xz", preset=1) as archive:
                archive.add(options.data, "data")
        content = {"campaign.toml": campaign, "wheels": wheels, "bundle": options.bundle}
        content["data.tar.xz"] = options.data and data
        write(options.to, content, options.piece_mib * 2**20)
    flag = "" if options.data is None else '--config.data.dir="$here/data"'
    (options.to / "start.sh").write_text(START.replace("@COMMIT@", commit()).replace("@DATA@", flag))
    for file in sorted(options.to.iterdir()):
        print(f"{file.stat().st_size / 2**20:8.1f} MiB  {file}")


def missing(wheel: pathlib.Path, have: list[str], python: str) -> list[str]:
    """What the wheel requires with its extra ``train``, as NAME==VERSION, without what ``have`` brings."""
    there = resolved(have, python) if have else {}
    wanted = resolved([f"{wheel}[train]", *have], python)
    return [f"{name}=={version}" for name, version in sorted(wanted.items()) if name not in {*there, "dpa-jax"}]


def resolved(requirements: list[str], python: str) -> dict[str, str]:
    """{package: version} of all that pip would install."""
    report = ["--dry-run", "--ignore-installed", "-qq", "--report", "-", "--target", "/nowhere"]
    text = pip(python, "install", *report, *TARGET, *requirements)
    found = (package["metadata"] for package in json.loads(text)["install"])
    return {package["name"].lower().replace("_", "-"): package["version"] for package in found}


def pip(python: str, *arguments: str) -> str:
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def write(folder: pathlib.Path, content: dict[str, pathlib.Path | None], size: int) -> None:
    """Writes an archive of files and folders, by their names in it, as pieces of a size at most, and their digests."""
    folder.mkdir(parents=True)
    pieces = Pieces(folder, size)
    with tarfile.open(fileobj=pieces, mode="w|") as archive:
        for name, path in content.items():
            if path is not None:
                archive.add(path, name)
    pieces.end()
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(folder.glob("piece.*"))]
    (folder / "SHA256SUMS").write_text("".join(sums))


class Pieces(io.RawIOBase):
    """A file that goes on in the next one when it has come to a size."""

    def __init__(self, folder: pathlib.Path, size: int):
        self.folder, self.size, self.number, self.left, self.file = folder, size, 0, 0, io.BytesIO()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        data = memoryview(data)
        written = len(data)
        while len(data):
            if not self.left:
                self.end()
                self.file = (self.folder / f"piece.{self.number:03}").open("wb")
                self.number, self.left = self.number + 1, self.size
            part = data[: self.left]
            self.file.write(part)
            self.left, data = self.left - len(part), data[len(part) :]
        return written

    def end(self) -> None:
        self.file.close()


def commit() -> str:
    if not shutil.which("git"):
        return "unknown"
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
