"""Pictures from a checkpoint alone: which weights, which pictures, and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mf_lightning.__main__ import main
from mf_lightning.checkpoints import read_checkpoint
from mf_lightning.cli import load
from mf_lightning.data.shards import write_info
from mf_lightning.flow import EulerSampler
from mf_lightning.nets.embed import LabelEmbedder
from mf_lightning.pipeline import MeanFlowPipeline, requests
from mf_lightning.types import UserError
from tests.generators import SHIPPED, digits_info, pixel_info, write_generator
from tests.runs import RECIPES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_generator(tmp_path_factory.mktemp("run") / "last.ckpt", digits_info())


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return MeanFlowPipeline.from_checkpoint(checkpoint, device="cpu")


@pytest.fixture
def pixels(tmp_path):
    return write_generator(tmp_path / "pixels.ckpt", pixel_info(("cat", "dog", "2")))


def arrays(images):
    return [np.asarray(image) for image in images]


def same(one, other):
    return len(one) == len(other) and all(map(np.array_equal, arrays(one), arrays(other)))


def test_the_average_in_use_is_taken_and_others_on_request(checkpoint, pipeline):
    saved = read_checkpoint(checkpoint)
    wanted = {"0.99": saved["ema"]["weights"]["0.99"], "0.9": saved["ema"]["weights"]["0.9"]}
    wanted["raw"] = {key.removeprefix("net."): value for key, value in saved["state_dict"].items()}
    assert pipeline.description.weights == "ema 0.99"
    for asked, name in ((None, "0.99"), (0.9, "0.9"), ("raw", "raw")):
        net = MeanFlowPipeline.from_checkpoint(checkpoint, weights=asked, device="cpu").net
        for key, value in wanted[name].items():
            assert torch.equal(net.get_parameter(key) if key != "pos_embed" else net.pos_embed, value)


def near(one, other):
    """Tell whether pictures differ by at most one grey level."""
    differences = [np.abs(a.astype(int) - b).max() for a, b in zip(arrays(one), arrays(other), strict=True)]
    return max(differences) <= 1


def test_a_picture_is_a_function_of_seed_and_number(pipeline):
    many = pipeline(n=12, seed=5)
    assert same(pipeline(n=3, seed=5), many[:3])
    assert len({array.tobytes() for array in arrays(many)}) == 12
    assert not same(pipeline(n=3, seed=6), many[:3])
    assert same(pipeline([2, 3], seed=5)[:1], pipeline(2, seed=5))
    three_seeds = pipeline([4], seed=[5, 6, 5])
    assert same([three_seeds[0]], [three_seeds[2]])
    assert same([three_seeds[1]], pipeline([4], seed=6))
    assert not same([three_seeds[0]], [three_seeds[1]])
    classes_in_turn = pipeline([4, 1], n=4, seed=5)
    assert same(classes_in_turn[::2], pipeline(4, n=4, seed=5)[::2])
    assert same(classes_in_turn[1::2], pipeline(1, n=4, seed=5)[1::2])


@pytest.mark.parametrize("size", [1, 5, 12])
def test_pictures_made_many_at_a_time_are_the_same(pipeline, monkeypatch, size):
    """As on a GPU: batches of another size round some values the other way."""
    alone, asked = pipeline(n=12, seed=5), []

    def at_once(self, batch_size):
        asked.append(batch_size)
        return batch_size

    monkeypatch.setattr(MeanFlowPipeline, "_at_once", at_once)
    assert near(pipeline(n=12, seed=5, batch_size=size), alone)
    assert asked == [size]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cuda:x"])
def test_a_device_that_is_not_there(checkpoint, tmp_path, device, capsys):
    with pytest.raises(UserError, match=rf"Got the device {device} \(.*expected one that is there: cpu"):
        MeanFlowPipeline.from_checkpoint(checkpoint, device=device)
    with pytest.raises(SystemExit) as stop:
        main(["sample", str(checkpoint), str(tmp_path / "a.png"), f"--device={device}"])
    assert stop.value.code == 2
    assert f"Got the device {device}" in capsys.readouterr().err


def test_mps_is_refused_where_there_is_none(pipeline):
    if torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(UserError, match="Got the device mps"):
        requests.choose_device("mps")


def test_pictures_are_those_of_predict(tmp_path):
    """Batches of another size round a value in some thousands to the level beside it."""
    options = [
        "--config", str(RECIPES / "smoke.yaml"), f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=2",
        "--trainer.val_check_interval=2", "--sample_eval.num_samples=0", "--sample_grid.rows=0",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        "--sample_writer.num_samples=12", "--sample_writer.num_steps=2", "--sample_writer.seed=3",
    ]  # fmt: skip
    run = load(options)
    run.trainer.fit(run.model, run.datamodule)
    file = tmp_path / "checkpoints" / "last.ckpt"
    run = load(options)
    run.trainer.predict(run.model, run.datamodule, ckpt_path=str(file))
    ours = MeanFlowPipeline.from_checkpoint(file, device="cpu")
    assert ours.description.data.class_names == tuple("0123456789")
    for number, image in enumerate(arrays(ours(n=12, nfe=2, seed=3))):
        theirs = np.asarray(Image.open(tmp_path / "samples" / f"{number:06d}.png"))
        difference = np.abs(image.astype(int) - theirs)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_nfe_is_a_uniform_grid_and_counted(pipeline):
    noise, y = pipeline.request([1, 2], n=3)
    assert pipeline.generate(noise, y, grid=[1, 0.3, 0]).nfe == 2
    assert same(pipeline(7, nfe=2), pipeline(7, grid=[1, 0.5, 0]))
    assert not same(pipeline(7, nfe=2), pipeline(7, grid=[1, 0.3, 0]))


def test_classes_by_name_and_number(pixels):
    pipeline = MeanFlowPipeline.from_checkpoint(pixels, device="cpu")
    assert pipeline.request(["dog", 0, "2"], n=4)[1].tolist() == [1, 0, 2, 1]
    assert pipeline.request(n=4)[1].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"labels": [10]}, r"Got the class 10, expected a number from 0 to 9"),
        ({"labels": [-1]}, "Got the class -1"),
        ({"labels": "cat"}, "Got the class 'cat'"),
        ({"labels": []}, "Got no classes"),
        ({"nfe": 0}, "Got nfe = 0, expected a whole number of at least 1"),
        ({"nfe": 1.5}, "Got nfe = 1.5"),
        ({"nfe": 2, "grid": [1, 0]}, r"Got nfe = 2 and the time grid \[1, 0\], expected one of them"),
        ({"grid": [0, 1]}, "Got the time grid"),
        ({"n": 0}, "Got n = 0"),
        ({"seed": -1}, "Got the seeds"),
        ({"batch_size": 0}, "Got batch_size = 0"),
        ({"sampler": "heun"}, "Got the sampler 'heun', expected one of average, euler"),
    ],
)
def test_what_cannot_be_asked_for(pipeline, asked, message):
    with pytest.raises(UserError, match=message):
        pipeline(**asked)


def test_a_network_without_labels_takes_none(tmp_path):
    pipeline = MeanFlowPipeline.from_checkpoint(write_generator(tmp_path / "a.ckpt", pixel_info(())), device="cpu")
    assert len(pipeline(n=2)) == 2
    assert len(pipeline.interpolate(seeds=(0, 1), n=3)) == 3
    with pytest.raises(UserError, match="trained without labels"):
        pipeline([0])


def test_a_way_begins_and_ends_at_the_pictures_it_goes_between(pipeline):
    ends = [*pipeline([3], seed=1), *pipeline([7], seed=2)]
    for seeds, labels, first, last in (
        ((1, 2), (3, 7), *ends),
        ((1, 2), 3, ends[0], *pipeline([3], seed=2)),
        (1, (3, 7), ends[0], *pipeline([7], seed=1)),
    ):
        way = pipeline.interpolate(seeds=seeds, labels=labels, n=5)
        for image, end in ((way[0], first), (way[-1], last)):
            assert np.abs(np.asarray(image).astype(int) - np.asarray(end)).max() <= 1
        assert len({np.asarray(image).tobytes() for image in way}) == 5
    with pytest.raises(UserError, match="3 seeds"):
        pipeline.interpolate(seeds=(1, 2, 3))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, r"Got the seed 0 and the class 0 at both ends, .* Give two seeds \(0,1\), two classes"),
        ({"seeds": (4, 4), "labels": [3, "3"]}, "Got the seed 4 and the class 3 at both ends"),
        ({"seeds": (0, 1), "labels": []}, "Got no classes"),
        ({"seeds": (0, 1), "labels": ""}, "Got the class ''"),
    ],
)
def test_ways_that_cannot_be(pipeline, asked, message):
    with pytest.raises(UserError, match=message):
        pipeline.interpolate(**asked, n=3)


def test_a_class_that_stays_is_a_label(pipeline):
    """Networks promise to take int64 labels; weights of classes go to them only between two."""
    way = torch.tensor([0, 0.5, 1])
    assert pipeline.between(way, seeds=(0, 1), labels=4)[1].tolist() == [4, 4, 4]
    assert pipeline.between(way, seeds=(0, 1))[1].dtype == torch.int64
    assert pipeline.between(way[::2], labels=(4, 7))[1].tolist() == [4, 7]
    mixed = pipeline.between(way, labels=(4, 7))[1]
    assert mixed.dtype == pipeline.dtype
    assert mixed[1].tolist() == [0, 0, 0, 0, 0.5, 0, 0, 0.5, 0, 0, 0]


def test_noise_on_the_way_has_the_size_of_noise(pipeline):
    noise, _ = pipeline.between(torch.linspace(0, 1, 7), seeds=(0, 1), labels=0)
    norms = noise.flatten(1).norm(dim=1)
    assert norms.min() >= min(norms[0], norms[-1]) - 1e-3  # a straight line would lose a third in the middle
    assert torch.equal(noise[:1], pipeline.noise(0))


def test_a_mixture_of_classes_is_that_of_their_embeddings():
    table = LabelEmbedder(3, 8)
    weights = torch.tensor([[0.25, 0.75, 0, 0], [0, 0, 0, 1.0]])
    rows = table(torch.arange(4))
    assert torch.allclose(table(weights), torch.stack([0.25 * rows[0] + 0.75 * rows[1], rows[3]]))


def test_a_checkpoint_that_does_not_describe_its_data(tmp_path, checkpoint, pipeline):
    info = digits_info()
    old = write_generator(tmp_path / "run" / "checkpoints" / "old.ckpt", info, told=False)
    with pytest.raises(UserError, match=r"without a description of its data, .* --data DIR"):
        MeanFlowPipeline.from_checkpoint(old, weights="0.99", device="cpu")
    with pytest.raises(UserError, match=r"expected raw or one of the checkpoint's averages: 0.9, 0.99"):
        MeanFlowPipeline.from_checkpoint(old, autoencoder=SHIPPED, device="cpu")
    data = tmp_path / "data"
    data.mkdir()
    write_info(data, info)
    wanted = pipeline(n=3)
    for how in ({"data": data}, {"autoencoder": SHIPPED}):
        assert same(MeanFlowPipeline.from_checkpoint(old, weights="0.99", device="cpu", **how)(n=3), wanted)
    config = {
        "data": {"init_args": {"path": str(data), "autoencoder": {"init_args": {"pretrained": SHIPPED}}}},
        "ema": {"use": None, "decays": [0.99, 0.9]},
    }
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
    assert same(MeanFlowPipeline.from_checkpoint(old, device="cpu")(n=3), wanted)


def test_only_our_networks_are_imported(tmp_path):
    sys.modules.pop("antigravity", None)
    net = {"class_path": "antigravity.Net", "init_args": {"latent_shape": [1, 16, 16], "num_classes": 0}}
    file = write_generator(tmp_path / "a.ckpt", pixel_info(()), net=net)
    with pytest.raises(UserError, match=r"Got a network of the class antigravity.Net, .*trust_net=True"):
        MeanFlowPipeline.from_checkpoint(file)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"net": {"class_path": "mf_lightning.nets.Gone", "init_args": {"latent_shape": [1, 16, 16], "num_classes": 10}}},
            "Gone",
        ),
        ({"fm_fraction": 1.0}, "flow-matching network .* EulerSampler"),
        ({"state_dict": {}}, "cannot be made"),
    ],
)
def test_what_a_checkpoint_cannot_be(tmp_path, change, message):
    file = write_generator(tmp_path / "a.ckpt", pixel_info(), **change)
    with pytest.raises(UserError, match=message):
        MeanFlowPipeline.from_checkpoint(file, weights="raw", device="cpu")(n=1)


def test_flow_matching_is_sampled_by_euler(tmp_path):
    pipeline = MeanFlowPipeline.from_checkpoint(write_generator(tmp_path / "a.ckpt", pixel_info(), fm_fraction=1), device="cpu")
    assert same(pipeline(n=1, nfe=4, sampler=EulerSampler()), pipeline(n=1, nfe=4, sampler="euler"))


def test_another_autoencoder_is_refused(checkpoint):
    with pytest.raises(UserError, match="Got the autoencoder pixel, expected mf_lightning:digits/autoencoder@"):
        MeanFlowPipeline.from_checkpoint(checkpoint, autoencoder="pixel", device="cpu")(n=1)


@pytest.mark.parametrize(
    ("info", "autoencoder", "message"),
    [
        (digits_info, "pixel", "Got the autoencoder pixel for latents of 4 channels, .* it decodes 1 or 3, pictures"),
        (pixel_info, SHIPPED, "Got the autoencoder mf_lightning:.* for latents of 1 channels, .* it decodes 4. Give"),
    ],
)
def test_an_autoencoder_of_other_channels_is_refused(tmp_path, info, autoencoder, message):
    file = write_generator(tmp_path / "a.ckpt", info(), told=False)
    with pytest.raises(UserError, match=message):
        MeanFlowPipeline.from_checkpoint(file, weights="raw", autoencoder=autoencoder, device="cpu")


def run(*words):
    main(["sample", *map(str, words), "--device=cpu"])


def test_the_command_draws_sheets(pixels, tmp_path, capsys):
    run(pixels, "--classes", "cat,2", "--nfe", "1", "--n", "6", "--seed", "0", tmp_path / "rows.png")
    assert "ema 0.99 weights at step 7" in capsys.readouterr().out
    rows = Image.open(tmp_path / "rows.png")
    assert rows.height < rows.width < 3 * 80 + 60  # two rows of three, each 64 wide
    run(pixels, tmp_path / "nfe.png", "--nfe=1,2,4", "--n=3")
    assert capsys.readouterr().out.count("NFE") == 3
    run(pixels, tmp_path / "way.png", "--interpolate", "--classes=cat,dog", "--n=4")
    run(pixels, tmp_path / "one.png", "--classes=dog", "--n=1", "--grid=1,0.3,0")
    (alone,) = MeanFlowPipeline.from_checkpoint(pixels, device="cpu")("dog", grid=[1, 0.3, 0])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), np.asarray(alone))
    run(pixels, tmp_path / "many.png", "--n=64", "--scale=2")
    assert Image.open(tmp_path / "many.png").height > 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.png", "--nfe=0"], "Got nfe = 0"),
        (["a.png", "--nfe=one"], "Got --nfe one, expected whole numbers"),
        (["a.png", "--nfe=2", "--grid=1,0"], "expected one of them"),
        (["a.png", "--classes=3"], "Got the class '3', expected a number from 0 to 2"),
        (["a.jpg"], "expected a name that ends in .png"),
        (["a.png", "--weights=0.5"], "Got --weights 0.5, expected raw or one of the checkpoint's averages: 0.9, 0.99"),
        (["a.png", "--n=0"], "Got n = 0"),
        (["a.png", "--scale=0"], "Got --scale=0"),
        (["a.png", "--interpolate"], "Got the seed 0 and the class 0 at both ends, expected something to go between"),
    ],
)
def test_the_command_refuses_in_one_line(pixels, tmp_path, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(pixels, tmp_path / words[0], *words[1:])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("a.*"))


def test_a_truncated_file_is_named(pixels, tmp_path, capsys):
    (tmp_path / "cut.ckpt").write_bytes(pixels.read_bytes()[:-1000])
    with pytest.raises(SystemExit):
        run(tmp_path / "cut.ckpt", tmp_path / "a.png")
    message = capsys.readouterr().err
    assert "cut.ckpt', which cannot be read" in message
    assert "Traceback" not in message
