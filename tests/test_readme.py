"""What README and the pages of docs say is true: their examples run, what they name exists."""

import pathlib
import pkgutil
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [page for page in PAGES if "```python" in page.read_text() and page.stem != "own_mechanism"]


def run_examples(page):
    """The Python blocks of a page, one after the other, as a reader would paste them."""
    example = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    exec(compile(example, page.name, "exec"), {"__name__": "__main__"})


def test_the_readme_takes_five_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1000


# tests/activations/test_mechanism.py runs own_mechanism.md and takes back what it registers.
@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_examples_of_the_pages_run_and_learn(page, capsys):
    run_examples(page)
    accuracies = re.findall(r"accuracy ([\d.]+)", capsys.readouterr().out)
    assert all(float(accuracy) > 0.8 for accuracy in accuracies)
    assert accuracies or page.stem in ("README", "augment", "nodes", "text", "weights")  # which train nothing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    for name in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / name).exists(), name
    for name in re.findall(r"(?<![\w/])(?:configs|benchmarks|tests|docs|dpa_jax)/[\w/]*(?:\.py|\.md)\b", text):
        assert (ROOT / name).is_file() or name == "configs/NAME.py", name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_of_the_package_that_a_page_uses_exist(page):
    for name in set(re.findall(r"\bdpa_jax(?:\.\w+)+", page.read_text())):
        pkgutil.resolve_name(name)


def test_commands_use_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [extra for page in PAGES for extra in re.findall(r"'(?:\.|dpa_jax)\[([\w,]+)\]'", page.read_text())]
    assert "train" in named and "test" in named
    for extra in ",".join(named).split(","):
        assert extra in extras
