"""Trains and evaluates: python -m dpa_jax.train --config NAME [--workdir DIR] [--config.KEY=VALUE ...] [--eval].

With --compile_only it compiles the training step and says what that costs: docs/scale.md.
"""

import contextlib
import sys

from absl import flags

from dpa_jax import command_line


def main(argv: list[str] | None = None) -> None:
    """Trains, or evaluates, as a command line says; `command_line.run` tells of ``argv`` and errors."""
    argv = sys.argv if argv is None else argv
    with _hosts(argv):
        command_line.run(_train, _define_flags, argv, default_config="digits_vit")


def _define_flags(options: flags.FlagValues) -> None:
    workdir = "The run's folder; where not given it is runs/NAME, after the configuration and what is changed in it."
    command_line.define_workdir(workdir, options)
    evaluate = "Evaluate the run's best and newest checkpoints, train nothing."
    flags.DEFINE_bool("eval", False, evaluate, flag_values=options)
    only = "Compile the training step, print what it costs, and end; no data is needed."
    flags.DEFINE_bool("compile_only", False, only, flag_values=options)
    topology = "With --compile_only: the TPUs to compile for, v5e:16x16 for example; they need not be there."
    flags.DEFINE_string("topology", None, topology, flag_values=options)
    flags.DEFINE_string("json", None, "With --compile_only: the file for its figures.", flag_values=options)
    _define_host_flags(options)


def _define_host_flags(options: flags.FlagValues) -> None:
    flags.DEFINE_bool("distributed", False, "Join the other processes of a run on several hosts.", flag_values=options)
    coordinator = "HOST:PORT of process 0. Like the next two, for --distributed where no cluster says it."
    flags.DEFINE_string("coordinator", None, coordinator, flag_values=options)
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("process_id", None, "The number of this one, from 0.", lower_bound=0, flag_values=options)
    wait = "How long the processes wait for each other at the start."
    flags.DEFINE_integer("join_seconds", 60, wait, lower_bound=1, flag_values=options)


def _hosts(argv: list[str]) -> contextlib.AbstractContextManager:
    """Joins the other processes before anything else can fail, so that they are told of it."""
    options = flags.FlagValues()
    _define_host_flags(options)
    try:
        options(argv, known_only=True)
    except flags.Error:
        return contextlib.nullcontext()  # the whole command line's reader tells of it
    if not options.distributed:
        return contextlib.nullcontext()
    from dpa_jax.training.hosts import Hosts

    return Hosts(options.coordinator, options.num_processes, options.process_id, options.join_seconds)


def _train(options: flags.FlagValues) -> None:
    # Imported here, since the loader's worker processes import this module when it is the program.
    import jax

    from dpa_jax.training.checkpoint import DamagedCheckpointError
    from dpa_jax.training.compiled import keep_compiled
    from dpa_jax.training.folder import folder_of
    from dpa_jax.training.loop import NonFiniteError, evaluate, train_and_evaluate

    by_hand = (options.coordinator, options.num_processes, options.process_id)
    if not options.distributed and by_hand != (None, None, None):
        raise ValueError("--coordinator, --num_processes and --process_id are for --distributed; it is missing")
    if options.compile_only:
        if options.eval or options.distributed:
            raise ValueError("--compile_only trains and evaluates nothing; leave out --eval and --distributed")
        from dpa_jax.training import cost

        command_line.tell(cost.report(options.config, options.topology, options.json))
        return
    if (options.topology, options.json) != (None, None):
        raise ValueError("--topology and --json are for --compile_only; it is missing")
    workdir = folder_of(options.workdir or command_line.default_workdir(options))
    keep_compiled()
    try:
        if options.eval:
            said = _table(evaluate(options.config, workdir))
        else:
            train_and_evaluate(options.config, workdir)
            said = f"curves, metrics and checkpoints are in {workdir}"
        if jax.process_index() == 0:
            command_line.tell(said)
    except (NonFiniteError, DamagedCheckpointError) as error:
        sys.exit(f"error: {error}")


def _table(results: dict[int, dict[str, float]]) -> str:
    """One column a checkpoint, one line a figure; accuracies in percent."""
    rows = [f"{'step':<20}" + "".join(f"{step:>12}" for step in results)]
    for name in next(iter(results.values())):
        scale, unit = (1, "") if name.startswith("loss") else (100, " %")
        rows.append(f"{name + unit:<20}" + "".join(f"{scale * figures[name]:>12.4f}" for figures in results.values()))
    return "\n".join(rows)


if __name__ == "__main__":
    main()
