"""The grid of numbers of steps and real images; errors by time; images per second."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mf_lightning.callbacks import throughput
from mf_lightning.callbacks.sample_grid import real_pictures
from mf_lightning.cli import load
from mf_lightning.metrics.by_time import ErrorByTime
from mf_lightning.sheet import GAP, labelled_grid, pick_real
from tests.runs import RECIPES

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--self_check.enabled=false"]


def cells(picture: Image.Image, *, rows: int, columns: int, side: int) -> np.ndarray:
    """Return the pictures of a labelled grid, (rows, columns, side, side, 3), which lie at its right and lower edge."""
    array, step = np.asarray(picture), side + GAP
    top, left = array.shape[0] - rows * step, array.shape[1] - columns * step
    return np.stack(
        [
            np.stack([array[top + r * step :, left + c * step :][:side, :side] for c in range(columns)])
            for r in range(rows)
        ]
    )  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_is_a_name_and_its_pictures(channels):
    generator = torch.Generator().manual_seed(0)
    rows = {
        name: torch.randint(0, 256, (3, channels, 40, 40), generator=generator, dtype=torch.uint8)
        for name in ("NFE 1", "NFE 16", "real")
    }
    picture = labelled_grid(rows, ["cat", "a name that is far too long for its column", ""], scale=1)
    found = cells(picture, rows=3, columns=3, side=80)  # enlarged by 2, so that names fit
    for r, pixels in enumerate(rows.values()):
        expected = pixels.movedim(1, -1).numpy().repeat(2, axis=1).repeat(2, axis=2)
        assert np.array_equal(found[r], np.broadcast_to(expected, found[r].shape))
    array = np.asarray(picture).min(axis=-1)
    top, left = array.shape[0] - 3 * 82, array.shape[1] - 3 * 82
    ink = [(array[top + r * 82 : top + r * 82 + 80, : left - GAP] < 128).sum() for r in range(3)]
    assert min(ink) > 30  # every row has a name,
    above = [(array[: top - GAP, left + c * 82 : left + c * 82 + 80] < 128).sum() for c in range(3)]
    assert min(above[:2]) > 10
    assert above[2] == 0
    assert (array[:, -GAP:] == 255).all()  # and nothing hangs over


def test_real_samples_are_of_the_column_and_not_twice_the_same():
    labels = np.array([1, 0, 1, 2])
    assert pick_real(labels, [0, 1, 2, 1, 1, 5], 6) == [1, 0, 3, 2, 0, -1]
    assert pick_real(labels, None, 5) == [0, 1, 2, 3, -1]


def test_real_pictures_come_from_validation_then_training():
    cli = load(["--config", str(RECIPES / "smoke.yaml"), "--data.init_args.val_size=4", "--data.init_args.train_size=30"])
    data = cli.datamodule
    pictures = real_pictures(data, [3, 9, 0, 3], 4, torch.device("cpu"))
    held, trained = data.split("val"), data.split("train")
    assert held.labels.tolist() == [0, 1, 2, 3]
    nines, threes = (np.flatnonzero(trained.labels == label) for label in (9, 3))
    expected = [
        held.gather(np.array([3]))[0],
        trained.gather(nines[:1])[0],
        held.gather(np.array([0]))[0],
        held.gather(np.array([3]))[0],
    ]
    assert len(threes) == 3
    for picture, latents in zip(pictures, expected, strict=True):
        assert torch.equal(picture, data.decode(torch.from_numpy(latents))[0])


def test_the_grid_of_a_run(tmp_path):
    """Its rows are the first row of each NFE's own grid; unconditional, with columns of nothing but noise."""
    cli = load(
        [
            "--config", str(RECIPES / "smoke.yaml"), *QUIET, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=2",
            "--trainer.val_check_interval=2", "--sample_eval.num_samples=0", "--sample_grid.nfe=[1,3]", "--sample_grid.scale=2",
            "--sample_grid.max_columns=4", "--model.net.init_args.num_classes=0", "--trainer.limit_val_batches=1",
            "--model.loss.init_args.guidance={omega: 1.0, kappa: 0.0}",
        ]
    )  # fmt: skip
    cli.trainer.fit(cli.model, cli.datamodule)
    names = sorted(path.name for path in (tmp_path / "grids").iterdir())
    assert names == ["step00000002.png", "step00000002_nfe1.png", "step00000002_nfe3.png"]
    found = cells(Image.open(tmp_path / "grids" / names[0]), rows=3, columns=4, side=64)
    for row, name in enumerate(names[1:]):
        own = np.asarray(Image.open(tmp_path / "grids" / name).convert("RGB"))
        first = np.stack([own[4:68, 4 + column * 68 :][:, :64] for column in range(4)])
        assert np.array_equal(found[row], first)
    real = real_pictures(cli.datamodule, None, 4, torch.device("cpu")).movedim(1, -1).numpy()
    assert np.array_equal(found[2], np.broadcast_to(real.repeat(2, axis=1).repeat(2, axis=2), found[2].shape))


# errors by time


def test_errors_by_time():
    t = torch.tensor([0.0, 0.19, 0.2, 0.55, 1.0, 0.99])
    raw = torch.tensor([1.0, 3.0, 5.0, 7.0, 2.0, float("nan")])
    counted = torch.tensor([True, True, True, True, True, False])
    whole, parts = ErrorByTime(), ErrorByTime()
    whole.add(t, counted, raw_error=raw)
    for row in (slice(0, 1), slice(1, 5), slice(5, 6)):
        parts.add(t[row], counted[row], raw_error=raw[row])
    expected = {"raw_error_t0.0-0.2": 2.0, "raw_error_t0.2-0.4": 5.0, "raw_error_t0.4-0.6": 7.0, "raw_error_t0.8-1.0": 2.0}
    for found in (whole, parts):
        assert {name: float(value) for name, value in found.means(lambda sums: sums).items()} == expected
    both = parts.means(lambda sums: sums * 2)  # two processes with the same rows
    assert {name: float(value) for name, value in both.items()} == expected
    assert ErrorByTime().means(lambda sums: sums) == {}


# images per second


def test_images_per_second_leave_validation_out(monkeypatch):
    now, logged = [0.0], []
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    trainer = SimpleNamespace(
        global_step=0, datamodule=SimpleNamespace(batch_size=32), _logger_connector=SimpleNamespace(should_update_logs=False)
    )
    module = SimpleNamespace(log=lambda key, value, **how: logged.append((trainer.global_step, key, value)))
    callback = throughput.Throughput()
    callback.on_train_start(trainer, module)
    for step in range(1, 9):
        callback.on_train_batch_start(trainer, module, None, 0)
        now[0] += 100.0 if step == 1 else 0.5  # the first compiles
        trainer.global_step, trainer._logger_connector.should_update_logs = step, step % 4 == 0
        callback.on_train_batch_end(trainer, module, None, None, 0)
        if step == 6:
            callback.on_validation_start(trainer, module)
            now[0] += 1000.0
    assert logged == [(4, "train/images_per_s", 64.0), (8, "train/images_per_s", 64.0)]
