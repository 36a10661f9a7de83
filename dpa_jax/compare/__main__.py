"""Compares mechanisms over seeds.

python -m dpa_jax.compare --config NAME [--mechanisms relu,gelu,dpa] [--seeds N] [--vmap N] [--workdir DIR]
    [--config.KEY=VALUE ...]
"""

from __future__ import annotations

import shlex
import sys

from absl import flags

from dpa_jax import command_line


def main(argv: list[str] | None = None) -> None:
    """Compares as a command line says; see `command_line.run`."""
    argv = sys.argv if argv is None else argv
    command = shlex.join(["python", "-m", "dpa_jax.compare", *argv[1:]])
    command_line.run(lambda options: _compare(options, command), _define_flags, argv)


def _define_flags(options: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "mechanisms",
        "relu,gelu,dpa,dnrt,aiec",
        "What is compared: NAME[+arr][:OPTION=VALUE]... between commas.",
        flag_values=options,
    )
    flags.DEFINE_integer(
        "seeds", 5, "How many seeds each is trained with.", lower_bound=1, upper_bound=1000, flag_values=options
    )
    flags.DEFINE_integer(
        "vmap", 0, "Seeds in one program; 0: all on CPUs, else what fits.", lower_bound=0, flag_values=options
    )
    workdir = "The folder; where not given it is runs/compare_NAME, after the configuration and what is changed in it."
    command_line.define_workdir(workdir, options)


def _compare(options: flags.FlagValues, command: str) -> None:
    from dpa_jax.compare import compare, parse_entries
    from dpa_jax.training.checkpoint import DamagedCheckpointError
    from dpa_jax.training.compiled import keep_compiled
    from dpa_jax.training.folder import folder_of
    from dpa_jax.training.loop import NonFiniteError

    workdir = folder_of(options.workdir or command_line.default_workdir(options, "compare_"))
    keep_compiled()
    try:
        entries = parse_entries(options.mechanisms, options.config)
        compare(options.config, entries, options.seeds, workdir, vmap=options.vmap, command=command)
    except (NonFiniteError, DamagedCheckpointError) as error:
        sys.exit(f"error: {error}")
    table = (workdir / "table.md").read_text()
    command_line.tell(f"{table}\ntables, curves and every run's record are in {workdir}")


if __name__ == "__main__":
    main()
