"""Others' weights in: every naming gives back the network it came from, and what cannot be placed or trusted is refused."""

import argparse
import os
import pickle
import re
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from mf_lightning.checkpoints import read_checkpoint, write_checkpoint
from mf_lightning.flow import MeanFlowLoss
from mf_lightning.interop.conversion import NAMINGS
from mf_lightning.interop.public_sit import reverse_time, with_silent_h
from mf_lightning.nets import SiT
from mf_lightning.tools.consolidate import consolidate
from mf_lightning.tools.import_weights import import_weights
from mf_lightning.types import LatentSpec, UserError
from tests.nets import randomise
from tests.parity import importing

SPEC = LatentSpec((3, 8, 8), 4)
HEADS = "--num_heads=2"


def small_net(std: float = 0.3, **settings) -> SiT:
    return randomise(SiT(SPEC, **{"patch_size": 4, "depth": 2, "hidden_size": 16, "num_heads": 2, **settings}), std=std).eval()


def flow_matching_state(net: SiT) -> dict[str, torch.Tensor]:
    """A network that knows one time only: its ``h`` path says nothing."""
    for name, parameter in net.named_parameters():
        if name.startswith("h_embedder.mlp.2."):
            torch.nn.init.zeros_(parameter)
    return {name: value for name, value in net.state_dict().items() if not name.startswith("h_embedder.")}


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(5, generator=generator)
    return {
        "z_t": torch.randn(5, *SPEC.shape, generator=generator),
        "t": t,
        "r": t * torch.rand(5, generator=generator),
        "y": torch.tensor([0, 1, 2, 3, 4]),
    }


@torch.no_grad()
def outputs(net: SiT, *, z_t, t, r, y):
    return net(z_t, t=t, r=r, y=y)


def bring(tmp_path, content, *options, name="theirs.pt"):
    torch.save(content, tmp_path / name)
    return importing.imported(tmp_path / name, tmp_path / "ours.ckpt", *options)


def refusal(tmp_path, source, *options) -> str:
    """Return the one message that the command ends with; nothing was written."""
    with pytest.raises(RuntimeError) as stop:
        importing.imported(source, tmp_path / "ours.ckpt", *options)
    message = str(stop.value)
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert len(message) < 900
    assert not (tmp_path / "ours.ckpt").exists()
    return message


def test_names_of_this_project_and_haoyi(tmp_path):
    net = small_net()
    state = net.state_dict()
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    ours, printed = bring(tmp_path, wrapped, HEADS)
    assert outputs(ours, **inputs()).equal(outputs(net, **inputs()))
    assert "patch 4, depth 2, width 16, 2 heads, latents 3 x 8 x 8, 4 classes and the null label" in printed
    assert "weights: unnamed" in printed
    save_file(state, tmp_path / "plain.safetensors")
    ours, _ = importing.imported(tmp_path / "plain.safetensors", tmp_path / "plain.ckpt", HEADS)
    assert outputs(ours, **inputs()).equal(outputs(net, **inputs()))


def test_zhuyu_averaged_or_raw(tmp_path):
    net = small_net()
    state = {name.replace("h_embedder.", "r_embedder."): value for name, value in net.state_dict().items()}
    raw = {name: value + 1 for name, value in state.items()}
    both = {"model": raw, "ema": state, "opt": {}, "args": argparse.Namespace(path_type="linear"), "steps": 3}
    ours, printed = bring(tmp_path, both, HEADS)
    assert outputs(ours, **inputs()).equal(outputs(net, **inputs()))
    assert "weights: ema (ema); left aside: raw (model), args, opt, steps" in printed
    assert "r_embedder.mlp.0.bias => h_embedder.mlp.0.bias" in printed
    ours, printed = bring(tmp_path, both, HEADS, "--weights=raw")
    assert ours.x_embedder.proj.bias.equal(net.x_embedder.proj.bias + 1)
    assert "raw (model)" in printed
    (tmp_path / "ours.ckpt").unlink()
    torch.save({"model": raw}, tmp_path / "raw.pt")
    assert "raw (model), expected --weights=ema among them" in refusal(tmp_path, tmp_path / "raw.pt", HEADS, "--weights=ema")


