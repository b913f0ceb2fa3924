"""`verify` names every damaged file and shows what is whole; `stats` agrees with what sampling gives."""

import json
import shutil
import tempfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from mf_lightning.__main__ import main
from mf_lightning.autoencoders import KLAutoencoder
from mf_lightning.data import remote
from mf_lightning.data.datamodule import LatentDataModule
from mf_lightning.data.shards import DatasetInfo, file_checksum, read_info, write_info, write_shard
from mf_lightning.draws import Stream
from mf_lightning.pixels import from_uint8, to_uint8
from mf_lightning.tools import reading
from mf_lightning.tools.reading import DataFiles
from mf_lightning.tools.stats import latent_moments, stats
from mf_lightning.tools.verify import verify
from mf_lightning.types import UserError

DIGITS = "mf_lightning:digits/autoencoder"


def write_set(path, *, kind="moments", flip=True, counts=(5, 3), dtype="float16", autoencoder="toy@01", channels=2, seed=0):
    """Write a small data set with a mean of its own in each channel; return its info."""
    rng, shards = np.random.default_rng(seed), []
    for number, count in enumerate(counts):
        mean = rng.normal(0, 2, (2, count, channels, 4, 4)) + 3 * np.arange(channels)[:, None, None]
        std = np.abs(rng.normal(0, 1.5, mean.shape))
        both = (np.concatenate([mean, std], axis=2) if kind == "moments" else mean).astype(dtype)
        labels = (np.arange(count) + number) % 3
        shards.append(write_shard(path, "train", number, latents=both[0], labels=labels, flipped=both[1] if flip else None))
    shape = (channels, 4, 4)
    info = DatasetInfo(kind, shape, dtype, flip, autoencoder, 0.5, 1.0, 8, ("a", "b", "c"), {"train": tuple(shards)})
    write_info(path, info)
    return info


def resign(path, file) -> None:
    """Give ``dataset.json`` the checksum that a file has now."""
    info = read_info(path)
    name, ending = file.name.split(".")[:2]
    shards = tuple(
        replace(shard, sha256={**shard.sha256, ending: file_checksum(file)}) if shard.name == name else shard
        for shard in info.splits["train"]
    )
    write_info(path, replace(info, splits={"train": shards}))


def rewrite(file, change) -> None:
    """Change a shard's array in place."""
    array = np.load(file)
    change(array)
    np.save(file, array)


# verify


def test_a_whole_set(tmp_path, capsys):
    write_set(tmp_path)
    verify(tmp_path)
    printed = capsys.readouterr().out
    assert (
        "moments of shape (2, 4, 4), float16, with mirrored copies, of 8 pixels, made by toy@01; scale 0.5, shift 1.0"
        in printed
    )
    assert "train: 8 samples in 2 shard(s), 2 to 3 per class in 3 classes, values from" in printed
    assert "checksums good, values all finite" in printed


def set_value(index, value):
    return lambda array: array.__setitem__(index, value)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("00001.latents.npy", set_value((2, 0, 1, 1), np.nan), r"not finite in '.*00001.latents.npy', row 2"),
        ("00000.latents_flip.npy", set_value((4, 3, 1, 1), np.inf), r"not finite in '.*00000.latents_flip.npy', row 4"),
        ("00000.latents.npy", set_value((1, 2, 0, 0), -0.5), r"deviation below 0 in '.*00000.latents.npy', row 1"),
        ("00001.labels.npy", set_value(1, 3), r"Got label 3 in row 1 of '.*00001.labels.npy'"),
        ("00001.labels.npy", set_value(1, -1), r"Got label -1 in row 1 of '.*00001.labels.npy'"),
    ],
)
def test_wrong_values_with_a_right_checksum(name, change, match, tmp_path, monkeypatch):
    write_set(tmp_path)
    monkeypatch.setattr(reading, "BLOCK", 200)  # rows are numbered across blocks
    rewrite(tmp_path / "train" / name, change)
    resign(tmp_path, tmp_path / "train" / name)
    with pytest.raises(UserError, match=r"1 damaged file\(s\).*" + match):
        verify(tmp_path)


def test_a_mean_below_0_is_no_damage(tmp_path):
    write_set(tmp_path, kind="latents")
    rewrite(tmp_path / "train" / "00000.latents.npy", set_value((1, 1, 0, 0), -100))
    resign(tmp_path, tmp_path / "train" / "00000.latents.npy")
    verify(tmp_path)


