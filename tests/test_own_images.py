"""README's four commands from a folder of pictures to samples, as written there, on small pictures."""

import json
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from mf_lightning.__main__ import main as commands
from mf_lightning.cli import main
from tests.runs import ROOT

SMALL = {  # what a test adds to each command
    "encode": ["--autoencoder=pixel", "--image_size=32", "--extractor=digits-cnn", "--val_fraction=0.25"],
    "fit": [
        "--data.init_args.autoencoder=mf_lightning.autoencoders.PixelAutoencoder", "--model.net=configs/net/sit_smoke.yaml",
        "--model.net.init_args.patch_size=8", "--trainer.max_steps=3", "--trainer.val_check_interval=3",
        "--trainer.accelerator=cpu", "--data.init_args.batch_size=12", "--sample_eval.extractor=digits-cnn",
        "--sample_eval.num_samples=90", "--trainer.enable_progress_bar=false",
    ],
    "test": ["--sample_eval.num_samples=96"],
    "sample": ["--device=cpu"],
}  # fmt: skip


def four_commands() -> list[list[str]]:
    section = (ROOT / "README.md").read_text().split("\n## Your own images\n")[1].split("\n## ")[0]
    block = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0]
    return [shlex.split(line) for line in block.splitlines()]


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "my_images" / name).mkdir(parents=True)
        for i in range(16):
            pixels = rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my_images" / name / f"{i}.png")
    return tmp_path


def test_four_commands_from_pictures_to_samples(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    (pictures / "configs").symlink_to(ROOT / "configs")
    four = four_commands()
    assert [next(word for word in words if word in SMALL) for words in four] == ["encode", "fit", "test", "sample"]
    for words in four:
        if "lightning_cli.py" in words:
            name = words[2]
            main([*words[2:], *SMALL[name]])
        else:
            commands([*words[3:], *SMALL[words[3]]])
    rows = [json.loads(line) for line in (pictures / "runs" / "own_images" / "sample_eval.jsonl").read_text().splitlines()]
    assert [(row["step"], row["nfe"], row["protocol"]["num_samples"]) for row in rows] == [
        (3, nfe, count) for count in (90, 96) for nfe in (1, 2)
    ]
    assert {row["protocol"]["reference"].split(":")[0] for row in rows} == {rows[0]["protocol"]["reference"].split(":")[0]}
    assert all(np.isfinite(row["fid"]) for row in rows)
    assert Image.open(pictures / "own.png").size[0] > 32 * 4


def test_data_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "configs/experiment/own_images.yaml"])
    assert "latents" in capsys.readouterr().err
