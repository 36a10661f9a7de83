"""Command lines and configuration files with mistakes in them: one line each, of what is wrong and where."""

import os

import pytest

from tests.faults.harness import TINY

START = "from dpa_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
SMALL = "    config.model_options.image_size = 8\n"
END = "    return config\n"

# The text of a configuration file, and what the error says besides the file: its line, and the mistake.
FILES = {
    "empty": ("", "get_config"),
    "no function": ("config = 3\n", "get_config"),
    "no callable": ("get_config = 3\n", "get_config"),
    "syntax": (START + "    config.epochs == = 3\n" + END, "line 6"),
    "indentation": (START + "  config.epochs = 3\n" + END, "line 6"),
    "tabs": (START + "\tconfig.epochs = 3\n" + END, "line 6"),
    "bracket": (START + "    config.data.update(\n" + END, "line 6"),
    "name": (START + "    config.epochs = epohcs\n" + END, "line 6", "epohcs"),
    "attribute": (START + "    config.epochs.x = 3\n" + END, "line 6"),
    "import": ("import no_such_module\n" + START + END, "line 1", "no_such_module"),
    "import of a name": ("from dpa_jax.config import no_such_name\n" + START + END, "line 1", "no_such_name"),
    "division": (START + "    config.epochs = 1 // 0\n" + END, "line 6"),
    "key error": (START + "    config.epochs = {}['a']\n" + END, "line 6", "a"),
    "index error": (START + "    config.epochs = [][3]\n" + END, "line 6"),
    "assertion": (START + "    assert config.epochs == 1\n" + END, "line 6"),
    "raises": (START + "    raise RuntimeError('not today')\n" + END, "line 6", "not today"),
    "raises without a word": (START + "    raise Exception\n" + END, "line 6"),
    "recursion": ("def deeper():\n    return deeper()\n\n\n" + START + "    deeper()\n" + END, "line"),
    "memory": (START + "    bytes(10**15)\n" + END, "line 6"),
    "exit": (START + "    raise SystemExit(0)\n" + END, "line 6"),
    "exit at once": ("import sys\nsys.exit()\n", "line 2"),
    "quit": (START + "    exit(3)\n" + END, "line 6"),
    "unknown key": (START + "    config.epohcs = 3\n" + END, "line 6", "epochs"),
    "unknown key of a group": (START + "    config.data.nam = 'x'\n" + END, "line 6", "name"),
    "unknown item": (START + "    config['epohcs'] = 3\n" + END, "line 6", "epochs"),
    "unknown key read": (START + "    config.epochs = config.epoch\n" + END, "line 6", "epochs"),
    "update of an unknown key": (START + "    config.update(epohcs=3)\n" + END, "line 6", "epohcs"),
    "type": (START + "    config.epochs = 'many'\n" + END, "line 6", "epochs"),
    "type of a number": (START + "    config.epochs = 2.5\n" + END, "line 6", "epochs"),
    "group": (START + "    config.data = 3\n" + END, "line 6", "data"),
    "none": (START + END.replace("return config", "pass"), "line 4", "get_config", "NoneType"),
    "dict": (START + END.replace("config", "config.to_dict()"), "line 4", "get_config", "dict"),
    "number": ("def get_config():\n    return 3\n", "line 1", "get_config", "int"),
    "class": ("class get_config:\n    pass\n", "get_config"),
    "arguments": ("def get_config(x):\n    return x\n", "line 1", "get_config"),
    "generator": ("def get_config():\n    yield 3\n", "line 1", "get_config", "generator"),
    "other keys": (
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'a': 3})\n",
        "a",
    ),
    "no keys": ("from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict()\n", "missing"),
    "key removed": (START + "    config.unlock()\n    del config.epochs\n" + END, "epochs"),
    "value of nan": (START + "    config.optimizer.eps = float('nan')\n" + END, "optimizer.eps"),
    "value out of range": (START + "    config.batch_size = -8\n" + END, "batch_size"),
    "nested options": (START + "    config.mechanism_options = {'tau': {'x': 1}}\n" + END, "tau"),
    "list of options": (START + "    config.model_options = {'depth': [1]}\n" + END, "depth"),
    "option that is a number": (START + "    config.model_options = {'3': 3}\n" + END, "3"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("program", ["train", "compare"])
def test_a_mistake_in_a_configuration_file(case, program, name):
    text, *words = FILES[name]
    path = case.folder / "mine.py"
    path.write_text(text)
    words = ["mine.py" if word.startswith("line") else word for word in words] + words
    if program == "compare" and name.endswith("options"):
        words = []  # a comparison has its own
    case.refused(getattr(case, program)(f"--config={path}"), *words)


BYTES = {
    "binary": bytes(range(256)) * 20,
    "zeros": bytes(1000),
    "another encoding": START.encode("utf-16"),
    "no encoding": b"# -*- coding: nothing -*-\n" + START.encode() + END.encode(),
    "latin": b"x = '\xe9'\n" + START.encode() + END.encode(),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "an archive": b"PK\x03\x04" + bytes(100),
    "an open string": b"'" * 100001,
    "brackets": b"(" * 5000,
}


@pytest.mark.parametrize("name", BYTES)
def test_a_configuration_file_that_is_no_text(case, name):
    path = case.folder / "mine.py"
    path.write_bytes(BYTES[name])
    case.refused(case.train(f"--config={path}"), "mine.py")


def test_a_configuration_file_that_prints(case):
    path = case.folder / "mine.py"
    path.write_text("print('hello')\n" + START + SMALL + END)
    case.finished(case.train(f"--config={path}", *TINY), "hello")


def test_a_configuration_file_without_an_ending_or_in_a_strange_place(case):
    (folder := case.folder / "wo rk\n\N{SNOWMAN}").mkdir()
    path = folder / "mine"
    path.write_text(START + SMALL + END)
    case.finished(case.train(f"--config={path}", *TINY))


def test_a_configuration_file_that_is_another_kind_of_file(case):
    case.folder.joinpath("folder.py").mkdir()
    os.mkfifo(case.folder / "pipe.py")
    os.symlink("loop.py", case.folder / "loop.py")
    for name in (
        "folder.py",
        "pipe.py",
        "loop.py",
        "/dev/zero",
        "/dev/null",
        ".",
        "/",
        "~",
        "x" * 5000,
        "mine.py:tiny",
    ):
        case.refused(case.train(f"--config={name}"), "--config", "no file")
        case.tried += 1


# Arguments, and what the error says.
ARGUMENTS = [
    (("--config",), "--config"),
    (("--config=",), "--config"),
    (("--config", ""), "--config"),
    (("--config=digits_vit", "--config=cifar10_vit"), "--config", "twice"),
    (("--config", "digits_vit", "-config", "digits_vit"), "--config", "twice"),
    (("--config=nowhere.py",), "--config", "nowhere.py"),
    (("--config=\N{SNOWMAN}\n",), "--config"),
    (("--nothing",), "nothing"),
    (("--nothing=3",), "nothing"),
    (("--wrkdir=x",), "wrkdir", "workdir"),
    (("--" + "x" * 100_000,), "--xxx"),
    (("-",), "-"),
    (("--", "x"), "x"),
    (("--=",), "--="),
    (("---",), "-"),
    (("",), "''"),
    (("x",), "x"),
    (("--eval=perhaps",), "eval"),
    (("--noeval=3",), "eval"),
    (("--workdir=",), "workdir"),
    (("--flagfile=nowhere",), "nowhere"),
    (("--flagfile=/dev/null/x",), "/dev/null/x"),
    (("--config.epochs",), "config.epochs"),
    (("--config.epochs=",), "epochs"),
    (("--config.epochs=abc",), "epochs", "abc"),
    (("--config.epochs=3\n4",), "epochs"),
    (("--config.epochs=\N{SNOWMAN}",), "epochs"),
    (("--config.epochs=" + "9" * 10_000,), "epochs"),
    (("--config.epochs=[3]",), "epochs"),
    (("--config.epochs.x=3",), "epochs"),
    (("--config.epohcs=3",), "epohcs", "epochs"),
    (("--config.=3",), "config"),
    (("--config..=3",), "config"),
    (("--config.epochs.=3",), "epochs"),
    (("--config.\n=3",), "config"),
    (("--config.epochs[0]=3",), "epochs"),
    (("--config.data=3",), "data"),
    (("--config.data=",), "data"),
    (("--config.data",), "data"),
    (("--config.data=None",), "data"),
    (("--config.data={'name': 'digits'}",), "data"),
    (("--config.data={",), "data"),
    (("--config.data.name",), "name"),
    (("--config.data.nme=digits",), "data.nme", "data.name"),
    (("--config.data.download=perhaps",), "download"),
    (("--noconfig.epochs",), "epochs"),
    (("--noconfig.dta",), "dta"),
    (("--config.optimizer.name=a\nb",), "optimizer.name"),
    (("--config.optimizer.name=" + "x" * 100_000,), "optimizer.name"),
    (("--config.data.name=\x1b[2J\r\x00",), "data.name"),
    (("--config.schedule.milestones=(",), "milestones"),
    (("--config.schedule.milestones=(1, 2",), "milestones"),
    (("--config.schedule.milestones=a b",), "milestones"),
    (("--config.schedule.milestones=" + "(" * 500,), "milestones"),
    (("--config.schedule.milestones=" + "-" * 100_000 + "1",), "milestones"),
    (("--config.schedule.milestones=1j",), "milestones"),
    (("--config.augment.scale={[]: 1}",), "scale"),
    (("--config.mechanism_options=3",), "mechanism_options"),
    (("--config.mechanism_options.x=3",), "x"),
    (("--config.mechanism_options.tau.x=3",), "tau"),
    (("--config.mechanism_options.=3",), "mechanism_options"),
    (("--config.mechanism_options.tau=" + "(" * 500,), "tau"),
    (("--config.mechanism_options.tau={[]: 1}",), "tau"),
    (("--config.mechanism_options.tau=1", "--config.mechanism_options={}"), "mechanism_options"),
    (("--config.model_options.to_dict=3",), "to_dict"),
    (("--config.model_options.__class__=3",), "__class__"),
    (("--config.model_options._fields=3",), "_fields"),
    (("--config.coefficients.channel=much",), "channel"),
    (("--config.coefficients.x=1",), "x"),
    (("--config.coefficients.keys=1",), "keys"),
    (("--help=perhaps",), "help"),
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: " ".join(arguments[0])[:40])
def test_a_mistake_in_the_arguments(case, arguments):
    given, *words = arguments
    ended = case.train(*given)
    case.refused(ended, *words)
    assert ended.stderr.count("\n") == 1 and len(ended.stderr) < 3000, ended
    assert not case.workdir.exists()


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("-h",), ("--help", "--eval"), ("--help", "--config=cifar10_vit"), ("--config.seed=1", "--help")],
    ids=" ".join,
)
@pytest.mark.parametrize("module", ["dpa_jax.train", "dpa_jax.compare.__main__", "dpa_jax.data.preview"])
def test_help(case, arguments, module):
    arguments = [argument for argument in arguments if argument != "--eval" or module == "dpa_jax.train"]
    ended = case.start(module, *arguments).wait()
    case.finished(ended, "--config", "--config.KEY=VALUE")


