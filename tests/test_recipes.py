"""Every shipped recipe: parsed, built whole on the meta device, and one step taken with a smaller network."""

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from mf_lightning.cli import load
from mf_lightning.data.shards import DatasetInfo, write_info, write_shard
from mf_lightning.flow import Guidance
from mf_lightning.nets import SiT
from mf_lightning.tools.import_weights import import_weights
from mf_lightning.types import LatentSpec
from tests.runs import RECIPES, ROOT

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
MILLIONS = {"b4": 131, "b2": 131, "m2": 308, "l2": 459, "xl2": 676}
SETTINGS = {  # omega, kappa, interval, steps: the paper's table
    "imagenet256_sit_b4": (1.0, 0.0, (0.0, 1.0), 400_000),
    "imagenet256_sit_b4_omega3": (3.0, 0.0, (0.0, 1.0), 400_000),
    "imagenet256_sit_b2": (1.0, 0.5, (0.0, 1.0), 1_200_000),
    "imagenet256_sit_m2": (1.0, 0.5, (0.0, 1.0), 1_200_000),
    "imagenet256_sit_l2": (0.2, 0.92, (0.0, 0.8), 1_200_000),
    "imagenet256_sit_xl2": (0.2, 0.92, (0.0, 0.75), 1_200_000),
    "imagenet256_sit_xl2_plus": (1.0, 0.5, (0.3, 0.8), 5_000_000),
}


def fake_latents(path, *, shape, classes, count=32):
    """Write random moments in the latent format."""
    info = DatasetInfo("moments", shape, "float16", False, "none", 0.18215, 0.0, 256, tuple(map(str, range(classes))))
    rng = np.random.default_rng(0)
    shards = {}
    for split in ("train", "val"):
        latents = rng.random((count, *info.stored_shape)).astype(np.float16)
        shards[split] = (write_shard(path, split, 0, latents=latents, labels=rng.integers(0, classes, count)),)
    write_info(path, DatasetInfo(**{**info.__dict__, "splits": shards}))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return {
        "imagenet": fake_latents(tmp_path_factory.mktemp("imagenet"), shape=(4, 32, 32), classes=1000),
        "digits": fake_latents(tmp_path_factory.mktemp("digits"), shape=(4, 8, 8), classes=10),
        "cifar": fake_latents(tmp_path_factory.mktemp("cifar"), shape=(3, 32, 32), classes=10),
    }


@pytest.fixture(scope="module")
def flow_matching_checkpoint(tmp_path_factory):
    """An import of a flow-matching SiT as small as the networks that take one step here."""
    folder = tmp_path_factory.mktemp("imported")
    net = SiT(LatentSpec((4, 32, 32), 1000), patch_size=2, depth=1, hidden_size=32, num_heads=2)
    save_file({name: v for name, v in net.state_dict().items() if not name.startswith("h_")}, folder / "sit.safetensors")
    import_weights(folder / "sit.safetensors", folder / "sit.ckpt", format="sit", num_heads=2)
    return folder / "sit.ckpt"


@pytest.fixture
def recipe(data, flow_matching_checkpoint, monkeypatch, tmp_path):
    """Load a recipe on random latents; evaluation, which needs weights that only a hub has, is off."""
    monkeypatch.setenv("SIT_XL2", str(flow_matching_checkpoint))
    monkeypatch.setenv("IMAGENET_LATENTS", str(data["imagenet"]))
    monkeypatch.setenv("CIFAR10_PIXELS", str(data["cifar"]))
    monkeypatch.setenv("IMAGENET_REFERENCE", str(tmp_path / "reference.npz"))

    def make(name, *options):
        args = ["--config", str(RECIPES / f"{name}.yaml"), f"--trainer.default_root_dir={tmp_path}", *options]
        args += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--sample_eval.num_samples=0", "--sample_grid.rows=0"]
        if name == "quickstart":
            args.append(f"--data.init_args.path={data['digits']}")
        if name == "own_images":
            args.append(f"--data.init_args.path={data['imagenet']}")
        if name != "smoke":
            args.append("--data.init_args.autoencoder=null")
        return load(args)

    return make


