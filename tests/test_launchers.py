"""Who starts the processes, and what is refused: one line, from one process."""

from __future__ import annotations

import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from mf_lightning import sharding
from mf_lightning.callbacks.preemption import Preemption
from mf_lightning.cli import STRATEGIES, check_strategy, main
from mf_lightning.launchers import follow_launcher, fresh_prefix, process_rank, under_slurm, under_torchrun
from mf_lightning.types import UserError
from tests.runs import RECIPES, ROOT, command_line, error_of, python

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "MASTER_ADDR": "a"}
SLURM = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train", "LOCAL_RANK": "0"}
DDP = [f"--trainer={ROOT / 'configs/trainer/ddp.yaml'}", "--trainer.accelerator=cpu", "--trainer.devices=2"]
FSDP = [f"--trainer={ROOT / 'configs/trainer/fsdp.yaml'}", "--trainer.accelerator=cpu", "--trainer.devices=2"]


def trainer(num_nodes: int = 1, devices: object = "auto") -> SimpleNamespace:
    return SimpleNamespace(num_nodes=num_nodes, devices=devices)


@pytest.mark.parametrize(("environment", "nodes", "devices"), [(TORCHRUN, 2, 4), (SLURM, 2, 8), ({}, 1, "auto")])
def test_nodes_and_devices_come_from_the_launcher(environment, nodes, devices):
    settings = trainer()
    follow_launcher(settings, environment)
    assert (settings.num_nodes, settings.devices) == (nodes, devices)


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM])
def test_settings_that_agree_with_the_launcher_stay(environment):
    local = 4 if environment is TORCHRUN else 8
    for devices in (local, str(local), list(range(local)), -1):
        settings = trainer(2, devices)
        follow_launcher(settings, environment)
        assert settings.num_nodes == 2
        assert settings.devices in (devices, local)


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        (trainer(3), TORCHRUN, r"num_nodes = 3 under torchrun with --nnodes=2 --nproc-per-node=4, expected 2"),
        (trainer(1, 2), TORCHRUN, r"devices = 2 under torchrun .*expected 4.*devices: auto"),
        (trainer(1, [0]), SLURM, r"devices = \[0\] under SLURM with --nodes=2 --ntasks-per-node=8, expected 8"),
        (trainer(), {**SLURM, "SLURM_NTASKS": "15"}, r"15 tasks on 2 nodes, expected equally many"),
        (trainer(2), {}, r"2 node\(s\) and WORLD_SIZE = unset without MASTER_ADDR, expected .*docs/cluster.md"),
        (trainer(), {"RANK": "0", "WORLD_SIZE": "4"}, r"WORLD_SIZE = 4 without MASTER_ADDR"),
    ],
)
def test_settings_that_contradict_the_launcher(settings, environment, message):
    with pytest.raises(UserError, match=message):
        follow_launcher(settings, environment)


def test_who_is_first():
    assert process_rank({}) == 0
    assert process_rank(TORCHRUN) == 5
    assert process_rank(SLURM) == 9
    assert process_rank({"LOCAL_RANK": "3"}) == 3
    assert process_rank({"LOCAL_RANK": "0", "NODE_RANK": "1"}) != 0
    assert under_torchrun(TORCHRUN)
    assert under_slurm(SLURM)
    assert not under_slurm({**SLURM, "SLURM_JOB_NAME": "bash"})  # a shell inside an allocation
    assert not under_slurm({**SLURM, "SLURM_NTASKS": "1"})
    assert not under_slurm({**SLURM, **TORCHRUN})  # srun starts torchrun


@pytest.mark.parametrize("version", ["2.12.1", "2.7.0", "2.9.0+cu128"])
def test_fsdp_below_torch_2_13_is_refused(version):
    with pytest.raises(UserError, match=rf"Got torch {re.escape(version)} for FSDP, expected at least 2\.13"):
        sharding.check_torch(version)


@pytest.mark.parametrize("version", ["2.13.0", "2.15.0+cpu", "3.0.0", "2.14.0.dev20260601"])
def test_later_ones_are_not(version):
    sharding.check_torch(version)


@pytest.mark.parametrize("name", ["fsdp", "ddp_spawn", "deepspeed", "lightning.pytorch.strategies.FSDPStrategy"])
def test_other_strategies_are_refused(name):
    with pytest.raises(UserError, match=rf"trainer.strategy = {name}, expected DDP .*or this project's FSDP"):
        check_strategy(SimpleNamespace(class_path=name) if "." in name else name)
    for known in STRATEGIES:
        check_strategy(known)


