"""Checkpoints: whole or refused, no code in them is run, and any strategy goes on from those of any other."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from mf_lightning.callbacks import AtomicCheckpointIO
from mf_lightning.checkpoints import find_last, is_sharded_checkpoint, publish, read_checkpoint, read_header, sharded, tidy
from mf_lightning.checkpoints.files import write_checkpoint
from mf_lightning.cli import load
from mf_lightning.nets import SiT
from mf_lightning.pipeline import MeanFlowPipeline
from mf_lightning.tools.consolidate import consolidate
from mf_lightning.types import LatentSpec, UserError
from tests.runs import RECIPES, ROOT, command_line, error_of
from tests.test_resume import state

FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "checksums.json", "meta.pt")
FSDP = [f"--trainer={ROOT / 'configs/trainer/fsdp.yaml'}", "--trainer.accelerator=cpu", "--trainer.devices=2"]
WAYS = {
    "one": [],
    "ddp": ["--trainer.strategy=ddp", "--trainer.devices=2"],
    "fsdp": FSDP,
    "fsdp in one file": [*FSDP, "--trainer.strategy.init_args.sharded_checkpoints=false"],
    "fsdp in the background": [*FSDP, "--trainer.plugins.init_args.background=true"],
}
SETTINGS = [
    f"--config={RECIPES / 'smoke.yaml'}", "--trainer.precision=64-true", "--trainer.limit_val_batches=0",
    "--sample_grid.rows=0",
    "--sample_eval.num_samples=0", "--self_check.enabled=false", "--ema.decays=[0.9,0.99]", "--data.init_args.batch_size=24",
    "--data.init_args.train_size=60", "--data.init_args.val_size=12", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]  # fmt: skip
HALF, WHOLE = 3, 6


def train(way: str, root: Path, *more: object) -> Path:
    """Train one way and return its last checkpoint: one process in this one, several in processes of their own."""
    options = [*SETTINGS, *WAYS[way], f"--trainer.default_root_dir={root}", *map(str, more)]
    if way == "one":
        resume = next((o.split("=", 1)[1] for o in options if o.startswith("--ckpt_path=")), None)
        cli = load([o for o in options if not o.startswith("--ckpt_path=")])
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=resume)
    else:
        run = command_line("fit", *options, env={"OMP_NUM_THREADS": "1"})
        assert run.returncode == 0, run.stderr[-3000:]
    return root / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Return the checkpoint at half way of each way, made once."""
    made: dict[str, Path] = {}

    def half(way: str) -> Path:
        if way not in made:
            made[way] = train(way, tmp_path_factory.mktemp("half"), f"--trainer.max_steps={HALF}")
        return made[way]

    return half


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run of one process that was never stopped."""
    return state(train("one", tmp_path_factory.mktemp("unbroken"), f"--trainer.max_steps={WHOLE}"))


@pytest.fixture
def directory(halves, tmp_path):
    """A copy of the sharded checkpoint, alone in its folder."""
    return Path(shutil.copytree(halves("fsdp").resolve(), tmp_path / "copy" / "step00000003.ckpt"))


def content(step: int) -> dict:
    """Return a small checkpoint."""
    weights = {f"net.{name}": torch.full((3, 4), float(step)) + i for i, name in enumerate("abc")}
    return {"global_step": step, "state_dict": weights, "ema": {"weights": {"0.9": {"a": torch.arange(5)}}}, "none": None}


def write(step: int, path: Path, *, shards: bool = False) -> Path:
    """Write a small checkpoint, in one file or as a directory of shards (of one process)."""
    if shards:
        sharded.write(content(step), sharded.prepare(path, step), path, group=None, background=False)
    else:
        write_checkpoint(content(step), path)
    return path


def flip(file: Path, at: int) -> None:
    """Turn the bits of one byte around."""
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 0xFF]))


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], bound: float = 1e-9) -> None:
    """Compare weights, averages, optimizer state and step of two checkpoints."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        scale = value.abs().max().double().clamp(min=1e-6)
        assert (value - other[name]).abs().max() <= bound * scale, name


