"""Parts of a data set without a copy: which rows of a split are kept, decided by labels and a seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mf_lightning.types import UserError

HELD_OUT = "held-out"
"""Name of the validation split that ``val_fraction`` takes from the training split."""


@dataclass(frozen=True)
class Subset:
    """Which rows train and validate. Classes keep their numbers, so the network does not change.

    Args:
        classes: names, or numbers, of the classes to keep, in training and validation; null keeps all.
        max_per_class: most training rows of each class; null is no limit. 100 are among the 200 of a larger limit.
        balanced: keep equally many training rows of each class, those of the smallest one.
        val_fraction: share of each class of the training split that is held out and validates in place of val_split; 0 holds
            out none.
        seed: decides which rows.
    """

    classes: list[int | str] | None = None
    max_per_class: int | None = None
    balanced: bool = False
    val_fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_per_class is not None and self.max_per_class < 1:
            raise UserError(f"Got subset.max_per_class = {self.max_per_class}, expected at least 1, or null for no limit.")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"Got subset.val_fraction = {self.val_fraction}, expected a share in [0, 1); 0 holds out none.")
        if self.seed < 0:
            raise UserError(f"Got subset.seed = {self.seed}, expected 0 or more.")
        if self.classes is not None and not self.classes:
            raise UserError("Got subset.classes without any class, expected at least one, or null for all.")

    @property
    def takes_all(self) -> bool:
        """Tell whether every row is kept."""
        return self.classes is None and self.max_per_class is None and not self.balanced and not self.val_fraction

    def holds_out(self, val_split: str) -> bool:
        """Tell whether rows of the training split validate in place of ``val_split``.

        Raises:
            UserError: both are asked for.
        """
        if self.val_fraction and val_split != "val":
            raise UserError(
                f"Got data.init_args.val_split = {val_split} and subset.val_fraction = {self.val_fraction}, expected one of "
                "them: rows that are held out validate in place of a split. Leave one out."
            )
        return self.val_fraction > 0

    def describe(self) -> str:
        """Return what decides the training rows, as a checkpoint notes it."""
        classes = "all" if self.classes is None else ",".join(map(str, self.classes))
        return (
            f"classes {classes}; max_per_class {self.max_per_class}; balanced {self.balanced}; "
            f"val_fraction {self.val_fraction}; seed {self.seed}"
        )

    def training_rows(self, labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
        """Return the rows of the training split that train, sorted, (M,) int64.

        Args:
            labels: of the whole training split, (N,).
            class_names: of the data set.

        Raises:
            UserError: an unknown class, a class without rows to balance with, nothing left.
        """
        rows = {k: mine[self._held_out(len(mine)) :] for k, mine in self._by_class(labels, class_names).items()}
        limit = max((len(mine) for mine in rows.values()), default=0)
        if self.max_per_class is not None:
            limit = min(limit, self.max_per_class)
        if self.balanced:
            empty = [k for k, mine in rows.items() if not len(mine)]
            if empty:
                raise UserError(
                    f"Got no training row of class {_named(empty[0], class_names)}, expected some of each of the {len(rows)} "
                    "classes that subset.balanced makes equally large. Name the others in subset.classes, or lower "
                    "subset.val_fraction."
                )
            limit = min(limit, *(len(mine) for mine in rows.values()))
        return _joined([mine[:limit] for mine in rows.values()], "train", self)

    def validation_rows(self, labels: np.ndarray, class_names: Sequence[str], *, held_out: bool) -> np.ndarray:
        """Return the rows that validate, sorted, (M,) int64.

        Args:
            labels: of the whole split that they are of, (N,).
            class_names: of the data set.
            held_out: take the held-out rows of the training split; else all rows of the classes, of a validation split.

        Raises:
            UserError: an unknown class, nothing left.
        """
        rows = self._by_class(labels, class_names).values()
        return _joined([mine[: self._held_out(len(mine)) if held_out else None] for mine in rows], "validate", self)

    def _held_out(self, count: int) -> int:
        return round(self.val_fraction * count)

    def _by_class(self, labels: np.ndarray, class_names: Sequence[str]) -> dict[int, np.ndarray]:
        """Return each kept class's rows, in an order that (seed, class) decides."""
        order = np.argsort(labels, kind="stable")
        classes = self._numbers(class_names)
        firsts = np.searchsorted(labels[order], classes)
        ends = np.searchsorted(labels[order], classes, side="right")
        found = {}
        for k, first, end in zip(classes, firsts, ends, strict=True):
            generator = np.random.Generator(np.random.Philox(key=[self.seed, k]))
            found[k] = generator.permutation(order[first:end])
        return found

    def _numbers(self, class_names: Sequence[str]) -> list[int]:
        if self.classes is None:
            return list(range(max(1, len(class_names))))
        if not class_names:
            raise UserError(f"Got subset.classes = {self.classes} for a data set without classes, expected null. Leave it out.")
        numbers = set()
        for given in self.classes:
            if isinstance(given, str) and given in class_names:
                numbers.add(list(class_names).index(given))
            elif isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(class_names):
                numbers.add(given)
            else:
                raise UserError(
                    f"Got the class {given!r} in subset.classes, expected a name or a number in [0, {len(class_names)}) of "
                    f"this data set: {', '.join(class_names[:20])}{', ...' if len(class_names) > 20 else ''}. Correct it."
                )
        return sorted(numbers)


def _named(k: int, class_names: Sequence[str]) -> str:
    return f"{k} ({class_names[k]})" if class_names else str(k)


def _joined(rows: list[np.ndarray], use: str, subset: Subset) -> np.ndarray:
    joined = np.sort(np.concatenate(rows)) if rows else np.zeros(0, np.int64)
    if not len(joined):
        raise UserError(
            f"Got no row to {use} with, of the subset {subset.describe()}, expected at least one. Keep more classes, or change "
            "subset.val_fraction."
        )
    return joined