def test_every_damaged_file_is_named(tmp_path, capsys):
    write_set(tmp_path)
    folder = tmp_path / "train"
    flipped = bytearray((folder / "00000.latents_flip.npy").read_bytes())
    flipped[-1] ^= 1
    (folder / "00000.latents_flip.npy").write_bytes(flipped)
    whole = (folder / "00000.latents.npy").read_bytes()
    (folder / "00000.latents.npy").write_bytes(whole[:-7])
    (folder / "00001.labels.npy").unlink()
    np.save(folder / "00001.latents.npy", np.zeros((3, 4, 4), np.float16))
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tmp_path)])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    named = [line for line in printed.out.splitlines() if line.startswith("  damaged: ")]
    assert len(named) == 4
    for name, what in (
        ("00000.latents_flip.npy", "Got checksum"),
        ("00000.latents.npy", "truncated"),
        ("00001.labels.npy", "Got no file"),
        ("00001.latents.npy", r"Got (3, 4, 4) values"),
    ):
        assert any(name in line and what in line for line in named), name
    assert "4 DAMAGED FILE(S)" in printed.out
    assert "Got 4 damaged file(s)" in printed.err


def test_the_grid_shows_what_was_encoded(tmp_path, capsys):
    autoencoder = KLAutoencoder(DIGITS)
    pictures = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    for number in range(3):
        pictures[number, 0, 4 + 8 * number : 12 + 8 * number, 6:26] = 255
    moments = autoencoder.encode(from_uint8(pictures))
    moments[:, 4:] = 0  # every draw is the mean
    labels = np.array([2, 0, 1])
    flipped = autoencoder.encode(from_uint8(pictures.flip(2)))
    flipped[:, 4:] = 0
    shard = write_shard(tmp_path, "train", 0, latents=moments.numpy(), labels=labels, flipped=flipped.numpy())
    info = DatasetInfo(
        "moments", (4, 8, 8), "float32", True, autoencoder.id, 1.0916, 0.0, 32, tuple("abc"), {"train": (shard,)}
    )
    write_info(tmp_path, info)
    verify(tmp_path, grid=tmp_path / "new" / "grid.png")
    sheet = np.array(Image.open(tmp_path / "new" / "grid.png"))
    expected = to_uint8(autoencoder.decode(torch.stack([moments[:, :4], flipped[:, :4]], 1).flatten(0, 1)))
    assert sheet.shape == (36, 6 * 34 + 2, 3)
    for number, picture in enumerate(expected):
        shown = sheet[2:34, 2 + 34 * number : 34 + 34 * number, 0].astype(int)
        assert abs(shown - picture[0].numpy()).max() <= 1
    assert abs(sheet[2:34, 2:34, 0].astype(int) - pictures[0, 0].numpy()).mean() < 20
    assert "row by row the samples 0 (class 2), 1 (class 0), 2 (class 1) of train, each with its mirrored copy" in (
        capsys.readouterr().out
    )


def test_an_empty_set_has_no_grid(tmp_path):
    write_set(tmp_path, counts=(0,), autoencoder="pixel", flip=False)
    with pytest.raises(UserError, match="Got no samples in"):
        verify(tmp_path, grid=tmp_path / "grid.png")


