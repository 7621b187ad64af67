"""Reads a pickle as plain values: nothing in it is imported, called or built.

`pickle.Unpickler` cannot be made safe by the names it may find: BUILD sets attributes of whatever
was found, and REDUCE calls it. This reader knows only the opcodes that the index of a checkpoint
is written with (pickle's protocol 4 and 5, PEP 3154 and 574) and makes of them strings, numbers,
tuples, lists, dicts, and `Record`s, which are a name and fields. Every opcode takes a time and a
memory that its own bytes bound, and nothing is walked, compared or hashed but strings and numbers:
deep, circular or shared values cost no more than their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_mm.errors import CheckpointError

MOST_MARKS = 32  # open at once; an index has 7
MOST_STACK = 10_000  # values at once; pickle writes batches of 1,000
# Dimensions of a tensor, and the largest number. Below 2^60 different integers have different
# hashes, so that no choice of them makes a dict slow.
MOST_DIMENSIONS, MOST_NUMBER = 16, 2**60


class Name(str):
    """Dotted name that the pickle refers to."""


@dataclass(eq=False, slots=True)
class Record:
    """Object of the pickle: the name of its class, and its fields (dict or tuple) once known."""

    kind: Name
    fields: Any = None


def shown(text: object, most: int = 100) -> str:
    """Returns a text of a file for a message: escaped, and not longer than `most`."""
    line = str(text)[: most + 1]
    line = line if line.isprintable() else ascii(line)
    return line if len(line) <= most else f"{line[:most]}..."


def _refuse(what: str) -> CheckpointError:
    return CheckpointError(f"{what}, which no index needs")


def shape(value: object) -> tuple[int, ...]:
    """Returns a tuple of sizes or offsets.

    Raises:
        CheckpointError: it is none.
    """
    if type(value) is not tuple or len(value) > MOST_DIMENSIONS:
        raise _refuse("it has a shape that is no short tuple")
    if not all(type(n) is int and 0 <= n < MOST_NUMBER for n in value):
        raise _refuse("it has a shape of other things than small whole numbers")
    return value


def read(
    content: bytes, records: frozenset[str], values: frozenset[str], constants: frozenset[str]
) -> Any:
    """Returns the value of a pickle.

    Args:
        records: classes that become Records.
        values: names that stand for themselves, such as dtypes.
        constants: functions of one argument whose results nobody needs: they become None.

    Raises:
        CheckpointError: it is damaged, or has an opcode or a name that no index needs.
    """
    return _Reader(content, records, values, constants).read()


class _Reader:
    def __init__(
        self,
        content: bytes,
        records: frozenset[str],
        values: frozenset[str],
        constants: frozenset[str],
    ):
        self._content, self._at = content, 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        self._records, self._constants = records, constants
        self._names = records | values | constants | {"torch.Size"}

    def read(self) -> Any:
        content, end, stack = self._content, len(self._content), self._stack
        while self._at < end:
            code = content[self._at]
            self._at += 1
            if code == STOP:
                if len(stack) != 1 or self._marks:
                    raise CheckpointError("it ends in the middle")
                return stack[0]
            step = STEPS.get(code)
            if step is None:
                raise _refuse(f"it has the opcode {bytes([code])!r} at byte {self._at - 1}")
            step(self)
            if len(stack) > MOST_STACK:
                raise _refuse(f"it has {len(stack)} values at once")
        raise CheckpointError("it ends too early")

    # ---- bytes ----

    def _take(self, count: int) -> bytes:
        part = self._content[self._at : self._at + count]
        if len(part) != count:
            raise CheckpointError("it ends too early")
        self._at += count
        return part

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    # ---- stack ----

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise CheckpointError("it takes a value that is not there")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise CheckpointError("it takes a mark that is not there")
        mark = self._marks.pop()
        found = self._stack[mark:]
        del self._stack[mark:]
        return found

    def _top(self, kind: type) -> Any:
        value = self._pop()
        if type(value) is not kind:
            raise _refuse(f"it fills a {type(value).__name__} as a {kind.__name__}")
        self._stack.append(value)
        return value

    # ---- opcodes ----

    def _header(self) -> None:
        version = self._number(1)
        if self._at != 2 or version not in (4, 5):
            raise _refuse(f"it is of pickle's protocol {version}")

    def _frame(self) -> None:
        self._take(8)

    def _mark(self) -> None:
        if len(self._marks) == MOST_MARKS:
            raise _refuse(f"it is more than {MOST_MARKS} levels deep")
        self._marks.append(len(self._stack))

    def _text(self, size: int) -> None:
        try:
            self._stack.append(self._take(self._number(size)).decode())
        except UnicodeDecodeError:
            raise CheckpointError("it has a text that is not UTF-8") from None

    def _int(self, size: int) -> None:
        self._stack.append(self._number(size))

    def _signed(self, size: int) -> None:
        self._stack.append(int.from_bytes(self._take(size), "little", signed=True))

    def _long(self) -> None:
        size = self._number(1)
        if size > 8:
            raise _refuse(f"it has a number of {size} bytes")
        self._signed(size)

    def _memoize(self) -> None:
        value = self._pop()
        self._memo.append(value)
        self._stack.append(value)

    def _recall(self, size: int) -> None:
        number = self._number(size)
        if number >= len(self._memo):
            raise CheckpointError(f"it recalls value {number} of {len(self._memo)}")
        self._stack.append(self._memo[number])

    def _tuple(self, count: int) -> None:
        self._stack.append(tuple([self._pop() for _ in range(count)][::-1]))

    def _long_tuple(self) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _appends(self) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def _set_items(self, pairs: list[Any]) -> None:
        target, keys = self._top(dict), pairs[::2]
        # Texts are hashed with a secret and Records by identity; anything else might be slow.
        if len(pairs) % 2 or not all(type(key) in (str, Record) for key in keys):
            raise _refuse("it has a dict with other keys than texts and records")
        target.update(zip(keys, pairs[1::2], strict=True))

    def _set_item(self) -> None:
        value = self._pop()
        self._set_items([self._pop(), value])

    def _set_many(self) -> None:
        self._set_items(self._pop_to_mark())

    def _find(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise _refuse("it has a name that is no text")
        found = f"{module}.{name}"
        if found not in self._names:
            raise _refuse(f"it names {shown(found)}")
        self._stack.append(Name(found))

    def _new(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if type(kind) is not Name or kind not in self._records or arguments != ():
            raise _refuse("it makes an object of something else than a class of an index")
        self._stack.append(Record(kind))

    def _build(self) -> None:
        fields, record = self._pop(), self._top(Record)
        if record.fields is not None or type(fields) not in (dict, tuple):
            raise _refuse("it changes an object")
        record.fields = fields

    def _call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if type(function) is not Name or type(arguments) is not tuple or len(arguments) != 1:
            raise _refuse("it makes a call")
        if function == "torch.Size":
            self._stack.append(shape(arguments[0]))
        elif function in self._constants:
            self._stack.append(None)
        else:
            raise _refuse(f"it calls {function}")


# Opcodes by their bytes, as `pickletools.opcodes` lists them.
STOP = ord(".")
STEPS = {
    0x80: _Reader._header,
    0x95: _Reader._frame,
    ord("("): _Reader._mark,
    0x8C: lambda reader: reader._text(1),
    ord("X"): lambda reader: reader._text(4),
    ord("K"): lambda reader: reader._int(1),
    ord("M"): lambda reader: reader._int(2),
    ord("J"): lambda reader: reader._signed(4),
    0x8A: _Reader._long,
    ord("N"): lambda reader: reader._stack.append(None),
    0x88: lambda reader: reader._stack.append(True),
    0x89: lambda reader: reader._stack.append(False),
    0x94: _Reader._memoize,
    ord("h"): lambda reader: reader._recall(1),
    ord("j"): lambda reader: reader._recall(4),
    ord(")"): lambda reader: reader._stack.append(()),
    0x85: lambda reader: reader._tuple(1),
    0x86: lambda reader: reader._tuple(2),
    0x87: lambda reader: reader._tuple(3),
    ord("t"): _Reader._long_tuple,
    ord("]"): lambda reader: reader._stack.append([]),
    ord("a"): _Reader._append,
    ord("e"): _Reader._appends,
    ord("}"): lambda reader: reader._stack.append({}),
    ord("s"): _Reader._set_item,
    ord("u"): _Reader._set_many,
    0x93: _Reader._find,
    0x81: _Reader._new,
    ord("b"): _Reader._build,
    ord("R"): _Reader._call,
}
