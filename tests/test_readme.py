"""What README says is true: its example runs, its commands are those that are tested."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_example_runs_and_learns(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    (accuracy,) = re.findall(r"held-out accuracy ([\d.]+)", capsys.readouterr().out)
    assert float(accuracy) > 0.8


def test_files_that_it_names_exist():
    named = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"\b(?:configs|benchmarks)/\w+\.py\b", README)
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_commands_use_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"'\.\[(\w+)\]'", README):
        assert extra in extras
