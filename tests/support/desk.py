"""What the workers of some tests do. Imports no torch: each of them starts anew."""

import time

from megatron_mm.errors import DataError


class Desk:
    """What the workers of these tests do."""

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
    """Its bytes arrive and cannot be made an object of."""

    def __reduce__(self):
        return no_memory, ()


def no_memory():
    raise MemoryError("no memory for the answer")
