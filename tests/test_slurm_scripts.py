"""The SLURM scripts, with programs on PATH that only write down how they were called."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mf_lightning.cli import main
from tests.runs import ROOT

SCRIPTS = ROOT / "scripts" / "slurm"
PLAIN, TORCHRUN = SCRIPTS / "train.sbatch", SCRIPTS / "train_torchrun.sbatch"
RECIPE = "configs/experiment/smoke.yaml"
PROGRAMS = {
    "srun": """while [[ $1 == --* ]]; do echo "$1" >> "$LOG/srun"; shift; done; "$@" """,
    "train": """printf '%s\\n' "$0" "$@" > "$LOG/train"
if [[ $SIGNAL == yes ]]; then
    kill -USR1 "$BATCH"; until [[ -e $LOG/scancel ]]; do sleep 0.05; done
fi
if [[ $WRITES == yes ]]; then sleep 0.05; touch "$RUN/checkpoints/last.ckpt"; fi
exit $CODE""",
    "scancel": """sleep 0.05; echo "$@" >> "$LOG/scancel" """,
    "scontrol": """if [[ $1 == show ]]; then echo node7; echo node8; else echo "$@" >> "$LOG/scontrol"; fi""",
}


def submit(script, tmp_path, *extra, code=0, sends=False, writes=False):
    """Run a script as SLURM would; return its exit code, and what was called with what."""
    programs, log, run = tmp_path / "bin", tmp_path / "log", tmp_path / "run"
    for folder in (programs, log, run / "checkpoints"):
        folder.mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()  # of an earlier start
    for name, text in PROGRAMS.items():
        for program in ("python", "torchrun") if name == "train" else (name,):
            (programs / program).write_text(f"#!/bin/bash\n{text}\n")
            (programs / program).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "LOG": str(log), "RUN": str(run), "CODE": str(code),
        "SIGNAL": "yes" if sends else "", "WRITES": "yes" if writes else "", "SLURM_JOB_ID": "4711", "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_SUBMIT_DIR": str(ROOT), "TMPDIR": str(tmp_path),
    }  # fmt: skip
    command = ["bash", "-c", 'export BATCH=$$; exec bash "$@"', "-", str(script), RECIPE, str(run), *extra]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    calls = {file.name: file.read_text().splitlines() for file in log.iterdir()}
    return result.returncode, calls, result.stderr


@pytest.mark.parametrize("script", [PLAIN, TORCHRUN], ids=lambda script: script.stem)
@pytest.mark.parametrize("code", [0, 1, 2, 75, 137])
def test_the_job_is_requeued_exactly_at_75_and_hands_its_code_on(script, code, tmp_path):
    returned, calls, stderr = submit(script, tmp_path, code=code)
    assert returned == code, stderr
    assert calls.get("scontrol", []) == (["requeue 4711"] if code == 75 else [])


@pytest.mark.parametrize(("code", "writes", "expected"), [(1, True, 75), (1, False, 1), (0, True, 0)])
def test_torchruns_one_is_75_where_a_checkpoint_followed_the_signal(code, writes, expected, tmp_path):
    returned, calls, stderr = submit(TORCHRUN, tmp_path, code=code, sends=True, writes=writes)
    assert returned == expected, stderr
    assert calls["scancel"] == ["--signal=TERM 4711.0"]
    assert calls.get("scontrol", []) == (["requeue 4711"] if expected == 75 else [])


def test_a_crash_after_a_checkpoint_without_a_signal_is_not_requeued(tmp_path):
    returned, calls, _ = submit(TORCHRUN, tmp_path, code=1, writes=True)
    assert returned == 1
    assert "scontrol" not in calls


@pytest.mark.parametrize("script", [PLAIN, TORCHRUN], ids=lambda script: script.stem)
def test_the_command_line_takes_what_the_script_passes(script, tmp_path, capsys):
    _, calls, _ = submit(script, tmp_path, "--trainer.max_steps=77")
    assert "--kill-on-bad-exit=0" in calls["srun"]
    program, *arguments = calls["train"]
    assert Path(program).name == ("python" if script == PLAIN else "torchrun")
    at = arguments.index("lightning_cli.py")
    if script == TORCHRUN:
        assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=node7:29500", "--max-restarts=3"} <= set(arguments[:at])
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args(arguments).max_restarts == 3
    with pytest.raises(SystemExit) as stop:
        main([*arguments[at + 1 :], "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    config = yaml.safe_load(printed.out)
    trainer, recipe = config["trainer"], yaml.safe_load((ROOT / RECIPE).read_text())["trainer"]
    assert config["ckpt_path"] == "auto"
    assert (trainer["num_nodes"], trainer["max_steps"], trainer["default_root_dir"]) == (2, 77, str(tmp_path / "run"))
    assert trainer["val_check_interval"] == recipe["val_check_interval"]  # the part adds to the recipe's trainer
    assert "DDPStrategy" in str(trainer["strategy"])


@pytest.mark.parametrize("script", [PLAIN, TORCHRUN], ids=lambda script: script.stem)
def test_what_is_missing_is_told(script):
    result = subprocess.run(["bash", str(script), RECIPE], capture_output=True, text=True, timeout=20)
    assert result.returncode != 0
    assert "Got no folder for the run" in result.stderr


def test_directives():
    for script, per_node, how in ((PLAIN, 8, "USR1@120"), (TORCHRUN, 1, "B:USR1@120")):
        text = script.read_text()
        given = dict(shlex.split(line)[1].partition("=")[::2] for line in re.findall(r"^#SBATCH .*", text, re.MULTILINE))
        assert given["--signal"] == how
        assert given["--ntasks-per-node"] == str(per_node)
        assert given["--gpus-per-node"] == "8"
        assert given["--open-mode"] == "append"
        assert "--requeue" in given
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


WORKER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("written", flush=True), sys.exit(75)))
print("ready", flush=True)
time.sleep(60)
"""


def test_torchrun_passes_sigterm_on_and_exits_with_1(tmp_path):
    """What the script relies on, with the torchrun of this environment; its code says nothing of its process's 75."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "--max-restarts=3", str(tmp_path / "worker.py")]
    log = tmp_path / "log"
    with log.open("w") as stream:
        agent = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        end = time.monotonic() + 60
        while "ready" not in log.read_text() and time.monotonic() < end:
            time.sleep(0.2)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(timeout=40) == 1
    finally:
        agent.kill()
    assert log.read_text().count("written") == 1
    assert log.read_text().count("ready") == 1  # not restarted
