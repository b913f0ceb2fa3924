"""What may be asked for, checked at the door: devices, classes, seeds, steps, and points between two pictures."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from mf_lightning import draws
from mf_lightning.draws import Stream
from mf_lightning.flow.sampler import AverageSampler, EulerSampler, Sampler, check_grid, time_grid
from mf_lightning.types import UserError

Label = int | str
SAMPLERS: dict[str, type[Sampler]] = {"average": AverageSampler, "euler": EulerSampler}


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return a device; None is a GPU where there is one.

    Raises:
        UserError: no such device, or one that is not there.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=chosen).cpu()  # what is not there, or holds no values (meta), fails here
    except (RuntimeError, AssertionError, ImportError) as error:
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        raise UserError(
            f"Got the device {device} ({str(error).strip().splitlines()[0][:200]}), expected one that is there: "
            f"{', '.join(there)}. Give one of these, or none."
        ) from error
    return chosen


def choose_sampler(sampler: Sampler | str | None) -> Sampler:
    """Return how a jump is made, given as it is or by name; None is MeanFlow's.

    Raises:
        UserError: no such name.
    """
    if isinstance(sampler, Sampler):
        return sampler
    name = "average" if sampler is None else sampler
    if name not in SAMPLERS:
        raise UserError(f"Got the sampler {name!r}, expected one of {', '.join(SAMPLERS)}. Leave it out for MeanFlow's.")
    return SAMPLERS[name]()


def choose_grid(nfe: int | None, grid: Sequence[float] | None) -> list[float]:
    """Return the times of the jumps: a uniform grid of ``nfe`` jumps (1 where nothing is said), or the grid given.

    Raises:
        UserError: both, or a wrong one.
    """
    if nfe is not None and grid is not None:
        raise UserError(
            f"Got nfe = {nfe} and the time grid {list(grid)}, expected one of them: a grid of n + 1 times has n jumps. "
            "Leave one out."
        )
    if grid is not None:
        check_grid(grid)
        return [float(time) for time in grid]
    if nfe is not None and (isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1):
        raise UserError(f"Got nfe = {nfe!r}, expected a whole number of at least 1: the network passes for each image.")
    return time_grid(1 if nfe is None else nfe)


def class_numbers(labels: Sequence[Label] | Label, class_names: Sequence[str], num_classes: int) -> list[int]:
    """Return the numbers of classes that are given by number or name.

    Args:
        labels: one or several.
        class_names: of the data set.
        num_classes: of the network, 0 for one without labels.

    Raises:
        UserError: no such class, or a network without any.
    """
    asked = list(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
    if num_classes == 0:
        raise UserError(f"Got the classes {asked}, expected none: the network was trained without labels. Leave them out.")
    if not asked:
        raise UserError("Got no classes, expected at least one. Leave them out to take them in turn.")
    found = [_class_number(label, list(class_names), num_classes) for label in asked]
    for label, number in zip(asked, found, strict=True):
        if number is None:
            names = f" ({class_names[0]}, ..., {class_names[-1]})" if class_names else ""
            raise UserError(
                f"Got the class {label!r}, expected a number from 0 to {num_classes - 1}, or a name of the data set{names}."
            )
    return found


def _class_number(label: Label, names: list[str], num_classes: int) -> int | None:
    """Return a class's number; None where there is no such class. What is a number in range is never taken for a name."""
    if isinstance(label, str):
        name = label.strip()
        if name.isdecimal() and int(name) < num_classes:
            return int(name)
        return names.index(name) if name in names else None
    number = operator.index(label)
    return number if not isinstance(label, bool) and 0 <= number < num_classes else None


def check_seeds(seeds: int | Sequence[int]) -> list[int]:
    """Return seeds as a list.

    Raises:
        UserError: one that is no seed.
    """
    asked = [seeds] if isinstance(seeds, int) else list(seeds)
    if not asked or any(isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64 for seed in asked):
        raise UserError(f"Got the seeds {asked}, expected whole numbers from 0 to 2^64 - 1, at least one.")
    return asked


