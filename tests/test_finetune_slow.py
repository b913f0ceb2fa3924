"""What fine-tuning is for: a flow-matching network, imported, draws in one step after a few MeanFlow steps. Minutes."""

import pytest

from tests.parity import importing
from tests.runs import RECIPES, command_line, lines, python

pytestmark = pytest.mark.slow
STEPS = 150
STAGED = [  # of 150 steps most rows must jump, far ones too
    "--model.loss.init_args.guidance={omega: 1.0, kappa: 0.0}",
    "--model.loss.init_args.guidance_schedule={stages: [{from_step: 0}, {from_step: 30, guidance: {omega: 1.0, kappa: 0.5}}]}",
    "--model.loss.init_args.fm_fraction=0.25",
    "--model.loss.init_args.times={class_path: mf_lightning.flow.Uniform}",
]
SCORE = ["--sample_eval.metrics=[fid]", "--sample_eval.nfe=[1]", "--sample_grid.rows=0", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    assert python("-m", "mf_lightning", "prepare-digits", folder / "digits").returncode == 0
    return folder


def run(subcommand, folder, name, *options):
    """Run a part of the quickstart; return the FID at 1 NFE that it ends with."""
    result = command_line(
        subcommand, "--config", RECIPES / "quickstart.yaml", f"--data.init_args.path={folder / 'digits'}", *SCORE, *options,
        f"--trainer.default_root_dir={folder / name}", env={"OMP_NUM_THREADS": "2"}, timeout=1800,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return lines(folder / name / "sample_eval.jsonl")[-1]["fid"]


def train(folder, name, steps, *options):
    return run("fit", folder, name, f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", *options)


def euler_step(folder, name):
    """Return the FID of one Euler step of a flow-matching run: its import jumps with v(z, 1)."""
    out = folder / f"{name}.ckpt"
    importing.imported(folder / name / "checkpoints" / "last.ckpt", out)
    return run("test", folder, f"{name}_test", f"--ckpt_path={out}")


def test_few_meanflow_steps_make_a_flow_matching_network_jump(folder):
    flow_matching = "--model.loss=configs/loss/flow_matching.yaml"
    train(folder, "flow_matching", 400, flow_matching)
    before = euler_step(folder, "flow_matching")
    begin = [f"--model.init_from={folder / 'flow_matching.ckpt'}", "--model.lr_schedule.init_args.warmup_steps=10"]

    meanflow = train(folder, "meanflow", STEPS, *begin, *STAGED)
    train(folder, "longer", STEPS, *begin, flow_matching)
    longer = euler_step(folder, "longer")
    print(f"FID at 1 NFE: flow matching {before:.2f}, longer {longer:.2f}, MeanFlow {meanflow:.2f}")
    assert meanflow <= before / 2
    assert meanflow < longer