# whole or refused


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_there_and_back(tmp_path):
    for shards in (False, True):
        path = write(7, tmp_path / f"{shards}" / "last.ckpt", shards=shards)
        assert is_sharded_checkpoint(path) is shards
        assert find_last(path.parent) == path
        checkpoint, expected = read_checkpoint(path), content(7)
        assert checkpoint["none"] is None
        one, other = (sharded.split(c) for c in (checkpoint, expected))
        assert one[0] == other[0]
        assert all(torch.equal(one[1][name], value) for name, value in other[1].items())


def test_one_altered_byte_anywhere_is_refused(tmp_path):
    good, bad = write(1, tmp_path / "good.ckpt"), tmp_path / "step00000002.ckpt"
    shutil.copy(good, bad)
    assert read_checkpoint(bad)["global_step"] == 1
    size = good.stat().st_size
    for at in [*range(0, size, 7), *range(size - 100, size)]:
        flip(bad, at)
        with pytest.raises(UserError, match=rf"step00000002.ckpt', which cannot be read \(.*newest good one is {good}\. Re"):
            read_checkpoint(bad)
        flip(bad, at)
    assert read_checkpoint(bad)["global_step"] == 1


def test_cut_empty_and_absent_ones_are_refused(tmp_path):
    good, bad = write(1, tmp_path / "good.ckpt"), tmp_path / "step00000002.ckpt"
    whole = good.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        bad.write_bytes(whole[:length])
        for read in (read_checkpoint, *([read_header] if length < len(whole) - 50 else [])):  # a header is not checked
            with pytest.raises(UserError, match=f"cannot be read .*, expected a whole one.* newest good one is {good}"):
                read(bad)
    bad.unlink()
    bad.mkdir()
    with pytest.raises(UserError, match=r"a directory without checksums.json is no checkpoint"):
        read_checkpoint(bad)
    with pytest.raises(UserError, match=r"absent.ckpt', which does not exist"):
        read_checkpoint(tmp_path / "absent.ckpt")


