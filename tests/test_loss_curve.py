"""No number moves unnoticed: the smoke recipe's curve in float64, and what a wrong tangent does to it."""

import json

import pytest
import torch

from tests.loss_curve import STEPS, STORED, record


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
    dz, dr, dt = tangent

    def wrong(net, z_t, v_g, *, t, r, y):
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            one = torch.ones_like(t)
            return torch.func.jvp(lambda z, t, r: net(z, t=t, r=r, y=y), (z_t, t, r), (dz * v_g, dt * one, dr * one))[1]

    monkeypatch.setattr("mf_lightning.flow.meanflow.total_derivative", wrong)
    stored, moved = json.loads(STORED.read_text()), record(tmp_path)
    for key in ("raw_error", "dudt_norm", "grad_norm"):
        assert worst(moved, stored, key) > 1e-5, key
