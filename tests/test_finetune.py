"""Fine-tuning begins from imported weights: in the network and every average; guidance comes in stages, by step alone."""

import json

import pytest
import torch

from mf_lightning.__main__ import main as commands
from mf_lightning.callbacks import EMA
from mf_lightning.checkpoints import read_checkpoint
from mf_lightning.cli import load, main
from mf_lightning.flow import Guidance, GuidanceSchedule, GuidanceStage, MeanFlowLoss
from mf_lightning.flow.passes import PLAIN
from mf_lightning.nets import SiT
from mf_lightning.types import LatentSpec, UserError
from tests.nets import randomise, tiny_sit
from tests.parity import importing
from tests.runs import RECIPES, lines

SMOKE = ["--config", str(RECIPES / "smoke.yaml"), "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
FEW = [
    "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--sample_eval.num_samples=20", "--trainer.limit_val_batches=1",
    "--self_check.enabled=false", "--trainer.num_sanity_val_steps=0", "--trainer.callbacks=[]", "--sample_eval.nfe=[1]",
]  # fmt: skip
STAGED = GuidanceSchedule([GuidanceStage(0), GuidanceStage(3, Guidance(kappa=0.5)), GuidanceStage(9, Guidance(omega=2.0))])


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A flow-matching network of the smoke recipe's size, imported."""
    folder = tmp_path_factory.mktemp("imported")
    net = randomise(SiT(LatentSpec((1, 32, 32), 10), patch_size=8, depth=2, hidden_size=64, num_heads=2), std=0.02)
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("h_embedder.")}
    torch.save({"ema": state}, folder / "fm.pt")
    importing.imported(folder / "fm.pt", folder / "fm.ckpt", "--num_heads=2", "--format=repa")
    return folder / "fm.ckpt"


def weights(path):
    return {name.removeprefix("net."): value for name, value in read_checkpoint(path)["state_dict"].items()}


def fit(root, *options):
    run = load([*SMOKE, *FEW, f"--trainer.default_root_dir={root}", *map(str, options)])
    run.trainer.fit(run.model, run.datamodule, ckpt_path=None)
    return run


def test_a_fit_begins_there_with_every_average(imported, tmp_path):
    begun = {}

    class Look(EMA):
        def on_fit_start(self, trainer, pl_module):
            super().on_fit_start(trainer, pl_module)
            begun.update(net={k: v.clone() for k, v in pl_module.net.state_dict().items()})
            begun.update({decay: {k: v.clone() for k, v in kept.items()} for decay, kept in self.weights.items()})

    run = load(
        [*SMOKE, *FEW, f"--trainer.default_root_dir={tmp_path}", f"--model.init_from={imported}", "--trainer.max_steps=1"]
    )
    run.trainer.callbacks = [Look([0.9, 0.99])]
    run.trainer.fit(run.model, run.datamodule)
    expected = weights(imported)
    assert all(value.equal(expected[name]) for name, value in begun["net"].items())
    for decay in (0.9, 0.99):
        assert begun[decay].keys() == expected.keys() - {"pos_embed"}
        assert all(value.equal(expected[name]) for name, value in begun[decay].items())
    assert not run.model.net.x_embedder.proj.weight.equal(expected["x_embedder.proj.weight"])


def command(*options) -> str | None:
    """Run the command line in this process; return its message if it ends with one."""
    try:
        main([str(option) for option in options])
    except SystemExit as end:
        return str(end.code)
    return None


def test_what_imports_start_and_what_they_cannot(imported, tmp_path, capsys):
    root = [f"--trainer.default_root_dir={tmp_path / 'run'}"]
    save = ["--trainer.callbacks+=mf_lightning.callbacks.LastCheckpoint", f"--trainer.callbacks.folder={tmp_path / 'run'}"]
    assert command("fit", *SMOKE, *FEW, *root, *save, f"--model.init_from={imported}") is None
    last = tmp_path / "run" / "last.ckpt"
    assert read_checkpoint(last)["init_from"] == str(imported)

    more = ["--trainer.max_steps=3", "--trainer.val_check_interval=9"]
    elsewhere = imported.with_name("gone") / imported.name  # a resumed run does not read it again
    assert command("fit", *SMOKE, *FEW, *root, *more, f"--ckpt_path={last}", f"--model.init_from={elsewhere}") is None
    refused = {
        "a resumed run keeps its weights": [f"--ckpt_path={last}", "--model.init_from=other.ckpt"],
        "Begin from the weights: --model.init_from": [f"--ckpt_path={imported}"],
        "no imported checkpoint": [f"--model.init_from={last}"],
        "another architecture": [f"--model.init_from={imported}", "--model.net.init_args.depth=3"],
        "does not exist": ["--model.init_from=nothing.ckpt"],
    }
    for expected, options in refused.items():
        capsys.readouterr()
        assert command("fit", *SMOKE, *FEW, f"--trainer.default_root_dir={tmp_path / 'new'}", *options) not in (None, "0"), (
            expected
        )
        assert expected in capsys.readouterr().err