def test_lightning_listens_to_no_signal_of_ours():
    """Its handlers talk to other processes inside a handler, and requeue a SLURM job beside the exit code that says so."""
    before = signal.getsignal(signal.SIGTERM)
    for signals, ours in ((["SIGTERM", "SIGUSR1"], True), ([], False)):
        registered: list[int] = []
        connector = SimpleNamespace(register_signal_handlers=partial(registered.append, 1))
        fake = SimpleNamespace(_signal_connector=connector)
        preemption = Preemption(signals)
        preemption.setup(fake, None, "fit")
        fake._signal_connector.register_signal_handlers()
        assert registered == ([] if ours else [1])
        assert (signal.getsignal(signal.SIGTERM) != before) is ours
        preemption.teardown(fake, None, "fit")
        assert signal.getsignal(signal.SIGTERM) == before


def test_each_attempt_meets_in_a_part_of_the_store_of_its_own():
    """In three attempts of three processes, whoever comes first, in a store that keeps what processes that died left in it."""
    store, used = dist.HashStore(), set()
    store.set("mf_lightning/meeting/1", "a process that died before the first one answered")
    for first in range(3):
        found: dict[int, str] = {}

        def come(rank, found=found):
            found[rank] = fresh_prefix(store, rank, 3, timedelta(seconds=20))

        threads = [threading.Thread(target=come, args=((first + i) % 3,)) for i in range(3)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join()
        assert len(set(found.values())) == 1
        assert len(found) == 3
        used.add(found[0])
    assert len(used) == 3
    with pytest.raises(TimeoutError, match=r"processes \[1\] did not come"):
        fresh_prefix(store, 0, 2, timedelta(seconds=0.2))


APART = """
import datetime, sys
from pathlib import Path
from types import SimpleNamespace
import torch.distributed as dist
from mf_lightning.callbacks.checkpoint import check_shared
from mf_lightning.types import UserError

store, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

def broadcast(value):
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]

strategy = SimpleNamespace(broadcast=broadcast, barrier=dist.barrier)
trainer = SimpleNamespace(strategy=strategy, is_global_zero=rank == 0, world_size=2)
try:
    check_shared(trainer, folder, wait_s=0.5)
    print("shared")
except UserError as error:
    print(error)
dist.barrier()
"""


@pytest.mark.parametrize("shared", [True, False])
def test_nodes_that_do_not_share_the_folder_are_named(tmp_path, shared):
    script = tmp_path / "apart.py"
    script.write_text(APART)
    folders = [tmp_path / "one", tmp_path / ("one" if shared else "other")]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(python, script, tmp_path / "store", rank, folder) for rank, folder in enumerate(folders)]
        said = [job.result().stdout.strip() for job in jobs]
    if shared:
        assert said == ["shared", "shared"]
    else:
        expected = f"{socket.gethostname()} do(es) not see what process 0 wrote"
        assert all(expected in line for line in said), said
    assert not list(tmp_path.rglob(".*.shared"))


SAME = """
import sys
import torch.distributed as dist
from mf_lightning.callbacks.checkpoint import check_same_start
from mf_lightning.types import UserError

store, rank, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
try:
    check_same_start(None if path == "none" else path)
    print("same")
except UserError as error:
    print(error)
dist.barrier()
"""


@pytest.mark.parametrize(("paths", "said"), [
    (("a.ckpt", "a.ckpt"), "same"), (("none", "none"), "same"),
    (("a.ckpt", "b.ckpt"), "a.ckpt on"), (("a.ckpt", "none"), "and from nothing on"),
])  # fmt: skip
def test_processes_resume_from_one_checkpoint(tmp_path, paths, said):
    """A network file system may show a node an older link: all processes end, none waits for others."""
    (tmp_path / "same.py").write_text(SAME)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(python, tmp_path / "same.py", tmp_path / "store", rank, path) for rank, path in enumerate(paths)]
        lines = [job.result().stdout.strip() for job in jobs]
    assert all(said in line and (said == "same" or "expected one checkpoint for all" in line) for line in lines), lines


