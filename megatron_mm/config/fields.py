"""Declaration of a setting: its bounds, its explanation, and sections that a registry decides.

    micro_batch_size: PositiveInt = 1
    \"\"\"Samples of a microbatch; with packing, places of seq_length tokens.\"\"\"

The string behind a field is its explanation: `--help` and config/README.md print it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, get_args, get_origin

from megatron_mm.errors import ConfigError
from megatron_mm.plugins import Registry


@dataclass(frozen=True)
class Bounds:
    """The numbers that a setting may have: from `ge` or above `gt`, up to `le` or below `lt`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        """NaN is in no bounds."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and value == value
        )

    def __str__(self) -> str:
        low = _number(self.ge) if self.ge is not None else None
        low = f"more than {_number(self.gt)}" if self.gt is not None else low
        high = _number(self.le) if self.le is not None else None
        high = f"less than {_number(self.lt)}" if self.lt is not None else high
        if low and high:
            return f"{low} to {high}" if self.lt is None else f"{low} to below {self.lt:g}"
        if self.ge is not None:
            return f"{low} or more"
        return f"{high} or less" if self.le is not None else low or high or "any number"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


# No whole number of a run is larger, and C libraries take no more: torch's sizes, numpy's seeds.
MOST = 2**31 - 1


PositiveInt = Annotated[int, Bounds(gt=0)]
NonNegativeInt = Annotated[int, Bounds(ge=0)]
# Numbers of things that are made one by one: a slip must not begin work without an end.
Samples = Annotated[int, Bounds(ge=1, le=2**20)]
Experts = Annotated[int, Bounds(ge=1, le=2**14)]
Layers = Annotated[int, Bounds(ge=1, le=1024)]
Workers = Annotated[int, Bounds(ge=0, le=256)]
PositiveFloat = Annotated[float, Bounds(gt=0)]
NonNegativeFloat = Annotated[float, Bounds(ge=0)]


@dataclass(frozen=True)
class Named:
    """Marks text that is the name of a part of the registry, or a dotted path."""

    registry: Registry


@dataclass(frozen=True)
class Chosen:
    """Marks a section whose dataclass the registry gives for its key `type`.

    Every part of the registry has `settings`, a dataclass with a field `type` whose default is the
    part's name. A section without the key is of the type `default`.
    """

    registry: Registry
    default: str


@dataclass(frozen=True)
class Sections:
    """Marks a dict of sections, which the parts of the registry have.

    A part has `sections`, the dataclass of each key, or `settings`, the dataclass of a section
    under the part's own name; None for none. With `flat`, the sections stand beside the other
    fields in files, not below the field's name.
    """

    registry: Registry
    flat: bool = False

    def kinds(self) -> Iterator[tuple[str, type]]:
        """(key, dataclass) of every section. Parts with the same settings may share one.

        Raises:
            ConfigError: if two parts have different settings under one key.
        """
        found: dict[str, type] = {}
        for name, part in self.registry.items():
            for key, settings in _sections_of(name, part).items():
                if found.setdefault(key, settings) is not settings:
                    raise ConfigError(
                        f"{self.registry.what} {name} has the section {key}, which has other "
                        "settings already; choose another name for it"
                    )
        yield from found.items()

    def defaults(self) -> dict[str, Any]:
        """Every section with its default settings."""
        return {key: settings() for key, settings in self.kinds()}


def _sections_of(name: str, part: Any) -> Mapping[str, type]:
    if hasattr(part, "sections"):
        return part.sections
    return {} if part.settings is None else {name: part.settings}


def marker[T](hint: Any, kind: type[T]) -> T | None:
    """The annotation of this kind in an Annotated hint; None without one."""
    found = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((item for item in found if isinstance(item, kind)), None)


def bare(hint: Any) -> Any:
    """The hint without annotations."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


@cache
def explanations(cls: type) -> dict[str, str]:
    """Field name -> the string behind it, in one line; fields of base classes included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        written = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(written, ast.ClassDef)
        for field, text in pairwise(written.body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if not isinstance(text, ast.Expr):
                continue
            if isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
                found[field.target.id] = " ".join(text.value.value.split())
    return found
