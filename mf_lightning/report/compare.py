"""What differs: between the settings of runs, and between protocols of figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from mf_lightning.report.runs import Run

ABSENT = "not set"
HIDDEN = "(hidden: may hold a secret)"
_SECRET = re.compile(r"secret|token|password|passwd|api_?key|credential|storage_options", re.IGNORECASE)


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name; entries of a list by class, or by number; short lists of values stay whole."""
    if isinstance(settings, dict) and settings:
        entries = [(str(key), value) for key, value in settings.items()]
    elif isinstance(settings, list) and any(isinstance(entry, dict) for entry in settings):
        entries = list(_named(settings))
    else:
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for name, value in entries:
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def _named(entries: list[Any]) -> Iterable[tuple[str, Any]]:
    """Name the entries of a list by their class, so that one more callback does not move all others."""
    seen: dict[str, int] = {}
    for number, entry in enumerate(entries):
        path = entry.get("class_path") if isinstance(entry, dict) else None
        name = str(path).rsplit(".", 1)[-1] if path else str(number)
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), entry


def shown_settings(run: Run) -> dict[str, Any]:
    """Return a run's settings by dotted name, with its own folder as RUN and without what may be a secret."""
    flat = flatten(run.config or {})
    root = str(flat.get("trainer.default_root_dir") or "")

    def shown(name: str, value: Any) -> Any:
        if _SECRET.search(name) and value not in (None, {}, ""):
            return HIDDEN
        return "RUN" + value[len(root) :] if root and isinstance(value, str) and (value + "/").startswith(root + "/") else value

    return {name: shown(name, value) for name, value in flat.items()}


def differing(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Return (name, value in each record) where not all are equal, in the order of first appearance."""
    names = list(dict.fromkeys(name for record in records for name in record))
    table = [(name, [record.get(name, ABSENT) for record in records]) for name in names]
    return [(name, values) for name, values in table if any(value != values[0] for value in values)]


def protocol_names(runs: Sequence[Run]) -> dict[str, str]:
    """Return a name for each protocol in the runs, made of what tells it from the others; "" where there is one."""
    protocols = all_protocols(runs)
    different = differing(list(protocols.values()))
    names = {}
    for number, key in enumerate(protocols):
        parts = [_words(name, values[number]) for name, values in different if values[number] != ABSENT]
        names[key] = ", ".join(parts) or f"protocol {key}"
    if len(names) < 2:
        return dict.fromkeys(names, "")
    repeated = [key for key in names if list(names.values()).count(names[key]) > 1]
    return names | {key: f"{names[key]} ({key})" for key in repeated}


def _words(name: str, value: Any) -> str:
    return f"{value:,} images" if name == "num_samples" and isinstance(value, int) else f"{name.replace('_', ' ')} {value}"


def all_protocols(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Return the protocols in the runs, by their id."""
    return {row.protocol_id: row.protocol for run in runs for row in run.rows}
