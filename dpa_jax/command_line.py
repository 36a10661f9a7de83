"""Command lines of a configuration file and flags, whose mistakes are told in one line.

A module with a command defines its flags in a function, so that importing it defines none, and ends like this::

    def main(argv: list[str] | None = None) -> None:
        command_line.run(_train, _define_flags, argv, default_config="digits_vit")

    if __name__ == "__main__":
        main()
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import operator
import os
import pathlib
import re
import shutil
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags, logging

from dpa_jax.extras import require_train

if TYPE_CHECKING:
    from ml_collections import ConfigDict

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

    def command() -> None:
        options = parse(define_flags, argv, default_config=default_config)
        if options.help or options.helpfull:
            tell(_help(inspect.getdoc(inspect.getmodule(define_flags)) or "", options, default_config))
        elif options.config is None:
            raise ValueError("--config is missing, the configuration file")
        elif options.print_config:
            tell("\n".join(f"config.{path} = {value!r}" for path, _, value in _values(options.config)))
        else:
            for note in options.notes:
                with contextlib.suppress(OSError):  # nobody reads it
                    print(note, file=sys.stderr, flush=True)
            main(options)

    guarded(command)


def guarded(command: Callable[[], None]) -> None:
    """Runs what a command line asks for; SystemExit as `run` has it."""
    _open_closed_streams()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        require_train("this command")
    except ImportError as error:
        sys.exit(f"error: {error}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    try:
        with _no_interrupt_lost():
            command()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {_one_line(str(error))}")
    except MemoryError as error:
        sys.exit(f"error: out of memory: {_one_line(str(error))}")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"error: out of memory; smaller batches, or a smaller model, need less: {_one_line(str(error))}")
    except KeyboardInterrupt:
        _stop()


def _stop() -> NoReturn:
    with contextlib.suppress(OSError):
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
    os._exit(130)  # threads that still write are not waited for


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """A Ctrl-C in the middle of a destructor counts as well: Python would print a traceback and go on."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            _stop()
        before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:  # what a failed save puts on top has to outlast the program
            sys.unraisablehook = before


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
    from dpa_jax.overrides import FOLLOWED

    options = flags.FlagValues()
    define_flags(options)
    resolved = "Print the configuration with every change in it, as a configuration file sets it, and end."
    flags.DEFINE_bool("print_config", False, resolved, flag_values=options)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=options)
    flags.DEFINE_bool("helpfull", False, "Show this help and absl's own flags.", flag_values=options)
    about = "The configuration file, or the name of one that comes with dpa_jax."
    override = re.compile(r"--?(?:no)?config\.([^=]*)")
    for found in filter(None, map(override.match, argv[1:])):
        check_key(found[1])
    argv, name = _without_config(argv)
    if name is None:
        name = default_config
    if name is None:
        flags.DEFINE_string("config", None, about, flag_values=options)
        argv = [argument for argument in argv if not override.match(argument)]
    else:
        path = vars(options)["config_path"] = find_config(name)  # for `default_workdir`
        config = load_config(path)
    try:
        if name is not None:
            # The configuration's own lock refuses unknown keys, but where any key is meant to be possible.
            unlocked = {"lock_config": False, "accept_new_attributes": True}
            before = config.copy_and_resolve_references()
            config_flags.DEFINE_config_dict("config", config, about, options, sys_argv=argv, **unlocked)
        arguments = options(argv)
        given = {} if name is None else config_flags.get_override_values(options["config"])
        notes = [follow(options.config, before, given) for key, follow in FOLLOWED.items() if key in given]
        vars(options)["notes"] = list(filter(None, notes))
    except (RecursionError, MemoryError) as error:
        some = ", ".join(argument[:60] for argument in argv[1:])
        raise ValueError(f"one of these arguments is too long, or nested too deeply: {some}") from error
    except Exception as error:  # absl and ml_collections take any text, and raise whatever they come upon
        kind = "" if isinstance(error, flags.Error) else "config: "
        raise ValueError(kind + _gist(error)) from error
    if arguments[1:]:
        raise ValueError(f"unknown argument {arguments[1]!r}; a configuration file comes after --config")
    return options


def define_workdir(text: str, options: flags.FlagValues) -> None:
    """Defines ``--workdir``, which must not be empty, as a shell's unset variable makes it, or what is no text."""
    flags.DEFINE_string("workdir", None, text, flag_values=options)

    def is_text(value: str | None) -> bool:
        return value is None or (value != "" and value.encode(errors="ignore").decode() == value)

    flags.register_validator("workdir", is_text, "it must be the name of a folder, in UTF-8", flag_values=options)


def find_config(name: str) -> pathlib.Path:
    """The file of a configuration: a path, or one that comes with dpa_jax.

    The latter's names are ``cifar100_vit`` or, as a clone has it, ``configs/cifar100_vit.py``. Raises ValueError if
    there is none; the message names those that come with dpa_jax.
    """
    own, path = _own_configs(), pathlib.Path(name)
    if os.path.isfile(path):  # False, too, for what no file can be called
        return path
    if path.stem in own and name in (path.stem, f"configs/{path.stem}.py"):
        return own[path.stem]
    raise ValueError(f"--config: there is no file {name}; the configurations of dpa_jax are {', '.join(own)}")


