"""Which classes are made: balanced, drawn, or a list."""

import pytest
import torch

from mf_lightning.callbacks.generate import choose_labels
from mf_lightning.cli import load
from mf_lightning.types import UserError
from tests.runs import RECIPES


def test_a_list_of_classes_is_taken_in_turn():
    assert choose_labels([3, 7, 7], torch.tensor([0, 1, 2, 3, 10]), num_classes=10, seed=0).tolist() == [3, 7, 7, 3, 7]


@pytest.mark.parametrize(("classes", "num_classes"), [([3, 10], 10), ([-1], 10), ([], 10), ([0], 0)])
def test_classes_that_do_not_exist_are_refused(classes, num_classes):
    with pytest.raises(UserError, match=r"expected (classes in|no list)"):
        choose_labels(classes, torch.arange(3), num_classes=num_classes, seed=0)


def test_predict_takes_a_list_and_refuses_a_class_out_of_range_before_it_writes(tmp_path):
    def predict(classes: str, name: str) -> None:
        run = load(
            [f"--config={RECIPES / 'smoke.yaml'}", f"--trainer.default_root_dir={tmp_path / name}", "--ema.decays=[]",
             "--sample_writer.num_samples=3", f"--sample_writer.labels={classes}", "--trainer.accelerator=cpu",
             "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
        )  # fmt: skip
        run.trainer.predict(run.model, run.datamodule)

    predict("[9, 4]", "good")
    lines = (tmp_path / "good" / "samples" / "labels.csv").read_text().split()
    assert lines == ["index,label", "0,9", "1,4", "2,9"]
    with pytest.raises(UserError, match=r"Got the classes \[10\], expected classes in \[0, 10\)"):
        predict("[10]", "bad")
    assert not list((tmp_path / "bad").rglob("*.png"))
    predict("[1]", "bad")  # the folder was not begun
    assert (tmp_path / "bad" / "samples" / "labels.csv").read_text().split()[1] == "0,1"