def test_the_newest_good_one_by_time_is_named(tmp_path):
    """Not the last by name; damaged ones, and one that is no checkpoint at all, are passed over; a link is none."""
    paths = {step: write(step, tmp_path / f"step{step:08d}.ckpt", shards=step in (2, 4)) for step in range(1, 7)}
    for step, age in {1: 60, 2: 30, 3: 20, 4: 10, 5: 40, 6: 5}.items():
        os.utime(paths[step], (1e9 - age, 1e9 - age))
    last = tmp_path / "last.ckpt"
    last.symlink_to(paths[6].name)
    (tmp_path / "text.ckpt").write_text("none")
    flip(last, last.stat().st_size // 2)

    def named() -> str:
        with pytest.raises(UserError, match=r"last.ckpt', which cannot be read") as refused:
            read_checkpoint(last)
        return str(refused.value)

    for step, age in {4: 10, 3: 20, 2: 30, 5: 40, 1: 60}.items():
        assert f"The newest good one is {paths[step]}." in named()
        file = paths[step] / "meta.pt" if paths[step].is_dir() else paths[step]
        flip(file, file.stat().st_size // 2)
        os.utime(paths[step], (1e9 - age, 1e9 - age))
    assert "There is no good one beside it." in named()


# names


class Interrupted:
    """Counts the calls by which names change; the n-th of them does not happen."""

    NAMES = ((os, "replace"), (Path, "symlink_to"), (Path, "unlink"), (shutil, "rmtree"), (publish, "flush_folder"))

    def __init__(self, patch: pytest.MonkeyPatch, n: int, act) -> None:
        self.count, self.n, self.act = 0, n, act
        for owner, name in self.NAMES:
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, function):
        def call(*args, **kwargs):
            self.count += 1
            if self.count == self.n:
                self.act()
            return function(*args, **kwargs)

        return call


def fail() -> None:
    raise OSError(5, "Input/output error")


def fails_at(n: int, action) -> bool:
    """Do something whose n-th change of a name fails; tell whether it came that far."""
    with pytest.MonkeyPatch.context() as patch:
        calls = Interrupted(patch, n, fail)
        try:
            action()
        except (UserError, OSError, CheckpointException):
            assert calls.count >= n
    return calls.count >= n


def killed_at(n: int, action) -> bool:
    """Do something in a process that is killed instead of its n-th change of a name; tell whether it was."""
    child = os.fork()
    if child == 0:
        try:
            Interrupted(pytest.MonkeyPatch(), n, lambda: os._exit(9))
            action()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("ends", [fails_at, killed_at])
@pytest.mark.parametrize("kinds", ["files", "shards", "shards after files", "files after shards"])
@pytest.mark.parametrize("step", [4, 2, pytest.param(3, id="the same step again")])
def test_last_names_a_whole_one_wherever_writing_ends(tmp_path, ends, kinds, step):
    """Before each change of a name in turn, for the next step, an earlier one, and the one that is the last already."""
    shards = kinds.startswith("shards")
    for n in range(1, 100):
        folder = tmp_path / str(n)
        last = folder / "last.ckpt"
        for earlier in (1, 2, 3):
            write(earlier, last, shards=kinds in ("shards", "files after shards"))
        came = ends(n, lambda last=last: write(step, last, shards=shards))
        assert last.exists(), f"last.ckpt names nothing when change {n} does not happen"
        assert read_checkpoint(last)["global_step"] in (3, step)
        tidy(folder)
        write(step, last, shards=shards)
        assert read_checkpoint(last)["global_step"] == step
        names = {p.name for p in folder.iterdir()}
        assert "last.ckpt" in names
        assert len(names) <= 1 + publish.KEPT
        for path in folder.glob("step*.ckpt"):
            read_checkpoint(path)
        if not came:
            break
    assert 3 < n < 99


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("ends", [fails_at, killed_at])
def test_a_best_one_is_replaced_or_kept_wherever_writing_ends(tmp_path, ends):
    """A directory by a directory or a file; nothing is left beside it."""
    for before, after in ((True, True), (True, False), (False, True)):
        for n in range(1, 100):
            best = tmp_path / f"{before}{after}{n}" / "best_nfe1.ckpt"
            write(1, best, shards=before)
            came = ends(n, lambda best=best, after=after: write(2, best, shards=after))
            tidy(best.parent)
            assert [p.name for p in best.parent.iterdir()] == [best.name]
            assert read_checkpoint(best)["global_step"] in ((1, 2) if came else (2,))
            if not came:
                break
        assert 2 < n < 99


def test_names_that_are_not_of_a_run_stay(tmp_path):
    for name in ("step00000001 copy.ckpt", "step1.ckpt", "step00000001.ckpt.bak", "stepxx.ckpt"):
        (tmp_path / name).write_text("mine")
    for step in (1, 2, 3):
        write(step, tmp_path / "last.ckpt")
    assert {p.name for p in tmp_path.iterdir()} == {
        "step00000001 copy.ckpt", "step1.ckpt", "step00000001.ckpt.bak", "stepxx.ckpt",
        "step00000002.ckpt", "step00000003.ckpt", "last.ckpt",
    }  # fmt: skip


def test_what_a_kill_leaves_is_cleared_away_and_nothing_else(tmp_path):
    write(1, tmp_path / "last.ckpt")
    stay = {
        "step00000009.ckpt.tmp", "mine.tmp", ".mine.old", ".hidden", "best_nfe1.ckpt", "last.ckpt", "step00000001.ckpt",
        "folder",
        ".other.link", "last.ckpt.old",
    }  # fmt: skip
    for name in stay - {"last.ckpt", "step00000001.ckpt", "folder"}:
        (tmp_path / name).write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".step00000001.ckpt.tmp").write_text("x")
    (tmp_path / ".step00000002.ckpt.tmp").write_text("x")
    for name in (".step00000003.ckpt.tmp", ".step00000004.ckpt.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_text("x")
    (tmp_path / ".step00000005.ckpt.tmp.old").mkdir()
    (tmp_path / ".best_nfe2.ckpt.tmp").symlink_to("folder")
    (tmp_path / ".last.ckpt.link").symlink_to("nowhere")
    tidy(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == stay
    assert (tmp_path / "folder" / ".step00000001.ckpt.tmp").exists()
    tidy(tmp_path / "absent")


# directories of shards


def test_one_altered_byte_or_a_missing_file_of_a_directory_is_refused(directory):
    assert {p.name for p in directory.iterdir()} == set(FILES)
    assert read_checkpoint(directory)["global_step"] == HALF
    for name in FILES:
        file = directory / name
        size = file.stat().st_size
        places = range(size) if name == "checksums.json" else (0, size // 3, size // 2, size - 1)
        for at in places:
            flip(file, at)
            with pytest.raises(UserError, match=r"step00000003.ckpt', which cannot be read \("):
                read_checkpoint(directory)
            flip(file, at)
        for damage in (lambda file=file: os.truncate(file, 10), file.unlink):
            whole = file.read_bytes()
            damage()
            with pytest.raises(UserError, match=r"step00000003.ckpt', which cannot be read \("):
                read_checkpoint(directory)
            file.write_bytes(whole)
    assert read_checkpoint(directory)["global_step"] == HALF


class Evil:
    """Asks for a shell when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.system, (f"touch {self.made}",)


@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_code_in_a_directory_is_refused_and_not_run(directory, tmp_path, name):
    """With checksums that fit it."""
    made = tmp_path / "made"
    pickle.loads(pickle.dumps(Evil(made)))
    assert made.exists()  # that is what it does where it may
    made.unlink()
    if name == "meta.pt":
        torch.save({"global_step": 1, "x": Evil(made)}, directory / name)
    else:
        (directory / name).write_bytes(pickle.dumps(Evil(made)))
    sums = json.loads((directory / "checksums.json").read_text())
    sums[name] = sharded._checksum(directory / name)
    (directory / "checksums.json").write_text(json.dumps(sums))
    for read in (read_checkpoint, read_header):
        with pytest.raises(UserError, match="it holds more than plain values, and code in a checkpoint is never run"):
            read(directory)
    assert not made.exists()


def test_values_that_are_no_tensors_are_refused_in_an_index(directory):
    """torch would unpickle them freely."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    index = pickle.loads((directory / ".metadata").read_bytes())
    index.state_dict_metadata["x"] = BytesStorageMetadata()
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match="cannot be read"):
        read_header(directory)


def test_an_error_of_the_disk_while_shards_are_read_is_one_message(directory, monkeypatch):
    """torch wraps it in an exception that `except Exception` does not catch."""

    def fails(self, plan, planner):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sharded._Reader, "read_data", fails)
    with pytest.raises(UserError, match=r"step00000003.ckpt', which cannot be read"):
        read_checkpoint(directory)


def test_tensors_are_taken_out_and_put_back():
    tree = {
        "a": {1: torch.ones(2), 0.999: [torch.zeros(3), None, (torch.arange(4), "x", 1.5)], "empty": {}, "list": []},
        "n": 3,
        7: (),
        "deep": {"er": {"est": torch.tensor(1.0)}},
    }
    skeleton, tensors = sharded.split(tree)
    assert set(tensors) == {"a/1", "a/0.999/0", "a/0.999/2/0", "deep/er/est"}
    assert torch.load(_saved(skeleton), weights_only=True) == skeleton  # plain values
    asked = {}
    back = sharded.join(skeleton, lambda keys, name: asked.setdefault(keys, tensors[name]))
    assert set(asked) == {("a", 1), ("a", 0.999, 0), ("a", 0.999, 2, 0), ("deep", "er", "est")}
    again, others = sharded.split(back)
    assert again == skeleton
    assert all(torch.equal(others[name], value) for name, value in tensors.items())
    assert type(back["a"][0.999][2]) is tuple
    assert back["a"]["empty"] == {}
    assert back[7] == ()


def _saved(value):
    import io

    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("way", ["one", "fsdp"])
def test_a_header_has_shapes_and_no_values(halves, way):
    header, whole = read_header(halves(way)), read_checkpoint(halves(way))
    (plain, shapes), (values, tensors) = sharded.split(header), sharded.split(whole)
    assert plain == values
    assert header["global_step"] == HALF
    assert shapes.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert shapes[name].device.type == "meta"
        assert (shapes[name].shape, shapes[name].dtype) == (tensor.shape, tensor.dtype), name


# any strategy goes on from any other's


def test_one_process_and_fsdp_write_the_same_state(halves):
    assert is_sharded_checkpoint(halves("fsdp"))
    assert not is_sharded_checkpoint(halves("one"))
    assert_equal(state(halves("one")), state(halves("fsdp")))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("fsdp", "one"),
        ("one", "fsdp"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("fsdp", "ddp"),
                ("fsdp", "fsdp"),
                ("ddp", "fsdp"),
                ("ddp", "one"),
                ("one", "ddp"),
                ("fsdp in one file", "one"),
                ("fsdp in one file", "fsdp"),
                ("fsdp in the background", "one"),
            )
        ),
    ],
)
def test_any_strategy_goes_on_from_any_other(halves, unbroken, tmp_path, one, other):
    half = halves(one)
    assert is_sharded_checkpoint(half) == (one in ("fsdp", "fsdp in the background"))
    assert read_header(half)["global_step"] == HALF
    last = train(other, tmp_path, f"--ckpt_path={half}", f"--trainer.max_steps={WHOLE}")
    found = state(last)
    assert found["step"] == WHOLE
    assert_equal(unbroken, found)
    with pytest.raises(AssertionError):
        assert_equal(unbroken, {**state(half), "step": found["step"]})


