"""Which figures there are, and what besides the network moves them."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, NamedTuple


class MetricInfo(NamedTuple):
    """A figure of generated images."""

    name: str
    better: Literal["min", "max"]
    title: str


METRICS = (
    MetricInfo("fid", "min", "FID"),
    MetricInfo("sfid", "min", "sFID"),
    MetricInfo("kid", "min", "KID"),
    MetricInfo("fd_dinov2", "min", "FD DINOv2"),
    MetricInfo("inception_score", "max", "Inception Score"),
    MetricInfo("precision", "max", "Precision"),
    MetricInfo("recall", "max", "Recall"),
    MetricInfo("class_accuracy", "max", "Class accuracy"),
)
"""In the order in which they are shown."""
NAMES = tuple(metric.name for metric in METRICS)
COMPARED = ("ema", "nfe")
"""What figures of one protocol are compared over."""
DERIVED = ("kid_subset_size",)
"""What follows from the rest, and is only there where KID is."""
ONCE_UNTOLD = {"sampler": "average velocity", "weights": None}
"""What protocols that do not tell it had."""


def protocol_id(protocol: dict[str, Any]) -> str:
    """Return eight hexadecimal digits that equal protocols share, whatever EMA and NFE: only their figures compare.

    Args:
        protocol: as it stands beside a figure, JSON values.
    """
    fixed = {k: value for k, value in protocol.items() if k not in COMPARED + DERIVED and ONCE_UNTOLD.get(k) != value}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:8]
