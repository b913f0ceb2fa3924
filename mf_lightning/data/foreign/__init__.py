"""Latents that other projects wrote: one reader per layout, which says what the files are called and what they hold."""

from __future__ import annotations

from pathlib import Path

from mf_lightning.data.foreign.arrays import ArraySource
from mf_lightning.data.foreign.lightningdit import LightningDiTSource
from mf_lightning.data.foreign.mar import FolderSource, LmdbSource
from mf_lightning.data.foreign.meanflow import MeanFlowSource
from mf_lightning.data.foreign.repa import RepaSource
from mf_lightning.data.foreign.source import Facts, Holds, Rows, Source
from mf_lightning.data.shards import INFO_FILE
from mf_lightning.types import UserError

__all__ = ["LAYOUTS", "Facts", "Holds", "Rows", "Source", "open_source"]

LAYOUTS: dict[str, tuple[type[Source], ...]] = {
    "repa": (RepaSource,),
    "meanflow": (MeanFlowSource,),
    "mar": (LmdbSource, FolderSource),
    "lightningdit": (LightningDiTSource,),
    "arrays": (ArraySource,),
}
"""The layouts of each kind."""


def open_source(kind: str, path: str | Path, holds: Holds | None = None, follow_links: bool = False) -> Source:
    """Return a reader of latents in a folder of another project.

    Args:
        kind: one of ``LAYOUTS``.
        path: where that project wrote them.
        holds: what plain arrays hold; the other layouts say it themselves.
        follow_links: also take what symbolic links out of the folder point to.

    Raises:
        UserError: nothing there, files of another layout, damaged ones, or links out of the folder.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"Got SOURCE = '{path}', which does not exist, expected the latents of another project. Check the path."
        )
    if (holds is not None) != (kind == "arrays"):
        raise UserError(
            f"Got --holds {holds} for the kind {kind}, expected it for plain arrays, and for them only: the files of other "
            "kinds say it themselves. Give --holds mean_std, mean_logvar or latents with the kind arrays."
        )
    for layout in LAYOUTS[kind]:
        if layout.fits(path):
            return layout(path, holds, follow_links) if layout is ArraySource else layout(path, follow_links)
    expected = "; or ".join(layout.layout for layout in LAYOUTS[kind])
    raise UserError(f"Got SOURCE = '{path}', {_what_is_there(path)}, expected {expected}. Check KIND and SOURCE.")


def _what_is_there(path: Path) -> str:
    if path.is_dir() and not any(path.iterdir()):
        return "an empty folder"
    if (path / INFO_FILE).is_file() and not RepaSource.fits(path):
        return "which is a data set of this project already"
    like = [kind for kind, layouts in LAYOUTS.items() if any(layout.fits(path) for layout in layouts)]
    return f"which looks like the kind {' or '.join(like)}" if like else "which looks like no kind that is known here"