def test_what_was_taken_is_written_down(tmp_path):
    net = small_net()
    state, raw = net.state_dict(), small_net(std=0.2).state_dict()
    files = {
        "unnamed": (state, "auto"),
        "raw": ({"model": raw}, "auto"),
        "ema": ({"model": raw, "model_ema": state}, "auto"),
        "raw, though there is an average": ({"params": raw, "ema_params": state}, "raw"),
    }
    for expected, (content, asked) in files.items():
        bring(tmp_path, content, HEADS, f"--weights={asked}", name="a.pth")
        assert read_checkpoint(tmp_path / "ours.ckpt")["imported"] == {
            "source": "a.pth",
            "container": "torch",
            "format": "meanflow",
            "weights": expected.partition(",")[0],
            "flow_matching": False,
        }


def test_the_public_sit_runs_backwards(tmp_path):
    """u(z, t) = -u_SiT(z, 1 - t), whatever r is; with learned variances, which go."""
    net = small_net(std=0.1)
    theirs = flow_matching_state(net)
    patches = {"weight": (16, 3, 16), "bias": (16, 3)}
    for kind, shape in patches.items():
        value = theirs[f"final_layer.linear.{kind}"].view(shape)
        theirs[f"final_layer.linear.{kind}"] = torch.cat([value, value + 1], dim=1).flatten(0, 1)
    ours, printed = bring(tmp_path, theirs, HEADS)
    given = inputs()
    expected = -outputs(net, **{**given, "t": 1 - given["t"], "r": 1 - given["t"]})
    assert (outputs(ours, **given) - expected).abs().max() < 1e-6 * expected.abs().max()
    for line in (
        "dropped: 2 keys",
        "final_layer.linear.bias: 48 of its 96 rows, the learned variances",
        "added: 4 keys",
        "1 - t",
    ):
        assert line in printed
    assert "flow-matching network" in printed


def test_reversing_time_is_exact_and_its_own_inverse():
    net = small_net().double()
    state = flow_matching_state(net)
    turned = small_net().double()
    turned.load_state_dict(with_silent_h(reverse_time(state)))
    given = {name: value.double() if value.is_floating_point() else value for name, value in inputs().items()}
    # the network's own float64 frequencies differ from the folded float32 ones in the eighth digit
    expected = -outputs(net, **{**given, "t": 1 - given["t"], "r": 1 - given["t"]})
    assert (outputs(turned, **given) - expected).abs().max() < 1e-6 * expected.abs().max()
    twice = reverse_time(reverse_time(state))
    assert all((twice[name] - value).abs().max() < 1e-14 for name, value in state.items())


def test_a_silent_h_path_can_still_learn(tmp_path):
    ours, _ = bring(tmp_path, flow_matching_state(small_net()), HEADS, "--format=repa")
    x, y, rows = torch.randn(8, *SPEC.shape), torch.arange(8) % 4, torch.arange(8)
    loss = MeanFlowLoss(fm_fraction=0.0)
    draw = loss.draw_training(x, rows, seed=0, step=0, global_batch_size=8)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss(ours, x, y, draw, y_null=4).loss.backward()
        optimizer.step()
    assert ours.h_embedder.mlp[2].weight.grad.abs().max() > 0
    assert ours.h_embedder.mlp[0].weight.grad.abs().max() > 0
    given = inputs()
    assert not outputs(ours, **given).allclose(outputs(ours, **{**given, "r": given["t"]}))


