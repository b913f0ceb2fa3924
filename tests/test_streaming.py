"""Remote data sets: a real S3 server, an HTTP server that fails on purpose, the shared cache, order and resuming."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from mf_lightning.cli import main
from mf_lightning.data import remote
from mf_lightning.data.buffers import Buffers
from mf_lightning.data.cache import ShardCache
from mf_lightning.data.datamodule import LatentDataModule
from mf_lightning.data.loader import EvalLoader, LatentSplit, TrainLoader
from mf_lightning.data.order import WindowOrder
from mf_lightning.data.subset import Subset
from mf_lightning.types import UserError
from tests.test_data import write_dataset
from tests.test_subsets import arguments

COUNTS = (7, 5, 11, 2, 9, 6)
TOTAL = sum(COUNTS)
ROW_BYTES = 4 * 4 * 4 * 2


class Faults(SimpleHTTPRequestHandler):
    """Serves a folder; what it does to the shards is decided by ``server.fault(path, how often it was asked for)``."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        with server.lock:
            server.asked[self.path] = server.asked.get(self.path, 0) + 1
            fault = server.fault(self.path, server.asked[self.path])
        file = Path(self.translate_path(self.path))
        if fault == "503" or not file.is_file():
            self.send_error(503 if fault == "503" else 404)
            return
        content = file.read_bytes()
        if fault == "altered":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif fault == "slow":
            for byte in content:  # never still for as long as a timeout, and never done
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.1)
        else:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_dataset(folder, counts=COUNTS, flip=True)
    return folder


@pytest.fixture
def server(dataset):
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Faults, directory=str(dataset)))
    httpd.lock, httpd.asked, httpd.fault, httpd.daemon_threads = threading.Lock(), {}, lambda path, times: None, True
    httpd.handle_error = lambda *args: None  # a client that gave up
    threading.Thread(target=partial(httpd.serve_forever, poll_interval=0.02), daemon=True).start()
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.02)


def module(url, cache, **options):
    settings = {"batch_size": 4, "cache_dir": str(cache), "shuffle_window": 2, "fetch_timeout": 20.0, **options}
    return LatentDataModule(str(url), **settings)


def loader(split, *, batch=4, rank=0, world=1, start=0, seed=0, workers=0):
    settings = {"global_batch_size": batch, "seed": seed, "rank": rank, "world_size": world, "accumulate": 1}
    return TrainLoader(split, **settings, start_step=lambda: start, workers=workers)


def read(batches):
    """Return (index, value, label) of all rows; the value of row i is i, or -i where the mirrored copy was taken."""
    return [
        (int(i), float(x[0, 0, 0]), int(y)) for b in batches for i, x, y in zip(b.index, b.x, b.y, strict=True)
    ]  # fmt: skip


