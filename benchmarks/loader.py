"""How fast batches of latents come: this loader, a bare numpy gather from the same memory map, and LitData's loader.

python benchmarks/loader.py [--samples 20000] [--batch 256] [--rounds 5] [--folder .] [--json]

One process, float16 moments of 8x32x32 (what SD-VAE gives at 256x256), one pass over all samples in a shuffled order per
round; rounds alternate between the contestants, and the median round counts. Both loaders are taken at their best of 0, 1 and 2
workers (threads here, processes there). LitData is far faster with samples stored as numpy arrays than as torch tensors:
``vs_litdata`` compares with tensors, which its samples become anyway, ``vs_litdata_numpy`` with arrays. ``start_s`` is the time
to open 1.28 M samples in 400 shards, ``rss_anon_growth_bytes`` the anonymous memory that all rounds leave behind. The last line
is one flat JSON object; rates are samples per second.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mf_lightning.data.datamodule import LatentDataModule
from mf_lightning.data.loader import LatentSplit, TrainLoader
from mf_lightning.data.shards import DatasetInfo, ShardInfo, shard_file, write_info, write_shard

SHAPE = (8, 32, 32)
WORKERS = (0, 1, 2)
FORMS: dict[str, Callable[[np.ndarray], object]] = {"litdata tensor": torch.tensor, "litdata numpy": np.array}
"""What LitData stores a sample as."""


def write_ours(folder: Path, samples: int, shards: int) -> LatentSplit:
    """Write a data set of random moments and return its opened training split."""
    rng = np.random.default_rng(0)
    written = []
    for number, rows in enumerate(np.array_split(np.arange(samples), shards)):
        moments = rng.standard_normal((len(rows), *SHAPE), np.float32).astype(np.float16)
        written.append(write_shard(folder, "train", number, latents=moments, labels=rows % 1000))
    write_info(folder, described({"train": tuple(written), "val": ()}))
    return LatentDataModule(str(folder)).split("train")


def described(splits: dict[str, tuple[ShardInfo, ...]]) -> DatasetInfo:
    """Return the description of a data set with these shards."""
    latent_shape, names = (SHAPE[0] // 2, *SHAPE[1:]), tuple(map(str, range(1000)))
    return DatasetInfo("moments", latent_shape, "float16", False, "none", 1.0, 0.0, 256, names, splits)


def write_litdata(split: LatentSplit, folder: Path, form: Callable[[np.ndarray], object]) -> None:
    """Write the same samples in LitData's format, in chunks of the size that it advises.

    Args:
        split: samples.
        folder: to write to.
        form: what a sample's latents are stored as.
    """
    from litdata.streaming import Cache

    cache = Cache(str(folder), chunk_bytes="64MB")
    for i in range(len(split)):
        latents, labels = split.gather(np.array([i]))
        cache[i] = {"latents": form(latents[0]), "label": form(labels[0])}
    cache.done()
    cache.merge()


def start_up(folder: Path, *, shards: int = 400, each: int = 3200) -> float:
    """Return the seconds from nothing to an opened split of a large data set, whose latents are holes in sparse files."""
    (folder / "train").mkdir(parents=True)
    labels = np.arange(each) % 1000
    entries = []
    for number in range(shards):
        entry = ShardInfo(f"{number:05d}", each, {"latents": "", "labels": ""})
        np.lib.format.open_memmap(shard_file(folder, "train", entry.name, "latents"), "w+", np.float16, (each, *SHAPE))
        np.save(shard_file(folder, "train", entry.name, "labels"), labels)
        entries.append(entry)
    write_info(folder, described({"train": tuple(entries), "val": ()}))
    start = time.perf_counter()
    LatentDataModule(str(folder)).split("train")
    return time.perf_counter() - start


def gather(split: LatentSplit, batch: int) -> Callable[[], int]:
    """Return a pass that only indexes the memory maps with numpy, in the best case: an index of one shard at a time."""
    rng = np.random.default_rng(1)
    shards = [shard.latents for shard in split.shards]

    def run() -> int:
        seen = 0
        for shard in shards:
            order = rng.permutation(len(shard))
            for first in range(0, len(order), batch):
                seen += len(shard[order[first : first + batch]])
        return seen

    return run


def ours(split: LatentSplit, batch: int, workers: int, pinned: bool) -> Callable[[], int]:
    """Return a pass of this loader."""
    step = 0

    def run() -> int:
        nonlocal step
        start, seen = step, 0
        loader = TrainLoader(
            split, global_batch_size=batch, seed=0, rank=0, world_size=1, accumulate=1, start_step=lambda: start,
            workers=workers, pinned=pinned,
        )  # fmt: skip
        for given in loader:
            seen += len(given.x)
        step += len(loader)
        return seen

    return run


def litdata(folder: Path, batch: int, workers: int, pinned: bool) -> Callable[[], int]:
    """Return a pass of LitData's loader, shuffled."""
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True, drop_last=False)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, pin_memory=pinned)

    def run() -> int:
        return sum(len(given["label"]) for given in loader)

    return run


