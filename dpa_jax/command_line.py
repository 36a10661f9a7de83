"""Command lines of a configuration file and flags, whose mistakes are told in one line.

A module with a command defines its flags in a function, so that importing it defines none, and ends like this::

    def main(argv: list[str] | None = None) -> None:
        command_line.run(_train, _define_flags, argv, default_config="digits_vit")

    if __name__ == "__main__":
        main()
"""

import contextlib
import hashlib
import inspect
import os
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable

from absl import flags, logging

from dpa_jax.extras import require_train

# Of the configurations that come with dpa_jax: inside of an installed package, beside it in a clone.
_FOLDERS = [pathlib.Path(__file__).parent / "configs", pathlib.Path(__file__).parents[1] / "configs"]

FlagFunction = Callable[[flags.FlagValues], None]
"""Takes the object that holds the flags; their values are its attributes."""


def run(
    main: FlagFunction, define_flags: FlagFunction, argv: list[str] | None = None, *, default_config: str | None = None
) -> None:
    """Reads a command line, the program's name and its arguments (None: the process's), and runs its command.

    ``define_flags`` defines the flags of this command; ``config``, the configuration, comes with them.
    ``default_config`` is the configuration where none is given, a name or a path; None where one must be.

    Raises:
        SystemExit: with one line, for a mistake in the command line or in the configuration file, for a missing
            part, and for a ValueError or OSError of the command: what a user can mend; after a KeyboardInterrupt
            the process ends there and then, with a line and status 130.
    """
    argv = sys.argv if argv is None else argv
    _open_closed_streams()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        require_train("this command")
    except ImportError as error:
        sys.exit(f"error: {error}")
    try:
        options = parse(define_flags, argv, default_config=default_config)
        if options.help:
            print(inspect.getdoc(inspect.getmodule(main)), options.get_help(), sep="\n")
        elif options.config is None:
            raise ValueError("--config is missing, the configuration file")
        else:
            logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
            main(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        os._exit(130)  # threads that still write are not waited for


def tell(text: str) -> None:
    """Prints to standard output; to a pipe that nobody reads any more, as behind a `head`, nothing."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python, which flushes it at the end


def _open_closed_streams() -> None:
    """Gives a standard stream that is closed the null device: else the next file that is opened has its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", closefd=False))


def parse(define_flags: FlagFunction, argv: list[str], *, default_config: str | None = None) -> flags.FlagValues:
    """The values of a command line's flags; as `run`, but mistakes raise ValueError."""
    from ml_collections import config_flags

    from dpa_jax.config import check_key

    options = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=options)
    define_flags(options)
    for argument in argv[1:]:
        if override := re.match(r"--?config\.([\w.]+)", argument):
            check_key(override[1])
    argv = _with_config_files(argv)
    try:
        config_flags.DEFINE_config_file(
            "config",
            default_config and str(find_config(default_config)),
            "The configuration file, or the name of one that comes with dpa_jax.",
            flag_values=options,
            # The configuration's own lock refuses unknown keys, but where any key is meant to be possible.
            lock_config=False,
            accept_new_attributes=True,
            sys_argv=argv,
        )
        arguments = options(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, OSError) as error:
        raise ValueError(_one_line(error)) from error
    if arguments[1:]:
        raise ValueError(f"unknown argument {arguments[1]!r}; a configuration file comes after --config")
    return options


def find_config(name: str) -> pathlib.Path:
    """The file of a configuration: a path, or one that comes with dpa_jax.

    The latter's names are ``cifar100_vit`` or, as a clone has it, ``configs/cifar100_vit.py``. Raises ValueError if
    there is none; the message names those that come with dpa_jax.
    """
    folder = next(filter(pathlib.Path.is_dir, _FOLDERS))
    own = {file.stem: file for file in sorted(folder.glob("*.py"))}
    path = pathlib.Path(name)
    if path.is_file():
        return path
    if path.stem in own and name in (path.stem, f"configs/{path.stem}.py"):
        return own[path.stem]
    raise ValueError(f"--config: there is no file {name}; the configurations of dpa_jax are {', '.join(own)}")


def default_workdir(options: flags.FlagValues, prefix: str = "") -> pathlib.Path:
    """A folder under ``runs`` that tells one configuration from another; its name begins with ``prefix``.

    It is named after the configuration file and after what the command line changes in it, as in
    ``runs/digits_vit,mechanism=relu,seed=1``. Keys that change no figure do not count; where a name gets long or
    has characters that a file's name should not have, it ends with a hash of all changes.
    """
    from ml_collections import config_flags

    from dpa_jax.config import changes_figures

    overrides = sorted(config_flags.get_override_values(options["config"]).items())
    changes = [f"{key}={value}" for key, value in overrides if changes_figures(key)]
    stem = pathlib.Path(config_flags.get_config_filename(options["config"])).stem
    name = ",".join([prefix + stem, *changes])
    safe = re.sub(r"[^\w.,=+-]+", "_", name)
    if safe != name or len(safe) > 120:
        safe = f"{safe[:100]},{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return pathlib.Path("runs") / safe


def _with_config_files(argv: list[str]) -> list[str]:
    """The arguments with the path of a file after every --config."""
    argv = list(argv)
    for i, argument in enumerate(argv[1:], 1):
        if given := re.fullmatch(r"(--?config=)(.*)", argument):
            argv[i] = given[1] + str(find_config(given[2]))
        elif re.fullmatch("--?config", argv[i - 1]) and i > 1:
            argv[i] = str(find_config(argument))
    return argv


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
