"""The tables of a report. A cell's ``data-value`` holds the figure in full, its text four digits."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mf_lightning.metrics.protocol import METRICS, MetricInfo
from mf_lightning.report.charts import Chart, exact
from mf_lightning.report.compare import ABSENT, differing
from mf_lightning.report.plots import Group, ema_name
from mf_lightning.report.runs import Row, Run

NOTHING = "–"
BEHIND = ("Seconds per image", "Step")
PACKAGES = ("torch", "lightning", "mf_lightning", "torch-fidelity", "torchmetrics", "timm", "diffusers", "numpy")


def table(head: Sequence[str], rows: Iterable[str], *, caption: str = "", style: str = "") -> str:
    """Return a table in a box that scrolls sideways by itself; ``rows`` are finished ``<tr>`` elements."""
    title = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    label = f' aria-label="{escape(caption, quote=True)}"' if caption else ""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    kind = f' class="{style}"' if style else ""
    head_row, body = f"<thead><tr>{cells}</tr></thead>", "".join(rows)
    return f'{title}<div class="wide" tabindex="0"><table{kind}{label}>{head_row}<tbody>{body}</tbody></table></div>'


def plain_row(name: str, values: Iterable[Any]) -> str:
    """Return a row of texts under a name."""
    cells = "".join(f"<td>{escape(text(value))}</td>" for value in values)
    return f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'


def text(value: Any) -> str:
    """Return a setting as a table shows it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def figure_cell(value: float | None, metric: str, *, std: float | None = None, marks: str = "", step: int | None = None) -> str:
    """Return one figure's cell; ``marks`` holds "star" and "best"."""
    if value is None:
        return f'<td class="number">{NOTHING}</td>'
    spread = "" if std is None else f" ± {std:.2g}"
    at = "" if step is None else f" <small>step {step:,}</small>"
    star = '<span class="star" title="best of its column">★</span> ' if "star" in marks else ""
    shown = f"<b>{exact(value)}</b>" if marks else exact(value)
    own_step = "" if step is None else f' data-step="{step}"'
    return f'<td class="number" data-metric="{metric}" data-value="{value!r}"{own_step}>{star}{shown}{spread}{at}</td>'


@dataclass(frozen=True)
class Columns:
    """Which columns lead a table of figures: run and weights stand in front where there are several, else behind or nowhere."""

    several_runs: bool
    several_emas: bool

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Columns:
        """Return the columns that tell these groups apart."""
        return cls(len({group.run.name for group in groups}) > 1, len({group.ema for group in groups}) > 1)

    def heads(self, metrics: Sequence[MetricInfo], behind: Sequence[str] = ()) -> list[str]:
        """Return the column titles."""
        front = ["NFE", *(["Run"] if self.several_runs else []), *(["Weights"] if self.several_emas else [])]
        return [*front, *metric_heads(metrics), *behind, *([] if self.several_emas else ["Weights"])]

    def row(self, group: Group, nfe: int, cells: Iterable[str], data: dict[str, Any]) -> str:
        """Return a ``<tr>`` with ``data-`` attributes."""
        attributes = "".join(
            f' data-{key}="{escape(str(value), quote=True)}"'
            for key, value in {"run": group.run.name, "nfe": nfe, "ema": _json_number(group.ema), **data}.items()
        )
        weights = f"<td>{escape(ema_name(group.ema))}</td>"
        name = f"<td>{escape(group.run.name)}</td>" if self.several_runs else ""
        front, back = (weights, "") if self.several_emas else ("", weights)
        return f'<tr{attributes}><th scope="row">{nfe}</th>{name}{front}{"".join(cells)}{back}</tr>'


def evaluation_row(columns: Columns, group: Group, row: Row, cells: Iterable[str]) -> str:
    """Return the ``<tr>`` of one evaluation at one NFE."""
    seconds = NOTHING if row.seconds is None else exact(row.seconds) + (" *" if row.seconds_from_rate else "")
    behind = [f'<td class="number">{seconds}</td>', f'<td class="number">{row.step:,}</td>']
    data = {"protocol": group.protocol_id, "step": row.step, "seconds": _json_number(row.seconds)}
    return columns.row(group, row.nfe, [*cells, *behind], data)


def _json_number(value: float | None) -> str:
    return "null" if value is None else repr(value)


