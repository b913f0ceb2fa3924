"""Stored bytes => the square of pixels that an autoencoder sees, cropped as ADM does."""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from mf_lightning.data.images.source import Unreadable

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Pillow knows more, and runs other programs for some of them."""
ENLARGED = "smaller than the crop, enlarged"
ANIMATED = "animated, first frame taken"
TRANSPARENT = "with transparency, laid on white"
TURNED = "turned as their EXIF orientation says"
DEEP = "of 16 bits a channel, brought to 8"
NO_EXIF = "with damaged EXIF, taken as upright"
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Picture:
    """One decoded and cropped image."""

    pixels: np.ndarray
    """(c, size, size) uint8; (c, height, width) where nothing was cropped."""
    traits: tuple[str, ...]
    """What was done to it beyond the crop, for the summary."""


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the middle square of an image, resized as ADM does: halved with a box filter while it is at least twice too
    large, then brought to ``size`` on its short side with a bicubic filter.

    Args:
        image: of any size; a smaller one is enlarged.
        size: edge of the square, in pixels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_picture(content: bytes, *, size: int | None, channels: int) -> Picture:
    """Return the cropped pixels of an image file's bytes.

    EXIF orientation is applied, CMYK and palettes become RGB, transparent pixels are laid on white, 16 bits a channel are
    scaled to 8, and of an animation the first frame is taken.

    Args:
        content: of the file.
        size: edge of the square; None leaves the picture as it is.
        channels: 3 for RGB, 1 for grey.

    Raises:
        Unreadable: not an image, damaged, cut off, or of more pixels than Pillow's limit for decompression bombs.
    """
    traits: list[str] = []
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_pixels(image, size)
        if getattr(image, "is_animated", False) and image.format != "MPO":  # which holds a photograph and its previews
            traits.append(ANIMATED)
        if image.format == "TIFF" and image.getexif().get(_ORIENTATION) in _TURNS:
            traits.append(TURNED)  # by Pillow, when it loads the pixels
        image.load()
        image = _opaque(_turned(image, traits), "RGB" if channels == 3 else "L", traits)
        if size is not None and min(image.size) < size:
            traits.append(ENLARGED)
        pixels = np.asarray(image if size is None else center_crop(image, size))
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable(f"no image of the formats {', '.join(FORMATS)}" if content else "an empty file") from error
    except _BROKEN as error:
        told = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error)) or "no reason given"
        raise Unreadable(f"{type(error).__name__}: {told}") from error
    planes = pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)
    return Picture(np.ascontiguousarray(planes), tuple(traits))


def _check_pixels(image: Image.Image, size: int | None) -> None:
    """Refuse what would fill the memory, before a pixel is decoded."""
    limit, pixels, short = Image.MAX_IMAGE_PIXELS or 1 << 62, image.width * image.height, max(1, min(image.size))
    told = f"{image.width} x {image.height} pixels"
    if pixels > limit:
        raise Unreadable(f"{told}, more than Pillow's limit of {limit:,}: a decompression bomb?")
    if size is not None and pixels * max(1, size / short) ** 2 > limit:
        raise Unreadable(f"{told}, so narrow that it has more than {limit:,} when it is enlarged to {size}")


def _turned(image: Image.Image, traits: list[str]) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except (*_BROKEN, TypeError, AttributeError):  # the picture itself may be whole
        traits.append(NO_EXIF)
        return image
    if turn is None:
        return image
    traits.append(TURNED)
    return image.transpose(turn)


def _opaque(image: Image.Image, mode: str, traits: list[str]) -> Image.Image:
    """Return an image in "RGB" or "L" of one in any of Pillow's modes."""
    if image.mode == "F":
        raise Unreadable("floating-point pixels, whose range nothing tells")
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep, hidden = np.asarray(image).astype(np.int32), image.info.get("transparency")
        if deep.min() < 0 or deep.max() > 65535:
            raise Unreadable(f"values from {deep.min()} to {deep.max()}, expected 16 bits at most")
        traits.append(DEEP)
        image = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
        if isinstance(hidden, int):
            image = Image.merge("LA", (image, Image.fromarray(np.where(deep == hidden, 0, 255).astype(np.uint8))))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            traits.append(TRANSPARENT)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
