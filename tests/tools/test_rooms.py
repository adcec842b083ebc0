"""The layout of the code: which room may import from which, and that no module imports in a
circle.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nanochat_jax"

# A room imports only from itself and from the rooms named here. The modules at the package's root
# are "root".
ALLOWED = {
    "model": {"root"},
    "data": {"root", "model", "tasks"},
    "tasks": {"root", "data"},
    "infer": {"root", "model"},
    "eval": {"root", "model", "data", "tasks", "infer"},
    "train": {"root", "model", "data", "tasks", "infer", "eval", "report"},
    "report": {"root"},
    "interop": {"root", "model", "train"},
    "serve": {"root", "model", "infer"},
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(name: str, *, top_level: bool = False) -> set[str]:
    """Modules of the package that a module imports."""
    tree = ast.parse(MODULES[name].read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("nanochat_jax")
        ):
            found |= {
                f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}" in MODULES
                else node.module
                for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found - {name}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else "root"


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_from_the_rooms_below(room):
    wrong = [
        f"{name} imports {target}"
        for name in MODULES
        if room_of(name) == room
        for target in imports_of(name)
        if room_of(target) not in ALLOWED[room] | {room}
    ]
    assert not wrong


def test_no_module_imports_in_a_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in imports_of(name, top_level=True):
                visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_the_package_does_not_import_the_planner():
    wrong = [
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        for imported in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        if imported.split(".")[0] == "tpu"
    ]
    assert not wrong
