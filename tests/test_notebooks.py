"""Every notebook runs, is stored without outputs, and its pictures are in the documentation."""

import os
import re

import nbformat
import pytest
from PIL import Image

from scripts.notebooks import IMAGES, NOTEBOOKS, execute, pictures
from tests.runs import ROOT

SLOW = ("1_", "2_", "3_")
CPU_SECONDS = 180
RUN = [pytest.param(path, id=path.stem[:1], marks=[pytest.mark.slow] * path.name.startswith(SLOW)) for path in NOTEBOOKS]
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def names_of(path) -> list[str]:
    return [cell.metadata["picture"] for cell in nbformat.read(path, as_version=4).cells if "picture" in cell.metadata]


def test_there_are_four():
    assert [path.name[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_"]


@EACH
def test_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@EACH
def test_defines_nothing_that_the_package_has(path):
    """No function or class of a notebook bears the name of one of the package or of another notebook."""
    pattern = r"^(?:def|class) (\w+)"
    package = {name for file in (ROOT / "mf_lightning").rglob("*.py") for name in re.findall(pattern, file.read_text(), re.M)}
    code = {p: "\n".join(c.source for c in nbformat.read(p, as_version=4).cells if c.cell_type == "code") for p in NOTEBOOKS}
    mine = set(re.findall(pattern, code[path], re.M))
    others = {name for p in NOTEBOOKS if p != path for name in re.findall(pattern, code[p], re.M)}
    assert not mine & (package | others)


@EACH
def test_pictures_are_shown(path):
    text = (ROOT / "docs" / "notebooks.md").read_text()
    assert f"notebooks/{path.name}" in text
    for name in names_of(path):
        assert f"images/{name}.png" in text
        assert (IMAGES / f"{name}.png").stat().st_size < 150_000
        Image.open(IMAGES / f"{name}.png").verify()


@pytest.mark.parametrize("path", RUN)
def test_runs(path, tmp_path):
    assert os.environ["OMP_NUM_THREADS"] == "1"  # CPU seconds are then seconds of a quiet machine
    notebook, seconds = execute(path, tmp_path)
    assert seconds < CPU_SECONDS
    assert sorted(pictures(notebook)) == sorted(names_of(path))
