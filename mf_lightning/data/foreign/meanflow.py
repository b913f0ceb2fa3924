"""The official MeanFlow preparation: ``train/00000000.pt``, one file per image.

Layout and content as in Gsunshine/meanflow ``prepare_dataset.py`` and ``utils/data_util.py`` (read in its copy rese1f/meanflow
905912f; Lyy-iiis/imeanflow's is the same). A file is ``torch.save({"image": moments, "label": label})``: mean and STD, stacked,
(2C, h, w), unscaled, in the channels-first order that ``utils/vae_util.py`` reads, and a label as a tensor without dimensions.
There is no mirrored copy. The preparation takes sd-vae-ft-mse in its flax copy unless told otherwise, and training 0.18215.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mf_lightning.data.foreign.source import DAMAGE, Facts, FilePerSample, files_below, has_file, unreadable, whole_label
from mf_lightning.data.walk import check_link
from mf_lightning.types import UserError


class MeanFlowSource(FilePerSample):
    """Moments and label in a file for each image, in the order of their names.

    Args:
        path: the folder of the .pt files, or the one that holds it as ``train``.
        follow_links: also take what symbolic links out of the folder point to.
    """

    layout = "a folder (or its train) with .pt files, each with image and label"
    holds = "mean_std"
    facts = Facts("stabilityai/sd-vae-ft-mse", 0.18215, 0.0, 8)

    def __init__(self, path: Path, follow_links: bool = False) -> None:
        root = _root(path)
        check_link(root, path, follow_links=follow_links)
        super().__init__(root, sorted(files_below(root, ".pt", follow_links=follow_links, within=path, deep=False)))

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Look for .pt files and for nothing that another layout keeps beside them."""
        root = _root(path)
        return has_file(root, ".pt", deep=False) and not has_file(root, ".safetensors", deep=False)

    def read_file(self, number: int) -> tuple[np.ndarray, int, None]:
        """Read one file, as tensors only."""
        file = self.root / self.files[number]
        try:
            sample = torch.load(file, map_location="cpu", weights_only=True)
        except DAMAGE as error:
            raise unreadable(file, error) from error
        if not (isinstance(sample, dict) and {"image", "label"} <= set(sample) and isinstance(sample["image"], torch.Tensor)):
            found = ", ".join(map(str, sample)) if isinstance(sample, dict) else type(sample).__name__
            raise UserError(
                f"Got '{file}' with {found}, expected the tensors image and label, as the official MeanFlow preparation "
                "writes them. Check KIND and SOURCE."
            )
        return to_numpy(sample["image"]), whole_label(sample["label"], f"'{file}'"), None


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's numbers; bfloat16, which numpy has not, as float32, without loss."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _root(path: Path) -> Path:
    return path / "train" if (path / "train").is_dir() and not has_file(path, ".pt", deep=False) else path
