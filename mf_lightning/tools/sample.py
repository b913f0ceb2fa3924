"""`python -m mf_lightning sample`: a sheet of pictures of a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from mf_lightning.pipeline import MeanFlowPipeline
from mf_lightning.pipeline.requests import check_count, choose_grid
from mf_lightning.sheet import labelled_grid, tile, to_picture
from mf_lightning.tools.generators import open_generator
from mf_lightning.types import UserError

NAMED_ROWS = 20
"""Classes up to which each has a row with its name."""


def sample(
    checkpoint: Path,
    out: Path,
    classes: str | None = None,
    n: int | None = None,
    seed: str = "0",
    nfe: str | None = None,
    grid: str | None = None,
    interpolate: bool = False,
    sampler: Literal["average", "euler"] = "average",
    weights: str | None = None,
    autoencoder: str | None = None,
    data: str | None = None,
    device: str | None = None,
    batch_size: int = 64,
    scale: int = 1,
    trust_net: bool = False,
) -> None:
    """Draw pictures of a checkpoint into one PNG; image i is a function of (seed, i) alone.

    Args:
        checkpoint: a file, a directory of shards, or a folder that `export` made.
        out: .png file to write; one picture alone is written as it is, several on a sheet.
        classes: numbers or names, taken in turn, for example 3,7; without it all classes in turn.
        n: pictures; without it as many as there are classes or seeds, at least 16, or 9 on a way.
        seed: pictures 0, 1, ... of one seed; several, for example 0,1,2, take the first picture of each.
        nfe: network passes for each picture; several, for example 1,2,4, give a row each. Without it 1.
        grid: times of the jumps instead, for example 1,0.3,0.
        interpolate: go in n pictures from the first to the second of two seeds, of two classes, or of both.
        sampler: "euler" follows the instantaneous velocity, for flow-matching networks.
        weights: "raw", or an average's decay; without it the one that the run's evaluation used.
        autoencoder: local directory or hub name, where the one that made the latents is not found by its id.
        data: directory of the data set, where the checkpoint does not describe it.
        device: without it a GPU where there is one.
        batch_size: pictures at a time on a GPU.
        scale: each pixel of a sheet is drawn at least this many pixels wide.
        trust_net: import a network class of another package, which runs its code.

    Raises:
        UserError: something asked for that cannot be.
    """
    if out.suffix != ".png":
        raise UserError(f"Got OUT = {out}, expected a name that ends in .png. `predict` writes single files.")
    if scale < 1:
        raise UserError(f"Got --scale={scale}, expected at least 1.")
    passes = [None] if nfe is None else numbers("nfe", nfe, int)
    times = None if grid is None else numbers("grid", grid, float)
    grids = [choose_grid(steps, times) for steps in passes]
    seeds = numbers("seed", seed, int)
    labels = None if classes is None else [name.strip() for name in classes.strip("[]").split(",")]
    count = check_count(n) if n is not None else 9 if interpolate else max(16, len(labels or []), len(seeds))
    if n is None and len(seeds) > 1 and not interpolate:
        count = max(len(seeds), len(labels or []))
    how = {"weights": weights, "autoencoder": autoencoder, "data": data, "device": device, "trust_net": trust_net}
    pipeline = open_generator(checkpoint, **how)
    if interpolate:
        way = torch.linspace(0, 1, count, dtype=torch.float64)
        noise, y = pipeline.between(way, seeds=seeds, labels=labels, moving=True)
        columns = [f"{weight:.2f}" for weight in way.tolist()]
        numbered = None
    else:
        noise, y = pipeline.request(labels, n=count, seed=seeds)
        numbered = None if y is None else y.tolist()
        columns = [""] * count if y is None else [pipeline.class_names[label] for label in numbered]
    made = [pipeline.generate(noise, y, grid=g, sampler=sampler, batch_size=batch_size) for g in grids]
    rows = {f"NFE {one.nfe}": one.pixels for one in made}
    sheet = _sheet(pipeline, rows, columns, numbered, together=interpolate or len(grids) > 1, scale=scale)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out)
    except OSError as error:
        raise UserError(f"Got {out}, which cannot be written ({error.strerror or error}), expected a place for it.") from error
    seconds = ", ".join(f"NFE {one.nfe}: {1000 * one.seconds / count:.1f} ms an image" for one in made)
    print(f"{out}: {count} pictures, seed {', '.join(map(str, seeds))}; {seconds}")


def numbers(name: str, text: str, kind: type) -> list:
    """Return the numbers of an option such as 1,2,4.

    Raises:
        UserError: it holds something else.
    """
    try:
        return [kind(part) for part in text.strip("[]").split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"Got --{name} {text}, expected {what} with commas between them, for example 1 or 1,2,4.") from error


def _sheet(
    pipeline: MeanFlowPipeline,
    rows: dict[str, torch.Tensor],
    columns: list[str],
    labels: list[int] | None,
    *,
    together: bool,
    scale: int,
) -> Image.Image:
    """Return one picture as it is; rows of one noise each; a row for each class; or a plain sheet."""
    pixels = next(iter(rows.values()))
    if together:
        return labelled_grid(rows, columns, scale=scale)
    if len(pixels) == 1:
        return to_picture(pixels[0])
    order = list(dict.fromkeys(labels or []))
    if 1 <= len(order) <= NAMED_ROWS and len(pixels) > len(order):
        by_class = {
            pipeline.class_names[label]: pixels[[i for i, other in enumerate(labels) if other == label]] for label in order
        }
        return labelled_grid(by_class, [""] * max(map(len, by_class.values())), scale=scale)
    if labels is not None and len(pixels) <= NAMED_ROWS:
        return labelled_grid(rows, columns, scale=scale)
    sheet = to_picture(tile(pixels, columns=math.ceil(math.sqrt(len(pixels)))))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
