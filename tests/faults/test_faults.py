"""Kills at random points: in steps, inside checkpoints and validations, on one process, DDP, FSDP and background saving."""

import time

import pytest

from mf_lightning.checkpoints import read_header
from tests.faults.suite import PREEMPTED, STEPS, report, run_suite, start

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("setup", ["one", "ddp"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_while_a_run_starts_or_ends(tmp_path, setup, name):
    """Before the first step it is answered after that step; in the last checkpoint it changes nothing; nothing hangs."""
    root = tmp_path / "run"
    started = start(root, setup, victim=f"setup:0:0.1:{name}:0", resume=False)
    assert started.returncode == PREEMPTED, started.stderr[-2000:]
    last = root / "checkpoints" / "last.ckpt"
    assert not last.exists() or read_header(last)["global_step"] <= 2
    ended = start(root, setup, victim=f"checkpoint:{STEPS}:0.0:{name}:0", resume=last.exists())
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "kill" in (tmp_path / "run.faults.log").read_text().split("start 1")[1]
    assert read_header(last)["global_step"] == STEPS


@pytest.mark.parametrize("setup", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_takes_the_job_down_with_a_reason(tmp_path, setup, rank):
    result = start(tmp_path / "run", setup, victim=f"step:5:0.01:SIGKILL:{rank}", resume=False)
    seconds = time.monotonic() - float((tmp_path / "run.faults.log").read_text().split("kill SIGKILL")[1].split()[1])
    assert result.returncode != 0
    assert seconds < 30
    words = ("lost the others", "has ended without a word", "is gone", "Child process with PID")  # the last is Lightning's
    reasons = [line for line in result.stderr.splitlines() if any(word in line for word in words)]
    assert len(reasons) == 1, result.stderr[-3000:]
    assert "frame #" not in result.stderr


def test_killed_runs_end_like_unbroken_ones(tmp_path, capsys):
    outcome = run_suite(tmp_path, kills=25, seed=0)
    assert sum(outcome.hits.values()) >= 25
    assert outcome.hits["step"] >= 8
    assert outcome.hits["checkpoint"] >= 5
    assert outcome.hits["validation"] >= 5
    with capsys.disabled():
        print("\n" + report(outcome, seed=0))