@pytest.mark.parametrize("name", NAMES)
def test_recipe_takes_one_step(recipe, name):
    shrink = [] if name in ("smoke", "quickstart") else [
        "--model.net.init_args.depth=1", "--model.net.init_args.hidden_size=32", "--model.net.init_args.num_heads=2",
    ]  # fmt: skip
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    steps = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"]
    if name == "quickstart":
        steps.append("--model.lr_schedule.init_args.warmup_steps=0")
    cli = recipe(name, *shrink, *quiet, *steps, "--data.init_args.batch_size=16")
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 1
    assert cli.model.last_terms.raw_error.shape == (16,)
    assert torch.isfinite(cli.model.last_terms.raw_error).all()
    assert any((p != 0).any() for p in cli.model.net.final_layer.parameters())  # left its zero start


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("imagenet")])
def test_recipe_builds_whole_on_the_meta_device(recipe, name):
    cli = recipe(name)
    with torch.device("meta"):
        net = cli.model.make_net(LatentSpec((4, 32, 32), 1000))
    size = name.removesuffix("_omega3").removesuffix("_plus").split("_")[-1]
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - MILLIONS[size]) < 0.01 * MILLIONS[size]


@pytest.mark.parametrize("name", SETTINGS)
def test_recipe_has_the_papers_settings(recipe, name):
    omega, kappa, interval, steps = SETTINGS[name]
    cli = recipe(name)
    loss = cli.model.loss
    assert (loss.guidance.omega, loss.guidance.kappa, loss.guidance.interval) == (omega, kappa, interval)
    assert (loss.fm_fraction, loss.weight.norm_p, loss.weight.norm_eps) == (0.75, 1.0, 0.01)
    assert (loss.times.P_mean, loss.times.P_std) == (-0.4, 1.0)
    assert loss.label_drop.probability == 0.1
    assert cli.trainer.max_steps == steps
    optimizer = cli.model.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.Adam
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"], optimizer.defaults["weight_decay"]) == (1e-4, (0.9, 0.95), 0)
    assert cli.datamodule.batch_size == 256
    assert cli.trainer.precision == "32-true"
    callbacks = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    assert callbacks["EMA"].decays == [0.9999]


def test_the_cifar_recipe_has_the_papers_settings(recipe):
    cli = recipe("cifar10_pixel_sit")
    loss = cli.model.loss
    assert (loss.fm_fraction, loss.weight.norm_p, loss.times.P_mean, loss.times.P_std) == (0.25, 0.75, -2.0, 2.0)
    optimizer = cli.model.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"], optimizer.defaults["weight_decay"]) == (
        6e-4,
        (0.9, 0.999),
        0,
    )
    schedule = cli.model.lr_schedule(optimizer)
    rates = [schedule.lr_lambdas[0](step) for step in (0, 9_999, 799_999)]
    assert rates == [1e-4, 1.0, 1.0]
    assert (cli.datamodule.batch_size, cli.trainer.max_steps) == (1024, 800_000)
    assert next(c for c in cli.trainer.callbacks if type(c).__name__ == "EMA").decays == [0.99995]
    with torch.device("meta"):
        net = cli.model.make_net(LatentSpec((3, 32, 32), 10))
    assert net.y_null is None
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - 58) < 0.1


def test_fine_tuning_is_guided_after_twenty_epochs(recipe):
    cli = recipe("sit_xl2_from_sit")
    assert cli.model.loss.guidance_at(20 * 1_281_167 // 256 - 100).is_none
    assert cli.model.loss.guidance_at(100_000) == Guidance(0.2, 0.92, (0.0, 0.75))
    assert cli.trainer.max_steps == 3 * 100_000
    with torch.device("meta"):
        net = cli.model.make_net(LatentSpec((4, 32, 32), 1000))
    assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - MILLIONS["xl2"]) < 1


def test_recipes_are_short_and_start_with_a_comment():
    for name in NAMES:
        text = (RECIPES / f"{name}.yaml").read_text()
        assert text.startswith("# ")
        assert len(text.splitlines()) <= 26, name


def test_every_part_is_yaml_and_used():
    texts = " ".join(path.read_text() for path in RECIPES.glob("*.yaml"))
    for part in (ROOT / "configs").rglob("*.yaml"):
        assert yaml.safe_load(part.read_text()), part
        if part.parent.name in ("net", "data", "loss"):
            assert f"../{part.parent.name}/{part.name}" in texts, part
