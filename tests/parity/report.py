"""One stored file, and the rows that comparing with it gives."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

OK, FAIL, DEVIATES, NOT_BUILT = "ok", "FAIL", "deviates", "not built"

BOUND = 1e-5
"""Of networks, losses, fields, gradients and samplers: largest difference over largest stored value."""

Value = Tensor | np.ndarray | float | Callable[[], "Tensor | np.ndarray | float"]
"""What we compute; as a function, so that its failure costs one row and not the whole file."""

Gradients = Mapping[str, Tensor]
"""Arrays by parameter name."""


class MissingArray(LookupError):
    """A file lacks an array that a check needs."""


class Unreadable(LookupError):
    """A file is no .npz of plain numbers."""


@dataclass(frozen=True)
class Row:
    """One compared quantity."""

    file: str
    quantity: str
    status: str
    error: float | None
    """Largest difference, relative unless the note says otherwise; NaN never passes; None if nothing was compared."""
    bound: float | None
    note: str = ""


def difference(got: Tensor, expected: Tensor) -> float:
    """Return max|a - b| / max|b|, or max|a - b| if b is all zero; NaN if either holds one."""
    got, expected = got.detach().double(), expected.detach().double()
    largest = (got - expected).abs().max().item()
    scale = expected.abs().max().item()
    return largest / scale if scale > 0 else largest


def measure(got: Tensor | np.ndarray | float, expected: Tensor) -> tuple[float, str]:
    """Return the difference and, where it is NaN or infinite, why."""
    got = got if isinstance(got, Tensor) else torch.from_numpy(np.asarray(got))
    if got.shape != expected.shape:
        return math.nan, f"got shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return math.nan, "the stored array is empty"
    error = difference(got, expected)
    return error, "" if math.isfinite(error) else "not a number, or infinite"


class Oracle:
    """The arrays of one .npz file, which remembers what was read.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                self.arrays = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise Unreadable(f"got {path.name} unreadable ({error}), expected an .npz; copy it again") from error
        self.name = path.name
        self.unread = set(self.arrays)

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.arrays:
            raise MissingArray(f"missing array '{key}' in {self.name}; compute the file again")
        self.unread.discard(key)
        return self.arrays[key]

    def number(self, key: str) -> float | int:
        """Return a scalar."""
        return self[key].item()

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the arrays whose name starts with the prefix, by the rest of their name."""
        found = {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}
        if not found:
            raise MissingArray(f"missing arrays '{prefix}...' in {self.name}; compute the file again")
        return found


class Checks:
    """Compares values with the arrays of one file and keeps a row of each comparison.

    Args:
        oracle: the file.
    """

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.rows: list[Row] = []

    def add(self, quantity: str, status: str, error: float | None, bound: float | None, note: str = "") -> None:
        self.rows.append(Row(self.oracle.name, quantity, status, error, bound, note))

    def judge(self, quantity: str, error: float, bound: float, note: str = "") -> None:
        """Add a row that is ok if the error is a number within the bound."""
        self.add(quantity, OK if error <= bound else FAIL, error, bound, note)

    def close(self, key: str, got: Value, *, name: str = "", bound: float = BOUND, note: str = "") -> None:
        """Compare with a stored array; FAIL if it is missing or of another shape, or if our side cannot be run."""
        name = name or key
        error, problem = self._measure(got, key)
        self.judge(name, error, bound, problem or note)

    def same(self, key: str, got: Value, *, name: str = "", note: str = "") -> None:
        """Compare with a stored array that must be met exactly."""
        self.close(key, got, name=name, bound=0.0, note=note)

    def deviates(self, key: str, got: Value, *, name: str = "", note: str) -> None:
        """Show how far a deliberately different implementation is; only NaN and missing arrays FAIL."""
        error, problem = self._measure(got, key)
        self.add(name or key, FAIL if math.isnan(error) else DEVIATES, error, None, problem or note)

    def gradients(self, name: str, got: Gradients, expected: Callable[[], Gradients], *, deviates: str = "") -> None:
        """Add one row for all parameters, each measured against its own largest value; the worst one is named.

        Args:
            name: quantity.
            got: ours, by parameter.
            expected: gives the stored ones; missing ones FAIL.
            deviates: why they differ on purpose; empty if they must not.
        """
        try:
            stored = expected()
        except (MissingArray, ValueError) as error:
            return self.judge(name, math.nan, BOUND, str(error))
        apart = sorted(got.keys() ^ stored.keys())
        if apart:
            return self.judge(name, math.nan, BOUND, f"parameters on one side only: {', '.join(apart)}")
        found = {key: measure(got[key], value) for key, value in stored.items()}
        worst = max(found, key=lambda key: math.inf if math.isnan(found[key][0]) else found[key][0])
        error, problem = found[worst]
        name, failed = f"{name} (worst: {worst})", sum(not error <= BOUND for error, _ in found.values())
        if deviates and not math.isnan(error):
            return self.add(name, DEVIATES, error, None, deviates)
        return self.judge(name, error, BOUND, problem or f"{len(found) - failed} of {len(found)} parameters agree")

    def _measure(self, got: Value, key: str) -> tuple[float, str]:
        """Return the error, NaN if there is none, and what went wrong."""
        try:
            expected = self.oracle[key]
            got = got() if callable(got) else got
        except MissingArray as error:
            return math.nan, str(error)
        except Exception as error:  # whatever our side raises is a finding about our side: show it, go on
            return math.nan, f"{type(error).__name__}: {error}"
        return measure(got, expected)