@pytest.mark.slow
def test_another_architecture_is_refused_under_fsdp(halves, tmp_path):
    options = [*SETTINGS, *FSDP, f"--trainer.default_root_dir={tmp_path}", "--model.net.init_args.hidden_size=32"]
    message = error_of(command_line("fit", *options, f"--ckpt_path={halves('fsdp')}", env={"OMP_NUM_THREADS": "1"}))
    assert "Got a checkpoint of another architecture (hidden_size = 64), expected hidden_size = 32" in " ".join(message.split())


# one file of weights


def test_weights_of_both_kinds_of_checkpoint_in_one_file(halves, tmp_path, capsys):
    for name in ("raw", "0.9", "ema0.99"):
        made = {}
        for way in ("one", "fsdp"):
            out = tmp_path / way / f"{name}.safetensors"
            consolidate(halves(way), out, name)
            made[way] = load_file(out)
            with safe_open(out, "pt") as file:
                metadata = file.metadata()
            assert metadata["weights"] == (name if name == "raw" else f"ema {name.removeprefix('ema')}")
            assert metadata["step"] == str(HALF)
            assert f"weights at step {HALF}" in capsys.readouterr().out
            assert [p.name for p in out.parent.glob(".*")] == []
        assert_equal(made["one"], made["fsdp"])
        whole = read_checkpoint(halves("fsdp"))
        for key, value in made["fsdp"].items():
            kept = whole["state_dict"][f"net.{key}"]
            if name != "raw":
                kept = whole["ema"]["weights"][name.removeprefix("ema")].get(key, kept)
            assert torch.equal(value, kept), key
        about = json.loads(metadata["net"])
        assert about["class_path"] == "mf_lightning.nets.sit.SiT"
        config = about["init_args"]
        spec = LatentSpec(tuple(config.pop("latent_shape")), config["num_classes"])
        net = SiT(spec, **config).double()
        net.load_state_dict(made["fsdp"], strict=True)
    raw, average = (load_file(tmp_path / "fsdp" / f"{name}.safetensors") for name in ("raw", "0.9"))
    assert any(not torch.equal(raw[key], average[key]) for key in raw)


