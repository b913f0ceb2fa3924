"""The paper's ablations that a CPU can afford, on the quickstart's network and data, beside the paper's table.

    python -m scripts.ablations
    python -m scripts.ablations --groups='[jumps, tangents]' --steps=400

Share of rows with r != t, tangents of the derivative, sampler of times, exponent p of the adaptive weight; without guidance,
FID at 1 NFE, as in the paper. Finished arms are used again, killed ones go on. An hour or two at the quickstart's steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from mf_lightning.report.charts import exact
from mf_lightning.types import UserError
from scripts.arms import RECIPE, Arm, Measured, Plan, measure, run_command
from scripts.claim import GUIDANCE
from scripts.results_page import PAGE, cost_table, figure, machine, markdown, protocol_of, write_section

LOSS = "--model.loss.init_args."
NONE = GUIDANCE % (1.0, 0.0)
CLOSE = 1.1
"""Settings whose FIDs differ by a smaller factor in the paper are not counted as ordered by it."""


def arm(name: str, title: str, *options: str) -> Arm:
    """Return an arm without guidance, sampled by average velocities, as in the paper."""
    return Arm(name, title, (NONE, *options))


def tangents(dr: int, dt: int) -> Arm:
    """Return an arm whose derivative is along (v, dr, dt); the self-check would refuse it."""
    loss = ("--model.loss=scripts.other_tangents.OtherTangents", f"{LOSS}dr={dr}", f"{LOSS}dt={dt}")
    loss += (
        f"{LOSS}times.class_path=mf_lightning.flow.LogitNormal",
        f"{LOSS}label_drop.class_path=mf_lightning.flow.DropAnyRow",
    )
    return arm(f"tangents-v{dr}{dt}", f"(v, {dr}, {dt})", *loss, "--self_check.enabled=false")


BASE = arm("base", "the paper's choice")


@dataclass(frozen=True)
class Group:
    """Settings of one ablation with the paper's FID (B/4, 80 epochs, 1 NFE, no guidance)."""

    title: str
    entries: tuple[tuple[str, Arm, float], ...]
    """How a setting is called, its arm, the paper's FID."""


GROUPS = {
    "jumps": Group(
        "Share of rows with r != t",
        (
            ("0 % (flow matching)", arm("jumps-0", "0 % of rows r != t", f"{LOSS}fm_fraction=1.0"), 328.91),
            ("25 %", BASE, 61.06),
            ("50 %", arm("jumps-50", "50 % of rows r != t", f"{LOSS}fm_fraction=0.5"), 63.14),
            ("100 %", arm("jumps-100", "100 % of rows r != t", f"{LOSS}fm_fraction=0.0"), 67.32),
        ),
    ),
    "tangents": Group(
        "Tangents (dz, dr, dt) of the derivative",
        (
            ("(v, 0, 1)", BASE, 61.06),
            ("(v, 0, 0)", tangents(0, 0), 268.06),
            ("(v, 1, 0)", tangents(1, 0), 329.22),
            ("(v, 1, 1)", tangents(1, 1), 137.96),
        ),
    ),
    "times": Group(
        "Sampler of times",
        (
            ("uniform", arm("times-uniform", "times uniform", f"{LOSS}times=mf_lightning.flow.Uniform"), 65.90),
            (
                "logit-normal(-0.2, 1)",
                arm("times-0.2", "times logit-normal(-0.2, 1)", f"{LOSS}times.init_args.P_mean=-0.2"),
                63.83,
            ),
            ("logit-normal(-0.4, 1)", BASE, 61.06),
        ),
    ),
    "p": Group(
        "Exponent p of the adaptive weight",
        (
            ("0", arm("p-0", "p = 0", f"{LOSS}weight.norm_p=0.0"), 79.75),
            ("0.5", arm("p-0.5", "p = 0.5", f"{LOSS}weight.norm_p=0.5"), 63.98),
            ("1", BASE, 61.06),
            ("1.5", arm("p-1.5", "p = 1.5", f"{LOSS}weight.norm_p=1.5"), 66.57),
            ("2", arm("p-2", "p = 2", f"{LOSS}weight.norm_p=2.0"), 69.19),
        ),
    ),
}


