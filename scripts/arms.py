"""The arms of a comparison: networks that are trained and scored through the command line, each in a folder of its own.

An arm is a recipe and what it changes. What is finished is used again if its settings agree; what was killed goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli

from mf_lightning import flow
from mf_lightning.callbacks.curves import read_rows
from mf_lightning.callbacks.sample_eval import RESULTS_FILE
from mf_lightning.cli import run
from mf_lightning.flow.sampler import check_nfe
from mf_lightning.report import RECORD_FILE
from mf_lightning.report.compare import differing, flatten
from mf_lightning.types import UserError

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "configs" / "experiment" / "quickstart.yaml"
ARM_FILE = "arm.json"
FIGURES = ("fid", "class_accuracy", "recall")


@dataclass(frozen=True)
class Arm:
    """A network of the comparison."""

    name: str
    """Of its folder."""
    title: str
    """In tables."""
    options: tuple[str, ...]
    """What it changes in the recipe, as options of the command line."""
    samplers: tuple[type[flow.Sampler], ...] = (flow.AverageSampler,)
    """It is scored with each."""


@dataclass(frozen=True)
class Plan:
    """What all arms of a comparison share."""

    root: Path
    nfe: tuple[int, ...]
    steps: int
    """Optimizer steps."""
    num_samples: int
    recipe: Path = RECIPE
    options: tuple[str, ...] = ()
    """For every arm, before its own."""

    def __post_init__(self) -> None:
        """Refuse what the last command would refuse, before the first arm trains.

        Raises:
            UserError: naming it.
        """
        check_nfe("nfe", list(self.nfe))
        if self.steps < 1 or self.num_samples < 2:
            raise UserError(
                f"Got steps = {self.steps}, num_samples = {self.num_samples}, expected at least 1 step and 2 images to score."
            )

    def folder(self, arm: Arm, seed: int) -> Path:
        """Return where an arm's run lies."""
        return self.root / f"{arm.name}-seed{seed}"

    def common(self, arm: Arm, seed: int) -> list[str]:
        """Return the options of both training and scoring."""
        own = [f"--seed_everything={seed}", f"--data.init_args.seed={seed}", f"--trainer.max_steps={self.steps}"]
        folder = f"--trainer.default_root_dir={self.folder(arm, seed)}"
        return ["--config", str(self.recipe), *self.options, *arm.options, *own, folder]

    def fit(self, arm: Arm, seed: int) -> list[str]:
        """Return the command that trains: it scores nothing, and goes on where it was killed."""
        return ["fit", *self.common(arm, seed), "--sample_eval.num_samples=0", "--sample_grid.rows=0", "--ckpt_path=auto"]

    def test(self, arm: Arm, seed: int, sampler: type[flow.Sampler], nfe: Sequence[int]) -> list[str]:
        """Return the command that scores the last state with one sampler."""
        state = self.folder(arm, seed) / "checkpoints" / "last.ckpt"
        how = [f"--sample_eval.sampler=mf_lightning.flow.{sampler.__name__}", f"--sample_eval.nfe={json.dumps(list(nfe))}"]
        images = f"--sample_eval.num_samples={self.num_samples}"
        return ["test", *self.common(arm, seed), *how, images, f"--ckpt_path={state}"]


@dataclass
class Measured:
    """What came out of one arm, over its seeds."""

    arm: Arm
    rows: dict[str, dict[int, list[dict[str, Any]]]] = field(default_factory=dict)
    """Lines of sample_eval.jsonl by sampler and NFE, one per seed."""
    training_seconds: list[float] = field(default_factory=list)
    """Per seed, as run.json counts them, over all sessions."""
    scoring_seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    """Per stage: cores that were busy with other work, on average; empty where the system does not tell."""
    threads: set[str] = field(default_factory=set)
    """What OMP_NUM_THREADS was, where it was set."""
    date: str = ""
    """Of the last stage."""
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""

    def values(self, figure: str, nfe: int, sampler: type[flow.Sampler] | None = None) -> list[float]:
        """Return a figure of each seed."""
        rows = self.rows[(sampler or self.arm.samplers[0]).name].get(nfe, [])
        return [row[figure] for row in rows]

    def mean(self, figure: str, nfe: int, sampler: type[flow.Sampler] | None = None) -> float:
        """Return a figure's mean over the seeds."""
        return statistics.fmean(self.values(figure, nfe, sampler))


def measure(arm: Arm, seeds: Sequence[int], plan: Plan) -> Measured:
    """Train and score one arm with each seed, as far as it is not done.

    Raises:
        UserError: a folder holds a run with other settings, or a command fails.
    """
    result = Measured(arm)
    for seed in seeds:
        folder = plan.folder(arm, seed)
        with taken(folder) as lock:
            record = open_record(folder, settings_of(arm, seed, plan))
            if not record["fitted"]:
                run_stage("fit", plan.fit(arm, seed), folder, record, lock)
                record["fitted"] = True
                write_record(folder, record)
            for sampler in arm.samplers:
                missing = [nfe for nfe in plan.nfe if nfe not in scored(folder, plan, sampler)]
                if missing:
                    run_stage("test", plan.test(arm, seed, sampler, missing), folder, record, lock)
        _collect(result, folder, record, plan)
    return result


