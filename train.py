"""Trains and evaluates: python train.py --config configs/NAME.py [--workdir DIR] [--config.KEY=VALUE ...] [--eval]."""

import pathlib
import re
import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from dpa_jax.training.checkpoint import DamagedCheckpointError
from dpa_jax.training.loop import NonFiniteError, evaluate, train_and_evaluate

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; runs/NAME of the configuration where not given.")
_EVAL = flags.DEFINE_bool("eval", False, "Evaluate the run's best and newest checkpoints, train nothing.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a run on several hosts.")


def main(_: list[str]) -> None:
    """Trains, or evaluates, as the flags say; an error that a user can mend is one line."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    config = flags.FLAGS.config
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / name)
    try:
        if _EVAL.value:
            print(_table(evaluate(config, workdir)))
        else:
            train_and_evaluate(config, workdir)
            print(f"curves, metrics and checkpoints are in {workdir}")
    except (ValueError, OSError, NonFiniteError, DamagedCheckpointError) as error:
        sys.exit(f"error: {error}")


def _parse(argv: list[str]) -> list[str]:
    """Reads the command line; exits with one line on what is wrong in it, or in the configuration file."""
    try:
        config_flags.DEFINE_config_file(
            "config",
            str(pathlib.Path(__file__).parent / "configs" / "digits_vit.py"),
            "The configuration file.",
            # The configuration's own lock refuses unknown keys, but where any key is meant to be possible.
            lock_config=False,
            accept_new_attributes=True,
            sys_argv=argv,
        )
        arguments = flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, OSError) as error:
        sys.exit(f"error: {_one_line(error)}")
    if arguments[1:]:
        sys.exit(f"error: unknown argument {arguments[1]!r}; a configuration file comes after --config")
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    if not pathlib.Path(file).is_file():
        sys.exit(f"error: --config: there is no file {file}")
    return arguments


def _one_line(error: Exception) -> str:
    """The gist of ml_collections' errors, which list all keys with their values or hold whole tracebacks."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "get_config"]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "config"
    message = error.args[0]
    while isinstance(message, Exception):
        message = message.args[0]
    lines = re.sub(r' Other fields present: ".*"(?=\n|\Z)', "", str(message), flags=re.DOTALL).strip().splitlines()
    text = " ".join(dict.fromkeys((lines[0], lines[-1])))
    return text if isinstance(error, flags.Error) else f"{place}: {text}"


def _table(results: dict[int, dict[str, float]]) -> str:
    """One column a checkpoint, one line a figure; accuracies in percent."""
    names = next(iter(results.values()))
    rows = [f"{'step':<20}" + "".join(f"{step:>12}" for step in results)]
    for name in names:
        scale, unit = (1, "") if name.startswith("loss") else (100, " %")
        rows.append(f"{name + unit:<20}" + "".join(f"{scale * figures[name]:>12.4f}" for figures in results.values()))
    return "\n".join(rows)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