def ablations(
    groups: list[str] = ["jumps", "tangents", "times", "p"],  # noqa: B006 (never changed; jsonargparse shows it)
    seeds: list[int] = [0],  # noqa: B006
    steps: int = 1500,
    num_samples: int = 2000,
    root: str = "runs/ablations",
    page: str = str(PAGE),
    recipe: str = str(RECIPE),
    options: list[str] = [],  # noqa: B006
) -> None:
    """Train the ablations, score them at 1 NFE, write docs/results.md.

    Args:
        groups: some of jumps, tangents, times, p.
        seeds: of training; every arm is trained with each.
        steps: optimizer steps of each arm.
        num_samples: images per evaluation.
        root: folder of the runs; runs of other steps need another.
        page: file whose section `ablations` is written.
        recipe: that the arms are variants of.
        options: of the command line, for every arm.
    """
    unknown = [name for name in groups if name not in GROUPS]
    if unknown or not groups or not seeds:
        raise UserError(f"Got groups = {groups}, seeds = {seeds}, expected at least one of each, groups of {list(GROUPS)}.")
    plan = Plan(Path(root), (1,), steps, num_samples, Path(recipe), tuple(options))
    chosen = [GROUPS[name] for name in groups]
    arms = {entry.name: entry for group in chosen for _, entry, _ in group.entries}
    results = {name: measure(entry, seeds, plan) for name, entry in arms.items()}
    text = section(chosen, results, plan, seeds)
    write_section(Path(page), "ablations", text)
    print(f"\n{text}\n\npage: {page}")


def section(groups: list[Group], results: dict[str, Measured], plan: Plan, seeds: list[int]) -> str:
    """Return the section of the page; what it says is chosen by the figures."""
    measured = list(results.values())
    parts = [f"`make ablations` wrote this. {machine(measured)}"]
    for group in groups:
        rows = [
            [
                name,
                f"{paper:.2f}",
                figure(results[entry.name].values("fid", 1)),
                figure(results[entry.name].values("class_accuracy", 1), percent=True),
            ]
            for name, entry, paper in group.entries
        ]
        head = [group.title, "paper, FID", "here, FID", "here, classified right"]
        parts += [f"**{group.title}**", markdown(head, rows), order_words(group, results)]
    doubt = " With one seed, settings whose FIDs lie a few percent apart here are not told apart." if len(seeds) == 1 else ""
    parts += [
        "**Protocol**",
        "The paper: SiT-B/4 on ImageNet 256x256, 80 epochs, 50,000 images. Both: no guidance, 1 NFE, sampled by "
        f"`z_0 = z_1 - u(z_1, 0, 1)`. FIDs of different features never compare as numbers, only their order does.{doubt} "
        f"{protocol_of(measured, plan, seeds)}",
        cost_table(measured),
    ]
    return "\n\n".join(parts)


def order_words(group: Group, results: dict[str, Measured]) -> str:
    """Return whether the settings come in the paper's order, and where not."""
    paper = {name: fid for name, _, fid in group.entries}
    here = {name: results[entry.name].mean("fid", 1) for name, entry, _ in group.entries}
    by_paper, by_here = (sorted(fids, key=fids.__getitem__) for fids in (paper, here))
    if by_paper == by_here:
        return f"Same order as in the paper, best first: {' < '.join(by_here)}."
    wrong = [
        f"{a} against {b} (here {exact(here[a])} and {exact(here[b])})"
        for a, b in combinations(by_paper, 2)
        if here[a] >= here[b]
    ]
    clear = [(a, b) for a, b in combinations(by_paper, 2) if paper[b] / paper[a] >= CLOSE]
    agree = sum(here[a] < here[b] for a, b in clear)
    best = (
        "The best setting is the same." if by_here[0] == by_paper[0] else f"The best here is {by_here[0]}, not {by_paper[0]}."
    )
    told = f"Of the {len(clear)} pairs that lie at least 10 % apart in the paper, {agree} come in the same order here."
    return (
        f"**Not the same order.** Paper, best first: {' < '.join(by_paper)}; here: {' < '.join(by_here)}. The other way round: "
        f"{'; '.join(wrong)}. {told if clear else 'No two lie 10 % apart in the paper.'} {best}"
    )


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    run_command(ablations, args)


if __name__ == "__main__":
    main()
