"""Fetch shards of a remote split in the background, before they are read."""

import sys
import threading
from collections import deque
from collections.abc import Iterable

from configs.errors import reason
from configs.log import say
from data.remote import CONCURRENT_FETCHES
from data.shard_index import max_index_bytes
from data.shards import Split


class Prefetcher:
    """Fetches shards in background threads, for all processes of a host.

    Errors are only logged: reading the shard runs into them again, and raises.
    """

    def __init__(self, split: Split):
        self.split, self.threads = split, 0  # running threads
        self._queue: deque[int] = deque()
        self._lock, self._announced = threading.Lock(), False

    def request(self, shards: Iterable[int]) -> None:
        """Fetch these shards, in this order, as far as the cache has room for them; replaces earlier requests."""
        cache, queue, missing = self.split.folder.cache, deque(), []
        room = cache.limit
        for number in shards:
            shard = self.split.shards[number]
            room -= shard.bytes + max_index_bytes(shard)
            if room < 0:
                break
            queue.append(number)
            cache.touch(shard.index_sha256)  # cached files of this request must not be evicted to make room for others
            if not cache.touch(shard.sha256):
                missing.append(shard.bytes)
        if missing and not self._announced:
            self._announced, what = True, f"{len(missing)} shards, {sum(missing) / 1e9:.3g} GB"
            say(f"fetching {what}, to {cache.folder}; more are fetched during training")
        with self._lock:
            self._queue = queue
            new = min(CONCURRENT_FETCHES, len(queue)) - self.threads
            self.threads += max(0, new)
        for _ in range(new):
            threading.Thread(target=self._fetch, daemon=True).start()

    def _fetch(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self.threads -= 1
                    return
                number = self._queue.popleft()
            try:
                self.split.fetch_shard(number)
            except Exception as error:
                print(f"prefetching failed: {reason(error)}", file=sys.stderr, flush=True)