def metric_heads(metrics: Sequence[MetricInfo]) -> list[str]:
    """Return column titles with the direction."""
    return [f"{metric.title} {'↓' if metric.better == 'min' else '↑'}" for metric in metrics]


def measured(groups: Sequence[Group]) -> list[MetricInfo]:
    """Return the figures that any row has."""
    return [metric for metric in METRICS if any(metric.name in row.figures for group in groups for row in group.rows)]


def newest_table(groups: Sequence[Group], caption: str) -> str:
    """Return the figures of each group's newest step, by NFE; the groups are of one protocol."""
    pairs = sorted(((group, row) for group in groups for row in group.newest), key=lambda pair: pair[1].nfe)
    metrics, columns = measured(groups), Columns.of(groups)

    def value(pair: tuple[Group, Row], metric: str) -> float | None:
        return pair[1].figures.get(metric)

    marks = {metric.name: _marks(pairs, metric, value) for metric in metrics}
    rows = []
    for number, (group, row) in enumerate(pairs):
        cells = [
            figure_cell(
                row.figures.get(metric.name),
                metric.name,
                std=row.figures.get(f"{metric.name}_std"),
                marks=marks[metric.name].get(number, ""),
            )
            for metric in metrics
        ]
        rows.append(evaluation_row(columns, group, row, cells))
    return table(columns.heads(metrics, BEHIND), rows, caption=caption, style="figures newest")


def best_table(groups: Sequence[Group], caption: str) -> str:
    """Return each figure's best over all steps, by NFE, with its step; the groups are of one protocol."""
    metrics, columns = measured(groups), Columns.of(groups)
    nfes = sorted({row.nfe for group in groups for row in group.rows})
    pairs = [(group, nfe) for nfe in nfes for group in groups if any(row.nfe == nfe for row in group.rows)]
    best = {
        (number, metric.name): _best([row for row in group.rows if row.nfe == nfe], metric)
        for number, (group, nfe) in enumerate(pairs)
        for metric in metrics
    }
    rows = []
    for number, (group, nfe) in enumerate(pairs):
        cells = []
        for metric in metrics:
            row = best[number, metric.name]
            cells.append(
                figure_cell(row.figures[metric.name], metric.name, step=row.step) if row else figure_cell(None, metric.name)
            )
        rows.append(columns.row(group, nfe, cells, {"protocol": group.protocol_id}))
    return table(columns.heads(metrics), rows, caption=caption, style="figures best")


def _best(rows: list[Row], metric: MetricInfo) -> Row | None:
    there = [row for row in rows if math.isfinite(row.figures.get(metric.name, math.nan))]
    choose: Callable = min if metric.better == "min" else max
    return choose(there, key=lambda row: row.figures[metric.name]) if there else None


def _marks(pairs: Sequence[tuple[Group, Row]], metric: MetricInfo, value: Callable) -> dict[int, str]:
    """Return "star" for the best of a column and "best" for the best at its NFE, where several compare, by row."""
    known = {n: v for n, pair in enumerate(pairs) if (v := value(pair, metric.name)) is not None and math.isfinite(v)}
    choose: Callable = min if metric.better == "min" else max
    marks: dict[int, str] = {}
    if len(known) > 1 and len(set(known.values())) > 1:
        top = choose(known.values())
        marks |= {number: "star" for number, figure in known.items() if figure == top}
    for nfe in {row.nfe for _, row in pairs}:
        here = {number: figure for number, figure in known.items() if pairs[number][1].nfe == nfe}
        if len(set(here.values())) > 1:
            top = choose(here.values())
            marks |= {number: f"{marks.get(number, '')} best".strip() for number, figure in here.items() if figure == top}
    return marks


def chart_table(chart: Chart) -> str:
    """Return the values that a chart draws: a row per x, a column per line."""
    places = sorted({x for series in chart.series for x, _ in series.points})
    known = [dict(series.points) for series in chart.series]
    rows = []
    for x in places:
        cells = "".join(
            f'<td class="number" data-value="{values[x]!r}">{exact(values[x])}</td>'
            if x in values
            else f'<td class="number">{NOTHING}</td>'
            for values in known
        )
        rows.append(f'<tr><th scope="row" class="number" data-value="{x!r}">{exact(x)}</th>{cells}</tr>')
    return table([chart.x, *(series.name for series in chart.series)], rows, caption=chart.y)


