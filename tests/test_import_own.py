"""This project's own weights in, however they were written: what a file tells is taken, and goes before every guess."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mf_lightning.__main__ import main
from mf_lightning.checkpoints import CHECKPOINT_FORMAT, describe_net, read_checkpoint, write_checkpoint
from mf_lightning.checkpoints.snapshots import Header, checksum, write_snapshot
from mf_lightning.checkpoints.weights import load_initial
from mf_lightning.nets import SiT
from mf_lightning.pipeline import MeanFlowPipeline
from mf_lightning.tools.consolidate import consolidate
from mf_lightning.tools.export_diffusers import CLASS
from mf_lightning.tools.import_weights import import_weights
from mf_lightning.types import LatentSpec, UserError
from tests.generators import pixel_info, write_generator
from tests.nets import randomise
from tests.parity.importing import imported, network


def own_net(shape=(1, 16, 16), **settings) -> SiT:
    settings = {"patch_size": 4, "depth": 1, "hidden_size": 32, "num_heads": 2, **settings}
    return randomise(SiT(LatentSpec(shape, 10), **settings), seed=3)


def write_run(path, net, **entries):
    """Write a checkpoint of a run, as far as import reads one."""
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    body = {"format_version": CHECKPOINT_FORMAT, "global_step": 7, "net": describe_net(net), "state_dict": state}
    write_checkpoint({**body, "ema": {"updates": 7, "weights": {}}, "fm_fraction": 0.75, **entries}, path)
    return path


def write_snapshots(folder, net, fm_fraction):
    tensors = {name: value.detach() for name, value in net.state_dict().items()}
    header = Header(20, 0.1, "3f2a", describe_net(net), pixel_info().describe(), fm_fraction, ("pos_embed",), checksum(tensors))
    write_snapshot(folder / "snapshots", tensors, header)
    return folder


@torch.no_grad()
def outputs(net, *, r):
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(4, *net.config["latent_shape"], generator=generator)
    t = torch.rand(4, generator=generator)
    return net.eval()(z_t, t=t, r=r * t, y=torch.tensor([0, 3, 9, 10]))


def write_each_way(folder, fm_fraction):
    """Return by kind a file or folder of weights of one run, and which weights they are."""
    run = write_generator(folder / "run.ckpt", pixel_info(), fm_fraction=fm_fraction)
    consolidate(run, folder / "one.safetensors", "0.9")
    MeanFlowPipeline.from_checkpoint(run, weights="0.9", device="cpu").save_pretrained(folder / "exported")
    snapshots = write_snapshots(folder / "phema", network_of(run), fm_fraction)
    for out in ("made.ckpt", "made.safetensors"):
        main(["phema", str(snapshots), "--sigma-rel", "0.1", f"--out={folder / out}"])
    consolidate(folder / "made.ckpt", folder / "consolidated.safetensors")
    return {
        "run": (run, "ema 0.9"),
        "consolidate": (folder / "one.safetensors", "ema 0.9"),
        "export": (folder / "exported", "ema 0.9"),
        "export's weights": (folder / "exported" / "model.safetensors", "ema 0.9"),
        "phema": (folder / "made.ckpt", "phema 0.1"),
        "phema, safetensors": (folder / "made.safetensors", "phema 0.1"),
        "phema, consolidated": (folder / "consolidated.safetensors", "phema 0.1"),
    }


def network_of(run):
    return MeanFlowPipeline.from_checkpoint(run, weights="raw", device="cpu").net


@pytest.mark.parametrize("fm_fraction", [1.0, 0.75])
def test_every_way_of_writing_tells_flow_matching_heads_data_and_weights(tmp_path, fm_fraction, capsys):
    sources = write_each_way(tmp_path, fm_fraction)
    for kind, (source, weights) in sources.items():
        chosen = ["--weights=0.9"] if kind == "run" else []
        ours, _ = imported(source, tmp_path / "ours.ckpt", *chosen)
        made = read_checkpoint(tmp_path / "ours.ckpt")
        assert made["imported"]["weights"] == weights, kind
        assert made["imported"]["source"] == source.name, kind
        assert made["imported"]["flow_matching"] is (fm_fraction == 1), kind
        assert made["data"] == pixel_info().describe(), kind
        assert outputs(ours, r=0.2).equal(outputs(ours, r=1)) is (fm_fraction == 1), kind
        again, _ = imported(tmp_path / "ours.ckpt", tmp_path / "again.ckpt")  # what import wrote tells it too
        told = read_checkpoint(tmp_path / "again.ckpt")["imported"]
        assert (told["weights"], told["flow_matching"]) == (weights, fm_fraction == 1), kind
        assert outputs(again, r=0.2).equal(outputs(ours, r=0.2)), kind


def test_the_weights_of_an_export_alone_tell_it(tmp_path):
    sources = write_each_way(tmp_path, 1.0)
    file = sources["export's weights"][0].rename(tmp_path / "moved.safetensors")
    imported(file, tmp_path / "ours.ckpt")
    assert read_checkpoint(tmp_path / "ours.ckpt")["imported"] == {
        "source": "moved.safetensors",
        "container": "safetensors",
        "format": "flow-matching",
        "weights": "ema 0.9",
        "flow_matching": True,
    }
    with pytest.raises(RuntimeError, match=r"ema 0\.9, expected --weights=raw among them"):
        imported(file, tmp_path / "ours.ckpt", "--weights=raw")


def test_a_flow_matching_average_begins_a_fit_only_through_import(tmp_path):
    """Its h path has only ever seen h = 0."""
    net = own_net()
    main(["phema", str(write_snapshots(tmp_path, net, 1.0)), "--sigma-rel", "0.1", f"--out={tmp_path / 'made.ckpt'}"])
    with pytest.raises(UserError, match=r"import .*made\.ckpt OUT\.ckpt"):
        load_initial(net, str(tmp_path / "made.ckpt"))
    ours, _ = imported(tmp_path / "made.ckpt", tmp_path / "ours.ckpt")
    load_initial(net, str(tmp_path / "ours.ckpt"))
    assert outputs(net, r=0.2).equal(outputs(ours, r=1))
    main(
        [
            "phema",
            str(write_snapshots(tmp_path / "meanflow", own_net(), 0.75)),
            "--sigma-rel=0.1",
            "--out",
            str(tmp_path / "mf.ckpt"),
        ]
    )
    load_initial(net, str(tmp_path / "mf.ckpt"))
    assert outputs(net, r=0.2).equal(outputs(own_net(), r=0.2))


SETTINGS = {
    "times": {"time_inputs": "t,r"},
    "three times": {"time_inputs": "t,r,h"},
    "not square": {"shape": (1, 16, 8)},
    "norms": {"qk_norm": True},
    "odd width of the MLP": {"hidden_size": 48, "mlp_ratio": 2.1},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_own_settings_go_before_guesses(tmp_path, kind):
    net = own_net(**SETTINGS[kind])
    run = write_run(tmp_path / "run.ckpt", net)
    consolidate(run, tmp_path / "one.safetensors")
    for source in (run, tmp_path / "one.safetensors"):
        ours, _ = imported(source, tmp_path / "ours.ckpt")
        assert ours.config == net.config
        assert outputs(ours, r=0.2).equal(outputs(net, r=0.2))


def test_own_flow_matching_network_with_norms(tmp_path):
    net = own_net(qk_norm=True)
    ours, printed = imported(write_run(tmp_path / "run.ckpt", net, fm_fraction=1.0), tmp_path / "ours.ckpt")
    assert "--format=flow-matching" in printed
    assert (outputs(ours, r=0.2) - outputs(net, r=1)).abs().max() < 1e-5


CONTRADICTIONS = {
    "heads": ({}, "--num_heads=4", "--num_heads=4 for weights whose file tells 2"),
    "no heads": ({}, "--num_heads=0", "--num_heads=0, expected at least 1"),
    "side": ({}, "--latent_size=32", "--latent_size=32 for weights whose file tells 16"),
    "side, not square": ({"shape": (1, 16, 8)}, "--latent_size=16", "whose file tells 16 x 8"),
    "classes": ({}, "--num_classes=11", "--num_classes=11 for weights whose file tells 10"),
    "another's names": ({}, "--format=sit", "expected meanflow, as the file tells"),
    "flow matching": ({"fm_fraction": 1.0}, "--format=meanflow", "expected flow-matching, as the file tells"),
    "times": ({"fm_fraction": 1.0, "time_inputs": "t,r"}, "--format=auto", "time_inputs = t,r, expected t,h"),
    "not told": ({"fm_fraction": None}, "--format=auto", "--format=flow-matching if they were"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_what_the_file_tells_is_not_overruled(tmp_path, kind):
    settings, option, expected = CONTRADICTIONS[kind]
    settings = dict(settings)
    share = settings.pop("fm_fraction", 0.75)
    run = write_run(tmp_path / "run.ckpt", own_net(**settings), fm_fraction=share)
    with pytest.raises(RuntimeError) as stop:
        imported(run, tmp_path / "ours.ckpt", option)
    assert expected in str(stop.value)
    assert not (tmp_path / "ours.ckpt").exists()


@pytest.mark.parametrize("said", ["a net", "3", "[]", '{"class_path": 3}', '{"init_args": {}}', '{"class_path": "a.B"}'])
def test_metadata_that_others_wrote_for_themselves(tmp_path, said):
    net = own_net()
    save_file(net.state_dict(), tmp_path / "theirs.safetensors", metadata={"net": said, "weights": "best"})
    imported(tmp_path / "theirs.safetensors", tmp_path / "ours.ckpt", "--num_heads=2")
    assert read_checkpoint(tmp_path / "ours.ckpt")["imported"]["weights"] == "unnamed"


@pytest.mark.parametrize(
    "changed", [{"flow_matching": "yes"}, {"data": "[1]"}, {"net": {"depth": "two"}}, {"net": {"latent_shape": 4}}]
)
def test_own_metadata_that_was_changed(tmp_path, changed):
    net = own_net()
    told = describe_net(net)
    told["init_args"].update(changed.get("net", {}))
    metadata = {"net": json.dumps(told), "flow_matching": "false", **{k: v for k, v in changed.items() if k != "net"}}
    save_file(net.state_dict(), tmp_path / "one.safetensors", metadata=metadata)
    with pytest.raises(UserError, match="expected"):
        import_weights(tmp_path / "one.safetensors", tmp_path / "ours.ckpt")


def test_an_export_to_diffusers_and_its_weights_alone(tmp_path):
    """Its settings lie beside the weights, one folder deeper than ours."""
    exported = write_each_way(tmp_path, 1.0)["export"][0]
    inside = exported / "transformer"
    inside.mkdir()
    plain = json.loads((exported / "config.json").read_text())
    (exported / "config.json").unlink()
    (inside / "config.json").write_text(json.dumps({"generator": plain}))
    (exported / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline", CLASS]}))
    state = {f"net.{name}": value for name, value in load_file(exported / "model.safetensors").items()}
    (exported / "model.safetensors").unlink()
    save_file(state, inside / "diffusion_pytorch_model.safetensors")
    for source in (exported, inside / "diffusion_pytorch_model.safetensors"):
        imported(source, tmp_path / "ours.ckpt")
        made = read_checkpoint(tmp_path / "ours.ckpt")["imported"]
        assert (made["source"], made["weights"], made["flow_matching"]) == (source.name, "ema 0.9", True)


def test_a_folder_that_is_half_an_export(tmp_path):
    write_each_way(tmp_path, 0.75)
    exported = tmp_path / "exported"
    (exported / "model.safetensors").rename(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match="expected all that export wrote"):
        import_weights(exported, tmp_path / "ours.ckpt")
    (exported / "config.json").unlink()
    (tmp_path / "gone.safetensors").rename(exported / "model.safetensors")
    with pytest.raises(UserError, match="without config"):
        import_weights(exported, tmp_path / "ours.ckpt")


def test_metadata_is_plain_text(tmp_path):
    source = write_each_way(tmp_path, 0.75)["consolidate"][0]
    with safe_open(source, "pt") as file:
        found = file.metadata()
    assert (found["weights"], found["step"], found["flow_matching"]) == ("ema 0.9", "7", "false")
    assert json.loads(found["net"])["init_args"]["num_heads"] == 2
    assert json.loads(found["data"]) == pixel_info().describe()


def test_options_are_taken_with_dashes_too(tmp_path):
    net = own_net()
    torch.save(net.state_dict(), tmp_path / "a-b.pt")
    main(["import", str(tmp_path / "a-b.pt"), str(tmp_path / "ours-1.ckpt"), "--num-heads", "2", "--allow-code=false"])
    assert outputs(network(tmp_path / "ours-1.ckpt"), r=0.2).equal(outputs(net, r=0.2))
    run = write_snapshots(tmp_path / "a-run", net, 0.75)
    main(["phema", str(run), "--sigma-rel", "0.1", f"--out={tmp_path / 'made-of-it.ckpt'}"])  # a value stays as it is
    assert (tmp_path / "made-of-it.ckpt").is_file()
