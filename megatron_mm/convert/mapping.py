"""The table's rows written out for one model and one folder: which tensor goes where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from megatron_mm.config import ModelConfig
from megatron_mm.config.families import language_family
from megatron_mm.convert import table
from megatron_mm.convert.table import SPELLINGS, Form, Row, Spelling
from megatron_mm.errors import ConvertError
from megatron_mm.model.families.transforms import Shape, Transform
from megatron_mm.parallel.param_layout import ParamLayout

# (name in the folder, first and last index of its first dimension or None) -> tensor
Read = Callable[[str, int | None, int | None], torch.Tensor]
# Parameters that a folder may lack: all of a group or nothing of it.
Group = re.Pattern[str]  # of the beginnings of the model's names
PROJECTOR: Group = re.compile(r"vision\.projector\.")
SIDES: Group = re.compile(r"vision\.memory_proj|language\.looks\.|language\.queries\.")
DELEGATES: Group = re.compile(r"language\.layers\.\d+\.moe\.inner\.delegate\.")
HEAD, EMBEDDING = "output_layer.weight", "embedding.weight"


@dataclass(frozen=True)
class ParamMapping:
    """One parameter of the model and the tensors of a Hugging Face folder that make it.

    Attributes:
        mcore: the model's name of the parameter.
        shape: shape of the whole parameter.
        names: names in the folder; with `{expert}` in them there is one of each per index of the
            parameter's first dimension.
        counted: every index of the parameter's first dimension is transformed by itself.
    """

    mcore: str
    shape: Shape
    names: tuple[str, ...]
    transform: Transform
    counted: bool

    @property
    def separate(self) -> bool:
        return "{expert}" in self.names[0]

    def named(self, expert: int) -> list[str]:
        return [name.replace("{expert}", str(expert)) for name in self.names]

    def hf_tensors(self) -> Iterator[tuple[str, Shape]]:
        """(name, shape) of every tensor in the folder."""
        shapes = self.transform.hf_shapes(self.shape[1:] if self.counted else self.shape)
        if not self.counted:
            yield from zip(self.names, shapes, strict=True)
        elif not self.separate:
            yield from ((n, (self.shape[0], *s)) for n, s in zip(self.names, shapes, strict=True))
        else:
            for expert in range(self.shape[0]):
                yield from zip(self.named(expert), shapes, strict=True)

    def to_mcore(self, read: Read, first: int, last: int) -> torch.Tensor:
        """The parameter, made of the folder's tensors; of a counted one the indices
        first..last-1."""
        if not self.counted:
            return self.transform.to_mcore([read(n, None, None) for n in self.names], self.shape)
        each: Iterable[Sequence[torch.Tensor]]
        if not self.separate:
            blocks = [read(name, first, last) for name in self.names]
            each = zip(*(block.unbind(0) for block in blocks), strict=True)
        else:
            each = ([read(n, None, None) for n in self.named(e)] for e in range(first, last))
        rest, whole = self.shape[1:], None
        for i, parts in enumerate(each):
            if whole is None:
                whole = parts[0].new_empty((last - first, *rest))
            self.transform.to_mcore(parts, rest, whole[i])
        return whole

    def to_hf(self, param: torch.Tensor, first: int) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the folder, from the parameter, or from the indices `first`... of a
        counted one."""
        if not self.counted:
            yield from zip(self.names, self.transform.to_hf(param), strict=True)
            return
        each = [self.transform.to_hf(index) for index in param]
        if self.separate:
            for i, parts in enumerate(each):
                yield from zip(self.named(first + i), parts, strict=True)
        else:
            for name, indices in zip(self.names, zip(*each, strict=True), strict=True):
                yield name, torch.stack(indices)


@lru_cache(maxsize=256)
def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for key in ("layer", "pair"):
        text = text.replace(rf"\{{{key}\}}", rf"(?P<{key}>\d+)")
    return re.compile(text.replace(r"\{rest\}", r"(?P<rest>[\w.]+)"))


def find_row(mcore: str, rows: Sequence[Row]) -> tuple[Row, dict[str, str]]:
    """The row of a parameter and what its braces stand for. Raises ConvertError."""
    for row in rows:
        found = _pattern(row.mcore).fullmatch(mcore)
        if found:
            return row, found.groupdict()
    raise ConvertError(f"{mcore} is in no row of the table of names: it cannot be converted")


def _mapping(
    mcore: str,
    layout: ParamLayout,
    form: Form,
    spelling: Spelling,
    values: dict[str, str],
    model: ModelConfig,
) -> ParamMapping:
    prefixes = {k: getattr(spelling, k) for k in ("text", "head", "vit", "projector")}
    names = tuple(n.format(expert="{expert}", **prefixes, **values) for n in form.names)
    return ParamMapping(mcore, layout.global_shape, names, form.how(model), layout.rows_drawn_alone)


