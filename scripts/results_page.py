"""docs/results.md: sections that commands write between their marks; the rest is written by hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from mf_lightning import flow
from mf_lightning.report.charts import exact
from mf_lightning.types import UserError
from scripts.arms import ROOT, Measured, Plan

PAGE = ROOT / "docs" / "results.md"


def write_section(page: Path, name: str, text: str) -> None:
    """Put a section's text between its two marks; a page that does not exist is made of the section alone.

    Raises:
        UserError: the page lacks the marks.
    """
    begin, end = (f"<!-- {name}: {edge} -->" for edge in ("begin", "end"))
    old = page.read_text() if page.exists() else f"{begin}\n{end}\n"
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(end) < old.index(begin):
        raise UserError(f"Got {page} without the lines {begin} and {end}, expected each once, in this order. Put them there.")
    before, after = old[: old.index(begin)], old[old.index(end) :]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{begin}\n{text.strip()}\n{after}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(values: Sequence[float], *, percent: bool = False) -> str:
    """Return a mean over seeds, with its spread if there are several."""
    if not values:
        return "–"
    show: Callable[[float], str] = (lambda value: f"{100 * value:.1f} %") if percent else (lambda value: f"{exact(value)}")
    spread = "" if len(values) == 1 else f" ± {show(statistics.stdev(values))}"
    return show(statistics.fmean(values)) + spread


def figures_table(results: Sequence[Measured], plan: Plan, name: str, *, percent: bool = False) -> str:
    """Return one figure of all arms and samplers by NFE."""
    rows = [
        [result.arm.title, sampler.name, *(figure(result.values(name, nfe, sampler), percent=percent) for nfe in plan.nfe)]
        for result in results
        for sampler in result.arm.samplers
    ]
    return markdown(["", "sampler", *(f"NFE {nfe}" for nfe in plan.nfe)], rows)


def cost_table(results: Sequence[Measured]) -> str:
    """Return seconds per arm, the mean over seeds, and how quiet the machine was."""
    rows = [
        [
            result.arm.title,
            f"{statistics.fmean(result.training_seconds):,.0f}",
            f"{statistics.fmean(result.scoring_seconds):,.0f}",
            f"{statistics.fmean(result.others):.1f}" if result.others else "not known",
        ]
        for result in results
    ]
    return markdown(["", "training, s", "scoring, s", "cores busy with other work meanwhile"], rows)


def machine(results: Sequence[Measured]) -> str:
    """Return where and with what it was measured, and whether the seconds can be trusted."""
    versions = ", ".join(f"{name} {number}" for name, number in results[-1].versions.items())
    others = [cores for result in results for cores in result.others]
    total = sum(sum(result.training_seconds) + sum(result.scoring_seconds) for result in results)
    threads = {count for result in results for count in result.threads}
    limit = f" OMP_NUM_THREADS={', '.join(sorted(threads))}." if threads else ""
    load = "How busy the machine was otherwise is not known."
    if others and max(others) >= 0.2:
        load = f"The machine was shared: up to {max(others):.1f} cores were busy with other work, so the seconds are too high."
    elif others:
        load = "The machine did nothing else."
    date = max(result.date for result in results)
    return f"{date}, {results[-1].device}; {versions}. {total / 60:,.0f} minutes in all.{limit} {load}"


def protocol_of(results: Sequence[Measured], plan: Plan, seeds: Sequence[int]) -> str:
    """Return under which conditions the figures compare."""
    told = results[0].rows[results[0].arm.samplers[0].name][plan.nfe[0]][0]["protocol"]
    recipe = plan.recipe.relative_to(ROOT) if plan.recipe.is_relative_to(ROOT) else plan.recipe.name
    seed_words = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))} (mean ± standard deviation)"
    return (
        f"Each arm: network, data, learning rate and its schedule, clipping and EMA of `{recipe}`, {plan.steps:,} steps, "
        f"training {seed_words}, last state. {told['num_samples']:,} images of EMA {told['ema']}, labels {told['labels']}, "
        f"evaluation seed {told['seed']}: noise and labels are the same for all arms, samplers and NFE. FID on "
        f"{told['extractor']}, layer {told['layer']}, against {told['reference']}; autoencoder {told['autoencoder']}; "
        f"{told['rounding']}; precision {told['precision']}."
    )


def sampler_words() -> str:
    """Return what the samplers' names mean, and why flow matching has one."""
    return (
        f"Sampler {flow.AverageSampler.name}: `z_r = z_t - (t - r) u(z_t, r, t)`. {flow.EulerSampler.name}: "
        "`z_r = z_t - (t - r) u(z_t, t, t)`, the instantaneous velocity. A flow-matching network is sampled by the second "
        "only, since the first asks it for what it was never taught."
    )
