"""The layout of the code: which room may import from which, no circles, and the limits of form."""

import ast

import house
import pytest

# A room imports only from itself, from the rooms named here and from the modules at the package's
# root, which all rooms share.
ALLOWED = {
    "model": set(),
    "data": {"model", "tasks"},
    "tasks": {"data"},
    "infer": {"model"},
    "eval": {"model", "data", "tasks", "infer", "report"},
    "train": {"model", "data", "tasks", "infer", "eval", "report"},
    "report": set(),
    "interop": {"model", "train"},
    "serve": {"model", "infer"},
    "speedrun": {"model", "data", "train", "report"},
}
MOST_ROOT_MODULES = 12


def test_rooms_import_only_from_the_rooms_below():
    wrong = [
        f"{name} imports {target}"
        for name in house.MODULES
        if (room := house.room_of(name)) != "root"
        for target in house.imports_of(name)
        if house.room_of(target) not in ALLOWED[room] | {room, "root"}
    ]
    assert not wrong


def test_no_module_imports_in_a_circle():
    assert house.circle() == []


def test_the_package_imports_neither_scripts_nor_the_planner():
    wrong = []
    for name, path in house.MODULES.items():
        for node in ast.walk(house.tree_of(path)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            wrong += [f"{name}: {n}" for n in names if n.split(".")[0] in ("tpu", "scripts")]
    # `nanochat COMMAND` lists the scripts
    assert wrong == ["nanochat_jax.__main__: scripts"]


def test_the_root_of_the_package_holds_few_modules():
    assert len(house.root_modules()) <= MOST_ROOT_MODULES, house.root_modules()


@pytest.mark.parametrize(
    ("measure", "limit", "exceptions"),
    [("lines", house.MOST_LINES, 0), ("parameters", house.MOST_PARAMETERS, 3)],
)
def test_functions_are_short_and_take_few_parameters(measure, limit, exceptions):
    over = [f for f in house.functions(*house.PRODUCT) if getattr(f, measure) > limit]
    assert len(over) <= exceptions, "\n".join(f"{f.where}: {getattr(f, measure)}" for f in over)


def test_lines_of_the_product_fit_the_columns():
    assert house.long_lines(*house.PRODUCT) == []
