"""The method's claim, reproduced small: one MeanFlow step against flow matching at 1 to 32 steps, on the quickstart's budget.

    python -m scripts.claim
    python -m scripts.claim --seeds='[0, 1, 2]'

Trains flow matching and MeanFlow, each without guidance and with the same guided velocity, scores all at each NFE, and writes
table and plot into docs/results.md. Finished arms are used again, killed ones go on.
"""

from __future__ import annotations

from pathlib import Path

from mf_lightning.flow import AverageSampler, EulerSampler
from mf_lightning.report.charts import Chart, Series, exact
from mf_lightning.report.png import save_png
from mf_lightning.types import UserError
from scripts.arms import RECIPE, Arm, Measured, Plan, measure, run_command
from scripts.results_page import (
    PAGE,
    cost_table,
    figures_table,
    machine,
    markdown,
    protocol_of,
    sampler_words,
    write_section,
)

FM = "--model.loss.init_args.fm_fraction=1.0"
MF = "--model.loss.init_args.fm_fraction=0.75"
GUIDANCE = "--model.loss.init_args.guidance={omega: %s, kappa: %s, interval: [0.0, 1.0]}"
NONE, GUIDED = GUIDANCE % (1.0, 0.0), GUIDANCE % (1.0, 0.5)
PLAIN_ERROR = "--model.loss.init_args.weight={norm_p: 0.0, norm_eps: 0.01}"
BOTH = (AverageSampler, EulerSampler)
ARMS = {
    arm.name: arm
    for arm in (
        Arm("fm", "flow matching", (FM, NONE), (EulerSampler,)),
        Arm("meanflow", "MeanFlow", (MF, NONE), BOTH),
        Arm("fm-guided", "flow matching, guided", (FM, GUIDED), (EulerSampler,)),
        Arm("meanflow-guided", "MeanFlow, guided", (MF, GUIDED), BOTH),
        Arm("fm-p0", "flow matching, plain squared error", (FM, NONE, PLAIN_ERROR), (EulerSampler,)),
        Arm("fm-guided-p0", "flow matching, guided, plain squared error", (FM, GUIDED, PLAIN_ERROR), (EulerSampler,)),
    )
}
PAIRS = (("Without guidance", "fm", "meanflow"), ("With guidance", "fm-guided", "meanflow-guided"))
FEW = 4
"""Steps that count as few."""
BY_FAR = 2.0
"""So many times the FID is worse by far."""
DIFFERENCES = """The arms differ in what the list below says and in nothing else: `fm_fraction` (1.0 is flow matching, 0.75
MeanFlow) and guidance (omega 1, kappa 0.5 inside the target, on all t). All other settings are the MeanFlow quickstart's; flow
matching got no tuning of its own. The same number of steps is not the same time, see the cost."""


def claim(
    seeds: list[int] = [0],  # noqa: B006 (never changed; jsonargparse shows it)
    arms: list[str] = ["fm", "meanflow", "fm-guided", "meanflow-guided"],  # noqa: B006
    nfe: list[int] = [1, 2, 4, 8, 32],  # noqa: B006
    steps: int = 1500,
    num_samples: int = 2000,
    root: str = "runs/claim",
    page: str = str(PAGE),
    recipe: str = str(RECIPE),
    options: list[str] = [],  # noqa: B006
) -> None:
    """Train flow matching and MeanFlow on one budget, score both at each NFE, write docs/results.md.

    Args:
        seeds: of training; every arm is trained with each.
        arms: some of fm, meanflow, fm-guided, meanflow-guided, fm-p0, fm-guided-p0 (flow matching without adaptive weight).
        nfe: network passes per image to score at.
        steps: optimizer steps of each arm.
        num_samples: images per evaluation.
        root: folder of the runs.
        page: file whose section `claim` is written; the plot goes into images/ beside it.
        recipe: that the arms are variants of.
        options: of the command line, for every arm.
    """
    unknown = [name for name in arms if name not in ARMS]
    if unknown or not arms or not seeds or not nfe:
        raise UserError(
            f"Got arms = {arms}, seeds = {seeds}, nfe = {nfe}, expected at least one of each, arms of {list(ARMS)}."
        )
    plan = Plan(Path(root), tuple(sorted(nfe)), steps, num_samples, Path(recipe), tuple(options))
    results = [measure(ARMS[name], seeds, plan) for name in arms]
    plot = Path(page).parent / "images" / "claim.png"
    plot.parent.mkdir(parents=True, exist_ok=True)
    save_png(chart(results, plan), plot)
    text = section(results, plan, seeds)
    write_section(Path(page), "claim", text)
    print(f"\n{text}\n\npage: {page}\nplot: {plot}")


