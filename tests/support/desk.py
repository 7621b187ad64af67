"""Work for the data workers of tests. It needs no torch, so that a worker starts quickly."""

import time

from megatron_mm.errors import DataError


class Desk:
    """Answers, fails or waits, as the method says."""

    def __init__(self, fails=False):
        if fails:
            raise DataError("tokenizer_model is gone")

    def double(self, number):
        return 2 * number

    def big(self, number):
        return bytes(number)

    def sleep(self, seconds):
        time.sleep(seconds)

    def divide(self, number):
        return 1 / number

    def unreadable(self, _):
        return Unreadable()


class Unreadable:
    """An answer whose bytes arrive but cannot be unpickled."""

    def __reduce__(self):
        return no_memory, ()


def no_memory():
    raise MemoryError("no memory for the answer")
