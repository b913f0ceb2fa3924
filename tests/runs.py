"""The command line as a user runs it: a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "configs" / "experiment"


def command_line(*args: object, cwd: Path = ROOT, env: dict | None = None, timeout: int = 150) -> subprocess.CompletedProcess:
    """Run ``python lightning_cli.py ARGS`` and return what it printed and its exit code."""
    return python(ROOT / "lightning_cli.py", *args, cwd=cwd, env=env, timeout=timeout)


def python(*args: object, cwd: Path = ROOT, env: dict | None = None, timeout: int = 150) -> subprocess.CompletedProcess:
    """Run ``python ARGS``."""
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), **(env or {})}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def error_of(result: subprocess.CompletedProcess) -> str:
    """Return the message of a run that must have failed with one message and no trace."""
    assert result.returncode not in (0, 1), result.stderr[-2000:]
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
    message = result.stderr[result.stderr.rindex("error: ") :]
    assert len(message) < 1500
    return message


def lines(file: Path) -> list[dict]:
    """Return the rows of a .jsonl file."""
    return [json.loads(line) for line in file.read_text().splitlines()]
