"""The report as one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path

import yaml

from mf_lightning.report.charts import Chart
from mf_lightning.report.compare import all_protocols, protocol_names, shown_settings
from mf_lightning.report.pictures import samples
from mf_lightning.report.plots import Group, against_nfe, against_seconds, against_step, diagnostics, groups
from mf_lightning.report.runs import FIGURES_FILE, Run
from mf_lightning.report.svg import legend, svg
from mf_lightning.report.tables import (
    all_rows_table,
    best_table,
    chart_table,
    cost_table,
    newest_table,
    protocol_table,
    settings_table,
    versions_here,
    versions_table,
)

_HERE = Path(__file__).parent
MOST_OPEN = 9
"""With more charts in a section only the first figure's are shown at once."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Even by mistake the page fetches nothing."""


def sections_of_charts(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """Return every chart of a report by its section."""
    found = groups(runs)
    return {
        "Quality against step": against_step(found),
        "Quality against NFE": against_nfe(found),
        "Quality against time": against_seconds(found),
        "Training": diagnostics(runs),
    }


def page(runs: Sequence[Run], charts: dict[str, list[Chart]], notes: Sequence[str]) -> str:
    """Return the whole page."""
    names = ", ".join(run.name for run in runs)
    pictures = samples(runs)  # may add notes
    sections = [("Figures", _figures(runs)), *_quality(runs, charts)]
    if pictures:
        about = "<p>A column is one class, its noise the same at each NFE and step.</p>"
        sections.append(("Samples", about + pictures))
    if charts["Training"]:
        about = "<p>Steps are counted as done, as in the figures above; metrics.csv counts from 0.</p>"
        sections.append(("Training", about + _charts(charts["Training"])))
    sections += [("Settings", _settings(runs)), ("Protocol", _protocol(runs))]
    sections.append(("Cost and versions", _cost(runs)))
    if any(run.rows for run in runs):
        sections.append(("Every evaluation", _every(runs)))
    links = "".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title, _ in sections)
    body = "".join(f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>{text}</section>' for title, text in sections)
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    here = versions_here()
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(names)}: report</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{(_HERE / 'page.css').read_text()}</style></head><body>"
        f'<header><h1>{escape(names)}</h1><div class="muted">Report of {_count(len(runs), "run")}, {made}</div>'
        f"<nav>{links}</nav>{_notes(runs, notes)}</header><main>{body}</main>"
        f"<footer>Made by mf_lightning {here.get('mf_lightning', '?')}. This file holds everything it shows.</footer>"
        f"<script>{(_HERE / 'page.js').read_text()}</script></body></html>"
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _notes(runs: Sequence[Run], notes: Sequence[str]) -> str:
    lines = [*notes, *(f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes)]
    if not lines:
        return ""
    return f'<div class="notes"><b>Notes</b><ul>{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul></div>'


def _by_protocol(runs: Sequence[Run]) -> list[tuple[str, str, list[Group]]]:
    """Return (id, name, groups) for each protocol."""
    found, names = groups(runs), protocol_names(runs)
    return [(key, names[key], [group for group in found if group.protocol_id == key]) for key in names]


def _what(key: str, name: str, some: Sequence[Group]) -> str:
    protocol = some[0].rows[0].protocol
    number = protocol.get("num_samples")
    known = [f"{number:,} images" if isinstance(number, int) else "", str(protocol.get("extractor", ""))]
    return ", ".join(part for part in (*known, f"protocol {key}" + (f" ({name})" if name else "")) if part)


def _figures(runs: Sequence[Run]) -> str:
    if not any(run.rows for run in runs):
        return "<p>Nothing to show: no evaluation has run yet, or sample_eval.num_samples is 0.</p>"
    parts = [
        '<p class="muted">↓ lower is better, ↑ higher is better. <span class="star">★</span> best of its column; '
        "<b>bold</b> without a star: best at its NFE. Figures of different protocols do not compare: each protocol has a "
        "table of its own.</p>"
    ]
    for key, name, some in _by_protocol(runs):
        what = _what(key, name, some)
        parts.append(newest_table(some, f"At the newest step: {what}"))
        if any(len({row.step for row in group.rows}) > 1 for group in some):
            parts.append(
                f"<details><summary>Best over training</summary>{best_table(some, f'Best over all steps: {what}')}</details>"
            )
    if any(row.seconds_from_rate for run in runs for row in run.rows):
        parts.append(
            '<p class="muted">* from images_per_s, which includes scoring: an older version measured no seconds per image.</p>'
        )
    return "".join(parts)


