"""Faults that are planted in a function's source, for the length of a test."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module


@contextmanager
def planted(owner: str, name: str, old: str, new: str) -> Iterator[None]:
    """Replaces `old` by `new` in the source of a function inside the context.

    Args:
        owner: import path of its module, or "module:Class".
    """
    module, _, cls = owner.partition(":")
    home = import_module(module)
    holder = getattr(home, cls) if cls else home
    function = getattr(holder, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{owner}.{name} has {source.count(old)} times {old!r}"
    made: dict = {}
    code = compile(source.replace(old, new), f"{home.__file__} with a fault", "exec")
    exec(code, vars(home), made)
    setattr(holder, name, made[name])
    try:
        yield
    finally:
        setattr(holder, name, function)
