"""Which charts a report has. Figures of different protocols, EMAs or runs never share a line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mf_lightning.metrics.protocol import METRICS, MetricInfo
from mf_lightning.report.charts import Chart, Series
from mf_lightning.report.compare import protocol_names
from mf_lightning.report.runs import Row, Run
from mf_lightning.report.svg import COLOURS

MOST_LINES = 8
"""A chart with more has one chart per NFE instead."""
MOST_POINTS = 200
"""A longer curve is drawn as means over equal spans of steps."""
STEP = "training step"
DIAGNOSTICS = (
    ("raw_error", "Raw error", "squared, summed over pixels (lower is better)"),
    ("velocity_error", "Velocity error", "squared, summed over pixels (lower is better)"),
    ("dudt_norm", "Size of du/dt", "|du/dt|, mean over rows with r < t"),
    ("grad_norm", "Gradient norm", "gradient norm before clipping"),
    ("loss", "Weighted loss", "loss after the adaptive weight"),
)
_RATE = re.compile(r"(images|samples|steps)_per_s|throughput")
_BIN = re.compile(r"(train|val)/(raw_error|velocity_error)_t([\d.]+)-([\d.]+)")


@dataclass(frozen=True)
class Group:
    """Rows that may share a line: one run, one EMA, one protocol."""

    run: Run
    ema: float | None
    protocol_id: str
    name: str
    rows: tuple[Row, ...]

    @property
    def newest(self) -> tuple[Row, ...]:
        """The rows of the newest step, by NFE."""
        return tuple(row for row in self.rows if row.step == self.rows[-1].step)


def ema_name(ema: float | None) -> str:
    """Return how an EMA is called."""
    return "raw weights" if ema is None else f"EMA {ema:g}"


def groups(runs: Sequence[Run]) -> list[Group]:
    """Return the rows of all runs as groups, named by what tells them apart."""
    protocols = protocol_names(runs)
    several_emas = len({row.ema for run in runs for row in run.rows}) > 1
    found = []
    for run in runs:
        keys = dict.fromkeys((row.ema, row.protocol_id) for row in run.rows)
        for ema, key in keys:
            parts = [run.name if len(runs) > 1 else "", ema_name(ema) if several_emas else "", protocols[key]]
            name = ", ".join(part for part in parts if part) or run.name
            rows = tuple(row for row in run.rows if (row.ema, row.protocol_id) == (ema, key))
            found.append(Group(run, ema, key, name, rows))
    return found


def axis(metric: MetricInfo) -> str:
    """Return a figure's axis label with its direction."""
    return f"{metric.title} ({'lower' if metric.better == 'min' else 'higher'} is better)"


def against_step(all_groups: Sequence[Group]) -> list[Chart]:
    """Return each figure against the training step, one line per group and NFE; none where no line has two steps."""
    nfes = sorted({row.nfe for group in all_groups for row in group.rows})
    charts = []
    for metric in METRICS:
        lines = [
            (number, nfe, points)
            for number, group in enumerate(all_groups)
            for nfe in nfes
            if (points := _points((row.step, row.figures.get(metric.name)) for row in group.rows if row.nfe == nfe))
        ]
        facets = [("", "", lines)]
        if len(lines) > MOST_LINES and len(nfes) > 1:
            facets = [(f"_nfe{nfe}", f" at {nfe} NFE", [line for line in lines if line[1] == nfe]) for nfe in nfes]
        for suffix, words, some in facets:
            if any(len(points) > 1 for *_, points in some):
                series = _step_series(all_groups, nfes, some)
                charts.append(
                    Chart(f"{metric.name}_step{suffix}", f"{metric.title}{words} against step", STEP, axis(metric), series)
                )
    return charts


