"""Trains and evaluates: python train.py --config configs/NAME.py [--workdir DIR] [--config.KEY=VALUE ...] [--eval]."""

import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from dpa_jax.training.loop import NonFiniteError, evaluate, train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    str(pathlib.Path(__file__).parent / "configs" / "digits_vit.py"),
    "The configuration file.",
    # The configuration's own lock refuses unknown keys, but where any key is meant to be possible.
    lock_config=False,
    accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; runs/NAME of the configuration where not given.")
_EVAL = flags.DEFINE_bool("eval", False, "Evaluate the run's best and newest checkpoints, train nothing.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a run on several hosts.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    config = _CONFIG.value
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / name)
    try:
        if _EVAL.value:
            print(_table(evaluate(config, workdir)))
        else:
            train_and_evaluate(config, workdir)
            print(f"curves, metrics and checkpoints are in {workdir}")
    except (ValueError, FileNotFoundError, NonFiniteError) as error:
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
    app.run(main)
