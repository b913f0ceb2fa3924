"""Sheets of pictures: a plain one, and one with a name before each row and above each column."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mf_lightning.types import UserError

GAP = 2
SMALLEST = 64
"""Pixels that a picture is at least wide on the sheet, so that what is written fits; it is enlarged by whole factors."""
PAPER, INK = (255, 255, 255), (30, 30, 30)


def to_picture(pixels: Tensor) -> Image.Image:
    """Return one uint8 picture, (1 or 3, H, W), as a PIL image."""
    array = pixels.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.moveaxis(array, 0, -1))


def tile(pixels: Tensor, *, columns: int, gap: int = 2) -> Tensor:
    """Return one picture, (c, H', W'), of uint8 pictures, (N, c, H, W), row by row, with a mid-grey gap between them."""
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 128, dtype=torch.uint8)
    for number, picture in enumerate(pixels.cpu()):
        top, left = (gap + (number // columns) * (height + gap), gap + (number % columns) * (width + gap))
        sheet[:, top : top + height, left : left + width] = picture
    return sheet


def labelled_grid(rows: dict[str, Tensor], columns: list[str], *, scale: int = 1) -> Image.Image:
    """Return a sheet with a name before each row and above each column.

    Args:
        rows: each row's uint8 pictures, (N, c, H, W), by name; all of one size.
        columns: names of the N columns, shortened where they do not fit.
        scale: each pixel is drawn at least this many pixels wide.
    """
    _, _, height, width = next(iter(rows.values())).shape
    scale = max(scale, -(-SMALLEST // width))
    height, width = height * scale, width * scale
    font = _font(max(12, min(24, width // 6)))
    left = max(int(font.getlength(name)) for name in rows) + 4 * GAP
    top = sum(font.getmetrics()) + 2 * GAP
    size = (left + len(columns) * (width + GAP), top + len(rows) * (height + GAP))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, name in enumerate(columns):
        middle = left + number * (width + GAP) + width // 2
        draw.text((middle, top - GAP), _fitted(name, width, font), fill=INK, font=font, anchor="md")
    for number, (name, pictures) in enumerate(rows.items()):
        y = top + number * (height + GAP)
        draw.text((left - 2 * GAP, y + height // 2), name, fill=INK, font=font, anchor="rm")
        for column, pixels in enumerate(pictures):
            picture = to_picture(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture.convert("RGB"), (left + column * (width + GAP), y))
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise UserError(
            "Got a Pillow without FreeType, expected one that can write words on the grids. Reinstall it (pip install -U "
            "pillow), or turn grids off with sample_grid.rows=0."
        )
    return font


def _fitted(name: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Return a name, cut to a width in pixels."""
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(name + "…") > width:
        name = name[:-1]
    return name + "…" if name else ""


def pick_real(labels: np.ndarray, wanted: list[int] | None, count: int) -> list[int]:
    """Return the number of a real sample for each column, no sample twice where a class has several.

    Args:
        labels: of the samples, (N,).
        wanted: class of each column; None takes the first samples whatever they are.
        count: columns.

    Returns:
        ``count`` numbers; -1 where there is no sample of the class.
    """
    if wanted is None:
        return [number if number < len(labels) else -1 for number in range(count)]
    used: dict[int, int] = {}
    found = []
    for label in wanted:
        of_class = np.flatnonzero(labels == label)
        found.append(int(of_class[used.get(label, 0) % len(of_class)]) if len(of_class) else -1)
        used[label] = used.get(label, 0) + 1
    return found


def blank(like: Tensor) -> Tensor:
    """Return a white picture of the shape of another, for a class without samples."""
    return torch.full_like(like, 255)
