"""WebDataset: tars in which the files of one sample follow each other and share a key (``0001.jpg``, ``0001.cls``)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath

from mf_lightning.data.images.archive import Member, TarIndex, TarReader
from mf_lightning.data.images.labels import NONE, Label, Labels, no_labels, number_classes
from mf_lightning.data.images.source import ENDINGS, ImageSource, Unreadable, is_image, no_images
from mf_lightning.types import UserError

JSON_FIELDS = ("label", "cls")


def split_key(name: str) -> tuple[str, str]:
    """Return key and ending: "a/0001.seg.png" is the sample "a/0001" and its file "seg.png"."""
    path = PurePosixPath(name)
    key, _, ending = path.name.partition(".")
    return str(path.with_name(key)) if key else name, ending.lower()


def is_webdataset(names: Sequence[str]) -> bool:
    """Tell whether labels lie beside images: some image has a ``.cls`` or ``.json`` file of the same key."""
    keys = {split_key(name)[0] for name in names if is_image(name)}
    return any(key in keys for key, ending in map(split_key, names) if ending in ("cls", "json"))


class WebDatasetSource(ImageSource):
    """The images of WebDataset tars: tars sorted by name, samples in the order stored, labels from ``.cls`` or ``.json``.

    A ``.cls`` file holds a number or a name; a ``.json`` file one of them as ``label`` or ``cls``.

    Args:
        index: the tars' files.
        labels: "none", or None to read them from the tars.

    Raises:
        UserError: no images, images without a label, or labels without an image.
    """

    def __init__(self, index: TarIndex, labels: str | None = None) -> None:
        where = f"{index.paths[0].parent}"
        if labels not in (None, NONE):
            raise UserError(
                f"Got --labels={labels} for WebDataset tars, expected their own labels. Leave it out, or give none."
            )
        self.reader = TarReader(index)
        self.any_order = not index.compressed
        samples = _samples(index)
        pictures = {key: ending for key, files in samples.items() for ending in files if f".{ending}" in ENDINGS}
        if not pictures:
            raise no_images(where)
        self.members = [samples[key][ending] for key, ending in pictures.items()]
        names = [f"{index.paths[key[0]].name}/{key[1]}.{ending}" for key, ending in pictures.items()]
        found = no_labels(len(names)) if labels == NONE else self._labels(samples, list(pictures), where)
        how = "no labels" if labels == NONE else "WebDataset, labels from .cls or .json members"
        super().__init__(names, *found, [how])

    def _labels(self, samples: dict, keys: list, where: str) -> Labels:
        kept = set(keys)
        labels = {key: self._label(files, key, where) for key, files in samples.items()}
        without = [key for key in keys if labels[key] is None]
        beyond = [key for key, label in labels.items() if label is not None and key not in kept]
        if without or beyond:
            name, what = (without[0], "no label") if without else (beyond[0], "a label but no image")
            raise UserError(
                f"Got labels that do not match in '{where}': {len(without):,} image(s) without .cls or .json, {len(beyond):,} "
                f"label(s) without an image; the first is the sample {name[1]!r} with {what}. Expected both in each sample. "
                "Correct the tars, or give --labels=none for images without classes."
            )
        return number_classes([labels[key] for key in keys], where)

    def _label(self, files: dict[str, Member], key: tuple[int, str], where: str) -> Label | None:
        try:
            if "cls" in files:
                return self.reader.read(files["cls"]).decode().strip()
            if "json" in files:
                body = json.loads(self.reader.read(files["json"]))
                return next((body[field] for field in JSON_FIELDS if isinstance(body.get(field), int | str)), None)
        except (Unreadable, ValueError, AttributeError) as error:
            raise UserError(
                f"Got the label of {key[1]!r} in '{where}', which cannot be read ({error}), expected text in .cls or "
                f'{{"label": ...}} in .json. Correct it.'
            ) from error
        return None

    def read(self, number: int) -> bytes:
        """Return the member's bytes."""
        return self.reader.read(self.members[number])


def _samples(index: TarIndex) -> dict[tuple[int, str], dict[str, Member]]:
    """Return each sample's files by ending, keyed by number of the tar and key."""
    samples: dict[tuple[int, str], dict[str, Member]] = {}
    for name, member in zip(index.names, index.members, strict=True):
        key, ending = split_key(name)
        files = samples.setdefault((member.archive, key), {})
        if ending in files or (f".{ending}" in ENDINGS and any(f".{other}" in ENDINGS for other in files)):
            raise UserError(
                f"Got the sample {key!r} in '{index.paths[member.archive]}' with two files of one kind, expected one "
                "image and one label. Remove one."
            )
        files[ending] = member
    return samples
