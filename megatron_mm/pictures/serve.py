"""The process that images are decoded in: reads requests from stdin, writes answers to stdout.

A message is the length of its head and of its body, the head as JSON, and the body, which holds
bytes of a file or pixels. The process ends with its parent, whose end closes stdin.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import struct
import sys
from typing import IO, Any

from megatron_mm.cli import leave_stops_to_parent
from megatron_mm.errors import DataError
from megatron_mm.pictures import decode

LENGTHS = struct.Struct("<IQ")
MAX_HEAD = 2**16
# The largest image, 2**26 pixels, is held up to six times: decoded, with alpha, over white, in RGB.
MEMORY = 3 * 2**30
# The largest image takes about 2 s on one core. Time on the processor, since a slow disk or a busy
# machine is not the image's fault.
SECONDS = 15


def write(stream: IO[bytes], head: dict[str, Any], *body: bytes) -> None:
    """Writes one message; its body is the parts of `body` joined."""
    text = json.dumps(head).encode()
    stream.write(LENGTHS.pack(len(text), sum(map(len, body))) + text)
    for part in body:
        stream.write(part)
    stream.flush()


def read(stream: IO[bytes], largest: int) -> tuple[dict[str, Any], bytes]:
    """Reads one message.

    Raises:
        EOFError: the other side has ended, or its message is longer than allowed: the body than
            `largest` bytes.
    """
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        raise EOFError
    of_head, of_body = LENGTHS.unpack(lengths)
    if of_head > MAX_HEAD or of_body > largest:
        raise EOFError
    text, body = stream.read(of_head), stream.read(of_body)
    if len(text) < of_head or len(body) < of_body:
        raise EOFError
    return json.loads(text), body


def _limit(kind: int, value: int) -> None:
    """Sets a limit, as far as the one that this process was started with allows."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, hard))


def _answer(head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], list[bytes]]:
    name, most = head["name"], head["max_pixels"]
    try:
        with io.BytesIO(body) if head["path"] is None else open(head["path"], "rb") as file:
            if head["sizes"] is None:
                return {"size": decode.size(file, name, most, head["box"])}, []
            image = decode.load(file, name, most, head["box"])
        whole = image.size
        parts = [decode.scaled(image, *(size or whole)).tobytes() for size in head["sizes"]]
        return {"sizes": [size or whole for size in head["sizes"]]}, parts
    except DataError as error:
        return {"error": str(error)}, []
    except MemoryError:
        held = MEMORY // 2**20
        return {
            "error": f"{name} needs more than {held} MiB to be decoded and scaled; shrink it"
        }, []
    except Exception as error:  # of a disk or of a library, of any kind
        reason = " ".join(str(error).split())[:200]
        return {"error": f"{name} cannot be read ({reason}); replace the file"}, []


def main() -> None:
    """Answers requests until stdin is closed."""
    leave_stops_to_parent()
    # Nothing that a library prints may stand among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for kind, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _limit(kind, value)
    write(answers, {"ready": True})
    while True:
        with contextlib.suppress(EOFError):
            head, body = read(sys.stdin.buffer, MEMORY)
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + head["seconds"])
            found, parts = _answer(head, body)
            write(answers, found, *parts)
            continue
        return


if __name__ == "__main__":
    main()
