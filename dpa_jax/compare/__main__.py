"""Compares mechanisms over seeds.

python -m dpa_jax.compare --config configs/NAME.py [--mechanisms relu,gelu,dpa] [--seeds N] [--vmap N] [--workdir DIR]
    [--config.KEY=VALUE ...]
"""

from __future__ import annotations

import pathlib
import shlex
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from dpa_jax.command_line import make_parser
from dpa_jax.compare import compare, parse_entries
from dpa_jax.training.checkpoint import DamagedCheckpointError
from dpa_jax.training.loop import NonFiniteError


def main(_: list[str]) -> None:
    """Compares as the flags say; an error that a user can mend is one line."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    options, config = flags.FLAGS, flags.FLAGS.config
    name = pathlib.Path(config_flags.get_config_filename(options["config"])).stem
    workdir = pathlib.Path(options.workdir or pathlib.Path("runs") / f"compare_{name}")
    command = shlex.join(["python", "-m", "dpa_jax.compare", *sys.argv[1:]])
    try:
        entries = parse_entries(options.mechanisms, config)
        compare(config, entries, options.seeds, workdir, vmap=options.vmap, command=command)
    except (ValueError, OSError, NonFiniteError, DamagedCheckpointError) as error:
        sys.exit(f"error: {error}")
    print((workdir / "table.md").read_text(), end="")
    print(f"\ntables, curves and every run's record are in {workdir}")


if __name__ == "__main__":
    flags.DEFINE_string("mechanisms", "relu,gelu,dpa,dnrt,aiec", "What is compared: NAME[+arr][:OPTION=VALUE]...,...")
    flags.DEFINE_integer("seeds", 5, "How many seeds each is trained with.", lower_bound=1)
    flags.DEFINE_integer("vmap", 0, "Seeds in one program; 0: all on CPUs, else what fits.", lower_bound=0)
    flags.DEFINE_string("workdir", None, "The folder; runs/compare_NAME of the configuration where not given.")
    app.run(main, flags_parser=make_parser())
