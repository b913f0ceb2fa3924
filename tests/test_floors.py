"""The house's floors: an import only goes down, and the code keeps to its own rules."""

import ast
from pathlib import Path

import pytest

from tests.runs import ROOT

PACKAGE = ROOT / "mf_lightning"
FLOORS = {
    "cli": 4, "__main__": 4, "module": 3, "callbacks": 3, "tools": 3, "flow": 2, "nets": 2, "data": 2, "autoencoders": 2,
    "strategies": 3, "checkpoints": 2, "sharding": 1, "launchers": 2, "failures": 3, "report": 2,
    "metrics": 2, "interop": 2, "schedules": 2, "optim": 2, "types": 1, "draws": 1, "pixels": 1, "transfer": 1, "assets": 1,
    "orphans": 1, "__init__": 1, "sheet": 1, "pipeline": 3, "profiles": 1,
}  # fmt: skip
ACROSS = {  # the few ways between rooms of one floor that the table allows
    ("callbacks", "module"), ("module", "callbacks"), ("failures", "callbacks"),
    ("report", "metrics"), ("tools", "pipeline"),
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "mf_lightning" else [f"mf_lightning.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("mf_lightning.")}
    return found


def climbs(importer: str, imported: str) -> bool:
    if importer == imported:
        return False
    return FLOORS[imported] > FLOORS[importer] or (
        FLOORS[imported] == FLOORS[importer] and FLOORS[importer] > 1 and (importer, imported) not in ACROSS
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path):
    wrong = {target for target in imported_rooms(path) if climbs(room(path), target)}
    assert not wrong, f"{path.name} ({room(path)}) imports {wrong}"


def test_the_walk_sees_a_climb(tmp_path):
    assert climbs("flow", "module")
    assert climbs("flow", "nets")
    assert not climbs("flow", "types")
    assert "callbacks" in imported_rooms(PACKAGE / "cli.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= 320
    assert path.name != "utils.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"


def test_flow_needs_torch_only():
    allowed = {
        "torch",
        "mf_lightning",
        "math",
        "dataclasses",
        "collections",
        "contextlib",
        "abc",
        "shutil",
        "typing",
        "itertools",
        "__future__",
    }
    for path in (PACKAGE / "flow").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] in allowed, path
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path


def test_flow_functions_carry_an_equation_or_section():
    for path in (PACKAGE / "flow").glob("*.py"):
        if path.stem not in ("__init__", "labels", "gaussian"):
            text = ast.get_docstring(ast.parse(path.read_text()))
            assert "MeanFlow" in text, path


def test_every_package_is_in_the_wheel():
    listed = (ROOT / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0]
    for init in PACKAGE.rglob("__init__.py"):
        name = ".".join(init.parent.relative_to(ROOT).parts)
        assert f'"{name}"' in listed, f"pyproject.toml leaves out {name}"