def all_rows_table(groups: Sequence[Group]) -> str:
    """Return every evaluation of groups of one protocol."""
    metrics, columns = measured(groups), Columns.of(groups)
    rows = []
    for group in groups:
        for row in group.rows:
            cells = [
                figure_cell(row.figures.get(metric.name), metric.name, std=row.figures.get(f"{metric.name}_std"))
                for metric in metrics
            ]
            rows.append(evaluation_row(columns, group, row, cells))
    return table(columns.heads(metrics, BEHIND), rows, style="figures every")


def settings_table(names: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    """Return the settings that differ between runs; "" if none does."""
    different = differing(records)
    return table(["Setting", *names], [plain_row(name, values) for name, values in different]) if different else ""


def protocol_table(protocols: dict[str, dict[str, Any]], users: dict[str, str]) -> str:
    """Return the protocols side by side; what differs is marked."""
    different = {name for name, _ in differing(list(protocols.values()))}
    names = dict.fromkeys(name for protocol in protocols.values() for name in protocol)
    rows = [plain_row("figures of", users.values())]
    for name in names:
        row = plain_row(name.replace("_", " "), [protocol.get(name, ABSENT) for protocol in protocols.values()])
        rows.append(row.replace("<tr>", '<tr class="differs">', 1) if name in different else row)
    return table(["Protocol", *protocols], rows)


def versions_here() -> dict[str, str]:
    """Return the versions of this process: Python and the packages that move figures."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cost_table(runs: Sequence[Run]) -> str:
    """Return what each run cost, as far as it was recorded."""
    costs = [_cost(run) for run in runs]
    return table(["Cost", *(run.name for run in runs)], [plain_row(name, [cost[name] for cost in costs]) for name in costs[0]])


def _cost(run: Run) -> dict[str, str]:
    sessions = run.record.get("sessions", [])
    unknown = "not recorded"
    last = sessions[-1] if sessions else {}
    newest = max([row.step for row in run.rows] + [points[-1][0] for points in run.curves.values()], default=0)
    steps = last.get("to_step", newest)
    seconds = sum(session["seconds"] for session in sessions)
    trained = sum(session["to_step"] - session["from_step"] for session in sessions)
    batch = last.get("batch_size") or _batch_size(run)
    devices = dict.fromkeys(f"{session.get('devices', '?')} x {session.get('device', '?')}" for session in sessions)
    parameters = run.record.get("parameters")
    return {
        "parameters": f"{parameters:,}" if isinstance(parameters, int) else unknown,
        "optimizer steps": f"{steps:,}",
        "batch size (global)": f"{batch:,}" if isinstance(batch, int) else unknown,
        "training images seen": f"{steps * batch:,}" if isinstance(batch, int) else unknown,
        "wall time, evaluation included": duration(seconds) if seconds else unknown,
        "images per second, evaluation included": exact(trained * batch / seconds)
        if seconds and isinstance(batch, int)
        else unknown,
        "devices": "; ".join(devices) or unknown,
        "strategy": str(last.get("strategy", unknown)),
        "precision": str(last.get("precision", unknown)),
        "torch.compile": text(last.get("compile", unknown)),
        "started, times resumed": f"{sessions[0].get('started', '?')}, {len(sessions) - 1}" if sessions else unknown,
    }


def _batch_size(run: Run) -> Any:
    data = (run.config or {}).get("data")
    settings = data.get("init_args") if isinstance(data, dict) else None
    return settings.get("batch_size") if isinstance(settings, dict) else None


def duration(seconds: float) -> str:
    """Return a time span for people: 75 s as 1 min 15 s."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"


def versions_table(runs: Sequence[Run]) -> str:
    """Return the versions that each run was trained with, and those of this report."""
    here = versions_here()
    recorded = []
    for run in runs:
        sessions = run.record.get("sessions", [])
        found: dict[str, list[str]] = {}
        for session in sessions:
            for name, value in (session.get("versions") or {}).items():
                found.setdefault(name, []).append(str(value))
        recorded.append({name: ", then ".join(dict.fromkeys(values)) for name, values in found.items()})
    names = dict.fromkeys([*here, *(name for record in recorded for name in record)])
    rows = [
        plain_row(name, [*(record.get(name, "not recorded") for record in recorded), here.get(name, "not installed")])
        for name in names
    ]
    return table(["Version", *(run.name for run in runs), "this report"], rows)