def anonymous() -> int:
    """Return the anonymous resident memory of this process in bytes (RssAnon)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def measure(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Return samples per second of the median round; the first round of each warms up and does not count."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            seen = run()
            if number:
                rates[name].append(seen / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--shards", type=int, default=1, help="shards that the samples lie in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(), help="where both data sets are written, and removed")
    parser.add_argument("--json", action="store_true", help="print the JSON line only, no table")
    args = parser.parse_args(arguments)
    if not 1 <= args.batch <= args.samples or not 1 <= args.shards <= args.samples or args.rounds < 1:
        parser.error("Got sizes that do not fit, expected 1 <= batch <= samples, 1 <= shards <= samples, 1 <= rounds.")
    return args


def main() -> None:
    """Measure and print."""
    args = parse()
    if importlib.util.find_spec("litdata") is None:
        print("error: Got no package litdata, expected it to compare with. pip install litdata", file=sys.stderr)
        raise SystemExit(2)
    torch.set_num_threads(1)
    pinned = torch.cuda.is_available()
    folder = Path(tempfile.mkdtemp(prefix="loader-", dir=args.folder))
    out = os.dup(1)  # LitData prints to the standard output
    try:
        os.dup2(2, 1)
        split = write_ours(folder / "ours", args.samples, args.shards)
        for name, form in FORMS.items():
            write_litdata(split, folder / name, form)
        runs = {"gather": gather(split, args.batch)}
        runs |= {f"ours {n}": ours(split, args.batch, n, pinned) for n in WORKERS}
        runs |= {f"{name} {n}": litdata(folder / name, args.batch, n, pinned) for name in FORMS for n in WORKERS}
        start_s = start_up(folder / "large")
        before = anonymous()
        rates = measure(runs, args.rounds)
        grown = anonymous() - before
    finally:
        shutil.rmtree(folder)
        sys.stdout.flush()
        os.dup2(out, 1)
    best = {name: max(rates[f"{name} {n}"] for n in WORKERS) for name in ("ours", *FORMS)}
    if not args.json:
        for name, rate in rates.items():
            print(f"{name:<18}{rate:>12,.0f} samples/s")
        print(f"1.28 M samples in 400 shards opened in {start_s:.2f} s")
        print(f"anonymous memory grew by {grown / 1e6:,.0f} MB")
    report = {
        "samples_per_s": best["ours"],
        "vs_gather": best["ours"] / rates["gather"],
        "vs_litdata": best["ours"] / best["litdata tensor"],
        "vs_litdata_numpy": best["ours"] / best["litdata numpy"],
        "gather_samples_per_s": rates["gather"],
        "litdata_samples_per_s": best["litdata tensor"],
        "litdata_numpy_samples_per_s": best["litdata numpy"],
        "start_s": start_s,
        "rss_anon_growth_bytes": grown,
        "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
