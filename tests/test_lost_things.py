"""What is lost while a run trains (a shard, the disk, W&B) ends it with one message, code 2, a whole checkpoint."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lightning import Callback
from lightning.pytorch.loggers import Logger
from wandb.errors import CommError

from mf_lightning.checkpoints import read_checkpoint
from mf_lightning.cli import main
from mf_lightning.data.loader import LatentSplit
from mf_lightning.data.shards import DatasetInfo, OpenShard, open_split, shard_file, write_info, write_shard
from mf_lightning.types import UserError
from tests.runs import RECIPES, command_line, error_of

SMALL = [  # validations, and so checkpoints, at 2, 4, ...
    "--trainer.max_steps=6", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1", "--self_check.enabled=false",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--sample_eval.num_samples=0",
    "--sample_grid.rows=0",
]  # fmt: skip
SMOKE = [f"--config={RECIPES / 'smoke.yaml'}", "--data.init_args.train_size=60", "--data.init_args.val_size=12",
         "--data.init_args.batch_size=8", *SMALL]  # fmt: skip


class CutShard(Callback):
    """Does to a file, before optimizer step 3, what another process may do."""

    def __init__(self, file: str, remove: bool = False) -> None:
        self.file, self.remove = file, remove

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            Path(self.file).unlink() if self.remove else os.truncate(self.file, 4096)


class FullDisk(Callback):
    """From a step's training or validation on, no file grows beyond so many bytes (or beyond what one of the run's is long)."""

    def __init__(self, step: int, size: int = 0, file: str | None = None) -> None:
        self.step, self.size, self.file = step, size, file

    def on_train_batch_start(self, trainer, *args):
        self._fill(trainer)

    def on_validation_start(self, trainer, pl_module):
        self._fill(trainer)

    def _fill(self, trainer):
        if trainer.global_step == self.step:
            size = self.size if self.file is None else (Path(trainer.default_root_dir) / self.file).stat().st_size + self.size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class LosesConnection(Logger):
    """A W&B run whose server goes away before step 5 is logged."""

    name, version = "lost", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if step == 4:
            raise CommError("run initialization has timed out")


def write_latents(path: Path, *, flip: bool = False, shards: int = 2) -> Path:
    """Write a small data set of moments."""
    rng = np.random.default_rng(0)
    info = DatasetInfo("moments", (4, 8, 8), "float16", flip, "none", 1.0, 0.0, 32, tuple("0123456789"))
    written = {}
    for split, count in (("train", 48), ("val", 16)):
        moments = np.abs(rng.normal(size=(count, 8, 8, 8))).astype(np.float16)
        more = {"flipped": moments[..., ::-1].copy()} if flip else {}
        each = [write_shard(path, split, n, latents=moments, labels=np.arange(count) % 10, **more) for n in range(shards)]
        written[split] = tuple(each)
    write_info(path, DatasetInfo(**{**info.__dict__, "splits": written}))
    return path


def last_step(root: Path) -> int:
    """Check ``last.ckpt`` whole and return its step."""
    return read_checkpoint(root / "checkpoints" / "last.ckpt")["global_step"]


def message_of_main(args: list, capsys) -> str:
    """Run `fit` in this process; it must end with one message and exit code 2."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *map(str, args)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)  # before pytest writes its own dots to a file
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    return err[err.index("error: ") :]


# data


