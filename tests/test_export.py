"""Exports come back: weights, a diffusers folder, graphs for any batch; nothing is sent unless asked to."""

import json
import logging
import socket

import numpy as np
import pytest
import torch

from mf_lightning.__main__ import main
from mf_lightning.pipeline import MeanFlowPipeline
from mf_lightning.pixels import to_uint8
from mf_lightning.tools import export_graphs
from tests.generators import digits_info, pixel_info, write_generator


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
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
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
    monkeypatch.setattr(export_graphs, "TOLERANCE", 0.0)
    assert "differs from torch by" in refused(capsys, pixels, tmp_path / "out", "--to=onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["pixels"]


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


class FakeHub:
    """What HfApi is asked for."""

    calls: list = []  # noqa: RUF012
    error = None

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))
        if self.error:
            raise self.error
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_nothing_is_sent_without_the_flag(checkpoint, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    hub = type("Hub", (FakeHub,), {"calls": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    export(checkpoint, tmp_path / "quiet")
    assert hub.calls == []
    export(checkpoint, tmp_path / "sent", "--push=me/digits")
    files = ["README.md", "config.json", "model.safetensors"]
    assert hub.calls == [("create", "me/digits", {"private": True, "exist_ok": True}), ("upload", "me/digits", files)]
    assert "sent to https://hub/me/digits" in capsys.readouterr().out
    hub.error = OSError("no route")
    message = refused(capsys, checkpoint, tmp_path / "kept", "--push=me/digits")
    assert "not sent to me/digits (no route)" in message
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
