"""Which room of the package imports which, from the source; `python -m tests.architecture` draws the picture anew."""

import ast
import functools
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"

# Every room, from the top of the house to its floor. A room imports from lower levels only, not from its own.
LEVELS = (
    ("campaign",),
    ("train",),
    ("compare",),
    ("training",),
    ("data",),
    ("models",),
    ("command_line", "nnx"),
    ("overrides",),
    ("config",),
    ("activations",),
    ("checks", "extras", "plots"),
)


def modules():
    """{dotted name: file} of every module but `dpa_jax/__init__.py`, which forwards names and imports lazily."""
    found = {}
    for file in sorted((ROOT / "dpa_jax").rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = file
    del found["dpa_jax"]
    return found


@functools.cache
def imports():
    """{module: the modules of dpa_jax that it imports}, also within functions; those for type checkers do not count."""
    found, known = {}, modules()
    for module, file in known.items():
        named, waiting = [], [ast.parse(file.read_text())]
        while waiting:
            node = waiting.pop()
            if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
                waiting += ast.iter_child_nodes(node)
            if isinstance(node, ast.Import):
                named += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports relatively"
                members = [f"{node.module}.{alias.name}" for alias in node.names]
                # `from package import name`: of a module of that name, or else of the package itself.
                named += [member if member in known else node.module for member in members]
        found[module] = {name for name in named if name.split(".")[0] == "dpa_jax"}
    return found


def contracted(package):
    """{part: the other parts that it imports} of a package: its modules and the packages in it."""

    def part(module):
        return module.removeprefix(f"{package}.").split(".")[0] if module != package else "__init__"

    found = {}
    for module, targets in imports().items():
        if module == package or module.startswith(f"{package}."):
            inside = {part(target) for target in targets if target == package or target.startswith(f"{package}.")}
            found[part(module)] = found.get(part(module), set()) | inside - {part(module)}
    return found


def reachable(graph, start):
    """Everything that `start` leads to by one arrow or more."""
    seen, waiting = set(), list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += graph[node]
    return seen


def picture():
    """The rooms and their arrows in Mermaid's words; an arrow that follows from others is left out."""
    graph = contracted("dpa_jax")
    lines = ["```mermaid", "flowchart TD"]
    for level in LEVELS:
        for room in level:
            folder = (ROOT / "dpa_jax" / room).is_dir()
            lines.append(f'    {room}["{room}{"/" if folder else ".py"}"]')
    for level in LEVELS:
        for room in level:
            implied = set().union(*(reachable(graph, target) for target in graph[room]))
            lines += [f"    {room} --> {target}" for target in sorted(graph[room] - implied)]
    return "\n".join([*lines, "```"])


def drawn(page):
    """The page with the picture as it should be."""
    return re.sub(r"```mermaid\n.*?```", lambda _: picture(), page, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text()))
