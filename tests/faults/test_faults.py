"""Kills at random points: in steps, inside checkpoints and validations, on one process, DDP, FSDP and background saving."""

import pytest

from tests.faults.suite import report, run_suite

pytestmark = pytest.mark.slow


def test_killed_runs_end_like_unbroken_ones(tmp_path, capsys):
    outcome = run_suite(tmp_path, kills=25, seed=0)
    assert sum(outcome.hits.values()) >= 25
    assert outcome.hits["step"] >= 8
    assert outcome.hits["checkpoint"] >= 5
    assert outcome.hits["validation"] >= 5
    with capsys.disabled():
        print("\n" + report(outcome, seed=0))
