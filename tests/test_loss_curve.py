"""No number moves unnoticed: the smoke recipe's curve in float64, and what a wrong tangent does to it."""

import json

import pytest

from mf_lightning.flow import MeanFlowLoss
from mf_lightning.types import UserError
from tests.loss_curve import STEPS, STORED, record
from tests.nets import along


def worst(one, other, key) -> float:
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(one, other, strict=True))


def test_curve_is_the_stored_one_and_the_same_bits_twice(tmp_path):
    stored = json.loads(STORED.read_text())
    first = record(tmp_path / "first")
    assert len(first) == len(stored) == STEPS
    for key in ("raw_error", "dudt_norm", "grad_norm"):
        assert min(row[key] for row in stored) > 0
        assert worst(first, stored, key) < 1e-9, key
    assert record(tmp_path / "second") == first


@pytest.mark.parametrize("tangent", [(0, 0, 1), (1, 1, 0), (1, 1, 1)])
def test_a_wrong_tangent_moves_the_curve(tmp_path, monkeypatch, tangent):
    monkeypatch.setattr(MeanFlowLoss, "_u_and_derivative", along(tangent))
    with pytest.raises(UserError, match="du/dt against central differences"):  # the self-check would not let it train
        record(tmp_path)
    stored, moved = json.loads(STORED.read_text()), record(tmp_path, self_check=False)
    for key in ("raw_error", "dudt_norm", "grad_norm"):
        assert worst(moved, stored, key) > 1e-5, key
