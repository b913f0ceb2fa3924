"""The files below a folder; symbolic links that lead out of it are refused unless they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mf_lightning.types import UserError


def walk_files(root: Path, *, follow_links: bool, within: Path | None = None, deep: bool = True) -> Iterator[str]:
    """Yield the paths of all files, relative to ``root``, in no order.

    Args:
        root: the folder.
        follow_links: also take what symbolic links out of ``within`` point to.
        within: the folder that links may not lead out of; None is ``root``.
        deep: False yields the files of ``root`` itself only.

    Raises:
        UserError: a folder that cannot be listed, a link out of ``within`` or in a circle.
    """
    tree = os.path.realpath(within or root)
    todo = [("", (os.path.realpath(root),))]
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
            if target is not None and not follow_links:
                _check_target(root / name, target, tree)
            if not entry.is_dir():
                yield name
            elif not deep:
                continue
            elif target is None:
                todo.append((name + "/", (*above, os.path.join(above[-1], entry.name))))
            elif target in above:
                raise UserError(f"Got the symbolic link {str(root / name)!r} to a folder above it, a circle. Remove the link.")
            else:
                todo.append((name + "/", (*above, target)))


def check_link(path: Path, within: Path, *, follow_links: bool) -> None:
    """Refuse a path that leads out of a folder through a symbolic link.

    Raises:
        UserError: naming it and where it leads.
    """
    if not follow_links:
        _check_target(path, os.path.realpath(path), os.path.realpath(within))


def _check_target(path: Path, target: str, tree: str) -> None:
    if target != tree and not target.startswith(tree.rstrip("/") + "/"):
        raise UserError(
            f"Got the symbolic link {str(path)!r} to {target!r}, expected only links within '{tree}'. "
            "Give --follow_links=true if what it points to belongs to the data."
        )
