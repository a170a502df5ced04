"""Which of the slow tests a run takes, when it takes only some of them."""

import zlib


def sampled(node: str, number: int, every: int) -> bool:
    """Whether a test is in sample `number`, counted on without end; any `every` samples in a row have each test once.

    It depends on the test's name alone, so tests that are added or removed move no other test to another sample.
    """
    return zlib.crc32(node.encode()) % every == number % every