def _step_series(all_groups: Sequence[Group], nfes: list[int], lines: list[tuple]) -> tuple[Series, ...]:
    """Return lines of (number of the group, NFE, points). One group: colour is NFE; else colour is the group, dash is NFE."""
    one_nfe = len({nfe for _, nfe, _ in lines}) == 1
    series = []
    for number, nfe, points in lines:
        if len(all_groups) == 1:
            look = nfes.index(nfe)
            series.append(Series(f"{nfe} NFE", points, look, look // COLOURS, look))
        elif one_nfe:
            series.append(Series(all_groups[number].name, points, number, number // COLOURS, number))
        else:
            kind = nfes.index(nfe)
            series.append(Series(f"{all_groups[number].name}, {nfe} NFE", points, number, kind, kind))
    return tuple(series)


def against_nfe(all_groups: Sequence[Group]) -> list[Chart]:
    """Return each figure against NFE at each group's newest step; none where no more than one NFE was measured."""
    charts = []
    for metric in METRICS:
        lines = [
            (number, points, ())
            for number, group in enumerate(all_groups)
            if (points := _points((row.nfe, row.figures.get(metric.name)) for row in group.newest))
        ]
        if len({x for _, points, _ in lines for x, _ in points}) > 1:
            x, title = "network passes per image (NFE)", f"{metric.title} against NFE"
            charts.append(_newest_chart(f"{metric.name}_nfe", title, x, metric, all_groups, lines, "nfe"))
    return charts


def against_seconds(all_groups: Sequence[Group]) -> list[Chart]:
    """Return each figure against the measured seconds per image at each group's newest step; NFE beside some points."""
    charts = []
    for metric in METRICS:
        lines, told = [], set()
        for number, group in enumerate(all_groups):
            rows = [
                row for row in group.newest if math.isfinite(row.figures.get(metric.name, math.nan)) and _positive(row.seconds)
            ]
            rows.sort(key=lambda row: row.seconds)
            points = tuple((row.seconds, row.figures[metric.name]) for row in rows)
            if points:  # an NFE is named once: the lines of several runs lie close
                labels = tuple("" if row.nfe in told else f"{row.nfe} NFE" for row in rows)
                told |= {row.nfe for row in rows}
                lines.append((number, points, labels))
        if lines:
            title = f"{metric.title} against time"
            charts.append(_newest_chart(f"{metric.name}_seconds", title, "seconds per image", metric, all_groups, lines, "log"))
    return charts


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _newest_chart(
    key: str, title: str, x: str, metric: MetricInfo, all_groups: Sequence[Group], lines: list[tuple], scale: str
) -> Chart:
    """Return a chart of lines of (number of the group, points, labels) at the groups' newest steps."""
    steps = {all_groups[number].rows[-1].step for number, *_ in lines}
    series = []
    for number, points, labels in lines:
        group = all_groups[number]
        name = group.name if len(steps) == 1 else f"{group.name}, step {group.rows[-1].step:,}"
        series.append(Series(name, points, number, number // COLOURS, number, labels))
    note = f"At step {steps.pop():,}." if len(steps) == 1 else ""
    return Chart(key, title, x, axis(metric), tuple(series), scale, note)


def _points(pairs: Iterable[tuple[int, float | None]]) -> tuple[tuple[float, float], ...]:
    """Return (x, y) by x, () if no y is finite."""
    points = tuple(sorted((float(x), y) for x, y in pairs if y is not None))
    return points if any(math.isfinite(y) for _, y in points) else ()


def diagnostics(runs: Sequence[Run]) -> list[Chart]:
    """Return what was logged while training: errors, sizes, learning rate, throughput."""
    charts = []
    for name, title, label in DIAGNOSTICS:
        keys = (f"train/{name}", f"val/{name}")
        note = "About 1 whatever the network does where norm_p is 1; the raw error tells more." if name == "loss" else ""
        charts.append(_curves(runs, keys, name, title, label, note))
    rates = sorted({key for run in runs for key in run.curves if key.startswith("lr-")})
    charts.append(_curves(runs, rates, "learning_rate", "Learning rate", "learning rate"))
    for key in sorted({key for run in runs for key in run.curves if _RATE.search(key)}):
        unit = "steps per second" if "steps_per_s" in key else "images per second (higher is faster)"
        charts.append(_curves(runs, (key,), re.sub(r"\W+", "_", key), f"Throughput: {key}", unit))
    return [chart for chart in (*charts, *_by_time(runs)) if chart]


def _curves(runs: Sequence[Run], keys: Sequence[str], file: str, title: str, label: str, note: str = "") -> Chart | None:
    series, span = [], 1
    for number, run in enumerate(runs):
        for kind, key in enumerate(keys):
            points, width = thinned(run.curves.get(key, []))
            span = max(span, width)
            if not _points(points):
                continue
            short = key.split("/")[0] if key.startswith(("train/", "val/")) else key
            parts = ([run.name] if len(runs) > 1 else []) + ([short] if len(keys) > 1 else [])
            colour = number if len(runs) > 1 else kind
            name = ", ".join(parts) or key
            series.append(Series(name, tuple(points), colour, kind + 2 * (number // COLOURS), kind))
    if not series:
        return None
    thin = f"Curves with many points are drawn as means over spans of {span:,} steps." if span > 1 else ""
    return Chart(file, title, STEP, label, tuple(series), note=" ".join(part for part in (note, thin) if part))


def thinned(points: list[tuple[int, float]]) -> tuple[list[tuple[int, float]], int]:
    """Return at most about ``MOST_POINTS`` points, each the mean over a span of steps, and the span; short curves as is."""
    if len(points) <= MOST_POINTS:
        return points, 1
    span = -(-points[-1][0] // MOST_POINTS)
    spans: dict[int, list[tuple[int, float]]] = {}
    for step, value in points:
        spans.setdefault((step - 1) // span, []).append((step, value))
    return [
        (some[-1][0], math.fsum(y for _, y in some) / len(some) if _all_finite(some) else math.nan) for some in spans.values()
    ], span


def _all_finite(points: list[tuple[int, float]]) -> bool:
    return all(math.isfinite(y) for _, y in points)


def _by_time(runs: Sequence[Run]) -> list[Chart]:
    """Return errors by bins of t: each run at its newest validation, and the bins of a run against the step."""
    bins: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for key in sorted({key for run in runs for key in run.curves}):
        match = _BIN.fullmatch(key)
        if match:
            bins.setdefault((match[1], match[2]), []).append((float(match[3]), float(match[4]), key))
    labels = {name: (title, label) for name, title, label in DIAGNOSTICS}
    charts = []
    for (split, name), edges in bins.items():
        title, label = labels[name]
        newest = []
        for number, run in enumerate(runs):
            there = [(low, high, run.curves[key][-1]) for low, high, key in sorted(edges) if key in run.curves]
            points = _points(((low + high) / 2, last[1]) for low, high, last in there)
            if points:
                step = max(last[0] for *_, last in there)
                newest.append(Series(f"{run.name}, step {step:,}", points, number, number // COLOURS, number))
        if newest:
            x = "t, middle of its bin (0 = data, 1 = noise)"
            charts.append(Chart(f"{split}_{name}_by_t", f"{title} by t, {split}", x, label, tuple(newest)))
        for number, run in enumerate(runs):
            series = tuple(
                Series(f"t {low:g} to {high:g}", tuple(thinned(run.curves[key])[0]), kind, 0, kind)
                for kind, (low, high, key) in enumerate(sorted(edges))
                if _points(run.curves.get(key, []))
            )
            if series:
                whose = f", {run.name}" if len(runs) > 1 else ""
                charts.append(
                    Chart(f"{split}_{name}_by_t_run{number + 1}", f"{title} by t, {split}{whose}", STEP, label, series)
                )
    return charts
