"""Measure the form of the code: sizes, long functions, many parameters, the import graph.

    python tests/house.py

tests/tools/test_house.py holds the limits.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nanochat_jax"
PRODUCT = ("nanochat_jax", "scripts", "tpu")
MOST_COLUMNS, MOST_LINES, MOST_PARAMETERS = 100, 60, 7


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


class Function(NamedTuple):
    where: str  # path:line name
    lines: int
    parameters: int  # without self or cls


def functions(*folders: str) -> Iterator[Function]:
    for path in python_files(*folders):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = node.args
                names = [
                    argument.arg
                    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
                ]
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield Function(where, lines, len(names) - (names[:1] in (["self"], ["cls"])))


def long_lines(*folders: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in python_files(*folders)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > MOST_COLUMNS
    ]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in python_files("nanochat_jax")}


def root_modules() -> list[str]:
    """Modules at the package's root and packages that stand for one (`SHARED`)."""
    plain = [path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")]
    return sorted({*plain, *SHARED})


# Folders that are modules of the root, cut into several files.
SHARED = {"checkpoint", "cli"}


def room_of(module: str) -> str:
    """The folder of a module; "root" for the modules that all rooms share."""
    parts = module.split(".")
    is_folder = len(parts) > 1 and (PACKAGE / parts[1]).is_dir()
    return parts[1] if is_folder and parts[1] not in SHARED else "root"


def imports_of(name: str, *, top_level: bool = False) -> set[str]:
    """Modules of the package that a module imports."""
    tree = tree_of(MODULES[name])
    imported = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nanochat_jax"):
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            imported |= {part if part in MODULES else node.module for part in submodules}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if alias.name in MODULES}
    return imported - {name}


def arrows() -> set[tuple[str, str]]:
    """Imports between the nodes of the graph: folders, and modules at the root."""

    def node(module: str) -> str:
        return module.split(".")[1] if "." in module else module

    pairs = {(node(name), node(target)) for name in MODULES for target in imports_of(name)}
    return {(start, end) for start, end in pairs if start != end}


def circle() -> list[str]:
    """Modules that import each other in a circle when they are imported; [] if there are none."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in imports_of(name, top_level=True):
                if cycle := visit(target, (*path, name)):
                    return cycle
            done.add(name)
        return []

    return next((cycle for name in MODULES if (cycle := visit(name, ()))), [])


def main() -> None:
    def kilobytes(*folders: str) -> int:
        return round(sum(path.stat().st_size for path in python_files(*folders)) / 1000)

    everything = [*functions(*PRODUCT)]
    long = sorted((f for f in everything if f.lines > MOST_LINES), key=lambda f: -f.lines)
    wide = [f for f in everything if f.parameters > MOST_PARAMETERS]
    graph = arrows()
    rows = [
        ("KB of Python: product", kilobytes(*PRODUCT)),
        ("KB of Python: tests", kilobytes("tests")),
        ("KB of Python: benchmarks", kilobytes("benchmarks")),
        (f"lines over {MOST_COLUMNS} columns: product", len(long_lines(*PRODUCT))),
        (f"lines over {MOST_COLUMNS} columns: tests", len(long_lines("tests"))),
        (f"functions over {MOST_LINES} lines", len(long)),
        (f"functions with more than {MOST_PARAMETERS} parameters", len(wide)),
        ("modules at the package's root", len(root_modules())),
        ("nodes of the import graph", len({node for arrow in graph for node in arrow})),
        ("arrows of the import graph", len(graph)),
        ("circles of imports", int(bool(circle()))),
    ]
    for name, value in rows:
        print(f"{name:44} {value:6,}")
    for function in (*long, *(function for function in wide if function not in long)):
        print(f"  {function.where}: {function.lines} lines, {function.parameters} parameters")


if __name__ == "__main__":
    main()
