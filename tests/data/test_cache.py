"""The folder of fetched files: its limit, what goes first, and what killed processes leave."""

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


def held(cache):
    return {path.name for path in cache.folder.iterdir()}


def test_the_least_recently_used_go_and_an_open_one_stays_readable(tmp_path):
    cache = Cache(tmp_path, 30)
    put(cache, A, 10, age=9)
    put(cache, B, 10, age=8)
    put(cache, C, 10, age=7)
    opened = cache.find(B, 10)  # used now
    put(cache, D, 15, age=1)
    assert held(cache) == {B, D}
    put(cache, A, 30)
    assert held(cache) == {A}
    assert os.read(opened, 99) == bytes(10)
    os.close(opened)


def test_files_of_others_are_neither_counted_nor_removed(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(bytes(100))
    (tmp_path / "photo.part").write_bytes(bytes(100))
    (tmp_path / "folder").mkdir()
    cache = Cache(tmp_path, 10)
    put(cache, A, 10)
    put(cache, B, 10)
    assert held(cache) == {B, "photo.jpg", "photo.part", "folder"}


def test_the_limit_holds_with_downloads_under_way(tmp_path):
    cache, used = Cache(tmp_path, 25), []

    def fetch(number):
        digest = f"{number:064}"
        with cache.fetching(digest), cache.part(digest, 10) as part:
            with locked(tmp_path / "room.lock"):
                used.append(cache._contents()[1])
            part.write_bytes(bytes(10))
            os.close(cache.keep(part, digest))
            with locked(tmp_path / "room.lock"):
                used.append(cache._contents()[1])

    put(cache, A, 20)  # must go first
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(fetch, range(12)))
    assert set(used) <= {10, 20} and len(used) == 24
    assert len(held(cache)) == 2


def test_a_file_of_another_length_does_not_count(tmp_path):
    cache = Cache(tmp_path, 100)
    put(cache, A, 10)
    assert cache.find(A, 11) is None
    assert held(cache) == set()
    assert cache.find(A, None) is None and not cache.touch(A)


def test_leftovers_go_and_downloads_under_way_stay(tmp_path):
    for name in (f"{A}.lock", f"{A}.10.0f.part", f"{B}.10.0f.part", f"{C}.10.0f.part", f"{C}.lock"):
        (tmp_path / name).write_bytes(bytes(10))
    with locked(tmp_path / f"{C}.lock"):
        Cache(tmp_path, 100)
        assert {path.name for path in tmp_path.iterdir()} == {f"{C}.10.0f.part", f"{C}.lock"}
        cache = Cache(tmp_path, 20)
        put(cache, A, 10)
        put(cache, B, 10)
        assert held(cache) == {B, f"{C}.10.0f.part", f"{C}.lock"}  # room is kept for the download
    with cache.fetching(C), cache.part(C, 10):
        assert f"{C}.10.0f.part" not in held(cache)


def test_a_lock_excludes_threads_and_leaves_nothing(tmp_path):
    inside, most, lock = [], [], tmp_path / "x.lock"

    def work(_):
        with locked(lock) as held:
            inside.append(held)
            most.append(len(inside))
            with locked(lock, wait=False) as twice:
                assert not twice
            time.sleep(0.001)
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(60)))
    assert set(most) == {1} and len(most) == 60
    assert not lock.exists()


def test_a_forked_child_does_not_keep_a_lock(tmp_path):
    with locked(tmp_path / "x.lock"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path / "x.lock", wait=False) as held:
            assert held
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache .*/file/cache: not a directory: .*choose another folder"):
        Cache(tmp_path / "file/cache", 10)
