"""Folders as runs leave them, written by hand: any number of figures, NFE, averages and protocols at once."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import yaml
from PIL import Image

from mf_lightning.metrics.protocol import NAMES, protocol_id

PROTOCOL = {
    "extractor": "inception-v3-compat",
    "layer": "2048",
    "resize": "the extractor's own",
    "reference": "reference.npz@ac5ea60356705d7c",
    "labels": "balanced",
    "autoencoder": "stabilityai/sd-vae-ft-mse@935c2de402bd8568",
    "rounding": "uint8 = floor(clip(127.5 x + 128, 0, 255)): nearest, halves up",
    "num_samples": 2000,
    "seed": 0,
    "precision": "bf16-mixed",
}


def row(step: int, nfe: int, *, ema: float | None = 0.995, factor: float = 1.0, names=NAMES, **protocol) -> dict:
    """Return one line of sample_eval.jsonl; figures depend on step, NFE and factor."""
    distance = factor * (300 / math.sqrt(nfe) * math.exp(-step / 300) + 3 / nfe + 0.1234567891)
    share = 1 / (1 + distance / 20)
    figures = {name: distance / (1000 if name == "kid" else 1) for name in ("fid", "sfid", "kid", "fd_dinov2")}
    figures |= {"inception_score": 200 * share, "precision": share, "recall": share * 0.7, "class_accuracy": share}
    spreads = {"kid": {"kid_std": 1.5e-4}, "inception_score": {"inception_score_std": 2.0}}
    kept: dict = {}
    for name in names:
        kept |= {name: figures[name], **spreads.get(name, {})}
    full = PROTOCOL | protocol
    return {
        "step": step,
        "ema": ema,
        "nfe": nfe,
        **kept,
        "images_per_s": 90.0 / nfe,
        "seconds_per_image": 0.004 * nfe + 0.0023,
        "protocol": full | {"ema": ema, "nfe": nfe},
        "protocol_id": protocol_id(full),
    }


def write_rows(folder: Path, rows: list[dict]) -> None:
    """Write sample_eval.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sample_eval.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


def make_run(folder: Path, *, rows: list[dict] | None = None, factor: float = 1.0, steps: int = 1500, lr: float = 2e-3) -> Path:
    """Write a whole run: figures, curves with errors by t, settings, record, grids."""
    places = range(300, steps + 1, 300)
    write_rows(folder, [row(s, n, factor=factor) for s in places for n in (1, 2, 4)] if rows is None else rows)
    table = []
    for step in range(9, steps, 5):
        wobble = 1 + 0.1 * math.sin(step)
        error = factor * wobble * (110 + 900 * math.exp(-step / 200))
        table.append(
            {
                "step": step,
                "lr-Adam": lr * (1 - step / steps),
                "train/raw_error": error,
                "train/velocity_error": error * 1.1,
                "train/dudt_norm": 25 * wobble,
                "train/grad_norm": wobble,
                "train/loss": 0.999,
                "train/images_per_s": 5000 * wobble,
            }
        )
    for step in places:
        error = factor * (110 + 900 * math.exp(-step / 200))
        bins = {f"val/raw_error_t{k / 5:.1f}-{(k + 1) / 5:.1f}": error * (2 - k / 4) for k in range(5)}
        table.append({"step": step - 1, "val/raw_error": error, "val/velocity_error": error * 1.1, **bins})
    columns = sorted({name for line in table for name in line})
    with (folder / "metrics.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(table)
    settings = {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": str(folder),
            "logger": [{"class_path": "mf_lightning.callbacks.MetricsCSV", "init_args": {"folder": str(folder)}}],
        },
        "model": {"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": lr}}},
        "data": {"class_path": "mf_lightning.data.Latents", "init_args": {"batch_size": 128}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    session = {"started": "2026-01-01 12:00:00 UTC", "seconds": 150.0, "device": "cpu (Some CPU, 2 cores)", "devices": 1}
    session |= {"strategy": "DDPStrategy", "precision": "32-true", "compile": False, "batch_size": 128}
    session["versions"] = {"python": "3.12.1", "torch": "2.8.0"}
    halves = [{**session, "from_step": 0, "to_step": steps // 2}, {**session, "from_step": steps // 2, "to_step": steps}]
    (folder / "run.json").write_text(json.dumps({"format": 1, "parameters": 1234567, "sessions": halves}))
    (folder / "grids").mkdir(exist_ok=True)
    for step in places:
        Image.new("L", (302, 122), 30 + step % 200).save(folder / "grids" / f"step{step:08d}.png")
        for nfe in (1, 2):
            Image.new("L", (302, 242), step % 255).save(folder / "grids" / f"step{step:08d}_nfe{nfe}.png")
    return folder
