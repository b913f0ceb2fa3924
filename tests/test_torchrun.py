"""Jobs that torchrun starts: two agents as on two nodes, a process that is killed, a process that fails."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from mf_lightning.checkpoints import read_checkpoint
from mf_lightning.checkpoints.sharded import split
from tests.runs import RECIPES, ROOT, command_line
from tests.test_resume import assert_same_run

pytestmark = pytest.mark.slow

CONFIGS = ROOT / "configs" / "trainer"
STEPS = 6
OPTIONS = [
    "--data.init_args.train_size=60",
    "--data.init_args.val_size=14",  # not divisible by 4 processes
    "--data.init_args.batch_size=8",
    f"--trainer.max_steps={STEPS}",
    "--trainer.val_check_interval=3",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--sample_eval.num_samples=32",
    "--sample_grid.rows=0",
    "--self_check.enabled=false",
]
OF_THE_FIRST_PROCESS = [f"train/{name}" for name in ("loss", "raw_error", "velocity_error", "dudt_norm")]
"""Means over the rows of the process that writes the log: averaging them would make every step wait."""
WANDB = f"--config={CONFIGS / 'wandb.yaml'}"
ACCIDENT = """
import os, signal, sys
from pathlib import Path
from lightning import Callback
from mf_lightning import cli

KIND, MARKER, options = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]


class Accident(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 4 and KIND == "kill" and not MARKER.exists():
            MARKER.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.global_rank == 1 and trainer.global_step == 3 and KIND == "raise":
            raise RuntimeError("the cat sat on the keyboard")


class Line(cli.MeanFlowCLI):
    def before_fit(self):
        super().before_fit()
        self.trainer.callbacks.append(Accident())


cli.MeanFlowCLI = Line
cli.main(options)
"""


def recipe(root: Path, *options: str) -> list[str]:
    return ["fit", f"--config={RECIPES / 'smoke.yaml'}", *options, *OPTIONS, f"--trainer.default_root_dir={root}"]


def torchrun(*args: object, inside: list[str] | None = None, **environment: str) -> subprocess.Popen:
    """Start one agent; what it and its processes print goes into one file."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM", "MASTER_", "WANDB_"))}
    environment = {**clean, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [*(inside or []), sys.executable, "-m", "torch.distributed.run", *map(str, args)]
    out = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (`ended` closes it)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)
    process.out = out
    return process


