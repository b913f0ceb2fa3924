"""The counter-based generator: known answers, moments, and independence of everything but (seed, stream, step, row)."""

import pytest
import torch

from mf_lightning import draws
from mf_lightning.draws import Stream


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = draws.philox_4x32([torch.tensor([c]) for c in counter], key)
    assert tuple(int(word) for word in words) == expected


def test_uniform_is_uniform():
    u = draws.uniform(1, Stream.TIMES, step=3, rows=torch.arange(50_000), count=2)
    assert u.dtype == torch.float64
    assert u.min() > 0
    assert u.max() < 1
    for column in u.T:
        distance = (column.sort().values - (torch.arange(50_000) + 0.5) / 50_000).abs().max()
        assert distance < 1.63 / 50_000**0.5
    assert torch.corrcoef(u.T)[0, 1].abs() < 0.02


def test_normal_moments():
    n = draws.normal(2, Stream.NOISE, step=0, rows=torch.arange(20_000), shape=(3, 3), dtype=torch.float64)
    assert n.shape == (20_000, 3, 3)
    flat = n.flatten(1)
    assert flat.mean(0).abs().max() < 0.03
    assert (flat.var(0) - 1).abs().max() < 0.05
    assert (flat.pow(4).mean(0) - 3).abs().max() < 0.3
    off_diagonal = torch.corrcoef(flat.T) - torch.eye(9, dtype=torch.float64)
    assert off_diagonal.abs().max() < 0.03


def test_a_row_does_not_depend_on_its_batch():
    rows = torch.tensor([5, 900, 17])
    together = draws.normal(7, Stream.NOISE, step=11, rows=rows, shape=(4, 2, 2))
    for row, expected in zip(rows, together, strict=True):
        alone = draws.normal(7, Stream.NOISE, step=11, rows=row[None], shape=(4, 2, 2))
        assert torch.equal(alone[0], expected)


@pytest.mark.parametrize("change", [{"seed": 8}, {"stream": Stream.TIMES}, {"step": 12}, {"seed": 7 + 2**32}])
def test_every_part_of_the_counter_matters(change):
    base = {"seed": 7, "stream": Stream.NOISE, "step": 11}
    rows = torch.arange(64)

    def draw(seed, stream, step):
        return draws.uniform(seed, stream, step=step, rows=rows, count=8)

    assert not (draw(**base) == draw(**{**base, **change})).any()


def test_float32_noise_is_the_rounded_float64_noise():
    rows = torch.arange(10)
    wide = draws.normal(0, Stream.NOISE, step=0, rows=rows, shape=(5,), dtype=torch.float64)
    assert torch.equal(wide.float(), draws.normal(0, Stream.NOISE, step=0, rows=rows, shape=(5,)))
