"""Prints pip constraints: exactly the lower bounds that pyproject.toml declares."""

import itertools
import pathlib
import re
import tomllib

project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
    if bound := re.match(r"([\w-]+)>=([\w.]+)", requirement):
        print(f"{bound[1]}=={bound[2]}")
