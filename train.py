"""Trains and evaluates: python train.py --config configs/NAME.py [--workdir DIR] [--config.KEY=VALUE ...] [--eval]."""

import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from dpa_jax.command_line import make_parser
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


def _table(results: dict[int, dict[str, float]]) -> str:
    """One column a checkpoint, one line a figure; accuracies in percent."""
    names = next(iter(results.values()))
    rows = [f"{'step':<20}" + "".join(f"{step:>12}" for step in results)]
    for name in names:
        scale, unit = (1, "") if name.startswith("loss") else (100, " %")
        rows.append(f"{name + unit:<20}" + "".join(f"{scale * figures[name]:>12.4f}" for figures in results.values()))
    return "\n".join(rows)


if __name__ == "__main__":
    app.run(main, flags_parser=make_parser(pathlib.Path(__file__).parent / "configs" / "digits_vit.py"))
