"""Trains the next runs of a campaign until the minutes are over, and leaves a small bundle to go on from.

python -m dpa_jax.campaign FILE --minutes 9 --out DIR [--vmap N] [--config.KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from typing import NoReturn

from dpa_jax import command_line

_BEGUN = time.monotonic()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: list[str] | None = None) -> None:
    """Trains as a command line says; `command_line.guarded` tells of errors."""
    command_line.guarded(lambda: _campaign(sys.argv[1:] if argv is None else argv[1:]))


def _campaign(arguments: list[str]) -> None:
    parser = _Parser("python -m dpa_jax.campaign", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", metavar="FILE", help="the campaign, in TOML: docs/campaign.md")
    parser.add_argument("--minutes", type=float, required=True, help="the time there is, from the program's start")
    parser.add_argument("--out", required=True, help="the folder of the bundle, which is continued and replaced")
    parser.add_argument("--vmap", type=int, default=0, help="seeds in one program; 0: all on CPUs, else what is faster")
    parser.add_argument("--dry_run", action="store_true", help="read the file, tell what is to be trained, and end")
    overrides = [argument for argument in arguments if argument.startswith(("--config.", "--noconfig."))]
    options = parser.parse_args([argument for argument in arguments if argument not in overrides])
    if not options.minutes > 0 or options.vmap < 0:
        raise ValueError(f"--minutes must be more than 0, --vmap at least 0; got {options.minutes}, {options.vmap}")

    from dpa_jax.campaign import continue_campaign, read_plan
    from dpa_jax.training.checkpoint import DamagedCheckpointError

    plan, out = read_plan(find_campaign(options.file), overrides), pathlib.Path(options.out)
    for note in plan.notes:
        print(note, file=sys.stderr)
    if options.dry_run:
        for step in plan.steps:
            names = ", ".join(entry.name for entry in step.entries)
            command_line.tell(f"{step.table.title}: {names}; {step.seeds} seeds of {step.table.config.epochs} epochs")
        return
    try:
        done = continue_campaign(plan, out, options.minutes, vmap=options.vmap, begun=_BEGUN)
    except DamagedCheckpointError as error:
        sys.exit(f"error: {error}")
    table = (out / "table.md").read_text()
    command_line.tell(f"{table}\n{'all is trained' if done else 'to be continued'}; the bundle is in {out}")


def find_campaign(name: str) -> pathlib.Path:
    """A campaign's file: a path, or the name of one that comes with dpa_jax, such as ``papers``."""
    folder = command_line.own_configs() / "campaigns"
    for path in (pathlib.Path(name), folder / f"{name}.toml"):
        if path.is_file():
            return path
    own = sorted(file.stem for file in folder.glob("*.toml"))
    raise ValueError(f"there is no file {name}; the campaigns of dpa_jax are {', '.join(own)}")


if __name__ == "__main__":
    main()
