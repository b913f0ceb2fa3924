"""A resumed run is the run that was never stopped, from whichever step, to the last bit and the last line of its logs."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from mf_lightning.callbacks import LastCheckpoint, Preempted, Preemption
from mf_lightning.checkpoints import publish, read_checkpoint
from mf_lightning.checkpoints.sharded import split
from mf_lightning.cli import load, main
from mf_lightning.types import UserError
from tests.runs import RECIPES

STEPS = 17
SETTINGS = {  # epochs end after 7 and 14 steps, validations fall on 5, 10, 15
    "data.init_args.train_size": 60,
    "data.init_args.val_size": 12,
    "data.init_args.batch_size": 8,
    "trainer.val_check_interval": 5,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "trainer.max_steps": STEPS,
    "sample_eval.num_samples": 10,
    "sample_grid.rows": 0,
    "self_check.enabled": "false",
}


def run(root: Path, *, every_n_steps: int = 1, resume: str | None = None, preempt: str | None = None, **options) -> None:
    """Train in this process; ``preempt`` is the hook, and the step, at which the run is asked to go."""
    settings = {**SETTINGS, "trainer.default_root_dir": root, **{k.replace("__", "."): v for k, v in options.items()}}
    cli = load(["--config", str(RECIPES / "smoke.yaml"), *(f"--{key}={value}" for key, value in settings.items())])
    next(c for c in cli.trainer.callbacks if isinstance(c, LastCheckpoint)).every_n_steps = every_n_steps
    if preempt is not None:
        hook, step = preempt.split("@")
        preemption = next(c for c in cli.trainer.callbacks if isinstance(c, Preemption))
        poll, calls = preemption.poll, []

        def asked(trainer):
            calls.append(trainer.state.stage.value)
            if trainer.global_step >= int(step) and trainer.state.stage.value == hook:
                os.kill(os.getpid(), signal.SIGTERM)
            poll(trainer)

        preemption.poll = asked
        with pytest.raises(Preempted):
            cli.trainer.fit(cli.model, cli.datamodule)
        return
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=resume)


def logs(root: Path) -> tuple[list[dict], list[dict]]:
    """Return the rows of metrics.csv, and the lines of sample_eval.jsonl without their timing."""
    with (root / "metrics.csv").open() as stream:
        metrics = [{k: v for k, v in row.items() if v and k != "train/images_per_s"} for row in csv.DictReader(stream)]
    figures = [json.loads(line) for line in (root / "sample_eval.jsonl").read_text().splitlines()]
    timing = ("images_per_s", "seconds_per_image")
    return metrics, [{key: value for key, value in row.items() if key not in timing} for row in figures]


def state(path: Path) -> dict[str, torch.Tensor]:
    """Return weights, averages and optimizer state of a checkpoint, and Lightning's counters as tensors."""
    checkpoint = read_checkpoint(path)
    _, tensors = split({key: checkpoint[key] for key in ("state_dict", "ema", "optimizer_states")})
    assert len(tensors) > 50
    return {**tensors, "step": torch.tensor(checkpoint["global_step"])}


