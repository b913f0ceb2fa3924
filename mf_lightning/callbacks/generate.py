"""Images from the network under training: image i is a function of (seed, i) alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from mf_lightning import draws
from mf_lightning.callbacks.ema import EMA
from mf_lightning.callbacks.preemption import poll
from mf_lightning.draws import Stream
from mf_lightning.flow.sampler import AverageSampler, CountedPasses, Sampler, sample, time_grid
from mf_lightning.types import UserError

LabelScheme = Literal["balanced", "uniform"]


@dataclass(frozen=True)
class Images:
    """One batch of generated pictures."""

    pixels: Tensor
    """(B, c, H, W) uint8."""
    labels: Tensor | None
    """(B,) int64, the classes asked for; None if unconditional."""
    index: Tensor
    """(B,) int64, CPU: the images' numbers."""
    nfe: int
    """Network passes that each image took, counted."""
    num_steps: int
    """Jumps of the sampler that made them."""
    seconds_per_image: float | None
    """Network and decoder, if it was asked for."""


def choose_labels(scheme: LabelScheme | list[int], index: Tensor, *, num_classes: int, seed: int) -> Tensor | None:
    """Return the class of each image, (B,) int64; None without classes.

    Args:
        scheme: "balanced" is ``i mod num_classes``, "uniform" drawn by (seed, i); a list of classes is taken in turn.
        index: numbers of the images, (B,) int64.
        num_classes: of the network; 0 is none.
        seed: of the drawn ones.

    Raises:
        UserError: a class that the network does not have.
    """
    if not isinstance(scheme, str):
        wrong = [k for k in scheme if not 0 <= k < num_classes]
        if wrong or not scheme:
            have = f"classes in [0, {num_classes})" if num_classes else "no list: this network was trained without classes"
            raise UserError(f"Got the classes {scheme}, expected {have}. Correct the list, or give balanced or uniform.")
        return torch.tensor(scheme, device=index.device)[index % len(scheme)]
    if num_classes == 0:
        return None
    if scheme == "balanced":
        return index % num_classes
    draw = draws.uniform(seed, Stream.SAMPLE_LABEL, step=0, rows=index, count=1)[:, 0]
    return (draw * num_classes).to(torch.int64)


def find_ema(trainer: Trainer) -> EMA:
    """Return the trainer's EMA callback; there is always one from the command line, perhaps with no averages."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]
    if not found:
        raise UserError(
            "Got a trainer without the EMA callback, expected one. Add mf_lightning.callbacks.EMA to its callbacks."
        )
    return found[0]


@torch.no_grad()
def generate(
    trainer: Trainer,
    pl_module: LightningModule,
    index: Tensor,
    *,
    num_steps: int | Sequence[int],
    ema: float | None,
    seed: int,
    labels: LabelScheme | list[int],
    batch_size: int,
    everywhere: bool = False,
    progress: bool = True,
    timed: Callable[[int], bool] = lambda batch: False,
    sampler: Sampler = AverageSampler(),
) -> Iterator[Images]:
    """Yield this process's share of the pictures of the given numbers, batch by batch, each for every number of steps.

    Every process calls it, with the same numbers: they call the network equally often, as a sharded one must be.

    Args:
        trainer: gives precision, EMA callback and data module.
        pl_module: its network draws.
        index: numbers of the images that all processes make together, dealt to them in turn, (N,) int64.
        num_steps: jumps of the sampler, or several numbers of them, which share noise and labels.
        ema: decay of the average to use; None is the raw weights.
        seed: with an image's number it decides noise and, where uniform, label.
        labels: "balanced", "uniform", or classes that are taken in turn.
        batch_size: images at a time on each process; the pictures do not depend on it.
        everywhere: every process makes all of them.
        progress: show a bar on the first process.
        timed: asked before each batch, 0, 1, ..., whether to measure its seconds, for which the device is waited for.
        sampler: how a jump is made.
    """
    all_steps = [num_steps] if isinstance(num_steps, int) else list(num_steps)
    net, data = pl_module.net, trainer.datamodule
    if pl_module.loss.fm_fraction == 1 and isinstance(sampler, AverageSampler):
        rank_zero_warn(
            "A flow-matching network (fm_fraction = 1) has only seen r = t and is sampled by average velocities, which it was "
            "never taught. Give sampler=mf_lightning.flow.EulerSampler in sample_eval, sample_grid and sample_writer."
        )
    num_classes = net.y_null or 0
    dtype = next(net.parameters()).dtype
    show = progress and trainer.is_global_zero and trainer.progress_bar_callback is not None
    weights = "raw weights" if ema is None else f"EMA {ema}"
    was_training = net.training
    net.eval()
    rank, processes = (0, 1) if everywhere else (trainer.global_rank, trainer.world_size)
    mine, largest = index[rank::processes], -(-len(index) // processes)
    bar = tqdm(total=len(mine) * len(all_steps), unit="img", leave=False, disable=not show)
    try:
        with bar, find_ema(trainer).applied(pl_module, ema):
            for number, start in enumerate(range(0, largest, batch_size)):
                part = mine[start : start + batch_size]
                # others may have one more, and compiled graphs have one size: filled up with images that are thrown away
                size = min(batch_size, largest if pl_module.compiled else largest - start)
                filled = _fill(part, size, otherwise=index[:1])
                on_device = filled.to(pl_module.device)
                noise = draws.normal(
                    seed, Stream.SAMPLE_NOISE, step=0, rows=on_device, shape=data.latent_spec.shape, dtype=dtype
                )
                y = choose_labels(labels, on_device, num_classes=num_classes, seed=seed)
                kept = slice(0, len(part))
                labels_kept = None if y is None else y[kept]
                for steps in all_steps:
                    poll(trainer)
                    bar.set_description(f"Sampling NFE {steps} of {', '.join(map(str, all_steps))}; {weights}", refresh=False)
                    watch = Stopwatch(pl_module.device) if timed(number) else None
                    counted = CountedPasses(pl_module.generator)
                    with trainer.precision_plugin.forward_context():
                        latents = sample(counted, noise, y=y, grid=time_grid(steps), sampler=sampler)
                    network = 0.0 if watch is None else watch.seconds()
                    if len(part):
                        pixels = data.decode(latents[kept])
                        seconds = None if watch is None else network / size + (watch.seconds() - network) / len(part)
                        yield Images(pixels, labels_kept, part, counted.passes, steps, seconds)
                    bar.update(len(part))
    finally:
        net.train(was_training)


def _fill(index: Tensor, size: int, otherwise: Tensor) -> Tensor:
    """Repeat the last number, or another where there is none, until there are ``size``."""
    last = index[-1:] if len(index) else otherwise
    return torch.cat([index, last.expand(size - len(index))])


class Stopwatch:
    """Seconds of wall time since it was made, after waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self) -> float:
        """Return the time passed."""
        return self._now() - self.start
