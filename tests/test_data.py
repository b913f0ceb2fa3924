"""The latent format there and back, the order of samples, and what is refused."""

import json

import numpy as np
import pytest
import torch

from mf_lightning.data.datamodule import LatentDataModule, same_autoencoder
from mf_lightning.data.loader import EvalLoader, LatentSplit, TrainLoader
from mf_lightning.data.shards import (
    DatasetInfo,
    OpenShard,
    open_split,
    read_info,
    verify_checksums,
    write_info,
    write_shard,
)
from mf_lightning.data.synthetic import SevenSegmentDataModule, seven_segment_digits
from mf_lightning.draws import Stream
from mf_lightning.tools.verify import verify
from mf_lightning.types import LatentSpec, UserError


def write_dataset(path, *, counts=(5, 3), kind="moments", flip=False, labels=None, classes=4, scale=0.5, shift=0.1):
    """Write a small data set whose value at row i tells i; return its info."""
    info = DatasetInfo(kind, (2, 4, 4), "float16", flip, "toy@0123", scale, shift, 8, tuple("abcdefgh"[:classes]), splits={})
    splits = {}
    for split, sizes in {"train": counts, "val": (4,)}.items():
        shards, first = [], 0
        for number, count in enumerate(sizes):
            rows = np.arange(first, first + count)
            stored = np.broadcast_to(rows[:, None, None, None], (count, *info.stored_shape)).astype(np.float16)
            y = rows % classes if labels is None else labels[first : first + count]
            flipped = -stored if flip else None
            shards.append(write_shard(path, split, number, latents=stored.copy(), labels=np.asarray(y), flipped=flipped))
            first += count
        splits[split] = tuple(shards)
    info = DatasetInfo(**{**info.__dict__, "splits": splits})
    write_info(path, info)
    return info


def in_memory(n: int) -> LatentSplit:
    return LatentSplit([OpenShard(np.arange(n, dtype=np.float32).reshape(n, 1, 1, 1), np.arange(n) % 3, None)])


def loader(n=20, batch=4, rank=0, world=1, accumulate=1, start=0, seed=0):
    return TrainLoader(
        in_memory(n),
        global_batch_size=batch,
        seed=seed,
        rank=rank,
        world_size=world,
        accumulate=accumulate,
        start_step=lambda: start,
    )


def test_info_there_and_back(tmp_path):
    info = write_dataset(tmp_path, flip=True)
    assert read_info(tmp_path) == info
    body = json.loads((tmp_path / "dataset.json").read_text())
    assert body["format_version"] == 1
    assert body["splits"]["train"]["count"] == 8
    assert [s["count"] for s in body["splits"]["train"]["shards"]] == [5, 3]
    assert not list(tmp_path.rglob("*.tmp"))


def test_shards_are_plain_numpy_and_memory_mapped(tmp_path):
    info = write_dataset(tmp_path)
    plain = np.load(tmp_path / "train" / "00001.latents.npy")
    assert plain.shape == (3, 4, 4, 4)
    assert plain[0, 0, 0, 0] == 5
    shards = open_split(tmp_path, info, "train", checksums=True)
    assert isinstance(shards[0].latents, np.memmap)


@pytest.mark.parametrize("flip", [False, True])
def test_gather_across_shards(tmp_path, flip):
    split = LatentSplit(open_split(tmp_path, write_dataset(tmp_path, flip=flip), "train"))
    index = np.array([7, 0, 4, 5, 0])
    mirrored = np.array([True, False, True, False, True]) if flip else None
    latents, labels = split.gather(index, mirrored)
    sign = np.where(mirrored, -1, 1) if flip else 1
    assert (latents[:, 0, 0, 0] == index * sign).all()
    assert (labels == index % 4).all()


