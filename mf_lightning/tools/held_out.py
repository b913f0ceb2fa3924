"""The validation split that a command takes from its samples."""

from __future__ import annotations

import numpy as np

from mf_lightning.types import UserError


def hold_out(count: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the samples that train and of those that validate: the first of a permutation of seed 0, sorted.

    Args:
        count: of all samples.
        fraction: of them that validates.

    Raises:
        UserError: a split would be empty.
    """
    validate = round(fraction * count)
    if not 0 < validate < count:
        raise UserError(
            f"Got --val_fraction {fraction} of {count:,} samples, which leaves {validate:,} for validation, expected some for "
            "each split. Give another share."
        )
    chosen = np.random.default_rng(0).permutation(count)
    return np.sort(chosen[validate:]), np.sort(chosen[:validate])
