"""The floors of the house: which room may import which, and the size limits that keep it readable."""

import ast
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ALLOWED = {
    "pipelines": set(),
    "pixart": set(),
    "encoders": {"pipelines"},
    "captioning": {"pipelines", "encoders"},
    "curation": {"pipelines", "encoders"},
    "dataset_stats": {"pipelines", "encoders"},
    "features": {"pipelines", "encoders"},
    "training": {"pipelines", "encoders", "pixart"},
    "sampling": {"pipelines", "encoders", "pixart"},
    "toyworld": {"pipelines", "encoders", "pixart"},
    # The doors: they open every room by name, and list the keys of all.
    "atelier": {"pipelines", "captioning", "curation", "dataset_stats", "features", "training", "sampling", "toyworld"},
}
FORBIDDEN_FILE_NAMES = {"utils.py", "common.py", "base.py", "helpers.py", "misc.py"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
SOURCES = sorted(path for room in ALLOWED for path in (REPOSITORY / room).rglob("*.py"))
BESIDE = sorted(path for folder in ("tests", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py"))


def imported_modules(tree: ast.Module) -> list[str]:
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            modules.append(node.module or "")
    return modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_module_stays_on_its_floor(path: Path) -> None:
    room = path.relative_to(REPOSITORY).parts[0]
    modules = imported_modules(ast.parse(path.read_text()))
    for module in modules:
        target = module.split(".")[0]
        assert target not in ALLOWED.keys() - ALLOWED[room] - {room}, f"{room} may not import {module}"
        assert target != "torchvision", "nothing here may need torchvision"
        if room == "pipelines":
            assert target != "torch", "pipelines moves data and needs no torch"


def house_imports() -> dict[str, set[str]]:
    """Which modules of the house each of them imports: at its top, inside functions, and for types alone.

    An import for types alone counts, too: two files that need each other's names to be read are one file in two.
    """
    modules = {module_name(path): ast.parse(path.read_text()) for path in SOURCES}
    return {name: house_modules(tree, modules.keys()) - {name} for name, tree in modules.items()}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def house_modules(tree: ast.Module, known: Collection[str]) -> set[str]:
    names = set(imported_modules(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            # `from room import module` names a module, too
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & set(known)


def circles(imports: Mapping[str, Collection[str]]) -> list[str]:
    """Return one circle of each knot of modules that import each other, as `a -> b -> a`."""
    found = []
    for start in sorted(imports):
        way = shortest_way_back(start, imports)
        if way and start == min(way):
            found.append(" -> ".join(way))
    return found


def shortest_way_back(start: str, imports: Mapping[str, Collection[str]]) -> list[str]:
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:
        for module in sorted(imports[way[-1]]):
            if module == start:
                return [*way, start]
            if module not in seen:
                seen.add(module)
                ways.append([*way, module])
    return []


def test_a_circle_is_found_and_named() -> None:
    imports = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"a", "f"}, "f": {"e"}}
    assert circles(imports) == ["a -> b -> c -> a", "e -> f -> e"]
    tree = ast.parse("from training import config\ndef lazy():\n    import pixart.model as m\n")
    assert house_modules(tree, ["training.config", "pixart.model", "training"]) == {
        "training",
        "training.config",
        "pixart.model",
    }


def test_no_two_files_import_each_other_in_a_circle() -> None:
    assert circles(house_imports()) == []


@pytest.mark.parametrize("path", SOURCES + BESIDE, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_module_is_small_and_has_a_name(path: Path) -> None:
    text = path.read_text()
    assert path.name not in FORBIDDEN_FILE_NAMES
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{node.name} has {num_lines} lines"


@pytest.mark.parametrize(
    "room", [room for room in ALLOWED if room not in ("pipelines", "encoders", "pixart", "atelier")]
)
def test_heavy_libraries_are_imported_where_they_are_used(room: str) -> None:
    """`python -m room --help` and a run with nothing to do must not wait for torch, ray or deepspeed."""
    for name in ("__init__.py", "__main__.py", "config.py"):
        path = REPOSITORY / room / name
        assert path.is_file(), f"{room} lacks {name}"
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                heavy = {"torch", "ray", "deepspeed", "transformers", "diffusers"}
                tops = {module.split(".")[0] for module in imported_modules(ast.Module([node], []))}
                assert not tops & heavy, f"{room}/{name} imports {tops & heavy} at the top"
