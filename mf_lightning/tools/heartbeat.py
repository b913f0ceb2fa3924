"""`heartbeat`: what every process of a run does, and which one the others wait for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from mf_lightning.types import UserError

SILENT = 3
"""A file older than this many of its intervals is no sign of life."""


@dataclass(frozen=True)
class Beat:
    """One process's file, as it is read."""

    rank: int
    world_size: int
    host: str
    pid: int
    every_s: float
    step: int
    hooks: int
    """Hooks passed since the last optimizer step: the finer measure of how far a process is."""
    phase: str
    age: float
    """Seconds since the file was written."""
    unchanged: float
    """Seconds since step or phase changed."""

    @property
    def ended(self) -> bool:
        """Whether the process ended and said so."""
        return self.phase in ("finished", "stopped")

    @property
    def silent(self) -> bool:
        """Whether the process gives no sign of life."""
        return not self.ended and self.age > SILENT * self.every_s


def heartbeat(run: str | Path) -> None:
    """Print one line per process of a run, and one that names those that are behind or give no sign of life.

    Args:
        run: the run's folder, its trainer.default_root_dir.

    Raises:
        UserError: the run wrote no heartbeat, or a file is not one.
    """
    beats = read_beats(run)
    rows = [("rank", "host", "pid", "step", "phase", "unchanged for", "file age")]
    rows += [(str(b.rank), b.host, str(b.pid), str(b.step), b.phase, f"{b.unchanged:.1f} s", f"{b.age:.1f} s") for b in beats]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(verdict(beats))


def read_beats(run: str | Path) -> list[Beat]:
    """Return the heartbeats of a run, sorted by rank."""
    folder = Path(run) / "heartbeat"
    files = sorted(folder.glob("rank*.json"))
    if not files:
        raise UserError(
            f"Got no heartbeat files in {folder}, expected one per process. Start the run with --heartbeat.every_s=10, and "
            "give its trainer.default_root_dir here."
        )
    now, found = datetime.now(timezone.utc), []
    for file in files:
        try:
            raw = json.loads(file.read_text())
            age = max(0.0, (now - datetime.fromisoformat(raw.pop("written"))).total_seconds())
            raw.pop("local_rank")
            found.append(Beat(age=age, unchanged=raw.pop("since") + age, **raw))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"Got {file}, which is no heartbeat ({error}), expected what this version writes. Remove the file."
            ) from error
    return sorted(found, key=lambda beat: beat.rank)


def verdict(beats: Sequence[Beat]) -> str:
    """Return the line that names who is behind, who is silent, who ended and who never wrote."""
    parts, running = [], [beat for beat in beats if not beat.ended]
    if running:
        parts.append(_behind(running))
    silent = [beat for beat in running if beat.silent]
    if silent:
        told = ", ".join(f"{b.rank} (pid {b.pid} on {b.host}, file {b.age:.0f} s old)" for b in silent)
        parts.append(f"no sign of life: {_processes(silent)} {told}")
    for phase, words in (("stopped", "stopped by an error or a signal"), ("finished", "finished")):
        ended = [beat for beat in beats if beat.phase == phase]
        if ended:
            told = ", ".join(f"{beat.rank} at step {beat.step}" for beat in ended)
            parts.append(f"{words}: {_processes(ended)} {told}")
    missing = sorted(set(range(max(beat.world_size for beat in beats))) - {beat.rank for beat in beats})
    if missing:
        parts.append(f"without a file: {_processes(missing)} {', '.join(map(str, missing))}")
    return "; ".join(parts)


def _behind(running: Sequence[Beat]) -> str:
    """Name the processes that have come least far, if they stand still; files are not written at the same moment."""
    least, most = (extreme((beat.step, beat.hooks) for beat in running) for extreme in (min, max))
    last = [beat for beat in running if (beat.step, beat.hooks) == least]
    longest = max(running, key=lambda beat: beat.unchanged)
    if all(beat.unchanged > SILENT * beat.every_s for beat in last) and least != most:
        told = ", ".join(f"{b.rank} (pid {b.pid} on {b.host}, {b.phase}, unchanged for {b.unchanged:.0f} s)" for b in last)
        ahead = f"others are at step {most[0]}" if most[0] > least[0] else "others are further in the same step"
        return f"behind: {_processes(last)} {told} at step {least[0]}, {ahead}"
    where = f"step {least[0]}" if least[0] == most[0] else f"steps {least[0]} to {most[0]}"
    told = f"process {longest.rank} ({longest.phase}, {longest.unchanged:.0f} s)"
    return f"none is behind, all at {where}; longest unchanged: {told}"


def _processes(several: Sequence[object]) -> str:
    return "process" if len(several) == 1 else "processes"
