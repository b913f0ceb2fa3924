"""Images in folders: one folder per class (ImageNet layout), or all in one with a labels file."""

from __future__ import annotations

from pathlib import Path

from mf_lightning.data.images.labels import LABEL_FILES, find_labels
from mf_lightning.data.images.source import ImageSource, ignored_note, is_image, no_images, read_file
from mf_lightning.data.walk import walk_files


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
        found = sorted(walk_files(root, follow_links=follow_links))
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