def settings_of(arm: Arm, seed: int, plan: Plan) -> dict[str, Any]:
    """Return every setting of the training command as it resolves, flat, and the data set's checksums."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        run([*plan.fit(arm, seed), "--print_config"])
    settings = yaml.safe_load(printed.getvalue())
    if not isinstance(settings, dict):
        raise UserError(f"Got options that the command line refuses for arm {arm.name}, expected those of `fit`. See above.")
    path = settings["data"]["init_args"].get("path")
    about = None if path is None else Path(path) / "dataset.json"
    data = json.loads(about.read_text()) if about is not None and about.is_file() else None
    return json.loads(json.dumps({**flatten(settings), "data set": data}))


def open_record(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of an arm's run, which begins here if there is none.

    Raises:
        UserError: it was begun with other settings.
    """
    file = folder / ARM_FILE
    if file.is_file():
        record = json.loads(file.read_text())
        # an option that did not exist then and is null now changes nothing
        different = differing([{name: s[name] for name in s if s[name] is not None} for s in (record["settings"], settings)])
        if different:
            names = ", ".join(f"{name} = {ours} (there: {theirs})" for name, (theirs, ours) in different[:5])
            raise UserError(
                f"Got {names} for {folder}, expected the settings that it was begun with. Remove the folder to measure "
                "anew, or give another --root."
            )
        return record
    if folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir()):
        raise UserError(f"Got {folder} with files but no {ARM_FILE}, expected an arm's run or nothing. Give another --root.")
    record = {"settings": settings, "fitted": False, "stages": []}
    write_record(folder, record)
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write what is known of an arm's run in one stroke."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{ARM_FILE}.tmp"
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(folder / ARM_FILE)


LOCK_FILE = ".arm.lock"


@contextlib.contextmanager
def taken(folder: Path) -> Iterator[int]:
    """Hold a folder against a second call; commands that are started inherit the lock and hold it if this process is killed.

    Raises:
        UserError: another call is at work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"Got {folder}, which another call is at work in, expected a free one. Wait for it.") from error
        yield file.fileno()


def run_stage(stage: str, args: list[str], folder: Path, record: dict[str, Any], lock: int) -> None:
    """Run one command and note what it cost.

    Raises:
        UserError: it failed, or was interrupted.
    """
    print(f"\n== {folder.name}: {stage}\n{' '.join(['python', 'lightning_cli.py', *args])}\n", flush=True)
    started, begin, others = datetime.now(timezone.utc), time.monotonic(), OtherWork()
    command = [sys.executable, str(ROOT / "lightning_cli.py"), *args]
    child = subprocess.Popen(command, pass_fds=(lock,), env={**os.environ, "WANDB_MODE": "offline"})
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())  # `fit` then leaves a checkpoint
    try:
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    seconds = time.monotonic() - begin
    note = {"stage": stage, "started": f"{started:%Y-%m-%d %H:%M} UTC", "seconds": round(seconds, 1), "code": code}
    record["stages"].append({**note, "others": others.cores(seconds), "threads": os.environ.get("OMP_NUM_THREADS")})
    write_record(folder, record)
    if code:
        raise UserError(
            f"Got exit code {code} from `{stage}` of {folder.name}, expected 0; its message stands above. The same call "
            "goes on."
        )


class OtherWork:
    """How much of the machine other work took, since it was made: a figure of seconds needs it beside it."""

    def __init__(self) -> None:
        self.busy, self.own = _busy_seconds(), _children_seconds()

    def cores(self, seconds: float) -> float | None:
        """Return cores busy with anything but this process's children, on average; None where the system does not tell."""
        if self.busy is None:
            return None
        taken = _busy_seconds() - self.busy - (_children_seconds() - self.own)
        return round(max(0.0, taken / seconds), 2)


def _busy_seconds() -> float | None:
    """Return the seconds that all cores have worked since the machine started (Linux)."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _, _, *rest = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def scored(folder: Path, plan: Plan, sampler: type[flow.Sampler]) -> dict[int, dict[str, Any]]:
    """Return the newest figures of the last step by NFE."""
    return {
        row["nfe"]: row
        for row in read_rows(folder / RESULTS_FILE)
        if row["step"] == plan.steps
        and row["protocol"]["sampler"] == sampler.name
        and row["protocol"]["num_samples"] == plan.num_samples
    }


def _collect(result: Measured, folder: Path, record: dict[str, Any], plan: Plan) -> None:
    for sampler in result.arm.samplers:
        rows = scored(folder, plan, sampler)
        for nfe in plan.nfe:
            result.rows.setdefault(sampler.name, {}).setdefault(nfe, []).append(rows[nfe])
    sessions = json.loads((folder / RECORD_FILE).read_text())["sessions"]
    result.training_seconds.append(sum(session["seconds"] for session in sessions))
    result.scoring_seconds.append(sum(stage["seconds"] for stage in record["stages"] if stage["stage"] == "test"))
    result.others += [stage["others"] for stage in record["stages"] if stage["others"] is not None]
    result.threads |= {stage["threads"] for stage in record["stages"] if stage["threads"]}
    result.date = max(result.date, *(stage["started"][:10] for stage in record["stages"]))
    result.versions, result.device = sessions[-1]["versions"], sessions[-1]["device"]


def run_command(function: Callable[..., None], args: list[str] | None = None) -> None:
    """Run a comparison from the command line; a mistake of the user's, or a run that failed, is one message."""
    try:
        auto_cli(function, args=args, prog=f"python -m scripts.{function.__name__}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