def same_as_local(url, dataset, cache, **options):
    """Read two epochs and the validation split from the URL and from the directory, and compare every value."""
    far, near = module(url, cache, **options), LatentDataModule(str(dataset), batch_size=4, shuffle_window=2)
    for start in (0, len(far.split("train")) // 4):
        rows = read(loader(far.split("train"), start=start, workers=1))
        assert len(rows) == TOTAL // 4 * 4
        assert rows == read(loader(near.split("train"), start=start))
    evals = [EvalLoader(data.split("val"), batch_size=3, rank=0, world_size=1, workers=1) for data in (far, near)]
    assert read(evals[0]) == read(evals[1])
    return far


# places


def test_a_file_url_is_the_directory(dataset, tmp_path):
    same_as_local(f"file://{dataset}", dataset, tmp_path / "cache")


def test_http_is_the_directory_and_each_file_is_fetched_once(server, dataset, tmp_path):
    same_as_local(server.url, dataset, tmp_path / "cache")
    assert set(server.asked.values()) == {1}
    assert len([path for path in server.asked if "train" in path]) == 3 * len(COUNTS)
    same_as_local(server.url, dataset, tmp_path / "cache")
    assert {path for path, times in server.asked.items() if times == 2} == {"/dataset.json"}


@pytest.fixture(scope="module")
def s3():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"key": "a", "secret": "b", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    server.stop()


def test_s3_is_the_directory(s3, dataset, tmp_path):
    import s3fs

    bucket = s3fs.S3FileSystem(**s3)
    bucket.mkdir("latents")
    bucket.put(str(dataset), "latents/deep/", recursive=True)
    assert bucket.exists("latents/deep/set/dataset.json")
    data = same_as_local("s3://latents/deep/set", dataset, tmp_path / "cache", storage_options=s3)
    assert data.split("train").remote is not None
    with pytest.raises(UserError, match=r"Got no file 's3://latents/nothing/dataset.json'"):
        module("s3://latents/nothing", tmp_path / "cache", storage_options=s3)
    bucket.pipe("latents/deep/set/train/00002.latents.npy", b"x" * 2000)
    with pytest.raises(UserError, match=r"Got checksum .* of 's3://latents/deep/set/train/00002.latents.npy', fetched twice"):
        read(loader(module("s3://latents/deep/set", tmp_path / "anew", storage_options=s3).split("train")))


def test_starting_reads_nothing_but_the_description(server, tmp_path):
    module(server.url, tmp_path / "cache").split("train")
    assert server.asked == {"/dataset.json": 1}


def test_a_subset_of_a_remote_set_fetches_labels_and_the_shards_it_needs(server, dataset, tmp_path):
    subset = Subset(max_per_class=1, val_fraction=0.2)
    far = module(server.url, tmp_path / "cache", subset=subset, batch_size=1)
    near = LatentDataModule(str(dataset), batch_size=1, shuffle_window=2, subset=subset)
    for name in ("train", far.val_split):
        rows = near.split(name).rows
        assert far.split(name).rows.tolist() == rows.tolist()
    assert not [path for path in server.asked if "latents" in path]
    assert read(loader(far.split("train"), batch=1)) == read(loader(near.split("train"), batch=1))
    needed = set(near.split("train").shards_of(np.arange(len(near.split("train")))))
    assert len({path for path in server.asked if ".latents.npy" in path}) == len(needed) < len(COUNTS)


# faults


@pytest.mark.parametrize("fault", ["cut", "503", "slow"])
def test_what_fails_once_or_twice_is_fetched_again(server, dataset, tmp_path, fault):
    server.fault = lambda path, times: fault if times <= (1 if fault == "slow" else 2) and "00001.latents.npy" in path else None
    options = {"fetch_timeout": 0.3} if fault == "slow" else {}
    same_as_local(server.url, dataset, tmp_path / "cache", **options)
    assert server.asked["/train/00001.latents.npy"] == (2 if fault == "slow" else 3)


@pytest.mark.parametrize(
    ("fault", "reason"), [("cut", ""), ("503", "503"), ("slow", "less than 65,536 bytes came in 0.3 s")]
)  # fmt: skip
def test_what_fails_always_ends_with_one_message(server, tmp_path, fault, reason):
    server.fault = lambda path, times: fault if "train/00001.latents.npy" in path else None
    data = module(server.url, tmp_path / "cache", fetch_retries=2, fetch_timeout=0.3 if fault == "slow" else 20.0)
    with pytest.raises(UserError, match=rf"Got no whole '.*00001.latents.npy' in 3 attempts, .*{reason}"):
        read(loader(data.split("train"), workers=1))
    assert server.asked["/train/00001.latents.npy"] == 3


def test_a_shard_altered_once_is_fetched_again(server, dataset, tmp_path):
    server.fault = lambda path, times: "altered" if times == 1 and "train" in path else None
    same_as_local(server.url, dataset, tmp_path / "cache")


@pytest.mark.parametrize("ending", ["latents", "latents_flip", "labels"])
def test_a_shard_altered_for_good_never_reaches_training(server, tmp_path, ending):
    name = f"/train/00002.{ending}.npy"
    server.fault = lambda path, times: "altered" if path == name else None
    data = module(server.url, tmp_path / "cache")
    first = sum(COUNTS[:2])
    batches, rows = iter(loader(data.split("train"))), []

    def collect():
        for batch in batches:
            rows.extend(read([batch]))

    with pytest.raises(UserError, match=rf"Got checksum .*{name}', fetched twice, expected .*: the file was altered"):
        collect()
    assert server.asked[name] == 2
    assert not {i for i, _, _ in rows} & set(range(first, first + COUNTS[2]))
    assert all(abs(value) == i and label == i % 4 for i, value, label in rows)


def test_missing_files_and_wrong_addresses(server, dataset, tmp_path):
    (dataset / "train" / "00003.latents.npy").unlink()
    with pytest.raises(UserError, match=r"Got no file '.*/train/00003.latents.npy', expected a whole data set there"):
        list(loader(module(server.url, tmp_path / "cache").split("train")))
    assert server.asked["/train/00003.latents.npy"] == 1
    with pytest.raises(UserError, match=r"Got no file '.*/absent/dataset.json'.*written last"):
        module(f"{server.url}/absent", tmp_path / "cache")
    with pytest.raises(UserError, match="Got the URL 'nothing://x'"):
        module("nothing://x", tmp_path / "cache")
    with pytest.raises(UserError, match=r"Got no whole 'http://127.0.0.1:9/dataset.json' in 2 attempts"):
        module("http://127.0.0.1:9", tmp_path / "cache", fetch_retries=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle_window": 0}, "Got data.init_args.shuffle_window = 0"),
        ({"cache_size": 0}, "Got data.init_args.cache_size = 0"),
        ({"fetch_retries": -1}, "Got data.init_args.fetch_retries = -1"),
        ({"fetch_timeout": 0}, "Got data.init_args.fetch_timeout = 0"),
        ({"workers": -1}, "Got data.workers = -1"),
        ({"checksums": True}, "files of a URL are checked when fetched"),
    ],
)
def test_options_out_of_range(dataset, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        module(f"file://{dataset}", tmp_path / "cache", **options)


def test_options_that_would_have_no_effect(dataset, tmp_path):
    for option in ({"cache_dir": "x"}, {"storage_options": {"a": 1}}):
        with pytest.raises(UserError, match=f"Got data.init_args.{next(iter(option))} .* for the directory"):
            LatentDataModule(str(dataset), **option)


def test_a_cache_too_small_for_two_windows(dataset, tmp_path):
    with pytest.raises(
        UserError, match=r"Got data.init_args.cache_size = 1e-05 GB, expected at least .* 2 shard\(s\) of 'train'"
    ):
        module(f"file://{dataset}", tmp_path / "cache", cache_size=1e-5).split("train")


# cache


def cache_files(folder):
    sizes = {}
    for file in folder.glob("*.npy"):
        with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
            sizes[file.name] = file.stat().st_size
    return sizes


def test_the_cache_stays_within_its_size(dataset, tmp_path):
    largest = 2 * (11 * ROW_BYTES + 128) + 11 * 8 + 128
    limit = 3 * largest
    assert sum(file.stat().st_size for file in (dataset / "train").iterdir()) > limit
    data = module(f"file://{dataset}", tmp_path / "cache", cache_size=limit / 1e9, shuffle_window=1)
    data.place.cache.patience = 5.0
    sizes = []
    for epoch in range(3):
        for batch in loader(data.split("train"), start=epoch * (TOTAL // 4), workers=1):
            assert (batch.x[:, 0, 0, 0].abs() == batch.index).all()
            sizes.append(sum(cache_files(tmp_path / "cache").values()))
    assert max(sizes) <= limit
    assert max(sizes) > largest
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def fetching(content):
    def fetch(new_file):
        file = new_file()
        file.write_bytes(content)
        return file

    return fetch


def entry(number, size=1000):
    from mf_lightning.data.checksum import file_checksum

    content = bytes([number]) * size
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"entry-{os.getpid()}-{number}"
    file.write_bytes(content)
    sha256 = file_checksum(file)
    file.unlink()
    return sha256, size, fetching(content)


def test_least_recently_used_goes_first_and_nothing_in_use(tmp_path):
    cache = ShardCache(tmp_path, 3000, patience=0.3)
    entries = [entry(n) for n in range(5)]
    held = cache.open(*entries[0])
    cache.open(*entries[1]).close()
    cache.open(*entries[2]).close()
    cache.open(*entries[1]).close()  # used again: 2 is now the oldest that is not in use
    cache.open(*entries[3]).close()
    assert set(cache_files(tmp_path)) == {f"{entries[n][0]}.npy" for n in (0, 1, 3)}
    others = [cache.open(*entries[n]) for n in (1, 3)]
    with pytest.raises(UserError, match=r"Got a cache of 3e-06 GB .* in use, expected room for 1e-06 GB more"):
        cache.open(*entries[4])
    assert held.read() == bytes(1000)
    for stream in [held, *others]:
        stream.close()
    cache.open(*entries[4]).close()
    assert f"{entries[4][0]}.npy" in cache_files(tmp_path)


def test_a_map_alone_keeps_its_file(dataset, tmp_path):
    """The stream is closed once it is mapped; the map holds the lock."""
    data = module(f"file://{dataset}", tmp_path / "cache")
    shard = data.split("train").shards[2]
    small = ShardCache(tmp_path / "cache", 2000, patience=0.2)
    with pytest.raises(UserError, match="in use"):
        small.open(*entry(9))
    del shard
    small.open(*entry(9)).close()


def test_a_file_damaged_in_the_cache_is_fetched_again(dataset, tmp_path):
    cache = tmp_path / "cache"
    same_as_local(f"file://{dataset}", dataset, cache)
    for file in cache.glob("*.npy"):
        file.chmod(0o644)
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if len(content) % 3 else content[: len(content) // 2])
    same_as_local(f"file://{dataset}", dataset, cache)


def test_what_a_killed_process_left_is_cleared(tmp_path):
    cache = ShardCache(tmp_path, 2500, patience=0.3)
    sha256, size, fetch = entry(1)
    (tmp_path / f".{entry(2)[0]}.2400.0123456789ab.tmp").write_bytes(b"half")
    cache.open(sha256, size, fetch).close()
    assert not list(tmp_path.glob(".*.tmp"))


def share(url, cache, size, rank, results):
    data = module(url, cache, cache_size=size)
    rows = []
    for epoch in range(4):
        rows += read(loader(data.split("train"), start=epoch * (TOTAL // 4), rank=rank % 2, world=2, seed=rank // 2, workers=1))
    good = all(abs(value) == i and label == i % 4 for i, value, label in rows)
    results.put((rank, good, [i for i, _, _ in rows]))


def test_processes_and_jobs_share_one_cache(server, tmp_path):
    """Two jobs (seeds) of two processes each, in a cache that holds a part of the set."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_streaming"])
    results = context.Queue()
    size = 12 * (2 * (11 * ROW_BYTES + 128) + 11 * 8 + 128) / 1e9
    processes = [
        context.Process(target=share, args=(server.url, tmp_path / "cache", size, rank, results)) for rank in range(4)
    ]  # fmt: skip
    for process in processes:
        process.start()
    seen = {}
    for _ in processes:
        rank, good, rows = results.get(timeout=120)
        assert good
        seen[rank] = rows
    for process in processes:
        process.join()
    near = module(f"file://{tmp_path / 'set'}", tmp_path / "other")
    for job in (0, 1):
        whole = [i for e in range(4) for i, _, _ in read(loader(near.split("train"), start=e * (TOTAL // 4), seed=job))]
        assert seen[2 * job] == whole[0::2]
        assert seen[2 * job + 1] == whole[1::2]
    assert sum(cache_files(tmp_path / "cache").values()) <= size * 1e9


# order


@pytest.mark.parametrize("window", [1, 2, 4, 99])
def test_each_sample_once_an_epoch_in_windows_of_shards(window):
    order = WindowOrder(COUNTS, seed=5, window=window)
    shard_of = np.repeat(np.arange(len(COUNTS)), COUNTS)
    epochs = [order.at(epoch, np.arange(TOTAL)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(TOTAL))
        blocks = []
        for shard in shard_of[epoch]:  # shards come in windows, never again later
            if not blocks or (shard not in blocks[-1] and len(blocks[-1]) == window):
                blocks.append(set())
            blocks[-1].add(shard)
        assert sum(len(block) for block in blocks) == len(COUNTS)
    assert list(epochs[0]) != list(epochs[1])
    assert list(WindowOrder(COUNTS, seed=6, window=window).at(0, np.arange(TOTAL))) != list(epochs[0])
    places = np.random.default_rng(0).permutation(TOTAL)[:9]
    assert WindowOrder(COUNTS, seed=5, window=window).at(1, places).tolist() == epochs[1][places].tolist()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_world_size_and_workers_change_nothing(dataset, tmp_path, world, workers):
    data = module(f"file://{dataset}", tmp_path / "cache")
    whole = read(loader(data.split("train")))
    parts = [read(loader(data.split("train"), rank=rank, world=world, workers=workers)) for rank in range(world)]
    assert [row for step in zip(*parts, strict=True) for row in step] == whole
    assert len({i for i, _, _ in whole}) == len(whole)


def test_a_resumed_loader_goes_on_and_fetches_only_its_windows(server, tmp_path):
    whole = read(loader(module(server.url, tmp_path / "one").split("train")))
    server.asked.clear()
    data = module(server.url, tmp_path / "two")
    batches = iter(loader(data.split("train"), start=7))
    rows = read(next(batches) for _ in range(3))
    assert rows == whole[28:40]
    assert len({path for path in server.asked if ".latents.npy" in path}) < len(COUNTS)


def test_workers_end_with_their_loader(dataset, tmp_path):
    data = module(f"file://{dataset}", tmp_path / "cache")
    before = set(threading.enumerate())
    batches = iter(loader(data.split("train"), workers=2))
    next(batches)
    ours = set(threading.enumerate()) - before
    assert {"loader-0", "loader-1", "fetch-ahead-0"} <= {thread.name for thread in ours}
    batches.close()
    del data, batches
    end = time.monotonic() + 10
    while any(thread.is_alive() for thread in ours):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_memory_stays_while_a_large_set_is_read(tmp_path):
    """21 GB of a sparse file: mapped pages are not anonymous, and batches use the same memory again."""
    from mf_lightning.data.opened import OpenShard, open_array

    shape = (1_280_000, 8, 32, 32)
    with (tmp_path / "sparse.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f2", "fortran_order": False, "shape": shape})
        stream.truncate(stream.tell() + 2 * int(np.prod(shape)))
    latents = open_array(tmp_path / "sparse.npy", shape=shape, dtype=np.dtype(np.float16))
    split = LatentSplit([OpenShard(latents, np.zeros(shape[0], np.int64), None)])
    before = anonymous()
    for number, _ in enumerate(loader(split, batch=256, workers=1)):
        if number == 3:
            break
    assert anonymous() - before < 100e6


def test_memory_of_a_batch_is_used_again_and_never_while_something_looks_at_it():
    buffers = Buffers()
    shape, dtype = (3, 5), np.dtype(np.float16)
    first = buffers.empty(shape, dtype)
    first.fill_(1)
    where, view, array = first.data_ptr(), first[1:], first.numpy()[2]
    del first
    assert buffers.empty(shape, dtype).fill_(2).data_ptr() != where
    del view
    others = [buffers.empty(shape, dtype).fill_(3) for _ in range(3)]
    assert where not in {other.data_ptr() for other in others}
    assert (array == 1).all()
    del array
    assert buffers.empty((5, 3), np.dtype(np.int16)).data_ptr() == where
    assert buffers.empty((4, 5), dtype).shape == (4, 5)


def test_batches_that_are_kept_stay_as_they_are(dataset):
    split = LatentDataModule(str(dataset), batch_size=4).split("train")
    kept = list(loader(split, workers=2))
    assert all((batch.x[:, 0, 0, 0].abs() == batch.index).all() for batch in kept)
    assert len({batch.x.data_ptr() for batch in kept}) == len(kept)


def anonymous():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


# a run


def test_a_run_on_a_server_resumes_bit_by_bit(server, tmp_path):
    from mf_lightning.checkpoints import read_checkpoint

    far = [
        "--data.init_args.shuffle_window=2",
        f"--data.init_args.cache_dir={tmp_path / 'cache'}",
        "--data.init_args.batch_size=4",
        "--model.lr_schedule.init_args.total_steps=14",
    ]
    main(["fit", *arguments(server.url, tmp_path / "whole", *far, "--trainer.max_steps=14")])
    main(["fit", *arguments(server.url, tmp_path / "parts", *far, "--trainer.max_steps=6")])
    main(["fit", *arguments(server.url, tmp_path / "parts", *far, "--trainer.max_steps=14", "--ckpt_path=auto")])
    states = [read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt")["state_dict"] for run in ("whole", "parts")]
    assert all((value == states[1][name]).all() for name, value in states[0].items())


def test_resuming_with_another_window_is_refused(server, tmp_path, capsys):
    far = [f"--data.init_args.cache_dir={tmp_path / 'cache'}", "--data.init_args.batch_size=4", "--trainer.max_steps=2"]
    main(["fit", *arguments(server.url, tmp_path / "run", *far)])
    with pytest.raises(SystemExit):
        main(["fit", *arguments(server.url, tmp_path / "run", *far, "--data.init_args.shuffle_window=3", "--ckpt_path=auto")])
    assert "Got training data with shuffle_window = 3, expected the checkpoint's shuffle_window = 8" in capsys.readouterr().err
