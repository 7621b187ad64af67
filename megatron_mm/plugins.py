"""Registries of named parts, and parts of users by dotted path.

A registry maps a name to a part or to its dotted path. A path is imported when the part is looked
up, so listing names imports nothing, and a room may name parts of later rooms. Wherever a name is
accepted, so is the dotted path of an unregistered part: `my.module.part`.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mm.errors import ConfigError, unknown

MAX_ENTRY = 10_000  # characters of a part with its arguments


def import_object(
    path: str, what: str, error: type[ValueError] = ConfigError, kind: str = "object"
) -> Any:
    """Imports the object at a dotted path.

    Args:
        what, kind: role and Python kind of the part, for the message: "reward", "function".

    Raises:
        error: it cannot be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    # Users' modules may raise anything while they are imported.
    except Exception as problem:
        reason = " ".join(str(problem).split())
        raise error(
            f"{what} {path} cannot be imported: {type(problem).__name__}: {reason}; give the "
            f"dotted path of a {kind} in a module on PYTHONPATH"
        ) from None


class Registry[T]:
    """Named parts of one kind.

    Args:
        what: role of the parts, for messages: "objective".
        parts: name -> part or its dotted path.
        kind: Python kind of a part, for messages: "function".
        needs: attributes that every part must have.
        error: exception for names and parts that cannot be used.
        dotted: whether dotted paths of unregistered parts are accepted.
    """

    def __init__(
        self,
        what: str,
        parts: Mapping[str, T | str] | None = None,
        *,
        kind: str = "object",
        needs: Sequence[str] = (),
        error: type[ValueError] = ConfigError,
        dotted: bool = True,
    ):
        self.what, self.kind, self.needs = what, kind, tuple(needs)
        self.error, self.dotted = error, dotted
        self._parts: dict[str, T | str] = dict(parts or {})

    def register(self, name: str, part: T | str) -> None:
        """Adds a part. Registering the same part again, as a re-imported module does, changes
        nothing.

        Raises:
            ConfigError (or `error`): the name is taken by another part.
        """
        if self._parts.setdefault(name, part) != part:
            raise self.error(f"{self.what} {name!r} is registered twice; choose another name")

    def names(self) -> list[str]:
        """Registered names, in the order of registration."""
        return list(self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __getitem__(self, name: str) -> T:
        """Returns the part of a name or dotted path.

        Raises:
            ConfigError (or `error`): the name is unknown, the part cannot be imported, or it lacks
                an attribute of `needs`.
        """
        part = self._parts.get(name)
        if part is None:
            if not (self.dotted and "." in name):
                raise self.error(str(unknown(self.what, name, self._parts)))
            part = name
        if isinstance(part, str):
            part = import_object(part, self.what, self.error, self.kind)
        lacking = [attribute for attribute in self.needs if not hasattr(part, attribute)]
        if lacking:
            raise self.error(
                f"{self.what} {name} has no `{lacking[0]}`; it needs {', '.join(self.needs)}"
            )
        return part

    def check(self, name: str) -> None:
        """Raises what [] raises, but imports no registered part."""
        if name not in self._parts:
            _ = self[name]

    def items(self) -> Iterator[tuple[str, T]]:
        """Yields (name, part) of every registered part."""
        return ((name, self[name]) for name in self._parts)


@dataclass(frozen=True)
class Spec:
    """Part with constant arguments, as written in a setting: `numeric(tolerance=0.1)`.

    Attributes:
        path: registered name or dotted path.
        options: constant keyword arguments.
        name: unique in its list, for metrics.
    """

    path: str
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""


def unique_name(path: str, taken: Collection[str]) -> str:
    """Returns the last part of a dotted path, or name_2, name_3 ... if it is taken."""
    name = short = path.rpartition(".")[2]
    number = 1
    while name in taken:
        number += 1
        name = f"{short}_{number}"
    return name


def parse_specs(
    entries: Sequence[str], registry: Registry, taken: Collection[str] = ()
) -> list[Spec]:
    """Parses entries such as `exact`, `numeric(tolerance=0.1)` or `my.module.function`, without
    importing. A second part of the same name is named name_2.

    Args:
        taken: names of other parts.
    Raises:
        ConfigError (or the registry's `error`): an entry has another form or an unknown name.
    """
    specs: list[Spec] = []
    for entry in entries:
        path, options = _parse(entry, registry)
        if "." not in path and path not in registry:
            raise registry.error(
                f"{registry.what} {entry!r} is not built in; use one of "
                f"{', '.join(registry)}, or a dotted path such as my.module.function"
            )
        name = unique_name(path, {*taken, *(other.name for other in specs)})
        specs.append(Spec(path, options, name))
    return specs


def _parse(entry: str, registry: Registry) -> tuple[str, dict[str, Any]]:
    try:
        if len(entry) > MAX_ENTRY:
            raise ValueError
        node = ast.parse(entry.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else None
        keywords = call.keywords if call else []
        if call and call.args:
            raise ValueError
        # **values has a keyword of None
        options = {str(k.arg): ast.literal_eval(k.value) for k in keywords if k.arg}
        path = ast.unparse(call.func if call else node)
        if len(options) != len(keywords) or not all(p.isidentifier() for p in path.split(".")):
            raise ValueError
    # MemoryError is Python's for brackets in too many brackets, TypeError for a list as a key.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise registry.error(
            f"{registry.what} {entry[:160]!r} cannot be read; write name, name(key=value, ...) "
            "with plain values, or a dotted path"
        ) from None
    return path, options
