"""What happens at a step that is not finite, or whose gradient or error jumps."""

import copy
import csv
import json
import math
import time
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback

from mf_lightning.callbacks import EMA, NonFiniteGuard, SpikeLog
from mf_lightning.cli import load
from mf_lightning.optim import compile_step
from mf_lightning.types import UserError
from tests.runs import RECIPES, error_of, lines, python

SMOKE = ("--config", str(RECIPES / "smoke.yaml"))
QUIET = ("sample_eval.num_samples=0", "sample_grid.rows=0", "self_check.enabled=false")
SHORT = (*QUIET, "trainer.limit_val_batches=0", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false")

SCRIPT = """
import sys, torch
from lightning import Callback
from mf_lightning import cli

class Spoil(Callback):
    '''Spoils a batch at a step of one process, and the gradient's norm as measured there at another step.'''

    def __init__(self, batch_at: int = -1, norm_at: int = -1, process: int = 0):
        self.batch_at, self.norm_at, self.process = batch_at, norm_at, process

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.global_step, trainer.global_rank) == (self.batch_at, self.process):
            batch.x[3] = float("nan")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if (trainer.global_step, trainer.global_rank) == (self.norm_at, self.process):
            module._gradient_norm = torch.tensor(float("nan"))

    def on_train_end(self, trainer, module):
        (guard,) = (c for c in trainer.callbacks if type(c).__name__ == "NonFiniteGuard")
        found = {"weights": module.net.state_dict(), "optimizer": trainer.optimizers[0].state_dict()["state"]}
        torch.save({**found, "skipped": guard.skipped}, f"{trainer.default_root_dir}/{trainer.global_rank}.pt")

add = cli.MeanFlowCLI.add_arguments_to_parser


def with_spoil(self, parser):
    parser.add_lightning_class_args(Spoil, "spoil")
    add(self, parser)

if __name__ == "__main__":
    cli.MeanFlowCLI.add_arguments_to_parser = with_spoil
    cli.main(sys.argv[1:])
"""


class Spoil(Callback):
    """Changes rows of a batch, at steps and batches of a step that are given."""

    def __init__(self, change, *steps: int, part: int = 0) -> None:
        self.change, self.steps, self.part = change, steps, part

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps and batch_idx % trainer.accumulate_grad_batches == self.part:
            self.change(batch.x)


def nan(x):
    x[3] = float("nan")


def large(x):
    x[2] *= 300
    x[5] *= -200


class Watch(Callback):
    """Keeps what each optimizer step found and left."""

    def __init__(self) -> None:
        self.states, self.rows, self.errors, self.norms = [], {}, [], []

    def state(self, trainer, pl_module):
        return copy.deepcopy([pl_module.net.state_dict(), trainer.optimizers[0].state_dict()["state"]])

    def on_train_start(self, trainer, pl_module):
        self.states.append(self.state(trainer, pl_module))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Compute raw errors anew, before the step."""
        step, loss, size = trainer.global_step, pl_module.loss, trainer.datamodule.batch_size
        draw = loss.draw_training(batch.x, batch.row, seed=pl_module.seed, step=step, global_batch_size=size)
        terms = loss(copy.deepcopy(pl_module.net), batch.x, batch.y, draw, y_null=pl_module.net.y_null)
        columns = {"index": batch.index, "row": batch.row, "t": draw.t, "r": draw.r, "raw_error": terms.raw_error}
        for values in zip(*(column.tolist() for column in columns.values()), strict=True):
            self.rows.setdefault(step, []).append({**dict(zip(columns, values, strict=True)), "process": 0})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == len(self.states):
            self.states.append(self.state(trainer, pl_module))
            errors = [row["raw_error"] for row in self.rows[trainer.global_step - 1]]
            self.errors.append(sum(errors) / len(errors))
            self.norms.append(float(trainer.logged_metrics["train/grad_norm"]))


def of_kind(cli, kind):
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, kind))


def prepare(root, *options: str, callbacks=()):
    settings = [f"--{option}" for option in (*SHORT, f"trainer.default_root_dir={root}", *options)]
    cli = load([*SMOKE, *settings])
    cli.trainer.callbacks[:0] = callbacks
    return cli


def fit(cli, ckpt_path=None):
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=ckpt_path)


def equal(one, other) -> bool:
    """Compare nested states bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    root = tmp_path / "run"
    settings = ["--trainer.val_check_interval=10", "--sample_eval.num_samples=0", "--sample_grid.rows=0", "--spoil.batch_at=12"]
    message = error_of(python("-c", SCRIPT, "fit", *SMOKE, f"--trainer.default_root_dir={root}", *settings))
    last = root / "checkpoints" / "last.ckpt"
    assert "step 12" in message
    assert "rows [3]" in message
    assert str(last) in message
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 10
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


def step_of(guard: NonFiniteGuard, step: int, *, loss: float = 1.0, norm: float = 1.0) -> SimpleNamespace:
    """Show the guard one optimizer step; the trainer is returned."""
    trainer = SimpleNamespace(global_step=step, global_rank=0, world_size=1, default_root_dir="nowhere")
    module = SimpleNamespace(
        last_terms=SimpleNamespace(raw_error=torch.tensor([1.0, loss])), gradient_norm=lambda: torch.tensor(norm)
    )
    guard.on_before_backward(trainer, module, torch.tensor(loss))
    guard.on_before_optimizer_step(trainer, module, None)
    return trainer


def test_guard_stops_at_a_gradient_that_is_not_finite():
    guard = NonFiniteGuard()
    step_of(guard, 4)
    with pytest.raises(UserError, match=r"gradient of norm inf at step 5, process 0, largest raw error 1"):
        step_of(guard, 5, norm=float("inf"))


def test_on_a_gpu_the_guard_reads_a_step_later_and_before_anything_is_kept():
    guard = NonFiniteGuard(deferred=True)  # as on a GPU
    module = SimpleNamespace(device=torch.device("cpu"))
    guard.on_train_start(SimpleNamespace(global_rank=0, default_root_dir="nowhere"), module)
    step_of(guard, 4)
    step_of(guard, 5, loss=float("nan"))
    with pytest.raises(UserError, match=r"loss of nan at step 5, process 0, rows \[1\]"):
        step_of(guard, 6)
    saving = lambda trainer, module_: module.before_saving()  # noqa: E731
    for keep in (saving, guard.on_validation_start, guard.on_train_end):
        guard.on_train_start(SimpleNamespace(global_rank=0, default_root_dir="nowhere"), module)
        trainer = step_of(guard, 7, norm=float("nan"))
        with pytest.raises(UserError, match=r"gradient of norm nan at step 7"):
            keep(trainer, None)


def test_the_guard_names_rows_of_every_accumulated_batch():
    guard = NonFiniteGuard(deferred=True)
    trainer = SimpleNamespace(global_step=3, global_rank=0, world_size=1, default_root_dir="nowhere")
    for error in (float("nan"), 2.0):
        terms = SimpleNamespace(raw_error=torch.tensor([1.0, error]))
        module = SimpleNamespace(last_terms=terms, gradient_norm=lambda: torch.tensor(float("nan")))
        guard.on_before_backward(trainer, module, torch.tensor(error))
    guard.on_before_optimizer_step(trainer, module, None)
    with pytest.raises(UserError, match=r"loss of nan at step 3, process 0, rows \[1\]"):
        guard.settle(trainer)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_touches_neither_weights_nor_optimizer_and_the_run_goes_on(tmp_path, accumulate, caplog):
    watch = Watch()
    options = ("guard.action=skip", "trainer.max_steps=6", f"trainer.accumulate_grad_batches={accumulate}")
    cli = prepare(tmp_path, *options, "trainer.log_every_n_steps=1", callbacks=[Spoil(nan, 3), watch])
    with caplog.at_level("INFO"):
        fit(cli)
    assert [equal(one, other) for one, other in zip(watch.states, watch.states[1:], strict=False)] == [
        step == 3 for step in range(6)
    ]
    assert cli.trainer.global_step == of_kind(cli, EMA).updates == 6
    assert all(torch.isfinite(p).all() for p in cli.model.net.parameters())
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/grad_norm"]]
    assert [float(row["train/skipped_steps"]) for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [math.isfinite(float(row["train/grad_norm"])) for row in rows] == [step != 3 for step in range(6)]
    rates = [float(row["lr-Adam"]) for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["lr-Adam"]]
    assert rates == sorted(rates)
    assert len(set(rates)) == 6  # the schedule goes on
    (printed,) = (record.message for record in caplog.records if "Skipped" in record.message)
    assert "a loss of nan at step 3, process 0, rows [3] of its batch; 1 of at most 10 skipped steps" in printed


@pytest.mark.parametrize("clip", [["gradient_clip_val=null"], ["gradient_clip_val=1.0", "gradient_clip_algorithm=value"]])
def test_a_step_is_skipped_however_gradients_are_clipped(tmp_path, clip):
    watch = Watch()
    settings = [f"trainer.{setting}" for setting in clip]
    fit(prepare(tmp_path, "guard.action=skip", "trainer.max_steps=2", *settings, callbacks=[Spoil(nan, 1), watch]))
    assert not equal(watch.states[0], watch.states[1])
    assert equal(watch.states[1], watch.states[2])


def test_skips_are_limited_and_counted_over_resumes(tmp_path):
    options = ("guard.action=skip", "guard.max_skips=2")
    first = prepare(tmp_path, *options, "trainer.max_steps=3", callbacks=[Spoil(nan, 0, 2)])
    fit(first)
    assert of_kind(first, NonFiniteGuard).skipped == 2
    resumed = prepare(tmp_path, *options, "trainer.max_steps=6", callbacks=[Spoil(nan, 4)])
    last = tmp_path / "checkpoints" / "last.ckpt"
    expected = (
        r"rows \[3\] of its batch, skipped step number 3 of the run, expected at most guard.max_skips = 2\. The last good"
    )
    with pytest.raises(UserError, match=f"loss of nan at step 4.*{expected}"):
        fit(resumed, ckpt_path=last)
    assert torch.load(last, weights_only=True)["global_step"] == 3


def test_a_limit_of_none_stops_at_the_first(tmp_path):
    with pytest.raises(UserError, match=r"at step 1, .* skipped step number 1 of the run, expected at most .* = 0"):
        fit(prepare(tmp_path, "guard.action=skip", "guard.max_skips=0", "trainer.max_steps=3", callbacks=[Spoil(nan, 1)]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NonFiniteGuard("skip", deferred=True), r"guard.deferred = true with guard.action = skip, expected .* Set "),
        (lambda: NonFiniteGuard("skip", max_skips=-1), r"guard.max_skips = -1, expected 0 or more"),
        (lambda: NonFiniteGuard("leave"), r"guard.action = 'leave', expected 'stop' or 'skip'"),
        (lambda: SpikeLog(factor=0.5), r"spike_log.factor = 0.5, expected a number above 1, or 0"),
        (lambda: SpikeLog(window=19), r"spike_log.window = 19, expected at least 20"),
        (lambda: SpikeLog(rows=0), r"spike_log.rows = 0, expected at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_compiled_step_without_gradients_does_not_run(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: lambda: calls.append(1))
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    compile_step(optimizer)
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3
    assert calls == []
    weight.grad = torch.ones(2)
    optimizer.step()
    assert calls == [1]


def test_a_network_without_gradients_has_a_norm(tmp_path):
    cli = prepare(tmp_path)
    cli.model.net = torch.nn.Linear(2, 2)
    assert float(cli.model.gradient_norm()) == 0


def two_processes(root, *options: str):
    """Train in two processes of which only the second sees what is spoiled."""
    settings = [f"--{option}" for option in (*SHORT, *options)]
    devices = ("--trainer.devices=2", "--trainer.strategy=ddp", "--spoil.process=1", "--trainer.max_steps=6")
    script = root.parent / "train.py"
    script.write_text(SCRIPT)
    return python(script, "fit", *SMOKE, f"--trainer.default_root_dir={root}", *devices, *settings)


def test_two_processes_skip_the_same_steps(tmp_path):
    root = tmp_path / "run"
    result = two_processes(root, "guard.action=skip", "spoil.batch_at=2", "spoil.norm_at=4")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Skipped: a loss that is not finite at step 2, in another process (1); 1 of" in result.stderr
    one, other = (torch.load(root / f"{process}.pt", weights_only=True) for process in (0, 1))
    assert one["skipped"] == other["skipped"] == 2
    assert {float(state["step"]) for state in one["optimizer"].values()} == {4.0}  # of six
    assert equal(one, other)
    assert all(torch.isfinite(value).all() for value in one["weights"].values())
    first, second = lines(root / "spikes.jsonl")  # written once
    assert (first["step"], second["step"]) == (2, 4)
    worst = first["rows"][0]
    assert (worst["process"], worst["row"], worst["raw_error"]) == (1, 7, None)  # row 3 of 1, 3, 5, 7, ...
    assert {row["process"] for row in second["rows"]} == {0, 1}


@pytest.mark.parametrize("spoil", ["batch", "norm"])
def test_two_processes_stop_together(tmp_path, spoil):
    """With a norm that only one process has, the other learns of it from nowhere else."""
    root = tmp_path / "run"
    deferred = ["guard.deferred=true"] if spoil == "norm" else []
    started = time.monotonic()
    result = two_processes(root, f"spoil.{spoil}_at=2", *deferred)
    assert time.monotonic() - started < 60
    assert "at step 2" in error_of(result)
    if spoil == "batch":
        found = ("a loss that is not finite at step 2, in another process (1)", "a loss of nan at step 2, process 1, rows [3]")
    else:
        found = ("a gradient that is not finite at step 2, in another process", "a gradient of norm nan at step 2, process 1")
    assert all(f"Got {text}" in result.stderr for text in found)  # each process's own words
    assert not (root / "checkpoints").exists()
    assert [line["step"] for line in lines(root / "spikes.jsonl")] == [2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_spike_names_its_worst_rows(tmp_path, accumulate):
    watch, at = Watch(), 22
    spoil = [Spoil(large, at, part=part) for part in range(accumulate)]
    options = ("trainer.max_steps=26", f"trainer.accumulate_grad_batches={accumulate}", "spike_log.rows=5")
    fit(prepare(tmp_path, *options, "trainer.log_every_n_steps=1", callbacks=[*spoil, watch]))
    (line,) = lines(tmp_path / "spikes.jsonl")  # silent at all other steps
    worst = sorted(watch.rows[at], key=lambda row: -row["raw_error"])[:5]
    assert [row["row"] % accumulate for row in worst[: 2 * accumulate]].count(0) == 2  # both batches have two of them
    assert [row["row"] for row in line["rows"]] == [row["row"] for row in worst]
    for found, expected in zip(line.pop("rows"), worst, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    usual = {"grad_norm_median": median(watch.norms[:at]), "raw_error_median": median(watch.errors[:at])}
    assert line == pytest.approx({"step": at, "grad_norm": watch.norms[at], "raw_error": watch.errors[at], **usual}, rel=1e-5)
    assert line["raw_error"] > 10 * line["raw_error_median"]


@pytest.mark.parametrize("option", ["spike_log.factor=0", "spike_log.window=20", "spike_log.factor=1e9"])
def test_ordinary_runs_and_a_log_that_is_off_write_nothing(tmp_path, option):
    spoil = [] if "window" in option else [Spoil(large, 22)]
    fit(prepare(tmp_path, "trainer.max_steps=24", option, callbacks=spoil))
    assert not (tmp_path / "spikes.jsonl").exists()


class SaveAt(Callback):
    """Saves in the middle of a run."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 24:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/middle.ckpt")


def test_a_resumed_log_holds_each_step_once_and_judges_as_before(tmp_path):
    """The step before the save is judged before it; a line that a crash cut off is written again."""
    options, spoil, file = ("trainer.max_steps=28", "spike_log.window=20"), Spoil(large, 21, 23, 26), tmp_path / "spikes.jsonl"
    fit(prepare(tmp_path, *options, callbacks=[spoil, SaveAt()]))
    uninterrupted = file.read_text()
    assert [line["step"] for line in lines(file)] == [21, 23, 26]
    file.write_text(uninterrupted + '{"step": 27, "grad_n')
    fit(prepare(tmp_path, *options, callbacks=[spoil]), ckpt_path=tmp_path / "middle.ckpt")
    assert file.read_text() == uninterrupted


@pytest.mark.parametrize("options", [[], ["guard.deferred=true"], ["guard.action=skip", "guard.max_skips=0"]])
def test_the_step_that_stops_a_run_is_in_the_log(tmp_path, options):
    cli = prepare(tmp_path, "trainer.max_steps=6", *options, callbacks=[Spoil(nan, 3)])
    with pytest.raises(UserError, match="at step 3"):
        fit(cli)
    (line,) = (json.loads(text, parse_constant=pytest.fail) for text in (tmp_path / "spikes.jsonl").read_text().splitlines())
    assert line["step"] == 3
    assert (line["grad_norm"], line["raw_error"], line["grad_norm_median"], line["raw_error_median"]) == (None,) * 4
    assert [row["raw_error"] is None for row in line["rows"]] == [True] + [False] * 7
    assert line["rows"][0]["row"] == 3
