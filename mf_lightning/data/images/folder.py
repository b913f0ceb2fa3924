"""Images in folders: one folder per class (ImageNet layout), or all in one with a labels file."""

from __future__ import annotations

import os
from pathlib import Path

from mf_lightning.data.images.labels import LABEL_FILES, find_labels
from mf_lightning.data.images.source import ImageSource, ignored_note, is_image, no_images, read_file
from mf_lightning.types import UserError


class FolderSource(ImageSource):
    """All images below a folder, sorted by their path within it.

    Args:
        root: the folder.
        labels: a labels file, "none", or None: a labels file in the folder, or else one class per folder.
        follow_links: also take what symbolic links outside of the folder point to.

    Raises:
        UserError: no images, no or wrong labels, links out of the folder or in a circle.
    """

    def __init__(self, root: Path, labels: str | None = None, follow_links: bool = False) -> None:
        self.root = root
        found = sorted(_walk(root, follow_links))
        names = [name for name in found if is_image(name)]
        if not names:
            raise no_images(root)
        inside = {name: (root / name).read_bytes() for name in LABEL_FILES if name in set(found)}
        numbers, class_names, how = find_labels(names, labels, inside, root)
        others = [name for name in found if not is_image(name) and name not in inside]
        super().__init__(names, numbers, class_names, [how, *ignored_note(others)])

    def read(self, number: int) -> bytes:
        """Return the file's bytes."""
        return read_file(self.root / self.names[number])


def _walk(root: Path, follow_links: bool) -> list[str]:
    """Return the paths of all files, relative to ``root``."""
    real = os.path.realpath(root)
    found, todo = [], [("", (real,))]
    while todo:
        folder, above = todo.pop()
        try:
            entries = list(os.scandir(root / folder))
        except OSError as error:
            raise UserError(
                f"Got the folder {str(root / folder)!r}, which cannot be listed ({error.strerror}). Make it readable."
            ) from error
        for entry in entries:
            name = folder + entry.name
            target = os.path.realpath(entry.path) if entry.is_symlink() else None
            if target is not None and not follow_links and not _within(target, real):
                raise UserError(
                    f"Got the symbolic link {str(root / name)!r} to {target!r}, expected only links within '{root}'. "
                    "Give --follow_links=true if what it points to belongs to the images."
                )
            if not entry.is_dir():
                found.append(name)
            elif target is None:
                todo.append((name + "/", (*above, os.path.join(above[-1], entry.name))))
            elif target in above:
                raise UserError(f"Got the symbolic link {str(root / name)!r} to a folder above it, a circle. Remove the link.")
            else:
                todo.append((name + "/", (*above, target)))
    return found


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