def test_repa_loses_its_projectors_and_keeps_its_time(tmp_path):
    net = small_net(depth=3)
    state = flow_matching_state(net)
    older = {name.replace("blocks.2.", "decoder_blocks.0."): value for name, value in state.items()}
    for theirs in (state, older):
        ema = {**theirs, "projectors.0.0.weight": torch.ones(3), "projectors.0.0.bias": torch.ones(3)}
        ours, printed = bring(tmp_path, {"ema": ema, "args": argparse.Namespace(path_type="linear", prediction="v")}, HEADS)
        given = inputs()
        assert (outputs(ours, **given) - outputs(net, **given)).abs().max() < 1e-6
        assert "projectors.0.0.weight: only REPA's loss uses it" in printed
        assert "(--format=repa)" in printed
        assert outputs(ours, **given).equal(outputs(ours, **{**given, "r": 0 * given["r"]}))


def test_own_flow_matching_network_says_the_same_for_every_h(tmp_path):
    """Its h path was trained at h = 0 alone; what it says there is kept, at every h."""
    net, given = small_net(), inputs()
    ours, printed = bring(tmp_path, net.state_dict(), HEADS, "--format=flow-matching")
    at_t = outputs(net, **{**given, "r": given["t"]})
    assert (outputs(ours, **given) - at_t).abs().max() < 1e-6 * at_t.abs().max()
    assert "converted: 4 keys" in printed

    checkpoint = {**read_checkpoint(tmp_path / "ours.ckpt"), "fm_fraction": 1.0, "data": {"kind": "moments"}}
    del checkpoint["imported"]
    write_checkpoint(checkpoint, tmp_path / "run.ckpt")  # one of this project's tells it
    again, printed = importing.imported(tmp_path / "run.ckpt", tmp_path / "again.ckpt")
    assert "--format=flow-matching" in printed
    assert outputs(again, **given).equal(outputs(ours, **given))
    assert read_checkpoint(tmp_path / "again.ckpt")["data"] == {"kind": "moments"}