WRONG = {
    "a batch that processes do not divide": ([*DDP, "--data.init_args.batch_size=63"], "a global batch of 63 for 2 device(s)"),
    "a device that is not there": ([*DDP, "--trainer.accelerator=gpu"], "GPUs"),
    "FSDP without a GPU": ([*FSDP, "--trainer.accelerator=gpu"], "GPUs"),
    "groups that processes do not divide": ([*FSDP, "--trainer.strategy.init_args.replicas=3"], "replicas = 3 for 2 process"),
    "weights kept in main memory without a GPU": ([*FSDP, "--trainer.strategy.init_args.cpu_offload=true"], "cpu_offload"),
    "compiled blocks under torch.func.jvp": (
        [*FSDP, "--model.compile=true", "--model.loss.init_args.jvp=torch"],
        "torch.func.jvp under FSDP",
    ),
    "nodes without an address": ([*DDP, "--trainer.num_nodes=2"], "without MASTER_ADDR"),
    "a strategy that was never proved": (
        ["--trainer.strategy=ddp_spawn", "--trainer.devices=2"],
        "trainer.strategy = ddp_spawn",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_run_is_one_line_from_one_process(tmp_path, what):
    options, message = WRONG[what]
    result = command_line("fit", f"--config={RECIPES / 'smoke.yaml'}", *options, f"--trainer.default_root_dir={tmp_path}")
    assert message in error_of(result)
    assert (result.stdout + result.stderr).count("error: ") == 1, result.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_checkpoint_of_other_shapes_is_one_line_from_one_process(tmp_path):
    small = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--sample_eval.num_samples=0", "--sample_grid.rows=0"]
    common = ["fit", f"--config={RECIPES / 'smoke.yaml'}", *small, "--self_check.enabled=false"]
    made = command_line(*common, f"--trainer.default_root_dir={tmp_path / 'one'}")
    assert made.returncode == 0, made.stderr[-2000:]
    last = tmp_path / "one" / "checkpoints" / "last.ckpt"
    for way in (DDP, FSDP):
        more = ["--model.net.init_args.hidden_size=32", f"--trainer.default_root_dir={tmp_path / way[0][-8:-5]}"]
        result = command_line(*common, *way, *more, f"--ckpt_path={last}")
        assert "another architecture (hidden_size = 64), expected hidden_size = 32" in " ".join(error_of(result).split())
        assert (result.stdout + result.stderr).count("error: ") == 1, result.stderr


LIVENESS = """
import os, sys, time
from types import SimpleNamespace
import torch.distributed as dist
from mf_lightning.callbacks import Liveness

store, rank, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.environ["MASTER_ADDR"] = "127.0.0.1"
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
callback = Liveness(grace_s=0.5)
trainer = SimpleNamespace(world_size=3, global_rank=rank)
callback.setup(trainer, None, "fit")
dist.barrier()
time.sleep(0.3)
if kind == "orderly":
    time.sleep(0.2 * rank)
    callback.teardown(trainer, None, "fit")
    time.sleep(1.5)
    os._exit(0)
if kind == str(rank):
    os.kill(os.getpid(), 9)
time.sleep(60)  # as in a kernel that waits for a process that is gone
"""


@pytest.mark.parametrize("kind", ["0", "1", "2", "orderly"])
def test_a_process_that_ends_takes_down_those_that_wait_in_a_device(tmp_path, kind):
    """Whichever ends; one process says so. Those that say goodbye take nobody with them."""
    (tmp_path / "live.py").write_text(LIVENESS)
    start = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(python, tmp_path / "live.py", tmp_path / "store", rank, kind) for rank in range(3)]
        results = [job.result() for job in jobs]
    assert time.monotonic() - start < 40
    codes = [result.returncode for result in results]
    said = [line for result in results for line in result.stderr.splitlines() if line.startswith("error: ")]
    if kind == "orderly":
        assert (codes, said) == ([0, 0, 0], [])
    else:
        assert codes == [-9 if rank == int(kind) else 1 for rank in range(3)]
        assert len(said) == 1, said
        assert said[0].startswith(f"error: process {kind}"), said
        assert "has ended without a word" in said[0]


def test_the_first_error_of_another_node_is_told():
    """Before processes have met: on the first node the first process says it, on another one its first process."""
    broken = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    for node, local, speaks in (("1", "0", True), ("1", "1", False), ("0", "1", False)):
        environment = {**broken, "NODE_RANK": node, "LOCAL_RANK": local}
        result = command_line("fit", "--config=absent.yaml", env=environment)
        assert result.returncode == 2
        assert ("absent.yaml" in result.stderr) is speaks, result.stderr
        assert not speaks or "(process 9 on" in result.stderr


def test_half_optimizer_steps_are_refused(tmp_path, capsys):
    options = [
        "--trainer.accumulate_grad_batches=2",
        "--trainer.limit_train_batches=3",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    with pytest.raises(SystemExit):
        main(["fit", f"--config={RECIPES / 'smoke.yaml'}", *options])
    assert "limit_train_batches = 3 (3 batches), trainer.accumulate_grad_batches = 2, expected whole" in capsys.readouterr().err