def own_configs() -> pathlib.Path:
    """The folder of the configurations that come with dpa_jax; `campaigns` in it has campaigns' files."""
    return next(filter(pathlib.Path.is_dir, _FOLDERS))


def _own_configs() -> dict[str, pathlib.Path]:
    return {file.stem: file for file in sorted(own_configs().glob("*.py"))}


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
    name = ",".join([prefix + options.config_path.stem, *changes])
    safe = re.sub(r"[^\w.,=+-]+", "_", name)
    if safe != name or len(safe) > 120:
        safe = f"{safe[:100]},{hashlib.sha256(name.encode(errors='backslashreplace')).hexdigest()[:8]}"
    return pathlib.Path("runs") / safe


def load_config(path: pathlib.Path) -> ConfigDict:
    """What ``get_config()`` of a configuration file returns.

    Raises:
        ValueError: for a mistake in the file, with the line that it is in.
    """
    from ml_collections import ConfigDict

    module = sys.modules["config_file"] = types.ModuleType("config_file")
    module.__file__, line = str(path), None
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ValueError("a configuration file has a function get_config()")
        line = getattr(getattr(get_config, "__code__", None), "co_firstlineno", None)
        config = get_config()
        if not isinstance(config, ConfigDict):
            raise ValueError(f"get_config() must return what default_config() makes; got {type(config).__name__}")
    except (Exception, SystemExit) as error:  # whatever the file does
        inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            inside = [error.lineno]
        where = f"{path}, line {line}" if (line := [line, *inside][-1]) else str(path)
        kind = "" if isinstance(error, AttributeError | TypeError | ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: {kind}{_gist(error)}") from error
    return config


# ---------------- What a command line shows of itself ----------------


def _help(about: str, options: flags.FlagValues, default: str | None) -> str:
    """What a command does, its flags, and every key of the configuration with its value and its meaning."""
    from dpa_jax.config import default_config

    width = shutil.get_terminal_size().columns

    def entry(name: str, text: str) -> str:
        return f"  {name}\n{flags.text_wrap(text, width, indent=' ' * 6)}"

    which = f"default: {default}" if default else "must be given"
    lines = [
        about,
        "",
        "Flags:",
        entry("--config=NAME", f"The configuration: a file, or one of {', '.join(_own_configs())} ({which})."),
        entry("--config.KEY=VALUE", "Changes a key of the configuration; the keys are below."),
    ]
    for name in options:
        flag = options[name]
        if name == flag.name and name.split(".")[0] != "config":
            short = f"-{flag.short_name}, " if flag.short_name else ""
            kind = {"string": "=TEXT", "int": "=N"}.get(flag.flag_type(), "")
            usual = "" if flag.boolean or flag.default is None else f" (default: {flag.default})"
            lines.append(entry(f"{short}--{name}{kind}", f"{flag.help}{usual}"))
    if options.helpfull:
        lines += ["", "absl's own flags:", flags.FlagValues().get_help("  ")]
    lines += ["", "Keys of the configuration, with their values:"]
    for path, meaning, value in _values(default_config() if options.config is None else options.config):
        given = {f"{path}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {path: value}
        shown = "\n  ".join(f"--config.{name}={inner}" for name, inner in given.items())
        lines.append(entry(shown or f"--config.{path}.OPTION=VALUE", meaning))
    return "\n".join(lines)


def _values(config: ConfigDict) -> Iterator[tuple[str, str, Any]]:
    """The name, the meaning and the value of every key; ValueError for a configuration that is not valid."""
    from dpa_jax.config import each_key, validate

    validate(config)
    values = config.to_dict()
    for path, key in each_key():
        yield path, key.about, functools.reduce(operator.getitem, path.split("."), values)


def _without_config(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments without --config, and its value; ValueError where that is missing, or is given twice."""
    rest, names, waiting = argv[:1], [], iter(argv[1:])
    for argument in waiting:
        if given := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            name = next(waiting, None) if given[1] is None else given[1]
            if not name:
                raise ValueError("--config must be followed by the name of a configuration file")
            names.append(name)
        else:
            rest.append(argument)
    if len(names) > 1:
        raise ValueError(f"--config is given twice: {names[0]}, {names[1]}")
    return rest, names[0] if names else None


def _gist(error: BaseException) -> str:
    """What an error says, without what ml_collections adds: all keys with their values."""
    message: Any = error
    while isinstance(message, BaseException):
        message = message.msg if isinstance(message, SyntaxError) else message.args[0] if message.args else ""
    text = str(error) if isinstance(error, OSError) else str(message)
    return re.sub(r' Other fields present: ".*"(?=\n|\Z)', "", text, flags=re.DOTALL)


def _one_line(text: str, longest: int = 2000) -> str:
    """A text as one line, which lacks its middle where it is long."""
    line = " ".join(filter(None, map(str.strip, text.splitlines())))
    return line if len(line) <= longest else f"{line[: longest // 2]} ... {line[-longest // 2 :]}"
