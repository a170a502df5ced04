"""The cache of fetched files: its limit, eviction, and leftovers of killed processes."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from configs.errors import UserError
from data.cache import Cache, locked

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


def put(cache, digest, size, age=0):
    with cache.fetching(digest), cache.part(digest, size) as part:
        part.write_bytes(bytes(size))
        os.close(cache.keep(part, digest))
    os.utime(cache.folder / digest, (time.time() - age,) * 2)


def cached(cache):
    return {path.name for path in cache.folder.iterdir()}


def test_the_least_recently_used_are_evicted_and_an_open_one_stays_readable(tmp_path):
    cache = Cache(tmp_path, 30)
    put(cache, A, 10, age=9)
    put(cache, B, 10, age=8)
    put(cache, C, 10, age=7)
    opened = cache.find(B, 10)  # used now
    put(cache, D, 15, age=1)
    assert cached(cache) == {B, D}
    put(cache, A, 30)
    assert cached(cache) == {A}
    assert os.read(opened, 99) == bytes(10)
    os.close(opened)


def test_files_of_others_are_neither_counted_nor_removed(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(bytes(100))
    (tmp_path / "photo.part").write_bytes(bytes(100))
    (tmp_path / "folder").mkdir()
    cache = Cache(tmp_path, 10)
    put(cache, A, 10)
    put(cache, B, 10)
    assert cached(cache) == {B, "photo.jpg", "photo.part", "folder"}


def test_the_limit_includes_downloads_in_progress(tmp_path):
    cache, used = Cache(tmp_path, 25), []

    def used_bytes() -> int:
        """Bytes of finished files, and those reserved by downloads, read off the names as data/cache.py documents."""
        with locked(tmp_path / "room.lock"):
            parts = [path.name.split(".") for path in tmp_path.glob("*.part")]
            files = [path for path in tmp_path.iterdir() if "." not in path.name]
            return sum(int(size) for _, size, *_ in parts) + sum(path.stat().st_size for path in files)

    def fetch(number):
        digest = f"{number:064}"
        with cache.fetching(digest), cache.part(digest, 10) as part:
            used.append(used_bytes())
            part.write_bytes(bytes(10))
            os.close(cache.keep(part, digest))
            used.append(used_bytes())

    put(cache, A, 20)  # must be evicted first
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(fetch, range(12)))
    assert set(used) <= {10, 20} and len(used) == 24
    assert len(cached(cache)) == 2


def test_a_file_of_another_length_does_not_count(tmp_path):
    cache = Cache(tmp_path, 100)
    put(cache, A, 10)
    assert cache.find(A, 11) is None
    assert cached(cache) == set()
    assert cache.find(A, None) is None and not cache.touch(A)


def test_leftovers_are_removed_and_downloads_in_progress_stay(tmp_path):
    for name in (f"{A}.lock", f"{A}.10.0f.part", f"{B}.10.0f.part", f"{C}.10.0f.part", f"{C}.lock"):
        (tmp_path / name).write_bytes(bytes(10))
    with locked(tmp_path / f"{C}.lock"):
        Cache(tmp_path, 100)
        assert {path.name for path in tmp_path.iterdir()} == {f"{C}.10.0f.part", f"{C}.lock"}
        cache = Cache(tmp_path, 20)
        put(cache, A, 10)
        put(cache, B, 10)
        assert cached(cache) == {B, f"{C}.10.0f.part", f"{C}.lock"}  # its bytes stay reserved
    with cache.fetching(C), cache.part(C, 10):
        assert f"{C}.10.0f.part" not in cached(cache)


def test_a_lock_excludes_threads_and_leaves_nothing(tmp_path):
    inside, counts, lock = [], [], tmp_path / "x.lock"

    def work(_):
        with locked(lock) as acquired:
            inside.append(acquired)
            counts.append(len(inside))
            with locked(lock, wait=False) as again:
                assert not again
            time.sleep(0.001)
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(60)))
    assert set(counts) == {1} and len(counts) == 60
    assert not lock.exists()


def test_a_forked_child_does_not_keep_a_lock(tmp_path):
    with locked(tmp_path / "x.lock"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path / "x.lock", wait=False) as acquired:
            assert acquired
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache .*/file/cache: not a directory.*another folder"):
        Cache(tmp_path / "file/cache", 10)