def test_the_grid_asks_for_the_right_autoencoder(tmp_path):
    write_set(tmp_path, autoencoder="pixel", channels=3)
    with pytest.raises(UserError, match=r"Got the autoencoder mf_lightning:digits/autoencoder@.*expected pixel"):
        verify(tmp_path, grid=tmp_path / "grid.png", autoencoder=DIGITS)
    verify(tmp_path, grid=tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (8 * 6 + 2, 2 * 6 + 2)
    with pytest.raises(UserError, match=r"ends in \.png"):
        verify(tmp_path, grid=tmp_path / "grid.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/grid\.png, which cannot be written"):
        verify(tmp_path, grid=tmp_path / "file" / "grid.png")
    with pytest.raises(UserError, match="without --grid"):
        verify(tmp_path, autoencoder="pixel")


def test_what_is_wrong_with_the_grid_is_told_before_all_is_read(tmp_path, capsys):
    write_set(tmp_path, autoencoder="pixel", channels=3)
    for options, match in (
        ({"grid": tmp_path / "grid.jpg"}, r"ends in \.png"),
        ({"grid": tmp_path / "grid.png", "autoencoder": DIGITS}, "expected pixel"),
    ):
        with pytest.raises(UserError, match=match):
            verify(tmp_path, **options)
        assert "train:" not in capsys.readouterr().out


def test_classes_are_counted(tmp_path, capsys):
    info = write_set(tmp_path)
    write_info(tmp_path, replace(info, class_names=("a", "b", "c", "d", "e")))
    verify(tmp_path)
    assert "0 to 3 per class, 2 of 5 classes without a sample" in capsys.readouterr().out
    write_set(tmp_path / "empty", counts=(0,))
    verify(tmp_path / "empty")
    assert "0 samples in 1 shard(s), 0 to 0 per class, 3 of 3 classes without a sample, no values" in capsys.readouterr().out
    latents = np.ones((2, 2, 4, 4), np.float16)
    shard = write_shard(tmp_path / "plain", "train", 0, latents=latents, labels=np.zeros(2, int))
    plain = replace(info, kind="latents", flip=False, class_names=(), splits={"train": (shard,)})
    write_info(tmp_path / "plain", plain)
    verify(tmp_path / "plain")
    assert "2 samples in 1 shard(s), without classes, values from 1 to 1" in capsys.readouterr().out


# behind a URL


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *args):
        pass


@pytest.fixture(params=["file", "memory", "http"])
def url(request, tmp_path, monkeypatch):
    """Return the URL at which what a test has written to tmp_path/set can be read."""
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    folder = tmp_path / "set"
    folder.mkdir()
    if request.param == "file":
        yield lambda: f"file://{folder}"
    elif request.param == "memory":
        import fsspec

        def upload() -> str:
            fsspec.filesystem("memory").put(f"{folder}/", f"/{tmp_path.name}/", recursive=True)
            return f"memory://{tmp_path.name}"

        yield upload
    else:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        server.daemon_threads = True
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True).start()
        yield lambda: f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("counts", [(5, 3), (2,) * 12])
def test_a_url_says_what_its_directory_says(counts, url, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "aside"))
    (tmp_path / "aside").mkdir()
    write_set(tmp_path / "set", autoencoder="pixel", channels=3, counts=counts)
    told, place = [], url()
    for path, grid in ((str(tmp_path / "set"), "near.png"), (place, "far.png")):
        main(["verify", path, "--grid", str(tmp_path / grid)])
        main(["stats", path, "--json"])
        told.append(capsys.readouterr().out.replace(path, "PATH").replace(grid, "GRID"))
    assert told[0] == told[1]
    assert "checksums good" in told[1]
    assert (tmp_path / "near.png").read_bytes() == (tmp_path / "far.png").read_bytes()
    assert not list((tmp_path / "aside").iterdir()), "what was fetched is not kept"


def test_every_damaged_file_behind_a_url_is_named(url, tmp_path, capsys):
    write_set(tmp_path / "set")
    folder = tmp_path / "set" / "train"
    altered = bytearray((folder / "00000.latents_flip.npy").read_bytes())
    altered[-1] ^= 1
    (folder / "00000.latents_flip.npy").write_bytes(altered)
    (folder / "00000.latents.npy").write_bytes((folder / "00000.latents.npy").read_bytes()[:-200])
    (folder / "00001.labels.npy").unlink()
    rewrite(folder / "00001.latents.npy", set_value((2, 0, 1, 1), np.nan))
    resign(tmp_path / "set", folder / "00001.latents.npy")
    place = url()
    with pytest.raises(UserError, match=r"Got 4 damaged file\(s\)"):
        verify(place, fetch_retries=1)
    named = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  damaged: ")]
    assert len(named) == 4
    for name, what in (
        ("00000.latents_flip.npy", "Got checksum"),
        ("00000.latents.npy", "Got no whole"),
        ("00001.labels.npy", "Got no file"),
        ("00001.latents.npy", "not finite"),
    ):
        (line,) = [line for line in named if f"{place.rstrip('/')}/train/{name}" in line]
        assert what in line
        assert "data.init_args" not in line
    with pytest.raises(UserError, match=r"Got no whole '.*00000\.latents\.npy' in 1 attempts.*raise --fetch_retries"):
        stats(place, fetch_retries=0)