def ended(*agents: subprocess.Popen, timeout: float = 120) -> list[str]:
    """Wait for agents and return what they printed; those that do not end in time are ended, with their processes."""
    limit = time.monotonic() + timeout
    while time.monotonic() < limit and any(agent.poll() is None for agent in agents):
        time.sleep(0.1)
    late = [agent for agent in agents if agent.poll() is None]
    for agent in late:
        agent.send_signal(signal.SIGTERM)  # it ends its processes, after 30 s by force
    for agent in late:
        agent.wait(60)
    said = []
    for agent in agents:
        agent.out.seek(0)
        said.append(agent.out.read())
        agent.out.close()
    assert not late, f"{len(late)} of {len(agents)} had not ended after {timeout} s: " + "\n".join(out[-3000:] for out in said)
    return said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def two_nodes() -> Iterator[list[tuple[list[str], str, str]]]:
    """Yield, for each of two "nodes", the command that enters it, its address and its network interface.

    They are network namespaces joined by a cable (veth) where this process may make them, else both are this machine.
    """

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    names = [f"mf{os.getpid()}{letter}" for letter in "ab"]
    made = ExitStack()
    try:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise OSError("not root, or no ip")
        for name in names:
            ip("netns", "add", name)
            made.callback(subprocess.run, ["ip", "netns", "del", name], check=False, capture_output=True)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.213.7.{number}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        nodes = [(["ip", "netns", "exec", name], f"10.213.7.{number}", name) for number, name in enumerate(names, 1)]
        subprocess.run([*nodes[0][0], "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"two nodes: loopback of this machine, since network namespaces cannot be made ({error})")
        nodes = [([], "127.0.0.1", "lo")] * 2
    else:
        print("two nodes: two network namespaces joined by a veth pair")
    with made:
        yield nodes


def numbers(row: dict[str, str]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if value and key != "train/images_per_s"}


def seen(root: Path) -> tuple[list[dict], list[dict], dict[str, torch.Tensor]]:
    """Return the rows of metrics.csv, the lines of sample_eval.jsonl and the tensors of the last checkpoint."""
    with (root / "metrics.csv").open() as stream:
        metrics = [numbers(row) for row in csv.DictReader(stream)]
    figures = [json.loads(line) for line in (root / "sample_eval.jsonl").read_text().splitlines()]
    checkpoint = read_checkpoint(root / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == STEPS
    _, tensors = split({key: checkpoint[key] for key in ("state_dict", "ema", "optimizer_states")})
    return metrics, figures, tensors


def assert_near(one: Path, other: Path) -> None:
    """Compare two runs whose processes differ in number: by rounding only."""
    (metrics, figures, tensors), (other_metrics, other_figures, other_tensors) = seen(one), seen(other)
    assert [row["step"] for row in metrics if "train/raw_error" in row] == list(range(STEPS))
    assert [row["step"] for row in metrics if "val/raw_error" in row] == [2, 5]
    assert len(other_metrics) == len(metrics)
    for row, other_row in zip(metrics, other_metrics, strict=True):
        assert row.keys() == other_row.keys()
        for name, value in row.items():
            if name not in OF_THE_FIRST_PROCESS:
                assert other_row[name] == pytest.approx(value, rel=1e-6, abs=1e-9), (row["step"], name)
    assert [(row["step"], row["nfe"]) for row in figures] == [(s, n) for s in (3, 6) for n in (1, 2)]
    for row, other_row in zip(figures, other_figures, strict=True):
        assert (row["step"], row["nfe"], row["ema"]) == (other_row["step"], other_row["nfe"], other_row["ema"])
        assert other_row["fid"] == pytest.approx(row["fid"], rel=1e-6)
    assert tensors.keys() == other_tensors.keys()
    for name, value in tensors.items():
        assert (value - other_tensors[name]).abs().max() <= 1e-9 * value.abs().max().clamp(min=1e-6), name


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run that all others are held against; without any launcher."""
    root = tmp_path_factory.mktemp("one")
    result = command_line(*recipe(root), "--trainer.precision=64-true", env={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    return root


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_agents_of_two_processes_are_one_run(one_process, tmp_path, way):
    root, more = tmp_path / "run", [f"--trainer={CONFIGS / (way + '.yaml')}", "--trainer.accelerator=cpu"]
    if way == "ddp":
        more.insert(0, WANDB)
    command = [*recipe(root, *more), "--trainer.precision=64-true"]
    with two_nodes() as nodes:
        port = free_port()
        agents = [
            torchrun(
                "--nnodes=2", "--nproc-per-node=2", f"--node-rank={rank}", "--rdzv-backend=c10d", "--rdzv-id=mf",
                f"--rdzv-endpoint={nodes[0][1]}:{port}", f"--rdzv-conf=is_host={int(rank == 0)}", f"--local-addr={address}",
                ROOT / "lightning_cli.py", *command, inside=inside, GLOO_SOCKET_IFNAME=interface,
            )
            for rank, (inside, address, interface) in enumerate(nodes)
        ]  # fmt: skip
        said = ended(*agents)
    assert [agent.returncode for agent in agents] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert_near(one_process, root)
    assert len(list(root.rglob("metrics*.csv"))) == 1
    assert sorted(path.name for path in (root / "checkpoints").iterdir()) == sorted(
        path.name for path in (one_process / "checkpoints").iterdir()
    )
    runs = list(root.rglob("offline-run-*"))
    assert len([run for run in runs if run.is_dir()]) == (1 if way == "ddp" else 0), runs


def accident(kind: str, folder: Path, *args: str, **environment: str) -> tuple[int, str]:
    """Run two processes under one agent, of which one has an accident, and return the exit code and what was printed."""
    (folder / "accident.py").write_text(ACCIDENT)
    root, more = folder / "run", [f"--trainer={CONFIGS / 'ddp.yaml'}", "--trainer.accelerator=cpu"]
    agent = torchrun(
        "--standalone", "--nproc-per-node=2", *args, folder / "accident.py", kind, folder / "marker", *recipe(root, *more),
        "--ckpt_path=auto", **environment,
    )  # fmt: skip
    [said] = ended(agent)
    return agent.returncode, said


def test_a_killed_process_comes_back_by_itself(tmp_path):
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
        code, said = accident("none" if name == "unbroken" else "kill", tmp_path / name, "--max-restarts=2")
        assert code == 0, said[-3000:]
    assert (tmp_path / "killed" / "marker").exists()
    assert "Nothing to resume" in said
    assert "(step00000003.ckpt)" in said
    assert_same_run(tmp_path / "unbroken" / "run", tmp_path / "killed" / "run")


def test_an_error_in_one_process_ends_the_job_and_is_named(tmp_path):
    start = time.monotonic()
    code, said = accident("raise", tmp_path, "--max-restarts=0")
    seconds = time.monotonic() - start
    assert code != 0
    assert seconds < 60
    cause = said[said.index("Root Cause") :]
    assert "rank      : 1" in cause
    assert "RuntimeError: the cat sat on the keyboard" in cause
    assert said.index("Nothing to resume") < said.index("the cat sat on the keyboard")
