"""W&B, TensorBoard and metrics.csv of one run say the same, and a server that is not there stops nothing."""

from __future__ import annotations

import csv
import io
import json
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mf_lightning.callbacks.wandb_log import without_secrets
from mf_lightning.checkpoints import read_checkpoint
from mf_lightning.cli import configs_dir
from tests.fake_wandb import FakeServer
from tests.runs import RECIPES, command_line, lines, python
from tests.wandb_file import OfflineRun

TRAINER = configs_dir() / "trainer"
SMALL = [
    f"--config={RECIPES / 'smoke.yaml'}", "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=2",
    "--sample_eval.num_samples=20", "--sample_eval.nfe=[1,2,4]", "--data.init_args.eval_batch_size=16",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--self_check.enabled=false",
]  # fmt: skip
BINS = [f"{b / 5:.1f}-{(b + 1) / 5:.1f}" for b in range(5)]


def fit(root: Path, *more: object, parts: tuple[str, ...] = ("wandb",), **env: str) -> str:
    configs = [f"--config={TRAINER / part}.yaml" for part in parts]
    result = command_line(
        "fit", *SMALL, *configs, f"--trainer.default_root_dir={root}", *more, env={"OMP_NUM_THREADS": "1", **env}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def offline_runs(root: Path) -> list[OfflineRun]:
    return [OfflineRun(folder) for folder in sorted((root / "wandb").glob("offline-run-*"))]


def logged(root: Path) -> dict[str, dict[int, float]]:
    """Return the columns of metrics.csv, by step."""
    found: dict[str, dict[int, float]] = {}
    with (root / "metrics.csv").open() as stream:
        for row in csv.DictReader(stream):
            for key, value in row.items():
                if value and key != "step":
                    found.setdefault(key, {})[int(row["step"])] = float(value)
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """One process, without W&B."""
    root = tmp_path_factory.mktemp("one")
    fit(root, "--trainer.max_steps=4", "--trainer.precision=64-true", parts=())
    return root


@pytest.fixture(scope="module")
def two(one, tmp_path_factory) -> Path:
    """A job of two processes, with every logger."""
    root = tmp_path_factory.mktemp("two") / "my-run"
    [reference] = one.glob("reference-*.npz")
    fit(
        root, f"--trainer={TRAINER / 'ddp.yaml'}", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_steps=4",
        "--trainer.precision=64-true", "--trainer.logger.init_args.log_model=true", f"--sample_eval.reference={reference}",
        parts=("tensorboard", "wandb"),
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def run(two) -> OfflineRun:
    runs = offline_runs(two)
    assert len(runs) == 1  # one process of the two
    return runs[0]


def test_the_run_is_whole_and_has_its_name(two, run):
    assert run.ended
    assert run.name == "my-run"
    assert run.id == (two / "wandb_id").read_text()


def test_every_logged_key_is_there_with_its_value(two, run):
    columns = logged(two)
    assert {f"{m}/nfe{n}" for m in ("fid", "kid", "precision", "recall", "class_accuracy") for n in (1, 2, 4)} <= set(columns)
    assert {"train/raw_error", "train/velocity_error", "train/dudt_norm", "train/grad_norm"} <= set(columns)
    assert {f"val/{e}_t{b}" for e in ("raw_error", "velocity_error") for b in BINS} <= set(columns)
    assert min(columns["train/images_per_s"]) == 1  # the first window begins behind the first step
    for key, values in columns.items():
        if key != "epoch":
            assert run.values(key) == pytest.approx(values), key


def test_best_figures_are_the_summary(two, run):
    rows = lines(two / "sample_eval.jsonl")
    for name, best in (("fid", min), ("kid", min), ("class_accuracy", max), ("precision", max)):
        for nfe in (1, 2, 4):
            values = [row[name] for row in rows if row["nfe"] == nfe]
            key = "min" if best is min else "max"
            summary = run.summary[f"{name}/nfe{nfe}"]
            assert summary == pytest.approx({key: best(values), "last": values[-1]}, rel=1e-5)
            defined = run.metrics[f"{name}/nfe{nfe}"]
            assert defined.step_metric == "trainer/global_step"
            assert getattr(defined.summary, key)


def test_a_chart_per_metric_has_a_line_per_nfe(two, run):
    rows = lines(two / "sample_eval.jsonl")
    charts = run.config["_wandb"]["visualize"]
    for name in ("fid", "kid", "precision", "recall", "class_accuracy"):
        assert charts[f"curves/{name}"]["panel_config"]["panelDefId"] == "wandb/lineseries/v0"
        table = run.table(f"curves/{name}_table")
        found = {(step, line): value for step, line, value in table["data"]}
        assert found == {(row["step"], f"NFE {row['nfe']}"): row[name] for row in rows}


def test_the_table_holds_step_nfe_and_metrics(two, run):
    rows, table = lines(two / "sample_eval.jsonl"), run.table("quality")
    assert [dict(zip(table["columns"], line, strict=True)) for line in table["data"]] == [
        {"weights": "EMA 0.99", **{name: row[name] for name in table["columns"] if name != "weights"}} for row in rows
    ]
    assert {"step", "nfe", "fid", "precision", "images_per_s", "seconds_per_image", "protocol_id"} <= set(table["columns"])
    assert len(rows) == 2 * 3


def test_grids_are_the_files(two, run):
    for name, file in (("grid", ""), ("nfe1", "_nfe1"), ("nfe2", "_nfe2"), ("nfe4", "_nfe4")):
        for step, image in run.values(f"samples/{name}").items():
            [path] = image["filenames"]
            sent, written = (Image.open(p) for p in (run.folder / "files" / path, two / "grids" / f"step{step:08d}{file}.png"))
            assert np.array_equal(np.asarray(sent), np.asarray(written))
        assert list(run.values(f"samples/{name}")) == [2, 4]


def test_settings_and_protocol_are_the_config(two, run):
    protocol = lines(two / "sample_eval.jsonl")[0]["protocol"]
    assert run.config["ema"]["decays"] == [0.99]
    assert run.config["model"]["net"]["class_path"].endswith("SiT")
    assert run.config["world_size"] == 2
    assert run.config["protocol"] == {key: value for key, value in protocol.items() if key not in ("ema", "nfe")}
    assert list(run.config["protocols"]) == [run.config["protocol_id"]]


def test_the_best_checkpoints_are_artifacts_where_asked_for(run):
    models = {artifact.name: artifact for artifact in run.artifacts if artifact.type == "model"}
    assert set(models) == {f"best_nfe1-{run.id}", f"best_nfe2-{run.id}"}
    [content] = models[f"best_nfe1-{run.id}"].manifest.contents
    assert content.path == "best_nfe1.ckpt"
    assert read_checkpoint(content.local_path)["global_step"] in (2, 4)  # it waits beside the run, not in HOME
    assert Path(content.local_path).is_relative_to(run.folder.parent)


def test_tensorboard_has_the_same(two):
    events = EventAccumulator(str(two / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    columns = logged(two)
    assert set(columns) <= set(events.Tags()["scalars"])
    for key, values in columns.items():
        if key != "epoch":
            assert {e.step: e.value for e in events.Scalars(key)} == pytest.approx(values, rel=1e-6), key
    for name, file in (("grid", ""), ("nfe4", "_nfe4")):
        for event in events.Images(f"samples/{name}"):
            sent = Image.open(io.BytesIO(event.encoded_image_string))
            written = Image.open(two / "grids" / f"step{event.step:08d}{file}.png").convert("RGB")
            assert np.array_equal(np.asarray(sent), np.asarray(written))
    [row, *_] = lines(two / "sample_eval.jsonl")
    [text] = events.Tensors(f"protocol/{row['protocol_id']}/text_summary")
    told = text.tensor_proto.string_val[0].decode()
    for key in ("extractor", "reference", "autoencoder", "num_samples", "seed"):
        assert f"- {key}: {row['protocol'][key]}" in told


def test_one_process_says_the_same_of_each_time(one, two):
    assert not (one / "wandb").exists()
    alone, together = logged(one), logged(two)
    assert set(alone) == set(together)
    for error in ("raw_error", "velocity_error"):
        for key in [f"val/{error}", *(f"val/{error}_t{b}" for b in BINS)]:
            assert together[key] == pytest.approx(alone[key], rel=1e-9), key


def test_another_protocol_has_curves_of_its_own(tmp_path):
    fit(tmp_path, "--trainer.max_steps=2")
    best = read_checkpoint(tmp_path / "checkpoints" / "best_nfe1.ckpt")
    fit(tmp_path, "--trainer.max_steps=4", "--sample_eval.num_samples=30", "--ckpt_path=last")
    rows = lines(tmp_path / "sample_eval.jsonl")
    first, second = rows[0]["protocol_id"], rows[-1]["protocol_id"]
    assert first != second
    columns, [before, after] = logged(tmp_path), offline_runs(tmp_path)
    assert list(columns["fid/nfe1"]) == [1]
    assert list(columns[f"fid/nfe1@{second}"]) == [3]
    assert list(after.values(f"fid/nfe1@{second}")) == [3]
    assert after.values("fid/nfe1") == {}
    assert after.summary[f"fid/nfe1@{second}"]["min"] == pytest.approx(rows[-3]["fid"])
    assert [line[0] for line in after.table("curves/fid_table")["data"]] == [2, 2, 2]
    assert [line[0] for line in after.table(f"curves/fid@{second}_table")["data"]] == [4, 4, 4]
    assert [line[-1] for line in after.table("quality")["data"]] == [first] * 3 + [second] * 3
    assert set(after.config["protocols"]) == {first, second}
    assert after.config["protocol_id"] == first  # that of the keys without a suffix
    assert before.id == after.id
    last = read_checkpoint(tmp_path / "checkpoints" / "best_nfe1.ckpt")
    assert (best["global_step"], last["global_step"]) == (2, 4)  # the best begins anew, whatever the figures


def test_secrets_stay_here():
    tree = {
        "data": {"init_args": {"path": "s3://a", "storage_options": {"secret": "abc"}}},
        "n": [1, {"storage_options": None}],
    }
    assert "abc" not in json.dumps(without_secrets(tree))
    assert without_secrets(tree)["data"]["init_args"]["path"] == "s3://a"
    assert without_secrets(tree)["n"] == [1, {"storage_options": None}]


# a server that is not there


LOGIN = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40}


def logger_run(folder: Path, url: str, code: str = "", **options: object) -> str:
    """Log in a process of its own; return what it said."""
    settings = ", ".join(f"{name}={value!r}" for name, value in {"wait_s": 1.0, "finish_s": 3.0, **options}.items())
    script = (
        "import os, sys\nfrom mf_lightning.callbacks import SafeWandbLogger\n"
        f"logger = SafeWandbLogger(save_dir={str(folder)!r}, id='abc', {settings})\n"
        "run = logger.experiment\nfor step in range(50): logger.log_metrics({'x': step}, step=step)\n"
        f"{code}\nfor step in range(50, 100): logger.log_metrics({{'x': step}}, step=step)\n"
        "logger.log_metrics({'y': 1}, step=100)\n"
    )
    result = python("-c", script, env={**LOGIN, "WANDB_BASE_URL": url, "HOME": str(folder)}, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def test_a_training_without_a_server_goes_on_offline(tmp_path):
    """One that takes the connection and never answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(20)
        said = fit(
            tmp_path, "--trainer.logger.init_args.wait_s=1", "--trainer.max_steps=2", **LOGIN,
            WANDB_BASE_URL=f"http://127.0.0.1:{silent.getsockname()[1]}",
        )  # fmt: skip
    assert said.count("does not answer (timed out). This run is written to") == 1
    [run] = offline_runs(tmp_path)
    assert run.ended
    assert run.values("fid/nfe1") == pytest.approx(logged(tmp_path)["fid/nfe1"])


def test_a_refused_connection(tmp_path):
    said = logger_run(tmp_path, "http://127.0.0.1:9")
    assert "W&B: http://127.0.0.1:9 does not answer ([Errno 111] Connection refused)" in said
    [run] = offline_runs(tmp_path)
    assert len(run.values("x")) == 100


@pytest.mark.slow
def test_a_server_that_answers_but_opens_no_run(tmp_path):
    server = FakeServer(hangs=("graphql",))
    said = logger_run(tmp_path, server.url, init_s=2.0)
    server.close()
    assert "opened no run" in said
    [run] = offline_runs(tmp_path)
    assert len(run.values("x")) == 100


def test_a_server_that_is_there_gets_everything(tmp_path):
    server = FakeServer()
    said = logger_run(tmp_path, server.url)
    server.close()
    assert "offline" not in said.replace("`wandb offline`", "")
    assert server.lines == 101
    assert offline_runs(tmp_path) == []


@pytest.mark.parametrize("way", ["refuses", "hangs"])
def test_a_server_that_goes_away_in_the_middle(tmp_path, way):
    server = FakeServer()

    def leave():
        while not server.left.is_set():
            server.left.wait(0.1)
        server.close() if way == "refuses" else server.hangs.update(("graphql", "file_stream", "store"))

    threading.Thread(target=leave, daemon=True).start()
    url = server.url
    logger_run(tmp_path, url, f"import urllib.request, time; urllib.request.urlopen('{url}/leave').close(); time.sleep(0.5)")
    [folder] = [path for path in (tmp_path / "wandb").glob("run-*") if path.is_dir()]
    assert len(OfflineRun(folder).values("x")) == 100
    if way == "hangs":
        server.close()


def test_the_process_of_wandb_dies(tmp_path):
    kill = (
        "import signal, subprocess, time\n"
        "for pid in subprocess.run(['pgrep', '-P', str(os.getpid())], capture_output=True, text=True).stdout.split():\n"
        "    if 'wandb-core' in open(f'/proc/{pid}/cmdline').read(): os.kill(int(pid), signal.SIGKILL)\n"
        "time.sleep(0.5)\n"
    )
    said = logger_run(tmp_path, "http://127.0.0.1:9", kill)
    assert said.count("its process is lost (Connection lost). Training goes on without it") == 1


def test_an_offline_run_is_sent_later(two, run, tmp_path):
    server = FakeServer()
    result = python(
        "-m", "wandb", "sync", run.folder, env={**LOGIN, "WANDB_BASE_URL": server.url, "HOME": str(tmp_path)}, timeout=120
    )
    server.close()
    assert result.returncode == 0, result.stderr
    assert server.lines == len(run.history)
    for kind in ("media/images/samples/grid", "media/table/quality", "media/table/curves/fid_table"):
        assert any(kind in path for path in server.stored), (kind, server.stored)
    assert {artifact.name for artifact in run.artifacts} == set(server.artifacts)
    assert f"best_nfe1-{run.id}" in server.artifacts