def check_count(n: int) -> int:
    """Return a number of images.

    Raises:
        UserError: it is not positive.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UserError(f"Got n = {n!r}, expected at least 1 image.")
    return n


def noise_of(seeds: list[int], count: int, shape: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return noise, (count, *shape): of images 0, 1, ... of one seed, as evaluation and `predict` draw it, or of image 0 of
    each of several seeds, taken in turn."""

    def draw(seed: int, numbers: Tensor) -> Tensor:
        return draws.normal(seed, Stream.SAMPLE_NOISE, step=0, rows=numbers.to(device), shape=shape, dtype=dtype)

    if len(seeds) == 1:
        return draw(seeds[0], torch.arange(count))
    first = torch.zeros(1, dtype=torch.int64)
    each = [draw(seed, first) for seed in seeds[:count]]
    return torch.cat([each[number % len(each)] for number in range(count)])


def between_noises(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """Return noise on the arc from one draw to another, (N, C, H, W): a straight line would leave the sphere that noise is on.

    Args:
        one: at weight 0, (1, C, H, W).
        other: at weight 1, (1, C, H, W).
        weight: (N,) in [0, 1].
    """
    a, b = one.double().flatten(), other.double().flatten()
    cosine = (a @ b / (a.norm() * b.norm())).clamp(-1, 1)
    angle = torch.arccos(cosine)
    w = weight.to(a)
    if float(angle.sin()) < 1e-6:  # the same direction, as from a draw to itself
        parts = 1 - w, w
    else:
        parts = torch.sin((1 - w) * angle) / angle.sin(), torch.sin(w * angle) / angle.sin()
    arc = parts[0][:, None] * a + parts[1][:, None] * b
    return arc.reshape(len(weight), *one.shape[1:]).to(one.dtype)


def between_classes(one: int, other: int, weight: Tensor, rows: int, *, dtype: torch.dtype) -> Tensor:
    """Return labels, (N,) int64, as every network takes them, where none is between two classes; else weights of the label
    table's rows, (N, rows) of a dtype: their embeddings are mixed, see ``LabelEmbedder``."""
    if one == other or ((weight == 0) | (weight == 1)).all():
        return torch.where(weight < 1, one, other)
    mixed = torch.zeros(len(weight), rows, dtype=weight.dtype)
    mixed[:, one] += 1 - weight
    mixed[:, other] += weight
    return mixed.to(dtype)


def way_ends(
    seeds: int | Sequence[int], labels: Sequence[Label] | Label | None, class_names: Sequence[str], num_classes: int
) -> tuple[list[int], list[int]]:
    """Return the seeds and the classes that a way goes between, one or two of each; no class for a network without labels.

    Args:
        seeds: one or two.
        labels: one or two; None is class 0.
        class_names: of the data set.
        num_classes: of the network.

    Raises:
        UserError: more of them, or what is none.
    """
    ends, numbers = check_seeds(seeds), []
    if labels is not None or num_classes:
        numbers = class_numbers(0 if labels is None else labels, class_names, num_classes)
    if len(ends) > 2 or len(numbers) > 2:
        raise UserError(
            f"Got {len(ends)} seeds and {len(numbers)} classes to go between, expected one or two of each: one that stays, "
            "or a first and a last."
        )
    return ends, numbers


def check_moves(ends: list[int], numbers: list[int]) -> None:
    """Refuse a way on which all pictures are equal.

    Raises:
        UserError: the same seed and the same class at both ends.
    """
    if len({*ends}) == 1 and len({*numbers}) < 2:
        stays = f"the seed {ends[0]}" + (f" and the class {numbers[0]}" if numbers else "")
        what = "two seeds (0,1), two classes (3,7), or both" if numbers else "two seeds (0,1)"
        raise UserError(
            f"Got {stays} at both ends, expected something to go between: all pictures would be equal. Give {what}."
        )