@pytest.mark.parametrize("remove", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_shard_that_is_cut_or_removed_while_a_run_trains(tmp_path, remove):
    """In a process of its own: what is read behind the end of a cut file is a bus error, which says nothing."""
    data, root = write_latents(tmp_path / "latents"), tmp_path / "run"
    file = shard_file(data, "train", "00001", "latents")
    run = command_line(
        "fit", f"--config={RECIPES / 'quickstart.yaml'}", f"--data.init_args.path={data}", "--data.init_args.autoencoder=null",
        "--data.init_args.batch_size=32", f"--trainer.default_root_dir={root}", "--model.lr_schedule.init_args.warmup_steps=1",
        *SMALL, "--trainer.callbacks+=tests.test_lost_things.CutShard", f"--trainer.callbacks.init_args.file={file}",
        f"--trainer.callbacks.init_args.remove={remove}", env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    message = error_of(run)
    assert run.returncode == 2
    assert str(file) in message
    assert ("which is gone" if remove else "which now has 4,096 bytes, expected the 49,280 bytes") in message
    assert "The last checkpoint is whole: bring the file back, then go on with --ckpt_path=auto" in message
    assert last_step(root) == 2


@pytest.mark.parametrize("ending", ["latents", "latents_flip"])
def test_latents_are_looked_at_before_it_is_read(tmp_path, ending):
    data = write_latents(tmp_path, flip=True)
    info = DatasetInfo(**{**_info(data).__dict__})
    split = LatentSplit(open_split(data, info, "train"))
    first, second = np.arange(0, 48), np.arange(48, 96)
    file = shard_file(data, "train", "00001", ending)
    whole = file.read_bytes()
    latents, _ = split.gather(second)
    file.write_bytes(whole + b"x")  # not cut: a map behind its end kills the test
    with pytest.raises(UserError, match=rf"{file}', which now has {len(whole) + 1:,} bytes, expected the {len(whole):,} bytes"):
        split.gather(second, np.ones(48, bool))
    split.gather(first)  # the other shard is whole
    file.unlink()
    with pytest.raises(UserError, match=rf"{file}', which is gone \(No such file"):
        split.gather(np.arange(40, 60))
    file.write_bytes(whole)
    assert np.array_equal(LatentSplit(open_split(data, info, "train")).gather(second)[0], latents)


def test_one_shard_alone_is_looked_at_as_well(tmp_path):
    data = write_latents(tmp_path, shards=1)
    split = LatentSplit(open_split(data, _info(data), "train"))
    split.gather(np.arange(4))
    shard_file(data, "train", "00000", "latents").unlink()
    with pytest.raises(UserError, match="which is gone"):
        split.gather(np.arange(4))


def test_shards_in_memory_have_no_files():
    shard = OpenShard(np.zeros((4, 1, 1, 1)), np.arange(4), None)
    shard.check_files()
    assert LatentSplit([shard]).gather(np.array([3]))[1] == [3]


def test_looking_costs_microseconds(tmp_path):
    (shard, _) = open_split(write_latents(tmp_path), _info(tmp_path), "train")
    start = time.perf_counter()
    for _ in range(1000):
        shard.check_files()
    assert time.perf_counter() - start < 0.5  # 4 us each where it was measured


def _info(path: Path) -> DatasetInfo:
    from mf_lightning.data.shards import read_info

    return read_info(path)


# disk


@pytest.fixture
def limit_restored():
    """A write beyond the limit fails, as on a full disk, instead of killing the process."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize(
    ("file", "step", "options", "kept"),
    [
        ("metrics.csv", 3, ["--trainer.logger.init_args.flush_logs_every_n_steps=1"], 2),
        ("sample_eval.jsonl", 4, ["--sample_eval.num_samples=20"], 2),
        ("grids/step00000002_nfe1.png", 4, ["--sample_grid.rows=8"], 2),
    ],
)
def test_a_disk_that_is_full_while_something_else_is_written(tmp_path, capsys, limit_restored, file, step, options, kept):
    full = ["--trainer.callbacks+=tests.test_lost_things.FullDisk", f"--trainer.callbacks.init_args.step={step}"]
    full += [
        f"--trainer.callbacks.init_args.file={file}",
        f"--trainer.callbacks.init_args.size={-100 if 'png' in file else 10}",
    ]
    message = message_of_main([*SMOKE, *options, f"--trainer.default_root_dir={tmp_path / 'run'}", *full], capsys)
    assert "Got no space to write" in message
    assert "File too large" in message
    assert "The last checkpoint is whole. Free some space, then go on with --ckpt_path=auto" in message
    assert last_step(tmp_path / "run") == kept
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob(".*")) == []


# W&B


def test_wandb_without_a_login_ends_with_one_message(tmp_path):
    env = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    root = tmp_path / "run"
    more = ["--config", RECIPES.parent / "trainer" / "wandb.yaml", f"--trainer.default_root_dir={root}"]
    run = command_line("fit", *SMOKE, *more, env={**env, "NETRC": str(tmp_path / "netrc"), "OMP_NUM_THREADS": "1"})
    message = error_of(run)
    assert run.returncode == 2
    assert "Got no connection to W&B (No API key configured" in message
    assert "WANDB_MODE=offline" in message


def test_a_connection_to_wandb_that_is_lost_in_the_middle(tmp_path, capsys):
    more = ["--trainer.logger+=tests.test_lost_things.LosesConnection", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    message = message_of_main([*SMOKE, *more], capsys)
    assert "Got no connection to W&B (run initialization has timed out)" in message
    assert "go on with --ckpt_path=auto" in message
    assert last_step(tmp_path / "run") == 2


def test_the_limit_of_open_files_is_raised_for_many_shards_or_named(tmp_path: Path):
    rng = np.random.default_rng(0)
    shards = tuple(
        write_shard(
            tmp_path, "train", i, latents=rng.random((2, 4, 2, 2)).astype(np.float32), labels=np.zeros(2, np.int64)
        ) for i in range(40)
    )  # fmt: skip
    info = DatasetInfo("latents", (4, 2, 2), "float32", False, "none", 1.0, 0.0, 16, (), {"train": shards, "val": ()})
    write_info(tmp_path, info)
    code = (
        "import resource, sys; from mf_lightning.data.shards import open_split, read_info\n"
        "import os; hard = len(os.listdir('/dev/fd')) + int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/dev/fd')) + 20, hard))\n"
        "print(len(open_split(sys.argv[1], read_info(sys.argv[1]), 'train')))"
    )
    enough = subprocess.run([sys.executable, "-c", code, str(tmp_path), "400"], capture_output=True, text=True, check=False)
    assert enough.stdout == "40\n", enough.stderr
    few = subprocess.run([sys.executable, "-c", code, str(tmp_path), "30"], capture_output=True, text=True, check=False)
    assert "40 of this data set stay open" in few.stderr