def test_every_sample_once_an_epoch_and_the_stream_has_no_seams():
    n, batch = 10, 4  # batches straddle epochs
    seen = np.concatenate([loader(n, batch).samples_at(step * batch + np.arange(batch)) for step in range(5)])
    assert sorted(seen[:n]) == sorted(seen[n:]) == list(range(n))
    assert list(seen[:n]) != list(seen[n:])
    other_seed = loader(n, batch, seed=1).samples_at(np.arange(n))
    assert list(other_seed) != list(seen[:n])


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 6)])
def test_deals_change_nothing(world, accumulate):
    """The same (sample, row) pairs make up each optimizer step, whatever the devices and accumulated batches."""
    n, batch = 24, 12
    whole = [{(int(i), int(r)) for i, r in zip(b.index, b.row, strict=True)} for b in loader(n, batch)]
    steps = [set() for _ in whole]
    for rank in range(world):
        for number, part in enumerate(loader(n, batch, rank=rank, world=world, accumulate=accumulate)):
            assert len(part.index) == batch // (world * accumulate)
            pairs = {(int(i), int(r)) for i, r in zip(part.index, part.row, strict=True)}
            assert not pairs & steps[number // accumulate]
            steps[number // accumulate] |= pairs
    assert steps == whole


def test_a_resumed_loader_goes_on_where_it_stopped():
    whole = [b.index.tolist() for b in loader(20, 4)]
    assert len(whole) == 5
    resumed = [b.index.tolist() for b in loader(20, 4, start=3)]
    assert resumed[:2] == whole[3:]


def test_eval_loader_reads_each_sample_once():
    seen = [i for rank in range(3) for b in EvalLoader(in_memory(11), batch_size=2, rank=rank, world_size=3) for i in b.index]
    assert sorted(map(int, seen)) == list(range(11))
    assert len(EvalLoader(in_memory(11), batch_size=2, rank=2, world_size=3)) == 2


def test_moments_are_sampled_by_row_and_scaled(tmp_path):
    write_dataset(tmp_path)
    data = LatentDataModule(str(tmp_path), batch_size=2)
    mean, std = torch.full((6, 2, 4, 4), 3.0), torch.full((6, 2, 4, 4), 0.25)
    stored, rows = torch.cat([mean, std], 1).half(), torch.arange(6)
    x = data.to_latents(stored, stream=Stream.MOMENTS, step=4, rows=rows)
    assert x.dtype == torch.float32
    z = x / 0.5 + 0.1  # the network sees (z - shift) * scale
    assert abs(z.mean() - 3) < 0.1
    assert abs(z.std() - 0.25) < 0.05
    again = data.to_latents(stored[2:4], stream=Stream.MOMENTS, step=4, rows=rows[2:4])
    assert torch.equal(again, x[2:4])
    assert not torch.equal(data.to_latents(stored, stream=Stream.MOMENTS, step=5, rows=rows), x)
    assert data.latent_spec == LatentSpec((2, 4, 4), 4)


def test_stored_latents_are_not_sampled(tmp_path):
    write_dataset(tmp_path, kind="latents")
    data = LatentDataModule(str(tmp_path), batch_size=2)
    stored = torch.full((1, 2, 4, 4), 2.0).half()
    assert torch.allclose(data.to_latents(stored, stream=Stream.MOMENTS, step=0, rows=torch.tensor([0])), torch.tensor(0.95))


def test_synthetic_digits_are_a_function_of_seed_and_number():
    labels = np.arange(20) % 10
    whole = seven_segment_digits(labels, seed=1, first=0)
    assert (seven_segment_digits(labels[5:9], seed=1, first=5) == whole[5:9]).all()
    assert whole.min() == -1
    assert whole.max() <= 1
    assert not (seven_segment_digits(labels, seed=2, first=0) == whole).all()
    data = SevenSegmentDataModule(train_size=30, val_size=10, batch_size=10)
    assert len(data.split("train")) == 30
    assert not (data.split("val").shards[0].latents == data.split("train").shards[0].latents[:10]).all()


def test_verify_command(tmp_path, capsys):
    write_dataset(tmp_path)
    verify(tmp_path)
    assert "train: 8 samples in 2 shard(s)" in capsys.readouterr().out


# what is refused


def test_no_directory(tmp_path):
    with pytest.raises(UserError, match=r"no directory, expected one with dataset.json"):
        LatentDataModule(str(tmp_path / "absent"))


def test_no_dataset_json(tmp_path):
    write_dataset(tmp_path)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(UserError, match="interrupted preparation"):
        LatentDataModule(str(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [lambda b: b.pop("kind"), lambda b: b.update(format_version=9), lambda b: b["splits"]["train"].update(count=7)],
)
def test_damaged_dataset_json(tmp_path, damage):
    write_dataset(tmp_path)
    body = json.loads((tmp_path / "dataset.json").read_text())
    damage(body)
    (tmp_path / "dataset.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="cannot be read as a data set"):
        read_info(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a data set"):
        read_info(tmp_path)


def test_missing_and_truncated_shards(tmp_path):
    info = write_dataset(tmp_path)
    file = tmp_path / "train" / "00001.latents.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"00001.latents.npy.*truncated"):
        open_split(tmp_path, info, "train")
    file.write_bytes(content[:20])
    with pytest.raises(UserError, match=r"00001.latents.npy.*truncated"):
        open_split(tmp_path, info, "train")
    file.unlink()
    with pytest.raises(UserError, match=r"Got no file .*00001.latents.npy"):
        open_split(tmp_path, info, "train")


def test_altered_shard_is_found_by_its_checksum(tmp_path):
    info = write_dataset(tmp_path)
    file = tmp_path / "train" / "00000.latents.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    open_split(tmp_path, info, "train")  # size and header are right
    with pytest.raises(UserError, match=r"Got checksum .* of '.*00000.latents.npy'"):
        verify_checksums(tmp_path, info, "train")
    with pytest.raises(UserError, match="altered or damaged"):
        LatentDataModule(str(tmp_path), checksums=True).split("train")


def test_shard_of_another_shape(tmp_path):
    info = write_dataset(tmp_path)
    np.save(tmp_path / "train" / "00000.latents.npy", np.zeros((5, 4, 4, 2), np.float16))
    with pytest.raises(UserError, match=r"Got \(5, 4, 4, 2\) values of float16 .* expected \(5, 4, 4, 4\)"):
        open_split(tmp_path, info, "train")


@pytest.mark.parametrize("bad", [4, -1])
def test_labels_outside_the_class_count(tmp_path, bad):
    info = write_dataset(tmp_path, labels=[0, 1, 2, bad, 0, 1, 2, 3])
    with pytest.raises(UserError, match=rf"Got label {bad} in row 3 .* expected labels in \[0, 4\)"):
        open_split(tmp_path, info, "train")


def test_batches_that_do_not_divide():
    with pytest.raises(UserError, match="expected a multiple of 6"):
        loader(20, 4, world=3, accumulate=2)
    with pytest.raises(UserError, match="Got 3 training samples for a global batch of 4"):
        loader(3, 4)


def test_unknown_split(tmp_path):
    write_dataset(tmp_path)
    with pytest.raises(UserError, match=r"Set data\.val_split"):
        LatentDataModule(str(tmp_path), val_split="test")


def test_autoencoder_ids():
    assert same_autoencoder("a@12", "b@12")
    assert not same_autoencoder("a@12", "a@34")
    assert same_autoencoder("pixel", "pixel")
    assert same_autoencoder("stabilityai/sd-vae-ft-mse@12", "stabilityai/sd-vae-ft-mse")
    assert same_autoencoder("sd-vae-ft-mse@12", "stabilityai/sd-vae-ft-mse")  # a local copy
    assert not same_autoencoder("me/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse")
    assert not same_autoencoder("x@12", "y")
