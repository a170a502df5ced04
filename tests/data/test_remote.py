"""Shards at a URL: the same samples as from a folder; faults of servers are logged and end in bounded time."""

import gc
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
import torch
from moto.server import ThreadedMotoServer

from configs.errors import UserError
from configs.schema import Data, Optim
from data import cache, loader, remote
from data.cache import Cache
from data.loader import eval_loader, train_loader
from data.prefetch import Prefetcher
from data.remote import Remote
from data.sampler import WINDOW, EpochOrder, TrainBatches
from data.shard_index import max_index_bytes
from data.shards import Split, open_split
from data.transforms import EvalTransform, PretrainTransform
from tests.data.helpers import as_folder, collection, open_files
from tests.data.server import Server
from tests.data.test_prepare import prepared

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores
TAR = "train-000001.tar"
FORK = multiprocessing.get_context("fork")
transform = PretrainTransform(Data(size=16), (2, 2), 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """36 shards of two images, more than two windows; a second split of four."""
    folder = tmp_path_factory.mktemp("remote")
    images = collection({"train/a": 36, "train/b": 36, "val/a": 4, "val/b": 4})
    prepared(as_folder(images, folder / "in"), folder / "out", "--shard-size", "2")
    return folder / "out"


@pytest.fixture
def server(shards, monkeypatch):
    """Serves `shards`, with short waiting times."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(cache, "POLL_SECONDS", 0.01)
    with Server(shards) as running:
        yield running


@pytest.fixture
def forks():
    """For tests that fork: a child would take a second to close each filesystem left over from other tests."""
    gc.collect()


@pytest.fixture
def impatient(request, monkeypatch):
    """A short stall limit, only for faults that stall: on a busy machine, other transfers could exceed it."""
    if request.getfixturevalue("fault") in (503, "hang", "stall"):
        monkeypatch.setattr(remote, "STALL_SECONDS", 0.4)


@pytest.fixture
def split(server, tmp_path) -> Split:
    """The remote training split, with room for all of it."""
    return open_split(Data(server.url, cache=str(tmp_path / "cache")))


def samples(split: Split) -> list[tuple[bytes, int]]:
    return [split.read(i) for i in range(len(split))]


def cached(split: Split) -> list[str]:
    return sorted(path.name for path in split.folder.cache.folder.iterdir())


def tars(server: Server) -> dict[str, int]:
    return {name: count for name, count in server.counts.items() if name.endswith(".tar")}


def test_the_same_samples_and_each_file_fetched_once(split, shards, server, tmp_path):
    local = Split(shards, "train")
    assert np.array_equal(split.labels(), local.labels())
    assert not tars(server)  # labels need no tars
    assert samples(split) == samples(local)
    assert (split.digest, split.classes, len(split)) == (local.digest, local.classes, len(local))
    assert open_files(tmp_path / "cache") == WINDOW
    again = open_split(Data(server.url + "/", cache=str(tmp_path / "cache")))
    assert samples(pickle.loads(pickle.dumps(again))) == samples(local)
    assert server.counts.pop("index.json") == 2
    assert len(server.counts) == 2 * len(local.shards) and set(server.counts.values()) == {1}
    assert cached(split) == sorted(d for shard in local.shards for d in (shard.sha256, shard.index_sha256))


def use_s3(monkeypatch, endpoint: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    for key, value in {**keys, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(key, value)


def test_s3(shards, monkeypatch, tmp_path):
    s3 = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    s3.start()
    try:
        use_s3(monkeypatch, "http://{}:{}".format(*s3.get_host_and_port()))
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in shards.iterdir():
            client.upload_file(str(path), "bucket", f"some/shards/{path.name}")
        split = open_split(Data("s3://bucket/some/shards", cache=str(tmp_path)), "val")
        assert samples(split) == samples(Split(shards, "val"))
        with pytest.raises(UserError, match=r"^s3://bucket/none/index\.json does not exist"):
            open_split(Data("s3://bucket/none", cache=str(tmp_path)))
        with pytest.raises(UserError, match=r"^s3://other/shards/index\.json does not exist"):
            open_split(Data("s3://other/shards", cache=str(tmp_path)))
        client.close()
    finally:
        s3.stop()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [503, "hang"])
def test_s3_that_does_not_answer(fault, server, monkeypatch, tmp_path):
    use_s3(monkeypatch, server.url)
    server.always = fault  # s3fs retries by itself, and waits longer each time
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^s3://bucket/x/index\.json: .*4 attempts"):
        open_split(Data("s3://bucket/x", cache=str(tmp_path)))
    assert time.monotonic() - started < 8


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (fault, name)
        for fault in (503, 429, "hang", "stall", "cut", "short", "flip")
        for name in ("index.json", TAR, TAR.replace(".tar", ".idx.npy"))
        if (fault, name) != ("flip", "index.json")  # may change one digit to another, which nothing can detect
    ],
)
def test_faults_of_a_server_are_retried_and_logged(fault, name, server, shards, tmp_path, capfd):
    server.faults[name] = [fault, fault]
    started = time.monotonic()
    split = open_split(Data(server.url, cache=str(tmp_path)))
    assert split.read(2) == Split(shards, "train").read(2)
    assert time.monotonic() - started < 8
    assert server.counts[name] == 3
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(f"{server.url}/{name}: ")]
    assert len(lines) == 2
    assert "2 of 4" in lines[0] and "0.02 s" in lines[0] and "3 of 4" in lines[1] and "0.04 s" in lines[1]
    assert {"hang": "stalled", "stall": "stalled", 503: "503"}.get(fault, "") in lines[0]
    assert not [path for path in cached(split) if path.endswith((".part", ".lock"))]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        (500, "500"),
        ("hang", "stalled.* 0 bytes"),
        ("stall", r"stalled.* \d\d+ bytes"),
        ("short", r"\d+ bytes, index\.json lists \d+"),
        ("flip", r"SHA-256 \w{16}, index\.json lists \w{16}"),
    ],
)
def test_the_last_error_names_the_url_and_the_fault(fault, pattern, split, server):
    server.always = fault
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"^{server.url}/{TAR}: .*{pattern}.*4 attempts") as error:
        split.open_tar(1)
    assert time.monotonic() - started < 8 and "\n" not in str(error.value)
    assert server.counts[TAR] == 4
    assert cached(split) == []


@pytest.mark.parametrize(
    ("status", "pattern"),
    [(404, "upload.*data.path"), (403, "credentials"), (400, "data.path")],
)
def test_errors_that_are_not_retried(status, pattern, server, tmp_path):
    server.always = status
    with pytest.raises(UserError, match=rf"^{server.url}/index\.json.*{pattern}"):
        open_split(Data(server.url, cache=str(tmp_path)))
    assert server.counts == {"index.json": 1}


def test_no_server(server, tmp_path):
    server.server_close()
    with pytest.raises(UserError, match=rf"^{server.url}/index\.json: .*4 attempts"):
        open_split(Data(server.url, cache=str(tmp_path)))


def test_an_endless_body(split, server, shards, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda path: bytes(1 << 24))
    with pytest.raises(UserError, match=rf"{TAR}: .*more than .* bytes"):
        split.open_tar(1)


@pytest.mark.parametrize(
    ("url", "pattern"),
    [
        ("pipe:cat /etc/passwd", "begins with http, "),
        ("pipe://cat", "begins with http"),
        ("file::http://127.0.0.1/x", "begins with http"),
        ("simplecache::http://127.0.0.1/x", "without ::"),
        ("http://127.0.0.1/x::file:///etc", "begins with http"),
        ("file:///etc", "begins with http"),
        ("ssh://host/x", "begins with http"),
        ("HTTP://host/x", "begins with http"),
        ("http://", "is not the URL of a folder"),
        ("s3://bucket/x?versionId=1", "is not the URL of a folder"),
        ("https://user:secret@host/x", "netrc"),
        ("gs://bucket/x", "pip install 'gcsfs'"),
    ],
)
def test_urls_that_are_refused(url, pattern, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(fsspec, "url_to_fs", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(UserError, match=pattern) as error:
        open_split(Data(url, cache=str(tmp_path)))
    assert "data.path" in str(error.value) and "secret" not in str(error.value)


def read_all(url: str, folder: str, expected: list) -> None:
    split = Split(Remote(url, Cache(Path(folder), 10**9)), "train")
    assert samples(split) == expected


@pytest.mark.usefixtures("forks")
def test_processes_that_read_at_once_fetch_each_file_once(server, shards, tmp_path):
    server.delay = 0.005
    args = server.url, str(tmp_path), samples(Split(shards, "train"))
    children = [FORK.Process(target=read_all, args=args) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 4
    assert server.counts.pop("index.json") == 4
    assert len(server.counts) == 72 and set(server.counts.values()) == {1}


@pytest.mark.usefixtures("forks")
def test_leftovers_of_a_killed_process_are_removed(split, server, shards):
    server.faults[TAR] = ["stall"]
    child = FORK.Process(target=split.fetch_shard, args=(1,))
    child.start()
    deadline = time.monotonic() + 10
    while server.faults[TAR] or not any(path.stat().st_size for path in split.folder.cache.folder.glob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert any(name.endswith(".part") for name in cached(split)) and any(
        name.endswith(".lock") for name in cached(split)
    )
    assert split.read(2) == Split(shards, "train").read(2)  # at once: the lock ended with its process
    assert cached(split) == sorted((split.shards[1].sha256, split.shards[1].index_sha256))


def test_a_cache_smaller_than_the_split(server, shards, tmp_path):
    expected = samples(Split(shards, "train"))
    index = Split(shards, "train")
    limit = 3 * max(shard.bytes + max_index_bytes(shard) for shard in index.shards)
    split = Split(Remote(server.url, Cache(tmp_path, limit)), "train")
    for _ in range(2):
        assert samples(split) == expected
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    assert min(tars(server).values()) == 2
    with pytest.raises(UserError, match=rf"^data\.cache_gb is 1e-06, .*{server.url}/train-000000\.tar .*raise it"):
        Split(Remote(server.url, Cache(tmp_path, 1000)), "train").open_tar(0)
    need = sum(sorted((shard.bytes + max_index_bytes(shard) for shard in index.shards), reverse=True)[: 2 * WINDOW])
    open_split(Data(server.url, cache=str(tmp_path), cache_gb=(need + 1) / 1e9))
    with pytest.raises(UserError, match=rf"^data\.cache_gb is 0\.0001, .*32 shards.*{server.url}, split train"):
        open_split(Data(server.url, cache=str(tmp_path), cache_gb=1e-4))


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_damaged_copy_is_fetched_again(harm, split, server, shards, capfd):
    expected = samples(Split(shards, "train"))
    assert split.read(2) == expected[2]
    for digest in (split.shards[1].sha256, split.shards[1].index_sha256):
        path = split.folder.cache.folder / digest
        data = bytearray(path.read_bytes())
        data = [byte ^ 255 for byte in data] if harm == "flip" else data[: len(data) // 2]
        path.unlink() if harm == "gone" else path.write_bytes(bytes(data))  # in place: also what is open now
    assert split.read(3) == expected[3]
    fresh = pickle.loads(pickle.dumps(split))
    assert [fresh.read(2), fresh.read(3)] == expected[2:4]
    assert ("damaged" in capfd.readouterr().err) == (harm != "gone")
    assert server.counts[TAR] == 2 and server.counts[TAR.replace(".tar", ".idx.npy")] == 2


def batches(path, folder, workers, first_step=0):
    data = Data(str(path), cache=str(folder), workers=workers)
    found = train_loader(open_split(data), transform, 3, 7, data, Optim(batch_size=8, epochs=2))
    return list(found.iterate(first_step))


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(("workers", "first"), [(0, 0), (2, 0), (2, 5)])
def test_batches_are_those_of_the_folder(workers, first, server, shards, tmp_path):
    expected, found = batches(shards, tmp_path, 0, first), batches(server.url, tmp_path, workers, first)
    assert len(found) == 18 - first
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
    assert set(tars(server).values()) == {1}


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation(workers, server, shards, tmp_path):
    data = Data(server.url, cache=str(tmp_path), workers=workers)
    split = open_split(data, "val")
    found = eval_loader(split, EvalTransform((8, 8), 1), 3, data, 3)
    for _ in range(2):
        assert torch.cat([batch["label"] for batch in found]).tolist() == Split(shards, "val").labels().tolist()
    assert set(tars(server).values()) == {1} and len(tars(server)) == 4


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_read_ends_the_run(workers, server, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(loader, "WORKER_GRACE", 1)  # the pytest process does not end, and waits for them
    server.faults[TAR] = [404] * 99
    with pytest.raises(UserError, match=rf"{server.url}/{TAR} does not exist") as error:
        batches(server.url, tmp_path, workers)
    assert "\n" not in str(error.value)
    assert f"prefetching failed: {server.url}/{TAR}" in capfd.readouterr().err


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_next_window_is_fetched_while_one_is_used(server, tmp_path, monkeypatch, capfd):
    data = Data(server.url, cache=str(tmp_path), workers=0)
    monkeypatch.setattr("data.shards.WINDOW", 4)
    found = train_loader(open_split(data), transform, 3, 7, data, Optim(batch_size=2, epochs=2))
    order = EpochOrder(found.samples.split.counts, 7, window=4)
    found.batches.order = order
    iterator = iter(found)
    for epoch, window, coming in ((0, 0, [(0, 0), (0, 1)]), (0, 1, [(0, 2)]), (0, 2, [(0, 3)])):
        for _ in range(4):
            batch = next(iterator)
        shards = {f"train-{number:06}.tar" for place in coming for number in order.shards(*place)}
        wait_for(lambda shards=shards: shards <= tars(server).keys())
        assert set((batch["sample"] // 2).tolist()) <= set(order.shards(epoch, window))
        assert len(tars(server)) == 4 * (window + 2)
    iterator.close()
    wait_for(lambda: found.prefetcher.threads == 0)
    assert set(tars(server).values()) == {1}
    assert re.search(rf"^fetching 8 shards, \S+ GB, to {tmp_path}", capfd.readouterr().out)


def test_prefetching_is_bounded_by_the_cache(server, shards, tmp_path):
    sizes = [shard.bytes + max_index_bytes(shard) for shard in Split(shards, "train").shards]
    split = Split(Remote(server.url, Cache(tmp_path, sum(sizes[:5]))), "train")
    split.fetch_shard(4)
    split.fetch_shard(30)
    prefetcher = Prefetcher(split)
    prefetcher.request(range(36))
    wait_for(lambda: prefetcher.threads == 0)
    assert set(tars(server)) == {f"train-{number:06}.tar" for number in (0, 1, 2, 3, 4, 30)}
    assert set(tars(server).values()) == {1}  # requested shards that were cached were not evicted
    assert not (tmp_path / split.shards[30].sha256).exists()


def test_only_the_first_rank_of_a_host_prefetches(server, tmp_path, monkeypatch):
    data = Data(server.url, cache=str(tmp_path), workers=0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train_loader(open_split(data), transform, 3, 7, data, Optim(batch_size=8, epochs=2)).prefetcher is None


def test_prefetch_requests_from_any_step():
    def coming(first_step):
        batches, requests = TrainBatches(EpochOrder(np.full(10, 5), 3, window=4), 8, 8, 0, 1, epochs=2), []
        list(batches.iterate(first_step, requests.append))
        return requests

    order = EpochOrder(np.full(10, 5), 3, window=4)  # windows begin at 0, 20 and 40; batches at 0, 8, 16, ... 40
    a, b, c = (order.shards(0, number) for number in range(3))
    x, y, z = (order.shards(1, number) for number in range(3))
    assert sorted(a + b + c) == list(range(10))
    assert coming(0) == [a + b, a + b + c, b + c, c + x, x + y, x + y + z, y + z, z]
    assert coming(1) == coming(0)
    assert coming(4) == [b + c, c + x, x + y, x + y + z, y + z, z]
    assert coming(11) == [z]
