"""Lines that a conversion prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_mm.config import ModelConfig
from megatron_mm.convert.folder import HFFolder
from megatron_mm.convert.mapping import PROJECTOR, ParamMapping, StateMapping, write_links
from megatron_mm.convert.work import nbytes
from megatron_mm.parallel.param_layout import ParamLayout

MOST = 20  # names shown of a list


def published(
    model: ModelConfig, parameters: Mapping[str, ParamLayout], separate: bool
) -> list[ParamMapping]:
    """Returns the mappings of a folder without weights: the names of a fused folder as transformers
    writes it, or, if `separate`, of a language model and a ViT as released."""
    if model.vision is None:
        return write_links(model, parameters, "text")
    if not separate:
        return write_links(model, parameters, "transformers")
    vision = {n: p for n, p in parameters.items() if n.startswith("vision.")}
    text = {n: p for n, p in parameters.items() if n not in vision}
    vision = {n: p for n, p in vision.items() if not PROJECTOR.match(n)}
    return write_links(model, text, "text") + write_links(model, vision, "encoder-release")


def totals(links: Sequence[ParamMapping], itemsize: int) -> tuple[int, int]:
    """Returns (number of hf tensors, their bytes)."""
    shapes = [shape for link in links for _, shape in link.hf_tensors()]
    return len(shapes), sum(nbytes(shape, itemsize) for shape in shapes)


def expected_lines(
    source: HFFolder, parameters: Mapping[str, ParamLayout], separate: bool
) -> list[str]:
    """Describes folders without weights: what they must hold, according to the config."""
    needed = {n: p for n, p in parameters.items() if not source.may_lack(n)}
    links = published(source.model, needed, separate)
    tensors, size = totals(links, torch.bfloat16.itemsize)
    new = [name for name in parameters if name not in needed]
    first = [name for link in links for name, _ in link.hf_tensors()][:3]
    return [
        f"no weights here: from the config, {tensors} tensors, {size:,} bytes in bf16 "
        f"-> {len(links)} mcore tensors (first {', '.join(first)})",
        *listed("new, from the seed", new),
        "dry run: nothing was written",
    ]


def mapping_lines(source: HFFolder, mapping: StateMapping, dtype: torch.dtype | None) -> list[str]:
    """Describes a mapping: its size, and everything in it that is not one to one."""
    mapped = {name for link in mapping.links for name, _ in link.hf_tensors()}
    names = sorted(mapped & source.tensors.keys())
    size = sum(source.tensors[name].nbytes for name in names)
    kinds = sorted({str(source.tensors[n].dtype).removeprefix("torch.") for n in names})
    lines = [
        f"{len(names)} tensors of {', '.join(kinds)}, {size:,} bytes "
        f"-> {len(mapping.links)} mcore tensors"
    ]
    if dtype is not None and kinds != [str(dtype).removeprefix("torch.")]:
        lines.append(f"rounded to {str(dtype).removeprefix('torch.')}")
    for what, found in (
        ("missing", mapping.missing),
        ("of another shape", mapping.misshaped),
        ("unexpected", mapping.unexpected),
        ("new, from the seed", mapping.new),
        ("carried along, not trained", mapping.carried),
    ):
        lines += listed(what, found)
    if mapping.tied:
        lines.append(
            "tied embeddings: the output layer becomes a tensor of its own, equal at the start"
        )
    if source.model.vision is not None and source.image_token_id is None:
        lines.append("no tokenizer says which token is <IMG_CONTEXT>: give one when exporting")
    return lines


def listed(what: str, names: Sequence[str]) -> list[str]:
    """Returns a line with the first names of a list; none for an empty list."""
    if not names:
        return []
    more = f", and {len(names) - MOST} more" if len(names) > MOST else ""
    return [f"{what} ({len(names)}): {', '.join(names[:MOST])}{more}"]
