"""Run the notebooks and put their pictures into docs/images: ``python -m scripts.notebooks [NAME ...]``.

A cell's metadata names its picture; the notebooks themselves stay as they are, without outputs.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IMAGES = ROOT / "docs" / "images"
CELL_TIMEOUT = 900
"""Seconds of the clock after which a cell counts as hanging."""
COLOURS = 128
CPU_SECONDS = "import time; print(time.process_time())"
"""Added as a last cell: what the notebook took, whatever else the machine was doing."""


def execute(path: Path, folder: Path) -> tuple[nbformat.NotebookNode, float]:
    """Return a notebook with its outputs, run in a folder, and its CPU seconds.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CPU_SECONDS))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return notebook, float(notebook.cells.pop().outputs[0].text)


def pictures(notebook: nbformat.NotebookNode) -> dict[str, Image.Image]:
    """Return the pictures of an executed notebook by the names in its cells' metadata."""
    found = {}
    for cell in notebook.cells:
        if "picture" in cell.metadata:
            (data,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
            found[cell.metadata["picture"]] = Image.open(io.BytesIO(base64.b64decode(data)))
    return found


def save_pictures(notebook: nbformat.NotebookNode) -> None:
    """Write an executed notebook's pictures into docs/images, in few colours, since a diagram needs no more."""
    IMAGES.mkdir(exist_ok=True)
    for name, picture in pictures(notebook).items():
        file = IMAGES / f"{name}.png"
        picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
        print(f"  docs/images/{file.name} {file.stat().st_size / 1000:.0f} kB")


def main(names: list[str]) -> None:
    """Render the notebooks whose names begin so; none given is all."""
    for path in NOTEBOOKS:
        if names and not path.name.startswith(tuple(names)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            notebook, seconds = execute(path, Path(folder))
        print(f"{path.name}: {seconds:.0f} CPU seconds")
        save_pictures(notebook)


if __name__ == "__main__":
    main(sys.argv[1:])