def test_pictures_of_both_kinds_of_checkpoint(halves):
    made = [MeanFlowPipeline.from_checkpoint(halves(way), weights="0.9", device="cpu") for way in ("one", "fsdp")]
    one, other = ([image.tobytes() for image in pipeline(n=3)] for pipeline in made)
    assert one == other
    assert made[0].description == made[1].description
    assert made[1].description.data.autoencoder == "pixel"


def test_what_consolidate_refuses(halves, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=r"Got --weights None, expected raw or one of the checkpoint's averages: 0.9, 0.99"):
        consolidate(halves("one"), out)
    with pytest.raises(UserError, match=r"Got --weights 0.5, expected"):
        consolidate(halves("one"), out, "0.5")
    with pytest.raises(UserError, match="Got --weights best, expected"):
        consolidate(halves("one"), out, "best")
    with pytest.raises(UserError, match=r"expected a name that ends in .safetensors"):
        consolidate(halves("one"), tmp_path / "out.pt", "raw")
    with pytest.raises(UserError, match="which does not exist"):
        consolidate(tmp_path / "absent.ckpt", out, "raw")
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(UserError, match="which exists, expected a new file"):
        consolidate(halves("one"), out, "raw")
    assert out.read_text() == "mine"
    consolidate(halves("one"), out, "raw", overwrite=True)
    assert len(load_file(out)) > 10


