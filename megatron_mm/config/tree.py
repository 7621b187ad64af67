"""Plain values <-> the dataclass tree of `settings.py`, strictly.

A key the settings do not have, or a value of another type, is refused with one line that
names the key and what is allowed. Nothing is guessed, with two exceptions: an int is a
fine float, and so is text like "1e-4", which is how PyYAML reads a number without a dot.
A setting that may be absent, and a list, also takes the word `none`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_mm.config.fields import (
    MOST,
    Bounds,
    Chosen,
    Named,
    Sections,
    bare,
    explanations,
    marker,
)
from megatron_mm.errors import ConfigError, unknown

ABSENT = "none"  # the word for a setting that is absent, in files and behind flags
MAX_TEXT = 2**16  # characters of a setting


@dataclass(frozen=True)
class Leaf:
    """One setting.

    Attributes:
        path: its keys in files, from the root.
        hint: its type, without annotations.
        explanation: the string behind its declaration; empty without one.
        named: marks text that names a part of a registry.
    """

    path: tuple[str, ...]
    hint: Any
    default: Any
    bounds: Bounds | None = None
    explanation: str = ""
    named: Named | None = None

    @property
    def name(self) -> str:
        return self.path[-1]


def optional(hint: Any) -> tuple[Any, bool]:
    """Splits `T | None` into (T, True); any other hint into (hint, False). Annotations are left
    out."""
    hint = bare(hint)
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (arg for arg in get_args(hint) if arg is not type(None))
        return bare(inner), True
    return hint, False


def hints_of(cls: type) -> dict[str, Any]:
    """Field name -> type of a dataclass, with annotations."""
    return get_type_hints(cls, include_extras=True)


def _marked[T](hint: Any, kind: type[T]) -> T | None:
    """`marker`, also inside `... | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(filter(None, (marker(arg, kind) for arg in get_args(hint))), None)
    return marker(hint, kind)


def expected(hint: Any) -> str:
    """The words for a type in a message or in a flag's help."""
    inner, may_be_none = optional(hint)
    if get_origin(inner) is Literal:
        words = ", ".join(map(str, get_args(inner)))
    elif get_origin(inner) is list:
        words = f"a list of {expected(get_args(inner)[0])}"
    elif get_origin(inner) is dict:
        words = f"a mapping from names to {expected(get_args(inner)[1])}"
    elif is_dataclass(inner):
        words = f"a mapping with the keys {', '.join(f.name for f in fields(inner))}"
    else:
        words = {bool: "true or false", str: "text"}.get(inner, getattr(inner, "__name__", ""))
    return f"{words} or none" if may_be_none else words


def leaves(cls: type, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Every setting below the dataclass `cls`, in the order of declaration.

    A section that a registry decides has the settings of all its kinds; a setting that several
    kinds have counts once, and its `type` is none of them. Settings below a dict of names are left
    out: they stand in files only.
    """
    hints, texts = hints_of(cls), explanations(cls)
    for f in fields(cls):
        hint = hints[f.name]
        inner, _ = optional(hint)
        chosen, sections = _marked(hint, Chosen), _marked(hint, Sections)
        if chosen:
            yield from _of_kinds(chosen, (*path, f.name))
        elif sections:
            for key, kind in sections.kinds():
                yield from leaves(kind, (*path, *([] if sections.flat else [f.name]), key))
        elif isinstance(inner, type) and is_dataclass(inner):
            yield from leaves(inner, (*path, f.name))
        elif get_origin(inner) is not dict:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            bare_hint = inner | None if optional(hint)[1] else inner
            yield Leaf(
                (*path, f.name),
                bare_hint,
                default,
                _marked(hint, Bounds),
                texts.get(f.name, ""),
                _marked(hint, Named),
            )


def _of_kinds(chosen: Chosen, path: tuple[str, ...]) -> Iterator[Leaf]:
    seen: set[str] = set()
    names = [chosen.default, *(name for name in chosen.registry if name != chosen.default)]
    for name in names:
        for leaf in leaves(chosen.registry[name].settings, path):
            if leaf.name not in seen and leaf.path != (*path, "type"):
                seen.add(leaf.name)
                yield leaf


def value_at(config: Any, path: tuple[str, ...]) -> Any:
    """The value of a leaf; None where a section of its path is absent or of a kind without it."""
    for key in path:
        if isinstance(config, Mapping):
            config = config.get(key)
            continue
        below = getattr(config, key, MISSING)
        if below is MISSING:  # a flat section
            dicts = (v for v in vars(config).values() if isinstance(v, Mapping)) if config else ()
            below = next((held[key] for held in dicts if key in held), None)
        config = below
    return config


def coerce(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`. Raises ConfigError naming `key`, value and expected type."""
    inner, may_be_none = optional(hint)
    if may_be_none and (value is None or value == ABSENT):
        return None
    wrong = ConfigError(f"{key} is {brief(value)}; allowed: {expected(hint)}")
    chosen, sections = _marked(hint, Chosen), _marked(hint, Sections)
    if chosen:
        if not isinstance(value, Mapping):
            raise wrong
        kind = chosen.registry[coerce(str, value.get("type", chosen.default), f"{key}.type")]
        return from_dict(kind.settings, value, key)
    if sections:
        return _sections(sections, value, key)
    if isinstance(inner, type) and is_dataclass(inner):
        return from_dict(inner, value, key)
    if get_origin(inner) is list:
        value = [] if value == ABSENT else value
        if not isinstance(value, (list, tuple)):
            raise wrong
        (item,) = get_args(inner)
        return [coerce(item, part, f"{key}[{index}]") for index, part in enumerate(value)]
    if get_origin(inner) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise wrong
        item = get_args(inner)[1]
        return {name: coerce(item, part, f"{key}.{name}") for name, part in value.items()}
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
    if isinstance(value, int) and abs(value) > MOST:
        raise ConfigError(f"{key} is {brief(value)}; allowed: up to {MOST}")
    if isinstance(value, str) and ("\0" in value or len(value) > MAX_TEXT):
        allowed = f"text of up to {MAX_TEXT} characters without NUL"
        raise ConfigError(f"{key} is {brief(value)}; allowed: {allowed}")
    named = _marked(hint, Named)
    if named and "." not in value:  # a dotted path is imported when the run is checked
        named.registry.check(value)
    return value


def brief(value: Any) -> str:
    """`repr` of a value for a message. Long ones, and numbers too long to print, are shortened."""
    if isinstance(value, int) and abs(value) > 2**63:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # it holds such a number, or itself
        return f"a {type(value).__name__}"
    return text if len(text) <= 160 else f"{text[:120]}... ({len(text)} characters)"


def _sections(sections: Sections, value: Any, key: str) -> dict[str, Any]:
    """A complete dict: sections that are absent have their defaults."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {brief(value)}; allowed: a mapping")
    kinds = dict(sections.kinds())
    for name in value:
        if name not in kinds:
            raise unknown(f"key in {key}:", name, kinds)
    prefix = "" if sections.flat else f"{key}."
    return {
        name: from_dict(kind, value.get(name, {}), f"{prefix}{name}")
        for name, kind in kinds.items()
    }


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

    Args:
        where: the dotted place of `mapping` in the whole tree, for messages only.
    Raises:
        ConfigError: for an unknown key or a value of the wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where or cls.__name__} is {brief(mapping)}; allowed: {expected(cls)}")
    hints, given = hints_of(cls), dict(mapping)
    flat: dict[str, dict[str, Any]] = {}
    for name, sections in _flat_sections(hints):
        keys = [key for key, _ in sections.kinds() if key in given and key not in hints]
        flat[name] = coerce(hints[name], {key: given.pop(key) for key in keys}, name)
    prefix = f"{where}." if where else ""
    known = [name for name in hints if name not in flat]
    for key in given:
        if key not in known:
            keys = [key for _, sections in _flat_sections(hints) for key, _ in sections.kinds()]
            raise unknown(f"key in {where or cls.__name__}:", key, [*known, *keys])
    return cls(**flat, **{k: coerce(hints[k], v, f"{prefix}{k}") for k, v in given.items()})


def _flat_sections(hints: Mapping[str, Any]) -> list[tuple[str, Sections]]:
    found = [(name, marker(hint, Sections)) for name, hint in hints.items()]
    return [(name, sections) for name, sections in found if sections and sections.flat]


def to_dict(config: Any) -> dict[str, Any]:
    """The tree below a dataclass as plain dicts, lists and numbers; inverse of `from_dict`."""
    flat = {name for name, _ in _flat_sections(hints_of(type(config)))}
    plain: dict[str, Any] = {}
    for f in fields(config):
        value = _plain(getattr(config, f.name))
        plain.update(value if f.name in flat else {f.name: value})
    return plain


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: mappings are merged key by key, anything else is replaced. So is a
    section by one of another `type`, which has other keys; one without a type takes any."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = value
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            kind = old.get("type")
            if kind in (None, value.get("type", kind)):
                merged[key] = merge(old, value)
    return merged
