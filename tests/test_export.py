"""Exports come back: weights, a diffusers folder, graphs for any batch; nothing is sent unless asked to."""

import functools
import json
import logging
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mf_lightning.__main__ import main
from mf_lightning.checkpoints import describe_net
from mf_lightning.nets import MLP
from mf_lightning.pipeline import MeanFlowPipeline
from mf_lightning.pixels import to_uint8
from mf_lightning.tools import export_graphs
from mf_lightning.types import LatentSpec, UserError
from tests.generators import digits_info, pixel_info, write_generator
from tests.nets import randomise


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_generator(tmp_path_factory.mktemp("run") / "checkpoints" / "last.ckpt", digits_info())


@pytest.fixture
def pixels(tmp_path):
    return write_generator(tmp_path / "pixels" / "last.ckpt", pixel_info(()))


@pytest.fixture(autouse=True)
def without_network(monkeypatch):
    """Let nothing leave the machine."""

    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def export(*words):
    main(["export", *map(str, words)])


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        export(*words)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def arrays(images):
    return [np.asarray(image) for image in images]


def pictures(pipeline):
    return arrays(pipeline(n=3, seed=4))


def test_weights_come_back(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    export(checkpoint, out, "--to=safetensors")
    assert "ema 0.99 weights at step 7" in capsys.readouterr().out
    ours, theirs = (
        MeanFlowPipeline.from_checkpoint(checkpoint, device="cpu"),
        MeanFlowPipeline.from_pretrained(out, device="cpu"),
    )
    assert theirs.description.plain() == ours.description.plain()
    assert np.array_equal(pictures(ours), pictures(theirs))
    export(out, tmp_path / "again")  # from an export
    twice = [load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again")]
    assert twice[0].keys() == twice[1].keys()
    assert all(torch.equal(value, twice[1][name]) for name, value in twice[0].items())
    assert "which exists" in refused(capsys, checkpoint, out)
    export(checkpoint, out, "--weights=raw", "--overwrite=true")
    assert MeanFlowPipeline.from_pretrained(out, device="cpu").description.weights == "raw"
    assert not list(tmp_path.glob(".*"))


def test_what_is_no_export_is_never_replaced(checkpoint, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "It is no earlier export" in refused(capsys, checkpoint, tmp_path / "mine", "--overwrite=true")
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_diffusers_loads_its_folder(kind, checkpoint, pixels, tmp_path, monkeypatch):
    import diffusers
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    source, out = checkpoint if kind == "latents" else pixels, str(tmp_path / "out")
    export(source, out, "--to=diffusers")
    wanted = pictures(MeanFlowPipeline.from_checkpoint(source, device="cpu"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, custom_pipeline=out, trust_remote_code=True)
    assert np.array_equal(arrays(pipe(num_images=3, seed=4).images), wanted)
    assert np.array_equal(pictures(MeanFlowPipeline.from_pretrained(out, device="cpu")), wanted)
    twice = [pipe(num_images=1, generator=torch.Generator().manual_seed(1), output_type="np").images for _ in range(2)]
    assert np.array_equal(*twice)
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(out, custom_pipeline=out)
    with pytest.raises(ValueError, match="no `model_cpu_offload_seq`"):  # the network is not called through diffusers' hooks
        pipe.enable_model_cpu_offload()


@pytest.mark.parametrize("kind", ["safetensors", "diffusers"])
def test_a_flow_matching_network_is_called_as_its_card_says(kind, tmp_path, monkeypatch):
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    file = write_generator(tmp_path / "fm.ckpt", pixel_info(), fm_fraction=1)
    export(file, "out", f"--to={kind}")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "in many network passes: a flow-matching network" in card
    assert "one-step" not in card.partition("# ")[0]
    assert "one network pass" not in card
    example, names = card.partition("```python\n")[2].partition("```")[0], {}
    exec(example.replace('("out"', '("./out"'), names)
    wanted = MeanFlowPipeline.from_checkpoint(file, device="cpu")([0], nfe=50, sampler="euler")
    assert np.array_equal(arrays(names["images"]), arrays(wanted))
    call = names["pipe" if kind == "diffusers" else "pipeline"]
    with pytest.raises(UserError, match="sampler='euler' in Python"):
        call(seed=0)


def expected(source, values, image):
    """The pipeline's own latents or pictures of the noise and labels of a graph."""
    pipeline = MeanFlowPipeline.from_checkpoint(source, device="cpu")
    z = values["noise"]
    one = torch.ones(len(z))
    with torch.no_grad():
        latent = z - pipeline.net(z, t=one, r=0 * one, y=values.get("label"))
    return pipeline.decode(latent) if image else latent


def check_graph(source, run, *, image):
    pipeline = MeanFlowPipeline.from_checkpoint(source, device="cpu")
    for count in (1, 3, 70):
        values = export_graphs.inputs(pipeline, count, seed=9)
        found, wanted = run(values), expected(source, values, image)
        if image:
            assert (to_uint8(found).int() - wanted.int()).abs().max() <= 1
        else:
            assert (found - wanted).abs().max() < 1e-4


def test_onnx_for_any_batch(checkpoint, tmp_path, capsys):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "onnx"
    export(checkpoint, out, "--to=onnx")
    assert "image.onnx: differs from torch by at most" in capsys.readouterr().out
    assert logging.root.manager.disable < logging.CRITICAL
    for name, image in (("generator", False), ("image", True)):
        session = ort.InferenceSession(out / f"{name}.onnx", providers=["CPUExecutionProvider"])
        assert [tuple(i.shape) for i in session.get_inputs()] == [("batch", 4, 8, 8), ("batch",)]
        told = json.loads(session.get_modelmeta().custom_metadata_map["mf_lightning"])
        assert (told["weights"], told["step"]) == ("ema 0.99", 7)

        def run(values, session=session):
            return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in values.items()})[0])

        check_graph(checkpoint, run, image=image)


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_torch_programs_for_any_batch(kind, checkpoint, pixels, tmp_path):
    source, out = checkpoint if kind == "latents" else pixels, tmp_path / "torch"
    export(source, out, "--to=torch")
    for name, image in (("generator", False), ("image", True)):
        program = torch.export.load(out / f"{name}.pt2").module()
        check_graph(source, lambda values, program=program: program(*values.values()), image=image)


def test_what_onnx_cannot_be(pixels, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    message = refused(capsys, pixels, tmp_path / "out", "--to=onnx", "--opset=11")
    assert "Got --opset 11, which cannot express this network (it has no Einsum, LayerNormalization; opset 18 can)" in message
    message = refused(capsys, pixels, tmp_path / "out", "--to=onnx", "--opset=99")
    assert "Got --opset 99, which cannot express this network (the newest that the package onnx knows is " in message
    monkeypatch.setattr(export_graphs, "TOLERANCE", 0.0)
    assert "differs from torch by" in refused(capsys, pixels, tmp_path / "out", "--to=onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["pixels"]


class Branching(MLP):
    """Its forward pass depends on values, which no graph can."""

    def forward(self, z_t, *, t, r, y=None):
        return super().forward(z_t if z_t.sum() > 0 else -z_t, t=t, r=r, y=y)


def write_mlp(file, kind):
    info = pixel_info()
    net = randomise(kind(LatentSpec(info.latent_shape, 10), hidden_size=16, depth=1))
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    averages = {"updates": 0, "weights": {}}
    return write_generator(file, info, net=describe_net(net), state_dict=state, ema=averages)


@pytest.mark.parametrize("to", ["torch", "onnx"])
def test_networks_that_are_no_transformers(to, tmp_path, capsys):
    if to == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    export(write_mlp(tmp_path / "mlp.ckpt", MLP), tmp_path / "out", f"--to={to}")  # compares several batch sizes
    file = write_mlp(tmp_path / "branching.ckpt", Branching)
    message = refused(capsys, file, tmp_path / "no", f"--to={to}", "--trust_net=true")
    assert "Got a network that torch.export cannot make a graph of (" in message
    assert "opset" not in message


def test_a_failure_of_onnx_is_not_laid_on_an_opset_that_nobody_gave(pixels, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def fail(*_, **__):
        raise TypeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    message = refused(capsys, pixels, tmp_path / "out", "--to=onnx")
    assert "Got a network that ONNX cannot express (no such operator), expected" in message
    assert "Got --opset 17, which cannot express" in refused(capsys, pixels, tmp_path / "out", "--to=onnx", "--opset=17")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--opset=18"], "expected it with --to onnx only"),
        (["--weights=0.5"], "expected raw or one of the checkpoint's averages: 0.9, 0.99"),
        (["--public=true"], "Got --public without --push"),
        (["--push=name"], "expected OWNER/NAME"),
        (["--autoencoder=/nowhere", "--to=torch"], "which is no directory here"),
    ],
)
def test_what_is_refused(checkpoint, tmp_path, words, message, capsys):
    assert message in refused(capsys, checkpoint, tmp_path / "out", *words)
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_named(checkpoint, tmp_path, capsys):
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    assert "cut.ckpt', which cannot be read" in refused(capsys, tmp_path / "cut.ckpt", tmp_path / "out")
    export(checkpoint, tmp_path / "whole")
    weights = tmp_path / "whole" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "which cannot be read" in refused(capsys, tmp_path / "whole", tmp_path / "out")
    weights.unlink()
    assert "which cannot be read" in refused(capsys, tmp_path / "whole", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "without config.json" in refused(capsys, tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body["net"].pop("class_path"), "(no entry 'class_path')"),
        (lambda body: body["net"].update(class_path=3), "(class_path is 3)"),
        (lambda body: body["net"].update(init_args=[]), "(init_args is [])"),
        (lambda body: body.update(net="SiT"), "(net is 'SiT')"),
        (lambda body: body.update(step="7"), "(step is '7')"),
        (lambda body: body.update(imported={}), "(no entry 'source')"),
    ],
)
def test_a_description_that_lacks_something_is_named(pixels, tmp_path, capsys, change, message):
    export(pixels, tmp_path / "whole")
    file = tmp_path / "whole" / "config.json"
    body = json.loads(file.read_text())
    change(body)
    file.write_text(json.dumps(body))
    assert f"which cannot be read {message}" in refused(capsys, tmp_path / "whole", tmp_path / "out")


class FakeHub:
    """What HfApi is asked for."""

    calls: list = []  # noqa: RUF012
    private = True

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    def repo_info(self, name):
        return type("Info", (), {"private": self.private})


def test_nothing_is_sent_without_the_flag(checkpoint, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    hub = type("Hub", (FakeHub,), {"calls": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    export(checkpoint, tmp_path / "quiet")
    assert hub.calls == []
    export(checkpoint, tmp_path / "sent", "--push=me/digits")
    files = ["README.md", "config.json", "model.safetensors"]
    assert hub.calls == [("create", "me/digits", {"private": True, "exist_ok": True}), ("upload", "me/digits", files)]
    assert "sent to https://hub/me/digits, a private repository\n" in capsys.readouterr().out
    export(checkpoint, tmp_path / "again", "--push=me/digits", "--public=true")
    assert "a private repository; it was there before, and --public decides over new" in capsys.readouterr().out
    hub.private = False
    export(checkpoint, tmp_path / "third", "--push=me/digits")
    assert "a public repository; it was there before" in capsys.readouterr().out


def test_without_a_network_the_folder_is_kept(checkpoint, tmp_path, capsys, monkeypatch):
    """The hub's own client raises what it does where there is no way out."""
    import huggingface_hub

    def refuse(self, address):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    here = functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9", token="hf_none")
    with pytest.raises(Exception, match="refused") as raised:
        here().create_repo("me/digits")
    assert not isinstance(raised.value, OSError | huggingface_hub.errors.HfHubHTTPError) or "requests" in str(raised.type)
    monkeypatch.setattr(huggingface_hub, "HfApi", here)
    message = refused(capsys, checkpoint, tmp_path / "kept", "--push=me/digits")
    assert "not sent to me/digits (" in message
    assert "refused" in message
    assert MeanFlowPipeline.from_pretrained(tmp_path / "kept", device="cpu").num_classes == 10


def test_the_card_tells_the_run_and_what_it_does_not_know(tmp_path):
    run = tmp_path / "run"
    file = write_generator(run / "checkpoints" / "last.ckpt", pixel_info(("cat", "dog")))
    export(file, tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "no config.yaml lay beside" in card
    assert "no sample_eval.jsonl with figures lay beside" in card
    config = {
        "seed_everything": 5,
        "model": {"loss": {"init_args": {"fm_fraction": 0.75, "guidance": {"omega": 1.0, "kappa": 0.5}}}},
        "data": {"init_args": {"path": "s3://bucket/pets", "batch_size": 48, "storage_options": {"secret": "hunter2"}}},
    }
    (run / "config.yaml").write_text(json.dumps(config))
    protocol = {"extractor": "inception-v3-compat", "num_samples": 50000, "nfe": 1, "ema": 0.99}
    rows = [
        {"step": 7, "ema": 0.99, "nfe": 1, "fid": 6.25, "protocol": protocol},
        {"step": 7, "ema": None, "nfe": 1, "fid": 66.5, "protocol": protocol},
        {"step": 3, "ema": 0.99, "nfe": 1, "fid": 77.5, "protocol": protocol},
    ]
    (run / "sample_eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export(file, tmp_path / "b")
    card = (tmp_path / "b" / "README.md").read_text()
    for told in (
        "| 1 | 6.25 |",
        "| num_samples | 50000 |",
        "| data set | pets |",
        '"kappa": 0.5',
        "| batch | 48 |",
        "2: cat, dog",
    ):
        assert told in card, told
    for other in ("66.5", "77.5", "hunter2"):
        assert other not in card
    export(file, tmp_path / "c", "--weights=0.9")
    assert "None of these weights (ema 0.9, step 7)" in (tmp_path / "c" / "README.md").read_text()


def test_imported_weights_have_figures_and_an_origin_of_their_own(tmp_path, capsys):
    run = tmp_path / "run"
    origin = {"source": "snapshots of run x", "container": "snapshots", "format": "meanflow", "weights": "phema 0.15"}
    alone = {"updates": 0, "weights": {}}
    phema = write_generator(run / "phema" / "a.ckpt", pixel_info(), imported=origin, ema=alone)
    theirs = {"source": "b4.pth", "container": "pickle", "format": "zhuyu", "weights": "ema 0.99"}
    imported = write_generator(run / "b4.ckpt", pixel_info(), imported=theirs, ema=alone)
    (run / "config.yaml").write_text(json.dumps({"data": {"init_args": {"path": "pets", "batch_size": 48}}}))
    rows = [
        {"fid": 66.5, "protocol": {}},
        {"fid": 77.5, "protocol": {"weights": None}},
        {"fid": 88.5, "protocol": {"weights": "phema 0.1 of snapshots of run x"}},
        {"fid": 99.5, "protocol": {}, "ema": 0.99},
        {"fid": 6.25, "protocol": {"weights": "phema 0.15 of snapshots of run x"}},
    ]
    lines = [json.dumps({"step": 7, "ema": None, "nfe": 1, **row}) + "\n" for row in rows]
    (run / "sample_eval.jsonl").write_text("".join(lines))

    def card_of(file, out):
        export(file, tmp_path / out)
        return (tmp_path / out / "README.md").read_text()

    card = card_of(phema, "a")
    assert "phema 0.15 weights of snapshots of run x at step 7" in capsys.readouterr().out
    for told in ("6.25", "put together with mf_lightning from snapshots of run x", "phema 0.15 of", "| batch | 48 |"):
        assert told in card, told
    for other in ("66.5", "77.5", "88.5", "99.5", "trained with mf_lightning"):
        assert other not in card, other
    card = card_of(imported, "b")
    for told in (
        "imported with mf_lightning from `b4.pth`",
        "| ema 0.99 of b4.pth, imported as `zhuyu` |",
        "None of these weights",
    ):
        assert told in card, told
    for other in ("6.25", "66.5", "77.5", "99.5", "trained with mf_lightning", "48", "pets"):
        assert other not in card, other
    assert json.loads((tmp_path / "b" / "config.json").read_text())["imported"] == theirs
    assert "imported with mf_lightning from `b4.pth`" in card_of(tmp_path / "b", "again")