def chart(results: list[Measured], plan: Plan) -> Chart:
    """Return FID against NFE: colour and mark are the arm, dashes the second sampler of an arm."""
    series = [
        Series(
            f"{result.arm.title}, {sampler.name}",
            tuple((float(nfe), result.mean("fid", nfe, sampler)) for nfe in plan.nfe),
            colour,
            dash,
            colour,
        )
        for colour, result in enumerate(results)
        for dash, sampler in enumerate(result.arm.samplers)
    ]
    title = f"FID against NFE, {plan.steps:,} steps each"
    return Chart("claim", title, "network passes per image (NFE)", "FID (lower is better)", tuple(series), "nfe")


def section(results: list[Measured], plan: Plan, seeds: list[int]) -> str:
    """Return the section of the page; what it says is chosen by the figures."""
    by_name = {result.arm.name: result for result in results}
    words = [
        "\n".join(verdict(title, by_name[fm], by_name[mf], plan))
        for title, fm, mf in PAIRS
        if fm in by_name and mf in by_name and 1 in plan.nfe
    ]
    doubt = (
        "One seed: it tells factors, not a few percent."
        if len(seeds) == 1
        else f"{len(seeds)} seeds: means, with the standard deviation over training runs."
    )
    seconds = [f"{title.lower()} {ratio(by_name, fm, mf):.2f}" for title, fm, mf in PAIRS if {fm, mf} <= set(by_name)]
    cost = f"Training seconds of MeanFlow over those of flow matching: {', '.join(seconds)}." if seconds else ""
    return "\n\n".join(
        part
        for part in (
            f"`make claim` wrote this. {machine(results)}",
            *words,
            doubt,
            "![FID against NFE](images/claim.png)",
            "**FID** (lower is better)",
            figures_table(results, plan, "fid"),
            "**Classified as the class asked for** (higher is better)",
            figures_table(results, plan, "class_accuracy", percent=True),
            "**Recall** (higher is better)",
            figures_table(results, plan, "recall"),
            "**Cost**",
            cost_table(results),
            cost,
            "**Protocol**",
            protocol_of(results, plan, seeds),
            DIFFERENCES,
            sampler_words(),
            markdown(["arm", "options"], [[r.arm.title, " ".join(f"`{o}`" for o in r.arm.options)] for r in results]),
        )
        if part
    )


def ratio(by_name: dict[str, Measured], fm: str, mf: str) -> float:
    """Return training seconds of MeanFlow over those of flow matching."""
    return sum(by_name[mf].training_seconds) / sum(by_name[fm].training_seconds)


def verdict(title: str, fm: Measured, mf: Measured, plan: Plan) -> list[str]:
    """Return, in sentences, how one MeanFlow step compares with flow matching at few and at many steps."""
    one = mf.mean("fid", 1)
    others = {nfe: fm.mean("fid", nfe) for nfe in plan.nfe}
    listed = ", ".join(f"{exact(fid)} at {nfe} NFE ({fid / one:.2g} times)" for nfe, fid in others.items())
    few = {nfe: fid for nfe, fid in others.items() if nfe <= FEW}
    least, counts = min(few.values()) / one, ", ".join(map(str, few))
    if least >= BY_FAR:
        claim_holds = f"**the claim holds**: it beats flow matching at {counts} NFE by a factor of {least:.2g} or more in FID"
    elif least > 1:
        claim_holds = (
            f"**the claim holds, but not by far**: at {counts} NFE flow matching's FID is at least {least:.2f} times as high"
        )
    elif max(few.values()) <= one:
        claim_holds = f"**the claim does not hold here**: flow matching has the lower or the same FID at {counts} NFE"
    else:
        beaten = ", ".join(str(nfe) for nfe, fid in few.items() if fid > one)
        claim_holds = f"**the claim holds in part**: it beats flow matching at {beaten} NFE, not at all of {counts}"
    sentences = [f"{title}, one MeanFlow step has FID {exact(one)}, flow matching {listed}: {claim_holds}."]
    better = [nfe for nfe, fid in others.items() if fid < one]
    if better:
        sentences.append(f"Of the NFE measured, flow matching needs {min(better)} to have a lower FID than that one step.")
    else:
        sentences.append(f"Flow matching does not reach that one step at {', '.join(map(str, others))} NFE.")
    last = max(plan.nfe)
    if last > 1:
        few_step = mf.mean("fid", last)
        direction = "lower than" if few_step < one else "not lower than"
        sentences.append(f"With {last} jumps MeanFlow has {exact(few_step)}, {direction} with one.")
    return sentences


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    run_command(claim, args)


if __name__ == "__main__":
    main()
