"""Plain values <-> the dataclass tree of `schema.py`, strictly.

A key the schema does not have, or a value of another type, is refused with one line that
names the key and what is allowed. Nothing is guessed, with two exceptions: an int is a
fine float, and so is text like "1e-4", which is how PyYAML reads a number without a dot.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_mm.errors import ConfigError, unknown


@dataclass(frozen=True)
class Leaf:
    """One setting: where it stands in the tree, its type and its default."""

    path: tuple[str, ...]
    hint: Any
    default: Any

    @property
    def name(self) -> str:
        return self.path[-1]


def optional(hint: Any) -> tuple[Any, bool]:
    """Splits `T | None` into (T, True); any other hint into (hint, False)."""
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (arg for arg in get_args(hint) if arg is not type(None))
        return inner, True
    return hint, False


def expected(hint: Any) -> str:
    """The words for a type in a message or in a flag's help."""
    inner, may_be_none = optional(hint)
    if get_origin(inner) is Literal:
        words = ", ".join(map(str, get_args(inner)))
    elif get_origin(inner) is list:
        words = f"a list of {expected(get_args(inner)[0])}"
    elif is_dataclass(inner):
        words = f"a mapping with the keys {', '.join(f.name for f in fields(inner))}"
    else:
        words = {bool: "true or false", str: "text"}.get(inner, inner.__name__)
    return f"{words} or none" if may_be_none else words


def leaves(cls: type, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Every setting below the dataclass `cls`, in the order of the schema."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        inner, _ = optional(hints[f.name])
        if is_dataclass(inner):
            yield from leaves(inner, (*path, f.name))
            continue
        default = f.default if f.default_factory is MISSING else f.default_factory()
        yield Leaf((*path, f.name), hints[f.name], default)


def coerce(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`. Raises ConfigError naming `key`, value and expected type."""
    inner, may_be_none = optional(hint)
    if value is None and may_be_none:
        return None
    wrong = ConfigError(f"{key} is {value!r}; allowed: {expected(hint)}")
    if is_dataclass(inner):
        return from_dict(inner, value, key)
    if get_origin(inner) is list:
        if not isinstance(value, (list, tuple)):
            raise wrong
        (item,) = get_args(inner)
        return [coerce(item, part, f"{key}[{index}]") for index, part in enumerate(value)]
    if get_origin(inner) is Literal:
        # The type matters too: True equals 1 in Python, but not in a config.
        if not any(type(value) is type(c) and value == c for c in get_args(inner)):
            raise wrong
        return value
    if inner is float:
        return _number(value, wrong)
    # A bool is an int to Python; a size of `true` is a mistake.
    if type(value) is not inner:
        raise wrong
    return value


def _number(value: Any, wrong: ConfigError) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(number):
        raise wrong
    return number


def from_dict[T](cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Builds the dataclass `cls`; keys that are absent keep their defaults.

    `where` is the dotted place of `mapping` in the whole tree, for messages only.
    Raises ConfigError for an unknown key or a value of the wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where or cls.__name__} is {mapping!r}; allowed: {expected(cls)}")
    hints = get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in mapping:
        if key not in hints:
            raise unknown(f"key in {where or cls.__name__}:", key, hints)
    return cls(**{k: coerce(hints[k], v, f"{prefix}{k}") for k, v in mapping.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """The tree below a dataclass as plain dicts, lists and numbers; inverse of `from_dict`."""
    return dataclasses.asdict(config)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: mappings are merged key by key, anything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value
    return merged
