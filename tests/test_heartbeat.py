"""A hang tells which process the others wait for, and a killed first process leaves no others behind."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone

import pytest

from mf_lightning.callbacks import Heartbeat
from mf_lightning.orphans import FIRST, watch_parent
from mf_lightning.tools.heartbeat import heartbeat
from mf_lightning.types import UserError
from tests.runs import RECIPES, ROOT, command_line, error_of, python

SMOKE = ("--config", RECIPES / "smoke.yaml", "--sample_eval.num_samples=0", "--sample_grid.rows=0")
TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")
RANK_1_STICKS_AT_STEP_3 = """
import os, sys, time
from lightning import Callback
from mf_lightning import cli

class Stick(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 3 and os.environ.get("LOCAL_RANK") == "1":
            self.asleep_in_this_hook()

    def asleep_in_this_hook(self):
        time.sleep(600)

add = cli.MeanFlowCLI.add_arguments_to_parser


def with_stick(self, parser):
    parser.add_lightning_class_args(Stick, "stick")
    add(self, parser)

cli.MeanFlowCLI.add_arguments_to_parser = with_stick
cli.main(sys.argv[1:])
"""


def test_two_processes_leave_two_files_with_the_last_step(tmp_path, capsys):
    root = tmp_path / "run"
    stale = root / "heartbeat" / "rank00002.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    options = ("--heartbeat.every_s=0.2", "--trainer.max_steps=6", f"--trainer.default_root_dir={root}")
    result = command_line("fit", *SMOKE, *TWO, *options)
    assert result.returncode == 0, result.stderr[-2000:]
    files = sorted((root / "heartbeat").iterdir())
    assert [file.name for file in files] == ["rank00000.json", "rank00001.json"]
    for rank, file in enumerate(files):
        beat = json.loads(file.read_text())
        assert (beat["rank"], beat["local_rank"], beat["world_size"]) == (rank, rank, 2)
        assert (beat["step"], beat["phase"], beat["every_s"]) == (6, "finished", 0.2)
        assert beat["host"]
        assert beat["pid"] > 0
        assert beat["since"] < 60
        assert datetime.fromisoformat(beat["written"]).utcoffset() is not None
    heartbeat(root)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]
    assert lines[-1] == "finished: processes 0 at step 6, 1 at step 6"


@pytest.fixture(scope="module")
def stuck(tmp_path_factory):
    """A run whose process 1 sleeps in a hook: what the table said, then stacks, then the first process is killed."""
    folder = tmp_path_factory.mktemp("stuck")
    script, root, log = folder / "stick.py", folder / "run", folder / "stderr.txt"
    script.write_text(RANK_1_STICKS_AT_STEP_3)
    options = ("--heartbeat.every_s=0.2", "--trainer.max_steps=1000", f"--trainer.default_root_dir={root}")
    command = [sys.executable, str(script), "fit", *map(str, (*SMOKE, *TWO, *options))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w") as stream:
        first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    seen = {"first": first.pid}
    child = None
    try:
        for _ in range(25):
            table = python("-m", "mf_lightning", "heartbeat", root)
            seen["table"] = table.stdout
            if "behind: process 1" in table.stdout or first.poll() is not None:
                break
            time.sleep(1)
        child = json.loads((root / "heartbeat" / "rank00001.json").read_text())["pid"]
        os.kill(child, signal.SIGUSR2)
        time.sleep(2)
        seen["alive_after_usr2"] = alive(child)
        first.send_signal(signal.SIGKILL)
        first.wait()
        begin = time.monotonic()
        while alive(child) and time.monotonic() < begin + 20:
            time.sleep(0.2)
        seen["child_gone"] = not alive(child)
    finally:
        first.kill()
        if child is not None and alive(child):
            os.kill(child, signal.SIGKILL)
    seen["stderr"] = log.read_text()
    return seen


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_stuck_in_a_hook_is_named_while_it_is_stuck(stuck):
    *rows, last = stuck["table"].splitlines()
    assert rows[0].split()[:5] == ["rank", "host", "pid", "step", "phase"]
    assert [row.split()[0] for row in rows[1:]] == ["0", "1"]
    assert last.startswith("behind: process 1 (pid ")
    assert "at step 3" in last
    assert "process 0" not in last


def test_usr2_prints_the_stack_of_a_hanging_process(stuck):
    assert stuck["alive_after_usr2"]
    assert "in asleep_in_this_hook" in stuck["stderr"]


def test_a_killed_first_process_leaves_no_other_behind(stuck):
    assert stuck["child_gone"]
    assert f"error: process 1 stops: the first process ({stuck['first']}) is gone" in stuck["stderr"]


def test_nobody_is_watched_whom_the_launcher_did_not_start(monkeypatch):
    started = []
    monkeypatch.setattr("mf_lightning.orphans.threading.Thread", lambda **how: started.append(how) or SimpleThread())
    for names, watched in (
        ({}, False),
        ({"LOCAL_RANK": "0", FIRST: "77"}, False),
        ({"LOCAL_RANK": "1"}, False),  # started by hand, by SLURM
        ({"LOCAL_RANK": "1", FIRST: "77", "TORCHELASTIC_RUN_ID": "a"}, False),
        ({"LOCAL_RANK": "1", FIRST: "77"}, True),
    ):
        for name in ("LOCAL_RANK", FIRST, "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        started.clear()
        watch_parent()
        assert bool(started) == watched, names
        assert os.environ.get(FIRST) == (
            str(os.getpid()) if "LOCAL_RANK" not in names or names["LOCAL_RANK"] == "0" else names.get(FIRST)
        )


class SimpleThread:
    def start(self):
        pass


@pytest.mark.slow
def test_off_writes_nothing(tmp_path):
    root = tmp_path / "run"
    result = command_line("fit", *SMOKE, "--trainer.max_steps=2", f"--trainer.default_root_dir={root}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert not (root / "heartbeat").exists()
    message = error_of(python("-m", "mf_lightning", "heartbeat", root))
    assert "--heartbeat.every_s=10" in message
    assert str(root / "heartbeat") in message


def beat(folder, rank, *, step=5, hooks=0, phase="training", since=0.0, age=1.0, world_size=3):
    folder.mkdir(exist_ok=True)
    written = (datetime.now(timezone.utc) - timedelta(seconds=age)).isoformat()
    who = {"rank": rank, "local_rank": rank, "world_size": world_size, "host": "a", "pid": 100 + rank, "every_s": 10}
    where = {"step": step, "hooks": hooks, "phase": phase, "since": since, "written": written}
    (folder / f"rank{rank:05d}.json").write_text(json.dumps({**who, **where}))


def last_line(root, capsys):
    heartbeat(root)
    return capsys.readouterr().out.splitlines()[-1]


def test_the_last_line_tells_a_hang_from_a_run_that_moves(tmp_path, capsys):
    folder = tmp_path / "heartbeat"
    for rank, step in enumerate((50, 70, 60)):  # files of one run, written at different moments
        beat(folder, rank, step=step)
    assert last_line(tmp_path, capsys).startswith("none is behind, all at steps 50 to 70; longest unchanged: process ")
    for rank, hooks in enumerate((2, 1, 2)):  # the others wait in a collective of the same step
        beat(folder, rank, hooks=hooks, since=80)
    told = "behind: process 1 (pid 101 on a, training, unchanged for 81 s) at step 5, others are further in the same step"
    assert last_line(tmp_path, capsys) == told
    for rank in range(3):
        beat(folder, rank, phase="validation", since=80 + rank)
    assert last_line(tmp_path, capsys) == "none is behind, all at step 5; longest unchanged: process 2 (validation, 83 s)"


def test_the_last_line_names_the_silent_the_stopped_and_the_missing(tmp_path, capsys):
    folder = tmp_path / "heartbeat"
    beat(folder, 0, since=100, world_size=5)
    beat(folder, 1, since=40, age=31, step=4, world_size=5)
    beat(folder, 2, phase="stopped", age=90, step=4, world_size=5)
    beat(folder, 3, phase="finished", age=90, world_size=5)
    line = last_line(tmp_path, capsys)
    assert "behind: process 1 (pid 101 on a, training, unchanged for 71 s) at step 4, others are at step 5" in line
    assert "no sign of life: process 1 (pid 101 on a, file 31 s old)" in line
    assert "stopped by an error or a signal: process 2 at step 4" in line
    assert "finished: process 3 at step 5" in line
    assert "without a file: process 4" in line


def test_what_is_wrong_is_told(tmp_path):
    with pytest.raises(UserError, match=r"heartbeat.every_s = -1"):
        Heartbeat(every_s=-1)
    with pytest.raises(UserError, match=r"heartbeat.every_s = nan"):
        Heartbeat(every_s=float("nan"))
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat" / "rank00000.json").write_text('{"rank": 0}')
    with pytest.raises(UserError, match=r"rank00000.json, which is no heartbeat"):
        heartbeat(tmp_path)


def test_an_error_is_written_down(tmp_path):
    """The file of a process that an exception ended says so, and its thread is gone."""
    from types import SimpleNamespace

    callback = Heartbeat(every_s=60)
    trainer = SimpleNamespace(default_root_dir=tmp_path, global_rank=0, local_rank=0, world_size=1, is_global_zero=True)
    trainer.global_step = 0
    callback.setup(trainer, None, "fit")
    thread = callback._thread
    trainer.global_step = 7
    callback.on_train_batch_start(trainer, None, None, 0)
    callback.on_exception(trainer, None, RuntimeError())
    assert not thread.is_alive()
    found = json.loads((tmp_path / "heartbeat" / "rank00000.json").read_text())
    assert (found["step"], found["phase"]) == (7, "stopped")
    callback.teardown(trainer, None, "fit")
    assert json.loads((tmp_path / "heartbeat" / "rank00000.json").read_text()) == found