def test_imported_weights_are_scored_as_they_are(imported, tmp_path):
    """Whatever averages the settings name: none was ever updated, so each is the weights."""
    for number, ema in enumerate(("[0.99]", "[0.5,0.9999]")):
        root = tmp_path / str(number)
        options = [f"--trainer.default_root_dir={root}", f"--ckpt_path={imported}", f"--ema.decays={ema}"]
        assert command("test", *SMOKE, *FEW, *options, "--sample_eval.metrics=[fid]") is None
    one, other = (lines(tmp_path / str(number) / "sample_eval.jsonl")[0] for number in (0, 1))
    assert one["fid"] == other["fid"]
    assert json.loads(json.dumps(one))["step"] == 0


def test_imported_weights_are_sampled_with_an_autoencoder_that_is_given(imported, tmp_path, capsys):
    with pytest.raises(SystemExit):
        commands(["sample", str(imported), str(tmp_path / "none.png"), "--n=2", "--device=cpu"])
    said = capsys.readouterr().err
    assert "--autoencoder" in said
    assert "Traceback" not in said
    assert not (tmp_path / "none.png").exists()
    commands(
        ["sample", str(imported), str(tmp_path / "two.png"), "--n=2", "--device=cpu", "--autoencoder=pixel", "--sampler=euler"]
    )
    assert (tmp_path / "two.png").stat().st_size > 100


def test_a_schedule_is_a_function_of_the_step():
    assert [STAGED.at(step) for step in (0, 2, 3, 8, 9, 10**6)] == [
        Guidance(), Guidance(), Guidance(kappa=0.5), Guidance(kappa=0.5), Guidance(omega=2.0), Guidance(omega=2.0),
    ]  # fmt: skip
    assert not STAGED.is_none
    assert GuidanceSchedule([GuidanceStage(0)]).is_none
    for starts in ([], [1], [0, 0], [0, 5, 4]):
        with pytest.raises(UserError, match="expected rising steps, the first 0"):
            GuidanceSchedule([GuidanceStage(step) for step in starts])
    with pytest.raises(UserError, match="beside a guidance_schedule"):
        MeanFlowLoss(guidance=Guidance(kappa=0.5), guidance_schedule=STAGED)


@pytest.mark.parametrize("step", [0, 2, 3, 8, 9])
def test_the_loss_of_a_step_is_that_of_its_stage(step):
    net = tiny_sit()
    x, y, rows = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % 4, torch.arange(8)
    staged, fixed = MeanFlowLoss(guidance_schedule=STAGED), MeanFlowLoss(guidance=STAGED.at(step))
    draw = staged.draw_training(x, rows, seed=0, step=step, global_batch_size=8)
    one, other = (loss(net, x, y, draw, y_null=4, step=step) for loss in (staged, fixed))
    assert one.u_tgt.equal(other.u_tgt)
    assert one.loss.equal(other.loss)
    if step >= 3:
        assert not one.u_tgt.equal(MeanFlowLoss()(net, x, y, draw, y_null=4).u_tgt)
    with pytest.raises(UserError, match="for an unconditional network"):
        staged(net, x, None, draw)  # also at a step that has no guidance yet


def test_training_and_validation_tell_the_loss_their_step(tmp_path):
    stages = "{stages: [{from_step: 0}, {from_step: 2, guidance: {kappa: 0.5}}]}"
    run = load([
        *SMOKE, *FEW, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=4", "--trainer.val_check_interval=1",
        "--model.loss.init_args.guidance={omega: 1.0, kappa: 0.0}", f"--model.loss.init_args.guidance_schedule={stages}",
    ])  # fmt: skip
    run.trainer.callbacks = []
    seen, plain = [], run.model.loss.guidance_at
    run.model.loss.guidance_at = lambda step: seen.append((run.model.training, step)) or plain(step)
    run.trainer.fit(run.model, run.datamodule)
    assert [step for training, step in seen if training] == [0, 1, 2, 3]
    assert sorted({step for training, step in seen if not training}) == [1, 2, 3, 4]
    assert plain(1).is_none
    assert plain(2) == Guidance(kappa=0.5)
    assert run.model.passes is PLAIN
