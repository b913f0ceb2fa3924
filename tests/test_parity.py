"""Our numbers against public implementations: the whole folder once, and proof that the comparison can fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mf_lightning.flow import MeanFlowLoss
from mf_lightning.interop import public_sit
from mf_lightning.interop.flax_names import from_flax
from mf_lightning.nets import SiT
from mf_lightning.types import LatentSpec, UserError
from tests.nets import along
from tests.parity.__main__ import main
from tests.parity.family import Family
from tests.parity.report import DEVIATES, FAIL, NOT_BUILT, OK, Row, difference
from tests.parity.suite import check_directory, check_file

ORACLES = Path(__file__).resolve().parents[1].parent / "shared" / "oracles"


@pytest.fixture(scope="module")
def oracles() -> Path:
    if not ORACLES.is_dir():
        pytest.skip("no stored reference numbers: ../shared/oracles, seen from the repository, is not there")
    return ORACLES


@pytest.fixture(scope="module")
def rows(oracles: Path) -> list[Row]:
    return check_directory(oracles)


def statuses(rows: list[Row]) -> dict[str, str]:
    return {row.quantity: row.status for row in rows}


# ---------------------------------------------------------------------------------------------- the stored folder


def test_nothing_fails(rows):
    assert not [row for row in rows if row.status == FAIL]


def test_every_file_has_rows_and_every_array_is_read(rows, oracles):
    assert {row.file for row in rows} == {path.name for path in oracles.glob("*.npz")}
    assert not [row for row in rows if "more arrays" in row.quantity]


def test_improved_meanflow_is_not_built_and_only_that(rows):
    not_built = {row.file for row in rows if row.status == NOT_BUILT}
    assert not_built == {row.file for row in rows if "imf" in row.file}
    assert len(not_built) == len([row for row in rows if row.status == NOT_BUILT])


def test_only_what_other_projects_do_differently_deviates(rows):
    deviating = {(row.file.split("_cfg")[0], row.quantity.split(" ")[0]) for row in rows if row.status == DEVIATES}
    v1 = {f"v1_default/{part}" for part in ("t", "r_given_r_ne_t", "fraction_r_eq_t")}
    of_zhuyu = {"loss", "loss_per_sample", "loss_per_sample_p0.5", "grad"}
    assert deviating == {("time_sampling_py_meanflow.npz", part) for part in v1} | {
        ("meanflow_loss_zhuyu", part) for part in of_zhuyu
    }


def copy_changed(source: Path, folder: Path, **changed) -> Path:
    """Copy a file with some arrays replaced; None leaves one out."""
    with np.load(source) as file:
        arrays = {key: file[key] for key in file.files} | changed
    np.savez(folder / source.name, **{key: value for key, value in arrays.items() if value is not None})
    return folder


def test_a_perturbed_field_fails(oracles, tmp_path, capsys):
    source = oracles / "sit_forward_haoyi.npz"
    u = np.load(source)["u"]
    u[0, 0, 0, 0] += 1e-3 * np.abs(u).max()
    assert main([str(copy_changed(source, tmp_path, u=u)), "--json"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ok"] is False
    failed = {row["quantity"]: row["error"] for row in report["rows"] if row["status"] == FAIL}
    assert set(failed) == {"u", "u (attention: math)", "u (imported, torch)", "u (imported, safetensors)"}
    assert all(error == pytest.approx(1e-3, rel=0.01) for error in failed.values())


def test_the_untouched_copy_passes(oracles, tmp_path, capsys):
    shutil.copy(oracles / "sit_forward_zhuyu.npz", tmp_path)
    assert main([str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ok"] is True
    assert report["counts"] == {OK: len(report["rows"]), FAIL: 0, DEVIATES: 0, NOT_BUILT: 0}
    assert set(report["rows"][0]) == {"file", "quantity", "status", "error", "bound", "note"}


def test_nan_and_missing_arrays_fail(oracles, tmp_path):
    source = oracles / "sit_forward_haoyi.npz"
    c = np.load(source)["mid/c"]
    c[0, 0] = np.nan
    found = check_directory(copy_changed(source, tmp_path, **{"mid/c": c, "u_f64": None}))
    failed = {row.quantity: row.note for row in found if row.status == FAIL}
    assert set(failed) == {"mid/c", "u_f64"}
    assert "missing array 'u_f64'" in failed["u_f64"]


def test_one_wrong_parameter_gradient_fails(oracles, tmp_path):
    name = "meanflow_loss_haoyi_cfg_k0.5_w1.npz"
    key = "p0.5/grad/h_embedder.mlp.2.bias"
    shutil.copy(oracles / "meanflow_weights_torch.npz", tmp_path)
    copy_changed(oracles / name, tmp_path, **{key: np.load(oracles / name)[key] * 1.001})
    failed = [row.quantity for row in check_file(Family(tmp_path), name) if row.status == FAIL]
    assert failed == ["p0.5/grad (worst: h_embedder.mlp.2.bias)"]


def test_loss_file_without_its_inputs_fails(oracles, tmp_path):
    shutil.copy(oracles / "meanflow_loss_official_none.npz", tmp_path)
    (row,) = check_directory(tmp_path)
    assert row.status == FAIL
    assert "missing file 'meanflow_loss_haoyi_none.npz'" in row.note


TANGENTS = {"time only": (0, 0, 1), "velocity and r": (1, 1, 0), "all three": (1, 1, 1)}


@pytest.mark.parametrize("tangent", TANGENTS.values(), ids=TANGENTS.keys())
def test_a_wrong_tangent_fails(oracles, monkeypatch, tangent):
    """The total derivative runs along (dz, dr, dt) = (v, 0, 1); no other one passes, in any case, at any power."""

    monkeypatch.setattr(MeanFlowLoss, "_u_and_derivative", along(tangent))
    names = [path.name for source in ("haoyi", "official") for path in oracles.glob(f"meanflow_loss_{source}_*.npz")]
    assert names
    for name in names:
        found = statuses(check_file(Family(oracles), name))
        must_fail = [key for key in found if key in ("u_tgt", "loss_raw") or "/grad" in key]
        assert len(must_fail) >= 5
        assert {found[key] for key in must_fail} == {FAIL}, name
        assert found["u"] == found["v_g"] == OK


# ------------------------------------------------------------------------------------------- without stored numbers


def test_no_folder_and_an_empty_one_say_what_to_do(tmp_path, capsys):
    for folder in (tmp_path / "none", tmp_path):
        assert main([str(folder)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("Got the folder")
        assert "expected" in message
        assert "Give the folder" in message


def test_unknown_and_broken_files_fail(tmp_path):
    np.savez(tmp_path / "sit_forward_somebody.npz", u=np.zeros(3))
    (tmp_path / "time_sampling.npz").write_bytes(b"no archive")
    (tmp_path / "README.md").write_text("not looked at")
    found = {row.file: row for row in check_directory(tmp_path)}
    assert {row.status for row in found.values()} == {FAIL}
    assert found["sit_forward_somebody.npz"].quantity == "unknown file"
    assert "unreadable" in found["time_sampling.npz"].note


def test_difference_is_relative_to_the_largest_value_and_absolute_for_zeros():
    assert difference(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0])) == pytest.approx(0.2)
    assert difference(torch.tensor([0.0, 0.25]), torch.zeros(2)) == 0.25
    assert not difference(torch.tensor([1.0, torch.nan]), torch.ones(2)) <= 1


def small_net(channels: int = 3) -> SiT:
    net = SiT(LatentSpec((channels, 8, 8), 5), patch_size=2, depth=2, hidden_size=16, num_heads=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def test_zhuyu_names_there_and_back():
    ours = small_net().state_dict()
    theirs = {name.replace("h_embedder.", "r_embedder."): value for name, value in ours.items()}
    back = public_sit.from_zhuyu(theirs)
    assert back.keys() == ours.keys()
    assert all(back[name] is theirs[name.replace("h_embedder.", "r_embedder.")] for name in back)
    assert public_sit.from_haoyi(ours) == ours


def test_willisma_network_ignores_r_and_loses_its_variances():
    net = small_net()
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("h_embedder.")}
    patches = {"weight": (4, 3, 16), "bias": (4, 3)}  # (p p, C) first, for patches of 2 x 2
    twice = {
        f"final_layer.linear.{kind}": torch.cat([state[f"final_layer.linear.{kind}"].view(shape)] * 2, dim=1)
        for kind, shape in patches.items()
    }
    for value in twice.values():
        value[:, 3:] += 1  # the variances, which must go
    twice = {name: value.flatten(0, 1) for name, value in twice.items()}
    found = public_sit.from_willisma({**state, **twice})
    assert all(found[name].equal(value) for name, value in state.items())
    net.load_state_dict(found, strict=True)
    x, t, y = torch.randn(4, 3, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 5])
    assert net(x, t=t, r=t, y=y).equal(net(x, t=t, r=0 * t, y=y))


def test_other_state_dicts_are_refused():
    ours = small_net().state_dict()
    for convert in (public_sit.from_zhuyu, public_sit.from_willisma):
        with pytest.raises(UserError, match=r"Got a state dict with.* expected"):
            convert(ours)
    ours["final_layer.linear.weight"] = torch.zeros(7, 16)
    with pytest.raises(UserError, match="last layer of 7 rows, expected 12"):
        public_sit.without_learned_sigma(ours)


def test_flax_names_and_layouts():
    kernel, patches = torch.arange(6.0).view(2, 3), torch.arange(24.0).view(2, 2, 3, 2)
    found = from_flax({
        "params/net/blocks/layers_1/adaLN_modulation/layers_1/_flax_linear/kernel": kernel,
        "net/t_embedder/mlp/layers_2/_flax_linear/bias": kernel[0],
        "net/x_embedder/proj/kernel": patches,
        "net/y_embedder/embedding_table/_flax_embedding/embedding": kernel,
    })  # fmt: skip
    assert list(found) == [
        "blocks.1.adaLN_modulation.1.weight",
        "t_embedder.mlp.2.bias",
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
    ]
    assert found["blocks.1.adaLN_modulation.1.weight"].equal(kernel.T)
    assert found["x_embedder.proj.weight"][1, 2, 0, 1] == patches[0, 1, 2, 1]
    assert found["y_embedder.embedding_table.weight"].equal(kernel)
