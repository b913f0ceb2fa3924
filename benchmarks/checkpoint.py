"""How long a checkpoint takes, for SiT-XL/2 with Adam and one average (10.8 GB of state in float32): written, checked, read.

python benchmarks/checkpoint.py [--depth 28] [--folder .]

What a preempted run needs is "written": from the moment the step ends until the checkpoint has its name. The disk is the
measure: a plain write of as many bytes to the same folder, flushed, is timed beside it.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch

from mf_lightning.callbacks import AtomicCheckpointIO
from mf_lightning.checkpoints import read_checkpoint
from mf_lightning.nets import SiT
from mf_lightning.types import LatentSpec


def state(depth: int, hidden_size: int, num_heads: int) -> dict:
    """Return what a checkpoint of a run holds: weights, one average, Adam's two moments; every value filled."""
    net = SiT(LatentSpec((4, 32, 32), 1000), patch_size=2, hidden_size=hidden_size, depth=depth, num_heads=num_heads)
    weights = {name: value.detach() for name, value in net.named_parameters()}
    copies = [{name: torch.randn_like(value) for name, value in weights.items()} for _ in range(3)]
    moments = {
        i: {"exp_avg": a, "exp_avg_sq": b} for i, (a, b) in enumerate(zip(*(c.values() for c in copies[1:]), strict=True))
    }
    return {
        "global_step": 1,
        "state_dict": {f"net.{name}": value for name, value in weights.items()},
        "ema": {"weights": {"0.9999": copies[0]}},
        "optimizer_states": [{"state": moments, "param_groups": []}],
    }


def plain_write(file: Path, size: int) -> float:
    """Return the seconds that the disk needs for as many bytes without any format."""
    block = os.urandom(1 << 24)
    start = time.perf_counter()
    with file.open("wb") as stream:
        for at in range(0, size, len(block)):
            stream.write(block[: min(len(block), size - at)])
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return seconds


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=28, help="blocks; 28 is SiT-XL")
    parser.add_argument("--hidden-size", type=int, default=1152)
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    given = parse()
    checkpoint = state(given.depth, given.hidden_size, given.num_heads)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=given.folder))
    try:
        path = folder / "last.ckpt"
        start = time.perf_counter()
        AtomicCheckpointIO().save_checkpoint(checkpoint, path)
        written = time.perf_counter() - start
        size = path.stat().st_size
        print(f"{size / 1e9:.1f} GB: written in {written:.1f} s ({size / 1e9 / written:.2f} GB/s)", flush=True)
        start = time.perf_counter()
        read_checkpoint(path)
        print(f"checked and read in {time.perf_counter() - start:.1f} s", flush=True)
        path.resolve().unlink()
        plain = plain_write(folder / "plain", size)
        print(f"as many bytes without any format, flushed: {plain:.1f} s; ratio {written / plain:.2f}", flush=True)
        print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
