"""Kill runs at random points, resume them, and compare what comes out with a run that was never killed.

python -m tests.faults --kills 100 --seed 3
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mf_lightning.checkpoints import read_header
from tests.runs import RECIPES, ROOT
from tests.test_resume import assert_same_run

STEPS, VALIDATE, SAVE = 33, 10, 4
"""Of a run: steps, steps between validations, steps between checkpoints; an epoch has 7 steps."""
OPTIONS = {
    "data.init_args.train_size": 60, "data.init_args.val_size": 12, "data.init_args.batch_size": 8,
    "trainer.max_steps": STEPS, "trainer.val_check_interval": VALIDATE, "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false",
    "sample_eval.num_samples": 40, "sample_eval.batch_size": 4, "sample_grid.rows": 1, "self_check.enabled": "false",
}  # fmt: skip
TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2"]
SETUPS = {
    "one": [],
    "background": [
        "--trainer.plugins="
        '{"class_path": "mf_lightning.callbacks.AtomicCheckpointIO", "init_args": {"background": true}}',
    ],
    "ddp": [f"--trainer={ROOT / 'configs/trainer/ddp.yaml'}", *TWO],
    "fsdp": [f"--trainer={ROOT / 'configs/trainer/fsdp.yaml'}", *TWO],
}  # fmt: skip
LONGEST = {"step": 0.03, "checkpoint": 0.03, "validation": 0.3}
"""Seconds after the beginning of a phase within which it is killed."""
PREEMPTED = 75


@dataclass
class Outcome:
    """What was done to the runs, by the phase that the log shows open at the kill."""

    hits: Counter = field(default_factory=Counter)
    missed: int = 0
    """Runs that came to their end, or were killed before the first checkpoint was written in the background."""
    chains: int = 0


def start(root: Path, setup: str, *, victim: str | None, resume: bool) -> subprocess.CompletedProcess:
    """Run until the end or the kill."""
    log = root.parent / f"{root.name}.faults.log"
    number = log.read_text().count("\nstart") if log.exists() else 0
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FAULTS_LOG": str(log), "FAULTS_RUN": str(number),
        "VICTIM": victim or "",
    }  # fmt: skip
    with log.open("a") as stream:
        stream.write(f"\nstart {number} {victim}\n")
    settings = [f"--{key}={value}" for key, value in OPTIONS.items()]
    recipe = f"--config={RECIPES / 'smoke.yaml'}"
    command = [sys.executable, "-m", "tests.faults.victim", "fit", recipe, *SETUPS[setup], *settings]
    command += [f"--trainer.default_root_dir={root}", *(["--ckpt_path=last"] if resume else [])]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def open_phase(root: Path, run: int, rank: int) -> str:
    """Return what the log shows begun and not ended by the killed process when it was killed."""
    lines = (root.parent / f"{root.name}.faults.log").read_text().splitlines()
    mine = [line.split() for line in lines if line.startswith(f"{run} {rank} ")]
    until = next((i for i, line in enumerate(mine) if line[2] == "kill"), None)
    if until is None:
        return "none"
    begun: list[str] = []
    for _, _, what, edge, *_ in mine[:until]:
        if edge == "begin":
            begun.append(what)
        elif what in begun:
            begun.remove(what)
    return begun[-1] if begun else "between"


def chain(folder: Path, setup: str, kinds: list[str], seed: int, outcome: Outcome, reference: Path) -> None:
    """Kill one run again and again, let it finish, and compare it with the unbroken one."""
    draw, root = random.Random(seed), folder / f"{setup}-{seed}"
    resume = False
    for kind in kinds:
        last = root / "checkpoints" / "last.ckpt"
        reached = read_header(last)["global_step"] if last.exists() else SAVE
        if reached + VALIDATE + 1 >= STEPS:
            break
        signal = "SIGKILL"
        if kind in ("SIGTERM", "SIGUSR1"):
            kind, signal = draw.choice(["step", "validation"]), kind
        at = reached + 1 + (draw.randrange(6) if kind == "step" else 0)
        rank = 0 if setup in ("one", "background") else draw.randrange(2)
        delay = draw.uniform(0, LONGEST[kind])
        result = start(root, setup, victim=f"{kind}:{at}:{delay:.4f}:{signal}:{rank}", resume=resume)
        run = (root.parent / f"{root.name}.faults.log").read_text().count("\nstart") - 1
        phase = open_phase(root, run, rank)
        if phase == "none":
            assert result.returncode == 0, result.stderr[-3000:]
            outcome.missed += 1
            break
        assert result.returncode != 0, f"{signal} in {phase} left exit code 0"
        if signal != "SIGKILL":
            assert result.returncode == PREEMPTED, (
                f"{signal} in {phase}: exit code {result.returncode}\n{result.stderr[-2000:]}"
            )
        resume = last.exists()
        if not resume:  # not counted
            assert setup == "background", "killed before the first checkpoint"
            outcome.missed += 1
            continue
        outcome.hits[phase if signal == "SIGKILL" else signal] += 1
    result = start(root, setup, victim=None, resume=resume)
    assert result.returncode == 0, f"{setup}, seed {seed}: the resumed run fails\n{result.stderr[-3000:]}"
    assert_same_run(reference, root)
    hidden = [path.name for path in (root / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not hidden, f"left behind: {hidden}"
    outcome.chains += 1
    print(f"{sum(outcome.hits.values())} kills, {outcome.chains} runs equal; now {setup}: {', '.join(kinds)}", file=sys.stderr)
    shutil.rmtree(root)


def run_suite(folder: Path, *, kills: int, seed: int, workers: int = 2) -> Outcome:
    """Kill at least ``kills`` times: 8 of 25 inside steps, 5 inside checkpoints, 5 inside validations, the rest any of them."""
    draw, outcome = random.Random(seed), Outcome()
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        references = {setup: folder / f"{setup}-unbroken" for setup in SETUPS}
        list(pool.map(lambda setup: _unbroken(references[setup], setup), SETUPS))
        wanted = Counter(step=-(-kills * 8 // 25), checkpoint=-(-kills * 5 // 25), validation=-(-kills * 5 // 25))
        number = 0
        while sum(outcome.hits.values()) < kills or any(outcome.hits[kind] < count for kind, count in wanted.items()):
            lacking = [kind for kind, count in wanted.items() for _ in range(max(0, count - outcome.hits[kind]))]
            pending = []
            for _ in range(workers):
                kinds = [draw.choice(lacking or list(wanted)), "step", draw.choice(["checkpoint", "validation"])]
                kinds.append(draw.choice(["SIGTERM", "SIGUSR1", "step"]))
                draw.shuffle(kinds)
                setup = list(SETUPS)[number % len(SETUPS)]
                number += 1
                pending.append(pool.submit(chain, folder, setup, kinds, seed * 1000 + number, outcome, references[setup]))
            for job in pending:
                job.result()
    return outcome


def _unbroken(root: Path, setup: str) -> None:
    result = start(root, setup, victim=None, resume=False)
    assert result.returncode == 0, result.stderr[-3000:]


def report(outcome: Outcome, seed: int) -> str:
    """Return the line that says what was tried."""
    hits = ", ".join(f"{count} in {phase}" if phase.islower() else f"{count} {phase}" for phase, count in outcome.hits.items())
    total = sum(outcome.hits.values())
    return f"{total} kills ({hits}; seed {seed}) over {outcome.chains} runs: all ended equal to the unbroken run."
