"""Command lines of a configuration file and flags, whose mistakes are told in one line."""

from __future__ import annotations

import pathlib
import re
import sys
import traceback
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from dpa_jax.config import check_key


def make_parser(default_config: pathlib.Path | None = None) -> Callable[[list[str]], list[str]]:
    """A ``flags_parser`` for ``absl.app.run`` that knows ``--config FILE`` and ``--config.KEY=VALUE``.

    Args:
        default_config: the configuration file where none is given; None where one must be.

    Returns:
        What reads a command line, and exits with one line on what is wrong in it, or in the configuration file.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            for argument in argv[1:]:
                if override := re.match(r"--?config\.([\w.]+)", argument):
                    check_key(override[1])
            config_flags.DEFINE_config_file(
                "config",
                None if default_config is None else str(default_config),
                "The configuration file.",
                # The configuration's own lock refuses unknown keys, but where any key is meant to be possible.
                lock_config=False,
                accept_new_attributes=True,
                sys_argv=argv,
            )
            arguments = flags.FLAGS(argv)
        except ValueError as error:
            sys.exit(f"error: {error}")
        except (flags.Error, KeyError, AttributeError, TypeError, OSError) as error:
            sys.exit(f"error: {_one_line(error)}")
        if arguments[1:]:
            sys.exit(f"error: unknown argument {arguments[1]!r}; a configuration file comes after --config")
        if default_config is None and not flags.FLAGS["config"].present:
            sys.exit("error: --config is missing, the configuration file")
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        if not pathlib.Path(file).is_file():
            sys.exit(f"error: --config: there is no file {file}")
        return arguments

    return parse


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