PREVIEWS = [
    ((), "--config"),
    (("--config=digits_vit", "--images=0"), "images"),
    (("--config=digits_vit", "--images=-3"), "images"),
    (("--config=digits_vit", "--images=1000000000"), "images"),
    (("--config=digits_vit", "--images=many"), "images"),
    (("--config=digits_vit", "--images="), "images"),
    (("--config=digits_vit", "--output="), "output"),
    (("--config=digits_vit", "--output=x.jpg"), "output"),
    (("--config=digits_vit", "--output=/dev/null/x.png"), "output"),
    (("--config=digits_vit", "--config.augment.flip=2"), "augment.flip"),
    (("--config=digits_vit", "--config.augment.rand_augment=x"), "rand_augment"),
    (("--config=digits_vit", "--config.augment.crop=pad", "--config.augment.padding=9"), "padding"),
    (("--config=digits_vit", "--config.seed=-1"), "seed"),
    (("--config=nowhere",), "nowhere"),
    (("--config=digits_vit", "x.py"), "x.py"),
]


@pytest.mark.parametrize("arguments", PREVIEWS, ids=lambda arguments: " ".join(arguments[0])[-40:])
def test_a_mistake_in_a_preview(case, arguments):
    given, word = arguments
    case.refused(case.start("dpa_jax.data.preview", *given).wait(), word)


def test_a_comparison_without_a_configuration(case):
    for arguments in ((), ("--config.seed=1",), ("--seeds=2",)):
        case.refused(case.start("dpa_jax.compare.__main__", *arguments).wait(), "--config is missing")
        case.tried += 1


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "new\nline",
        "\N{SNOWMAN}",
        "a:b",
        "*?[x]",
        "-dash",
        "'\"$HOME`",
        "x" * 200,
        "percent%20",
        "a,b=c",
    ],
    ids=ascii,
)
def test_a_folder_with_a_strange_name(case, name):
    workdir = case.folder / name
    case.finished(case.train(*TINY, "--config.epochs=1", f"--workdir={workdir}"))
    assert case.record(workdir)


@pytest.mark.parametrize("name", ["x" * 300, "\udcff", ""], ids=["too long", "not UTF-8", "empty"])
def test_a_folder_that_cannot_be(case, name):
    case.refused(case.train(*TINY, f"--workdir={case.folder / name if name else name}"))
