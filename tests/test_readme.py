"""What README and the pages of docs say is true: their examples run, what they name exists."""

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def run_examples(page):
    """The Python blocks of a page, one after the other, as a reader would paste them."""
    example = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    exec(compile(example, page.name, "exec"), {"__name__": "__main__"})


def test_example_runs_and_learns(capsys):
    run_examples(ROOT / "README.md")
    (accuracy,) = re.findall(r"held-out accuracy ([\d.]+)", capsys.readouterr().out)
    assert float(accuracy) > 0.8


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_examples_of_the_pages_run(page):
    run_examples(page)


def test_files_that_it_names_exist():
    named = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"\b(?:configs|benchmarks)/\w+\.py\b", README)
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_commands_use_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in re.findall(r"'\.\[(\w+)\]'", README):
        assert extra in extras