def assert_same_run(one: Path, other: Path) -> None:
    """Compare two finished runs, bit by bit and line by line."""
    states = [state(root / "checkpoints" / "last.ckpt") for root in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    (metrics, figures), (other_metrics, other_figures) = logs(one), logs(other)
    assert other_figures == figures
    assert other_metrics == metrics
    for best in ("best_nfe1.ckpt", "best_nfe2.ckpt"):
        steps = [read_checkpoint(root / "checkpoints" / best)["global_step"] for root in (one, other)]
        assert steps[0] == steps[1], best


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A whole run that kept the checkpoint of every step."""
    root = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "KEPT", 100)
        run(root)
    assert len(list((root / "checkpoints").glob("step*.ckpt"))) == STEPS
    metrics, figures = logs(root)
    assert [int(row["step"]) for row in metrics if "train/raw_error" in row] == list(range(STEPS))
    assert [(row["step"], row["nfe"]) for row in figures] == [(s, n) for s in (5, 10, 15) for n in (1, 2)]
    return root


def stopped_at(unbroken: Path, step: int, root: Path) -> Path:
    """Return a folder as a kill may leave it: an early checkpoint is the last, the logs are further on."""
    shutil.copytree(unbroken, root, symlinks=True)
    folder = root / "checkpoints"
    for kept in folder.glob("step*.ckpt"):
        if int(kept.stem[4:]) > step:
            kept.unlink()
    (folder / "last.ckpt").unlink()
    (folder / "last.ckpt").symlink_to(f"step{step:08d}.ckpt")
    with (root / "metrics.csv").open("a") as stream:
        stream.write("0.1,0.2")  # a line that the kill cut off
    return folder / "last.ckpt"


@pytest.mark.parametrize("step", [1, 5, 7, 10, *(pytest.param(s, marks=pytest.mark.slow) for s in (2, 6, 8, 13, 14, 15, 16))])
def test_from_the_checkpoint_of_any_step(unbroken, tmp_path, step):
    last = stopped_at(unbroken, step, tmp_path / "run")
    run(tmp_path / "run", resume=str(last))
    assert_same_run(unbroken, tmp_path / "run")


def test_validation_at_the_end_of_an_epoch(tmp_path):
    """The counters of Lightning's loops meet there."""
    run(tmp_path / "whole", trainer__val_check_interval=7)
    for step in (7, 14):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(publish, "KEPT", 100)
            run(tmp_path / str(step), trainer__val_check_interval=7, trainer__max_steps=step)
        last = tmp_path / str(step) / "checkpoints" / "last.ckpt"
        assert read_checkpoint(last)["global_step"] == step
        run(tmp_path / str(step), trainer__val_check_interval=7, resume=str(last))
        assert_same_run(tmp_path / "whole", tmp_path / str(step))


@pytest.mark.parametrize(
    "point",
    ["train@3", "validate@10", *(pytest.param(p, marks=pytest.mark.slow) for p in ("train@7", "validate@5", "train@10"))],
)
def test_preempted_between_steps_or_inside_a_validation(unbroken, tmp_path, point):
    run(tmp_path, preempt=point, every_n_steps=1000)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["resume"]["validation_due"] == point.startswith("validate")
    run(tmp_path, resume=str(last), every_n_steps=1000)
    assert_same_run(unbroken, tmp_path)


def test_preempted_inside_the_last_validation(tmp_path):
    """No step is left, the validation is."""
    run(tmp_path / "whole", trainer__max_steps=10)
    run(tmp_path / "run", preempt="validate@10", trainer__max_steps=10)
    run(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoints" / "last.ckpt"), trainer__max_steps=10)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_with_other_accumulation_it_goes_on_at_the_same_sample(unbroken, tmp_path):
    """In other batches, and so with other rounding: rows of the log agree, validations fall where they fell."""
    last = stopped_at(unbroken, 6, tmp_path / "run")
    run(tmp_path / "run", resume=str(last), trainer__accumulate_grad_batches=2, trainer__val_check_interval=10)
    one, other = state(unbroken / "checkpoints" / "last.ckpt"), state(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for name, value in one.items():
        assert (value - other[name]).abs().max() <= 1e-3 * value.abs().max().clamp(min=1e-3), name
    figures = [[(row["step"], row["nfe"]) for row in logs(root)[1]] for root in (unbroken, tmp_path / "run")]
    assert figures[0] == figures[1]


def test_other_data_or_batches_are_refused(unbroken, tmp_path):
    last = stopped_at(unbroken, 6, tmp_path / "run")
    with pytest.raises(UserError, match=r"training data with batch_size = 10, expected the checkpoint's batch_size = 8"):
        run(tmp_path / "run", resume=str(last), data__init_args__batch_size=10)
    with pytest.raises(UserError, match=r"training data with samples = 64"):
        run(tmp_path / "run", resume=str(last), data__init_args__train_size=64)


def small(root: Path, *more: str) -> list[str]:
    """Return the options of a run of three steps."""
    settings = {**SETTINGS, "trainer.max_steps": 3, "trainer.limit_val_batches": 0, "trainer.default_root_dir": root}
    return ["fit", f"--config={RECIPES / 'smoke.yaml'}", *(f"--{key}={value}" for key, value in settings.items()), *more]


def test_states_without_a_last_one_are_not_written_over(tmp_path, capsys):
    """`last.ckpt` names a state that somebody removed, or is gone: auto does not start anew over the others."""
    main(small(tmp_path, "--trainer.plugins=[]"))  # an emptied list does not bring Lightning's own writing back
    folder = tmp_path / "checkpoints"
    assert (folder / "last.ckpt").is_symlink()
    shutil.copy(folder / "step00000003.ckpt", folder / "step00000002.ckpt")
    (folder / "step00000003.ckpt").unlink()
    for removed in (False, True):
        if removed:
            (folder / "last.ckpt").unlink()
        for asked in (["--ckpt_path=auto"], ["--ckpt_path=last"], []):
            with pytest.raises(SystemExit):
                main(small(tmp_path, *asked))
            said = capsys.readouterr().err
            assert ("last.ckpt is gone" if removed else "names step00000003.ckpt, which is gone") in said
            assert f"--ckpt_path={folder / 'step00000002.ckpt'}" in said
    assert (folder / "step00000002.ckpt").exists()


def test_going_on_from_an_earlier_state_leaves_later_ones(tmp_path):
    """Until the run has passed them."""
    for step in (3, 4, 9):
        publish.publish(written(tmp_path, step), tmp_path / "last.ckpt", step=step)
    publish.publish(written(tmp_path, 5), tmp_path / "last.ckpt", step=5)
    assert sorted(p.name for p in tmp_path.glob("step*")) == ["step00000004.ckpt", "step00000005.ckpt", "step00000009.ckpt"]
    publish.publish(written(tmp_path, 10), tmp_path / "last.ckpt", step=10)
    publish.publish(written(tmp_path, 11), tmp_path / "last.ckpt", step=11)
    assert sorted(p.name for p in tmp_path.glob("step*")) == ["step00000010.ckpt", "step00000011.ckpt"]


def written(folder: Path, step: int) -> Path:
    aside = folder / ".aside"
    aside.write_text(str(step))
    return aside
