"""Small sets of latents, laid out as each project's own preparation writes them (the readers' docstrings name the code)."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

CHANNELS, SIZE = 4, 4


@dataclass
class Truth:
    """What was written, in the order of the files."""

    stored: np.ndarray
    flipped: np.ndarray | None
    labels: np.ndarray


def posterior(count: int, *, logvar: bool, seed: int = 0) -> np.ndarray:
    """Return mean and log-variance, or mean and std, (count, 2C, h, w) float32."""
    rng = np.random.default_rng(seed)
    mean, spread = rng.normal(0, 5, (2, count, CHANNELS, SIZE, SIZE)).astype(np.float32)
    second = spread * 6 - 10 if logvar else np.abs(spread) / 10
    return np.concatenate([mean, second.astype(np.float32)], axis=1)


def write_repa(root: Path, count: int = 10, dtype: str = "float32") -> Truth:
    stored, labels = posterior(count, logvar=False).astype(dtype), np.arange(count) * 7 % 3
    names = []
    for number in range(count):
        name = f"{number // 4:05d}/img-mean-std-{number:08d}.npy"
        (root / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / "vae-sd" / name).open("wb") as stream:
            np.save(stream, torch.from_numpy(stored[number]))
        names.append([name, int(labels[number])])
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": names}))
    return Truth(stored, None, labels)


def write_meanflow(root: Path, count: int = 10, dtype: str = "float32") -> Truth:
    stored, labels = posterior(count, logvar=False).astype(dtype), np.arange(count) * 5 % 3
    (root / "train").mkdir(parents=True)
    for number in range(count):
        channels_last = torch.tensor(np.array(stored[number].transpose(1, 2, 0)))
        sample = {"image": channels_last.permute(2, 0, 1), "label": torch.tensor(np.array(np.int64(labels[number])))}
        torch.save(sample, root / "train" / f"{number:08d}.pt")
    return Truth(stored, None, labels)


def write_lmdb(root: Path, count: int = 12, dtype: str = "float32") -> Truth:
    import lmdb

    stored, flipped = (posterior(count, logvar=True, seed=seed).astype(dtype) for seed in (0, 1))
    labels = np.arange(count) * 5 % 3
    root.mkdir(parents=True)
    environment = lmdb.open(str(root), map_size=1 << 22)
    with environment.begin(write=True) as writing:
        for number in range(count):
            data = {"moments": stored[number], "moments_flip": flipped[number], "label": int(labels[number])}
            data["filename"] = f"n{labels[number]:08d}/img_{number:07d}.JPEG"
            writing.put(f"{number}".encode(), pickle.dumps(data))
        writing.put(b"num_samples", str(count).encode())
        writing.put(b"created_at", b"2025-06-01 12:00:00")
    environment.sync()
    environment.close()
    return Truth(stored, flipped, labels)


def write_mar(root: Path, count: int = 10, dtype: str = "float32") -> Truth:
    stored, flipped = (posterior(count, logvar=True, seed=seed).astype(dtype) for seed in (0, 1))
    labels = np.sort(np.arange(count) % 3)
    for number in range(count):
        file = root / f"n0144{labels[number]:04d}" / f"n0144{labels[number]:04d}_{number}.JPEG.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, moments=stored[number], moments_flip=flipped[number])
    return Truth(stored, flipped, labels)


def write_lightningdit(root: Path, count: int = 10, dtype: str = "float32") -> Truth:
    from safetensors.torch import save_file

    rng, labels = np.random.default_rng(0), np.arange(count) * 7 % 3
    stored, flipped = rng.normal(0, 5, (2, count, CHANNELS, SIZE, SIZE)).astype(dtype)
    root.mkdir(parents=True)
    for shard, first in enumerate(range(0, count, 6)):
        part = slice(first, first + 6)
        arrays = {"latents": stored[part], "latents_flip": flipped[part], "labels": labels[part].astype(np.int64)}
        tensors = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
        metadata = {"total_size": f"{len(labels[part])}", "dtype": f"{tensors['latents'].dtype}", "device": "cpu"}
        save_file(tensors, root / f"latents_rank00_shard{shard:03d}.safetensors", metadata=metadata)
    torch.save({"mean": torch.zeros(1, CHANNELS, 1, 1), "std": torch.ones(1, CHANNELS, 1, 1)}, root / "latents_stats.pt")
    return Truth(stored, flipped, labels)


def write_arrays(root: Path, count: int = 10, dtype: str = "float32") -> Truth:
    stored, labels = posterior(count, logvar=False).astype(dtype), np.arange(count) * 7 % 3
    root.mkdir(parents=True)
    for name, part in (("a_", slice(0, 6)), ("b_", slice(6, None))):
        np.save(root / f"{name}moments.npy", stored[part])
        np.save(root / f"{name}moments_flip.npy", stored[part][:, :, :, ::-1])
        np.save(root / f"{name}labels.npy", labels[part])
    return Truth(stored, stored[:, :, :, ::-1], labels)


def write_npz(root: Path, count: int = 10, dtype: str = "float32") -> Truth:
    stored, labels = posterior(count, logvar=False).astype(dtype), np.arange(count) * 7 % 3
    root.mkdir(parents=True)
    np.savez(root / "0.npz", latents=stored[:7], labels=labels[:7].astype(np.int32))
    np.savez_compressed(root / "1.npz", latents=stored[7:], labels=labels[7:].astype(np.int32))
    return Truth(stored, None, labels)
