"""The plan of the package: which room may import which, and how large its parts may grow."""

from __future__ import annotations

import ast
import importlib
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "grounded_sam"
#: Rooms from the ground up. A module may import from its own room and from those below.
FLOORS = (
    ("errors", "hydra_state"),
    ("remote",),
    ("output",),
    ("files", "checks", "pages"),
    ("media", "weights"),
    ("acceleration",),
    ("structures",),
    ("formats",),
    ("sources", "detectors", "segmenters", "verifiers"),
    ("trackers",),
    ("pipeline", "evaluation"),
    ("sinks",),
    ("config",),
    ("engine",),
    ("serve",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
#: The synthetic scenes and trainings stand beside the rooms: no room needs them, and they need the lower ones.
APART = {"shapes", "__init__"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports: at the top, in functions, and for types alone."""
    modules = {module_name(file) for file in PACKAGE.rglob("*.py")}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] != PACKAGE.name:
                continue
            inner = parts[1:]
            while inner and ".".join(inner) not in modules:
                inner = inner[:-1]
            found.add(".".join(inner) or "__init__")
    return found - {module_name(path)}


GRAPH = {module_name(path): imports_of(path) for path in PACKAGE.rglob("*.py")}


def room(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def test_every_room_has_its_floor():
    assert {room(module) for module in GRAPH} - APART == set(FLOOR)


def test_imports_run_downwards():
    upward = [
        f"{module} imports {target}"
        for module, targets in GRAPH.items()
        for target in targets
        if room(module) != room(target)
        and room(module) not in APART
        and (room(target) in APART or FLOOR[room(target)] >= FLOOR[room(module)])
    ]
    assert not upward, upward


def test_no_modules_import_each_other_in_a_circle():
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(GRAPH[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(GRAPH):
        visit(module, ())


def test_the_metrics_sink_alone_knows_evaluation():
    sinks = {module for module in GRAPH if room(module) == "sinks"}
    assert {module for module in sinks if any(room(t) == "evaluation" for t in GRAPH[module])} == {"sinks.metrics"}


def test_the_root_is_a_table_of_contents():
    files = [path.name for path in PACKAGE.iterdir() if path.is_file() and path.name != "py.typed"]
    assert len(files) <= 7 and all(name.endswith(".py") for name in files), files


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_functions_and_classes_stay_small(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        limit = {ast.ClassDef: 250, ast.FunctionDef: 80, ast.AsyncFunctionDef: 80}.get(type(node))
        if limit is not None:
            lines = node.end_lineno - node.lineno + 1
            assert lines <= limit, f"{path.name}: {node.name} has {lines} lines"


STAGE_WORDS = {"source", "detector", "segmenter", "tracker", "session", "sink", "store", "frames", "stage"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_stages_are_known_by_type_not_by_attribute(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            words = {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)}
            words |= {n.attr for n in ast.walk(node.args[0]) if isinstance(n, ast.Attribute)}
            assert not words & STAGE_WORDS, f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def test_no_two_modules_define_a_public_name_twice():
    owners: dict[str, set[str]] = defaultdict(set)  # a module may have overloads of a function
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                owners[node.name].add(module_name(path))
    entry_points = {"main", "hub_file", "speed_up"}
    twice = {name: modules for name, modules in owners.items() if len(modules) > 1 and name not in entry_points}
    assert not twice, twice


def test_every_module_can_be_imported():
    for module in GRAPH:
        if room(module) == "serve":
            pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
        if module not in ("__main__", "__init__"):
            importlib.import_module(f"{PACKAGE.name}.{module}")