def _quality(runs: Sequence[Run], charts: dict[str, list[Chart]]) -> list[tuple[str, str]]:
    if not any(run.rows for run in runs):
        return []
    nfes = {row.nfe for run in runs for row in run.rows}
    texts = {
        "Quality against step": "",
        "Quality against NFE": "<p>At the newest step of each line. One network pass is one NFE.</p>",
        "Quality against time": "<p>At the newest step of each line: measured seconds per image, network and decoder, on one "
        "device. Only figures of one kind of machine compare.</p>",
    }
    found = []
    for title, text in texts.items():
        if charts[title]:
            found.append((title, text + _folded(charts[title])))
        elif title == "Quality against step":
            found.append((title, "<p>Only one step was evaluated: a curve needs two (trainer.val_check_interval).</p>"))
        elif title == "Quality against NFE" and len(nfes) == 1:
            found.append((title, f"<p>Only {nfes.pop()} NFE was measured: sample_eval.nfe=[1,2,4] gives a curve.</p>"))
    return found


def _folded(charts: Sequence[Chart]) -> str:
    """Return charts, the first figure's open and, if there are many, the others behind a line to open."""
    first = [chart for chart in charts if chart.y == charts[0].y]
    rest = [chart for chart in charts if chart.y != charts[0].y]
    if len(charts) <= MOST_OPEN:
        return _charts(charts)
    names = ", ".join(dict.fromkeys(chart.y.split(" (")[0] for chart in rest))
    return f"{_charts(first)}<details><summary>{escape(names)}</summary>{_charts(rest)}</details>" if rest else _charts(first)


def _charts(charts: Sequence[Chart]) -> str:
    cards = []
    for chart in charts:
        note = f'<p class="muted"><small>{escape(chart.note)}</small></p>' if chart.note else ""
        cards.append(
            f'<figure class="card" data-chart="{escape(chart.key, quote=True)}"><h3>{escape(chart.title)}</h3>{svg(chart)}'
            f"{legend(chart.series)}{note}<details><summary>Values</summary>{chart_table(chart)}</details></figure>"
        )
    return f'<div class="charts">{"".join(cards)}</div>'


def _settings(runs: Sequence[Run]) -> str:
    known = [run for run in runs if run.config]
    parts = []
    if len(known) > 1:
        different = settings_table([run.name for run in known], [shown_settings(run) for run in known])
        parts.append(f"<p>Only what differs.</p>{different}" if different else "<p>The settings of all runs are equal.</p>")
    for run in known:
        lines = yaml.safe_dump(shown_settings(run), sort_keys=False, allow_unicode=True, width=120)
        parts.append(f"<details><summary>All settings of {escape(run.name)}</summary><pre>{escape(lines)}</pre></details>")
    if any(not run.config for run in runs):
        parts.append(f"<p>Not known: {escape(', '.join(run.name for run in runs if not run.config))}.</p>")
    return "".join(parts)


def _protocol(runs: Sequence[Run]) -> str:
    protocols = all_protocols(runs)
    if not protocols:
        return "<p>Nothing was measured.</p>"
    users = {key: ", ".join(run.name for run in runs if any(row.protocol_id == key for row in run.rows)) for key in protocols}
    text = "<p>What moves the figures besides the network. EMA and NFE stand beside each figure.</p>"
    several = "<p>Marked rows differ, so figures of these protocols do not compare.</p>" if len(protocols) > 1 else ""
    return text + several + protocol_table(protocols, users)


def _cost(runs: Sequence[Run]) -> str:
    unknown = [run.name for run in runs if not run.record]
    note = (
        f"<p>The versions of {escape(', '.join(unknown))} were not recorded (an older version wrote no run.json); the last "
        "column is what made this report.</p>"
        if unknown
        else ""
    )
    return cost_table(runs) + note + versions_table(runs)


def _every(runs: Sequence[Run]) -> str:
    tables = [f"<h3>{escape(_what(key, name, some))}</h3>{all_rows_table(some)}" for key, name, some in _by_protocol(runs)]
    return f"<details><summary>All lines of {FIGURES_FILE}</summary>{''.join(tables)}</details>"