def test_urls_that_cannot_be_read(url, tmp_path):
    for command in (verify, stats):
        with pytest.raises(UserError, match=r"Got no file '.*dataset\.json'.* Correct the URL, or upload it again"):
            command(url())
        with pytest.raises(UserError, match="a protocol that fsspec knows"):
            command("nonsense://set")
        with pytest.raises(UserError, match="Got --fetch_retries -1"):
            command(url(), fetch_retries=-1)
        write_set(tmp_path / "near")
        with pytest.raises(UserError, match="Got --storage_options for the directory"):
            command(str(tmp_path / "near"), storage_options={"anon": True})


# stats


def sampled(path, info: DatasetInfo, *, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and std of each channel of many draws of all rows, as training draws them, unscaled."""
    data = LatentDataModule(str(path), batch_size=1, val_split="train")
    split = data.split("train")
    stored = [split.gather(np.arange(len(split)))[0]]
    if info.flip:
        stored.append(split.gather(np.arange(len(split)), np.ones(len(split), bool))[0])
    stored = torch.from_numpy(np.concatenate(stored))
    drawn = torch.cat(
        [data.to_latents(stored, stream=Stream.MOMENTS, step=step, rows=torch.arange(len(stored))) for step in range(draws)]
    )
    z = (drawn.double() / info.scale + info.shift).transpose(0, 1).flatten(1)
    return z.mean(1).numpy(), z.std(1, correction=0).numpy()


@pytest.mark.parametrize("kind", ["moments", "latents"])
@pytest.mark.parametrize("flip", [True, False])
def test_stats_are_those_of_sampled_latents(kind, flip, tmp_path, monkeypatch):
    info = write_set(tmp_path, kind=kind, flip=flip, counts=(30, 1, 20), channels=3, seed=4)
    monkeypatch.setattr(reading, "BLOCK", 700)
    found = latent_moments(DataFiles(tmp_path), "train")
    mean, std = sampled(tmp_path, info, draws=400 if kind == "moments" else 1)
    exact = kind == "latents"
    assert found.mean == pytest.approx(mean, abs=1e-6 if exact else 0.01)
    assert found.std == pytest.approx(std, rel=1e-6 if exact else 5e-3)
    assert found.count == (2 if flip else 1) * 51 * 16


def test_stats_keep_small_spread_on_a_large_mean(tmp_path):
    latents = (1000 + np.arange(32, dtype=np.float32).reshape(2, 1, 4, 4) / 1000).astype(np.float32)
    shard = write_shard(tmp_path, "train", 0, latents=latents, labels=np.zeros(2, int))
    info = DatasetInfo("latents", (1, 4, 4), "float32", False, "toy", 1.0, 0.0, 8, (), {"train": (shard,)})
    write_info(tmp_path, info)
    assert latent_moments(DataFiles(tmp_path), "train").std[0] == pytest.approx(latents.astype(float).std(), rel=1e-12)


def test_stats_as_json(tmp_path, capsys):
    write_set(tmp_path, channels=2)
    main(["stats", str(tmp_path), "--json"])
    printed = capsys.readouterr().out.splitlines()
    body = json.loads(printed[-1])
    assert all(isinstance(value, (int, float)) for value in body.values())
    found = latent_moments(DataFiles(tmp_path), "train")
    assert [body["std_0"], body["std_1"]] == pytest.approx(list(found.std))
    assert body["samples"] == 8
    data = np.concatenate([found.mean - body["mean"], found.std])
    assert body["std"] ** 2 == pytest.approx((data**2).sum() / 2)
    assert f"network input at scale 0.5, shift 1: mean {(body['mean'] - 1) / 2:.4f}, std {body['std'] / 2:.4f}" in printed[-2]
    main(["stats", str(tmp_path), "--json=false", "--split", "train"])
    assert "{" not in capsys.readouterr().out


def test_stats_refuse_what_has_no_numbers(tmp_path):
    write_set(tmp_path)
    with pytest.raises(UserError, match="Got the split 'val'"):
        stats(tmp_path, split="val")
    rewrite(tmp_path / "train" / "00001.latents.npy", set_value((2, 0, 1, 1), np.nan))
    with pytest.raises(UserError, match=r"not finite .*verify"):
        stats(tmp_path)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match="Got no file"):
        stats(tmp_path)