# in the background


def test_what_is_written_in_the_background_is_the_state_at_the_call(tmp_path, monkeypatch):
    go = threading.Event()

    def slowly(checkpoint, path):
        assert go.wait(30)
        write_checkpoint(checkpoint, path)

    monkeypatch.setattr("mf_lightning.callbacks.checkpoint.write_checkpoint", slowly)
    io, weights = AtomicCheckpointIO(background=True), torch.ones(3)
    nested = {"state": {0: {"step": torch.zeros(())}}, "list": [torch.ones(2)], "n": 1}
    io.save_checkpoint({"global_step": 1, "weights": weights, "optimizer_states": [nested]}, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()
    for tensor in (weights, nested["state"][0]["step"], nested["list"][0]):
        tensor.fill_(9)  # the next step
    nested["n"] = 2
    go.set()
    io.wait()
    checkpoint = io.load_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(checkpoint["weights"], torch.ones(3))
    (kept,) = checkpoint["optimizer_states"]
    assert (kept["state"][0]["step"], kept["list"][0].tolist(), kept["n"]) == (0, [1, 1], 1)


def test_an_error_in_the_background_is_told_at_the_next_save_or_at_the_end(tmp_path, monkeypatch):
    save = torch.save

    def on_a_full_disk(checkpoint, stream):
        if checkpoint["global_step"] == 1:
            raise OSError(28, "No space left on device")
        save(checkpoint, stream)

    monkeypatch.setattr(torch, "save", on_a_full_disk)
    io, nowhere = AtomicCheckpointIO(background=True), tmp_path / "folder" / "last.ckpt"
    io.save_checkpoint({"global_step": 1}, nowhere)
    with pytest.raises(UserError, match=r"Got no checkpoint written to .*folder/last.ckpt \(.*No space left"):
        io.save_checkpoint({"global_step": 2}, tmp_path / "last.ckpt")
    io.wait()  # told once
    assert not (tmp_path / "last.ckpt").exists()
    for finish in (io.wait, io.teardown):
        io.save_checkpoint({"global_step": 1}, nowhere)
        with pytest.raises(UserError, match="Got no checkpoint written"):
            finish()
    io.save_checkpoint({"global_step": 3}, tmp_path / "last.ckpt")
    io.wait()
    assert read_checkpoint(tmp_path / "last.ckpt") == {"global_step": 3}