def test_own_checkpoints_raw_averaged_and_consolidated(tmp_path):
    """They tell everything, the number of heads too; a damaged one is not read."""
    raw, averaged, given = small_net(), small_net(std=0.2), inputs()
    importing.imported(_safetensors(raw, tmp_path), tmp_path / "run.ckpt", HEADS)
    checkpoint = read_checkpoint(tmp_path / "run.ckpt")
    del checkpoint["imported"]
    checkpoint["fm_fraction"] = 0.75
    parameters = dict(averaged.named_parameters())
    checkpoint["ema"] = {"updates": 9, "weights": {"0.9": parameters, "0.99": {k: 2 * v for k, v in parameters.items()}}}
    checkpoint["ema"]["weights"] = {d: {k: v.detach() for k, v in w.items()} for d, w in checkpoint["ema"]["weights"].items()}
    write_checkpoint(checkpoint, tmp_path / "run.ckpt")
    for weights, net in (("raw", raw), ("0.9", averaged)):
        ours, printed = importing.imported(tmp_path / "run.ckpt", tmp_path / "ours.ckpt", f"--weights={weights}")
        assert outputs(ours, **given).equal(outputs(net, **given))
        assert f"weights: {'raw (state_dict)' if weights == 'raw' else 'ema 0.9;'}" in printed
    (tmp_path / "ours.ckpt").unlink()
    for asked in ("auto", "0.5"):
        assert "ema 0.9, ema 0.99, raw (state_dict)" in refusal(tmp_path, tmp_path / "run.ckpt", f"--weights={asked}")

    consolidate(tmp_path / "run.ckpt", tmp_path / "run.safetensors", weights="0.9")
    ours, _ = importing.imported(tmp_path / "run.safetensors", tmp_path / "ours.ckpt")
    assert outputs(ours, **given).equal(outputs(averaged, **given))
    (tmp_path / "ours.ckpt").unlink()

    content = bytearray((tmp_path / "run.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "run.ckpt").write_bytes(content)
    assert "checksum" in refusal(tmp_path, tmp_path / "run.ckpt", "--weights=raw")


def _safetensors(net, folder):
    save_file(net.state_dict(), folder / "net.safetensors")
    return folder / "net.safetensors"


def flax_state(net):
    """Return the parameters by the official code's paths and in its layouts."""
    flax = {}
    for name, value in net.state_dict().items():
        if name == "pos_embed":
            continue
        *parts, leaf = name.split(".")
        path = "/".join(f"layers_{part}" if part.isdigit() else part for part in parts)
        if name.startswith("x_embedder."):
            flax[f"{path}/{'kernel' if leaf == 'weight' else leaf}"] = value.permute(2, 3, 1, 0) if leaf == "weight" else value
        elif "embedding_table" in name:
            flax[f"{path}/_flax_embedding/embedding"] = value
        else:
            flax[f"{path}/_flax_linear/{'kernel' if leaf == 'weight' else leaf}"] = value.T if leaf == "weight" else value
    return flax


@pytest.mark.skipif(not importing.JAX, reason="needs the extra jax")
@pytest.mark.parametrize("container", ["msgpack", "orbax"])
def test_official_jax_weights(tmp_path, container):
    net = small_net()
    source = importing.write_flax(flax_state(net), tmp_path, container=container)
    ours, printed = importing.imported(source, tmp_path / "ours.ckpt", HEADS, "--latent_size=8")
    assert outputs(ours, **inputs()).equal(outputs(net, **inputs()))
    assert "ema (ema_params); left aside: raw (params), opt_state, step" in printed
    assert "pos_embed: the sin-cos table" in printed
    with pytest.raises(RuntimeError, match="number of attention heads"):
        importing.imported(source, tmp_path / "other.ckpt", "--latent_size=8")


def test_lower_precision_and_a_label_table_without_null_row(tmp_path):
    net = small_net()
    state = {name: value.bfloat16() for name, value in net.state_dict().items()}
    table = state["y_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"][:4].float()
    ours, printed = bring(tmp_path, state, HEADS, "--num_classes=4")
    assert ours.y_embedder.embedding_table.weight.equal(torch.cat([table, table.mean(dim=0, keepdim=True)]))
    assert "x_embedder.proj.bias: bfloat16 => float32" in printed
    assert "a null row added, the mean of the 4 classes" in printed
    (tmp_path / "ours.ckpt").unlink()
    assert "label table of 4 rows, expected 3" in refusal(tmp_path, tmp_path / "theirs.pt", HEADS, "--num_classes=7")


def test_without_labels(tmp_path):
    net = randomise(SiT(LatentSpec(SPEC.shape, 0), patch_size=4, depth=2, hidden_size=16, num_heads=2)).eval()
    ours, printed = bring(tmp_path, net.state_dict(), HEADS)
    assert ours.y_null is None
    assert "no classes" in printed


def _as_written_by(format):
    """Return a small network's state dict with the names of a format."""
    net = small_net(depth=1)
    if format == "flax":
        return flax_state(net)
    state = flow_matching_state(net) if format in ("sit", "repa") else net.state_dict()
    return {name.replace("h_embedder.", "r_embedder.") if format == "zhuyu" else name: v for name, v in state.items()}


@pytest.mark.parametrize("format", NAMINGS)
def test_every_key_that_is_missing_or_of_another_shape_is_told(tmp_path, format):
    """Whatever the names are; a table of positions is computed, and a network may be without labels."""
    state = _as_written_by(format)
    asked = {"num_heads": 2, "latent_size": 8}
    torch.save(state, tmp_path / "theirs.pt")
    import_weights(tmp_path / "theirs.pt", tmp_path / "ours.ckpt", format=format, **asked)
    for key in state:
        optional = key == "pos_embed" or "embedding_table" in key
        for value in (*(() if optional else (None,)), torch.tensor(1.0), torch.ones(3), torch.ones(2, 2, 2)):
            changed = {name: tensor for name, tensor in {**state, key: value}.items() if tensor is not None}
            torch.save(changed, tmp_path / "theirs.pt")
            with pytest.raises(UserError, match="expected"):
                import_weights(
                    tmp_path / "theirs.pt", tmp_path / "no.ckpt", format="auto" if value is None else format, **asked
                )


def test_missing_parts_of_a_time_embedder_are_named():
    state = small_net().state_dict()
    for key in [name for name in state if "_embedder.mlp." in name]:
        with pytest.raises(UserError, match=re.escape(f"without '{key}'")):
            with_silent_h({name: value for name, value in state.items() if name != key})


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_does_not(tmp_path, zipped):
    trap, file = tmp_path / "trap", tmp_path / "theirs.pt"
    torch.save({"ema": small_net().state_dict(), "args": Evil(trap)}, file, _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path, file, HEADS)
    assert "mkdir" in message
    assert "--allow_code=true" in message
    assert not trap.exists()
    file.write_bytes(pickle.dumps(Evil(trap), protocol=2))
    refusal(tmp_path, file, HEADS)
    assert not trap.exists()


def test_code_runs_only_where_the_user_insists(tmp_path):
    net, trap = small_net(), tmp_path / "trap"
    torch.save({"ema": net.state_dict(), "args": Evil(trap)}, tmp_path / "theirs.pt")
    ours, _ = importing.imported(tmp_path / "theirs.pt", tmp_path / "ours.ckpt", HEADS, "--allow_code=true")
    assert outputs(ours, **inputs()).equal(outputs(net, **inputs()))
    assert trap.exists()


@pytest.mark.parametrize("missing", ["class", "module"])
def test_a_pickle_of_a_script_that_is_not_here(tmp_path, missing, monkeypatch):
    """As training scripts write their options: their classes are of __main__, or of a module of theirs."""
    module = types.ModuleType("of_a_script")
    module.Options = type("Options", (), {"__module__": "of_a_script"})
    monkeypatch.setitem(sys.modules, "of_a_script", module)
    torch.save({"ema": small_net().state_dict(), "args": module.Options()}, tmp_path / "theirs.pt")
    if missing == "class":
        del module.Options
    else:
        monkeypatch.delitem(sys.modules, "of_a_script")
    message = refusal(tmp_path, tmp_path / "theirs.pt", HEADS, "--allow_code=true")
    assert "whose code is not here" in message
    assert "PYTHONPATH" in message


NO_FILES = {
    "web page": (b"\n<!DOCTYPE html><html><head></head></html>", "is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2700000000\n", "git lfs pull"),
    "empty": (b"", "is empty"),
    "other": (b"GGUF\x03\x00\x00\x00", "begins with b'GGUF"),
    "pickle": (b"\x80\x02}q\x00.", "cannot be read as torch"),
    "zip": (b"PK\x03\x04" + bytes(200), "cannot be read as torch"),
    "cut safetensors": ((500).to_bytes(8, "little") + b'{"a":{"dtype":"F32"', "cannot be read as safetensors"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_of_weights(tmp_path, kind):
    content, expected = NO_FILES[kind]
    (tmp_path / "theirs.pt").write_bytes(content)
    assert expected in refusal(tmp_path, tmp_path / "theirs.pt")


def test_damaged_files(tmp_path):
    state = small_net().state_dict()
    torch.save(state, tmp_path / "theirs.pt")
    save_file(state, tmp_path / "theirs.safetensors")
    for name in ("theirs.pt", "theirs.safetensors"):
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
        assert "It is cut or damaged" in refusal(tmp_path, file, HEADS)
    torch.save(state, tmp_path / "older.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "older.pt").read_bytes()
    storage = whole.index(b"cpu") - 12  # digits of the first tensor's place
    for damaged in (whole[: storage + 200], whole[:-2], whole[:storage] + b"x" + whole[storage + 1 :]):
        (tmp_path / "older.pt").write_bytes(damaged)
        assert "It is cut or damaged" in refusal(tmp_path, tmp_path / "older.pt", HEADS)
    assert "does not exist" in refusal(tmp_path, tmp_path / "nothing.pt")
    (tmp_path / "folder").mkdir()
    assert "no orbax checkpoint in it" in refusal(tmp_path, tmp_path / "folder")


def _changed(**changes):
    state = {**small_net().state_dict(), **changes}
    return {name: value for name, value in state.items() if value is not None}


UNFIT = {
    "missing": (_changed(**{"blocks.1.mlp.fc2.bias": None}), HEADS, "1 missing: blocks.1.mlp.fc2.bias"),
    "left over": (_changed(**{"blocks.0.gate": torch.ones(2)}), HEADS, "1 without a place: blocks.0.gate"),
    "shape": (_changed(**{"blocks.0.attn.proj.bias": torch.ones(8)}), HEADS, "proj.bias (8,) where (16,) fits"),
    "not a number": (_changed(**{"blocks.0.attn.proj.bias": torch.full((16,), torch.nan)}), HEADS, "that are no numbers"),
    "nobody's": ({"conv.weight": torch.ones(2), "fc.weight": torch.ones(3)}, HEADS, "no known SiT"),
    "no tensors": ({"epoch": 3, "args": {"lr": 1}}, HEADS, "no tensors under epoch, args"),
    "a list": ([torch.ones(2)], HEADS, "a list in it"),
    "heads": (_changed(), "--weights=auto", "number of attention heads"),
    "wrong heads": (_changed(), "--num_heads=3", "num_heads = 3"),
    "no heads": (_changed(), "--num_heads=0", "--num_heads=0, expected at least 1"),
    "no side": (_changed(pos_embed=None), "--latent_size=0", "--latent_size=0, expected at least 1"),
    "no classes": (_changed(**{"y_embedder.embedding_table.weight": None}), "--num_classes=1", "a network without labels"),
    "whole numbers": (_changed(**{"blocks.0.attn.proj.bias": torch.ones(16, dtype=torch.int8)}), HEADS, "that are no numbers"),
    "a block without number": (
        {**flow_matching_state(small_net()), "decoder_blocks.gate": torch.ones(2)},
        HEADS,
        "1 without a place: decoder_blocks.gate",
    ),
    "which way": (flow_matching_state(small_net()), HEADS, "--format=sit"),
    "another path": ({"ema": _changed(), "args": argparse.Namespace(path_type="cosine")}, HEADS, "path_type = cosine"),
    "another format": (_changed(), "--format=zhuyu", "without 'r_embedder.mlp.0.weight'"),
    "norms": (
        {**flow_matching_state(small_net(qk_norm=True)), "projectors.0.0.bias": torch.ones(1)},
        HEADS,
        "qk_norm",
    ),
    "norms of others": (small_net(qk_norm=True).state_dict(), HEADS, "qk_norm"),
    "table": (_changed(pos_embed=torch.ones(1, 5, 16)), HEADS, "position table of 5 tokens"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_weights_that_fit_nowhere(tmp_path, kind):
    content, option, expected = UNFIT[kind]
    torch.save(content, tmp_path / "theirs.pt")
    assert expected in refusal(tmp_path, tmp_path / "theirs.pt", option)


def test_out_is_not_written_over(tmp_path):
    torch.save(small_net().state_dict(), tmp_path / "theirs.pt")
    importing.imported(tmp_path / "theirs.pt", tmp_path / "kept.ckpt", HEADS)
    before = read_checkpoint(tmp_path / "kept.ckpt")
    assert before["imported"]["format"] == "meanflow"
    from mf_lightning.__main__ import main

    for out in ("kept.ckpt", "kept.pt"):
        with pytest.raises(SystemExit):
            main(["import", str(tmp_path / "theirs.pt"), str(tmp_path / out), HEADS])