def write_links(
    model: ModelConfig,
    parameters: Mapping[str, ParamLayout],
    spelling: str,
    *,
    rows: Sequence[Row] | None = None,
) -> list[ParamMapping]:
    """Returns the name mapping of every parameter for a folder to be written.

    Args:
        rows: instead of the model's table of names.
    """
    rows = table.rows(model) if rows is None else rows
    chosen, links = SPELLINGS[spelling], []
    for mcore, layout in parameters.items():
        row, values = find_row(mcore, rows)
        form = next(form for form in row.forms if form.used_by(chosen))
        links.append(_mapping(mcore, layout, form, chosen, values, model))
    return links


@dataclass
class StateMapping:
    """A folder read against a model.

    Attributes:
        links: in the model's order.
        missing: names that the folder lacks.
        unexpected: names in the folder that no row maps.
        misshaped: one line for each tensor of another shape.
        new: parameters that the folder need not have: drawn from the seed, or copied from another
            (`ParamLayout.copies`).
        carried: names in the folder of tensors that travel beside the model.
        tied: the output layer is a copy of the embedding.
    """

    links: list[ParamMapping] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    tied: bool = False

    def problem(self) -> str | None:
        """The reason that forbids the conversion, in one line; None if there is none."""
        words = []
        for found, what in (
            (self.missing, "missing"),
            (self.misshaped, "of another shape"),
            (self.unexpected, "unexpected"),
        ):
            if found:
                are = "tensor is" if len(found) == 1 else "tensors are"
                words.append(f"{len(found)} {are} {what} (first {found[0]})")
        return "; ".join(words) or None


def read_mapping(
    model: ModelConfig,
    parameters: Mapping[str, ParamLayout],
    stored: Mapping[str, Shape],
    *,
    new: Sequence[Group] = (SIDES, DELEGATES),
    declared: tuple[str, ...] = (),
    tied: bool = False,
    rows: Sequence[Row] | None = None,
) -> StateMapping:
    """Maps the stored tensors (name -> shape) to parameters.

    A tensor may be spelled in any known way; what is mapped by no row is reported, never
    skipped.

    Args:
        new: groups of parameters that the folder may lack: all of a group or nothing of it.
        declared: those among them that it may not lack.
        tied: the folder's config says that the output layer is the embedding.
        rows: instead of the model's table of names.
    """
    rows = table.rows(model) if rows is None else rows
    state, used = StateMapping(), set[str]()
    votes = dict.fromkeys(SPELLINGS, 0)
    absent: list[tuple[str, dict[str, ParamMapping]]] = []
    for mcore, layout in parameters.items():
        candidates = _candidates(mcore, layout, model, rows)
        found = {s: k for s, k in candidates.items() if next(k.hf_tensors())[0] in stored}
        if not found and mcore == HEAD and tied:
            row, values = find_row(EMBEDDING, rows)
            head = _every(mcore, layout, model, row, values)
            found = {s: k for s, k in head.items() if next(k.hf_tensors())[0] in stored}
            state.tied = bool(found)
        for spelling in found:
            votes[spelling] += 1
        if not found:
            absent.append((mcore, candidates))
            continue
        link = next(iter(found.values()))
        state.links.append(link)
        _check(link, stored, state, used)
    likely = sorted(votes, key=votes.__getitem__, reverse=True)
    for mcore, candidates in absent:
        group = next((g for g in new if may_lack(mcore, g, declared)), None)
        if group and not any(may_lack(link.mcore, group, declared) for link in state.links):
            state.new.append(mcore)
        else:
            link = next(candidates[s] for s in likely if s in candidates)
            state.missing += [name for name, _ in link.hf_tensors()]
    carried = language_family(model).carried
    state.carried = [name for name in stored if name.startswith(carried)]
    state.unexpected = sorted(stored.keys() - used - set(state.carried))
    return state


def may_lack(mcore: str, group: Group, declared: tuple[str, ...]) -> bool:
    """Whether a folder may lack a parameter: it is of the group and the folder does not declare
    it."""
    return bool(group.match(mcore)) and not mcore.startswith(declared)


def _candidates(
    mcore: str, layout: ParamLayout, model: ModelConfig, rows: Sequence[Row]
) -> dict[str, ParamMapping]:
    row, values = find_row(mcore, rows)
    return _every(mcore, layout, model, row, values)


def _every(
    mcore: str, layout: ParamLayout, model: ModelConfig, row: Row, values: dict
) -> dict[str, ParamMapping]:
    """Spelling -> how it writes this parameter."""
    return {
        name: _mapping(mcore, layout, form, spelling, values, model)
        for name, spelling in SPELLINGS.items()
        for form in row.forms
        if form.used_by(spelling)
    }


def _check(
    link: ParamMapping, stored: Mapping[str, Shape], state: StateMapping, used: set[str]
) -> None:
    """Notes which stored tensors a parameter uses, and which of them are missing or misshaped."""
    for name, shape in link.hf_tensors():
        used.add(name)
        if name not in stored:
            state.missing.append(name)
        elif tuple(stored[name]) != tuple(shape):
            state.misshaped.append(f"{name}: {list(stored[name])} there, {list(shape)} here")
