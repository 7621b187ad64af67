"""Records the routes and next tokens of a transformers model with experts, from its folder.

The model reads the rows with its own tokenizer in our chat template, one by one, in fp32 on one
process. Its routers' logits are those of `output_router_logits`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm import cli
from megatron_mm.config import DataConfig, RunConfig
from megatron_mm.config.hf import in_transformers_words
from megatron_mm.convert.folder import CONFIG, open_folder, read_json
from megatron_mm.convert.hf_files import stored_tensors
from megatron_mm.convert.hf_model import load_transformers
from megatron_mm.data.collate import collate
from megatron_mm.data.images import normalise
from megatron_mm.data.sample import Sample, SampleBuilder
from megatron_mm.data.tiles import image_settings
from megatron_mm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mm.errors import ConvertError, OneLine
from megatron_mm.mimic.record import Keep, check_top, top_experts
from megatron_mm.mimic.recorded import Recorded, TeacherSizes, place_of
from megatron_mm.mimic.rounds import Rows, open_rows
from megatron_mm.mimic.text import answer_starts, row_digest, supervised, token_digest

CORRECTION = "e_score_correction_bias"  # of routers as GLM-4.5's and DeepSeek-V3's


@dataclass(frozen=True)
class Seen:
    """The logits of a model for one sample: of its routers by layer, [T, E], and [T, V]."""

    routers: list[torch.Tensor]
    logits: torch.Tensor


class TransformersTeacher:
    """A folder's model, ready to be asked.

    Raises:
        ConvertError, DataError: it cannot be loaded, carries code that is not trusted, or lacks the
            tokens of the template.
    """

    def __init__(self, folder: Path, data: DataConfig, *, trust_remote_code: bool) -> None:
        self.folder = folder
        self.run = _run_of(folder, data)
        self.tokenizer: Tokenizer = load_tokenizer(folder, data.end_tokens)
        if self.run.model.vision is None:
            size = max(self.run.model.language.vocab_size, self.tokenizer.vocab_size)
            self.run.model.language.vocab_size = size
        try:
            self._model: Any = load_transformers(folder, trust_remote_code)
        except OneLine:
            raise
        except Exception as error:  # of transformers, of any kind
            raise ConvertError(f"{folder}: {cli.one_line(error)}") from error
        hidden = [name for name in self._model.state_dict() if name.endswith(CORRECTION)]
        if hidden:
            raise ConvertError(
                f"{folder}: {len(hidden)} of its routers choose with a correction ({hidden[0]}), "
                "which their logits do not show; record a teacher whose routers choose by softmax"
            )
        self.builder = SampleBuilder(self.run, self.tokenizer)

    @torch.no_grad()
    def see(self, sample: Sample) -> Seen:
        """Runs the model on a sample.

        Raises:
            ConvertError: it fails, or gives no router logits.
        """
        settings = image_settings(self.run)
        batch = collate([sample], settings=settings, pad_id=self.tokenizer.pad_id)
        inputs: dict[str, Any] = {"input_ids": batch.tokens_T.unsqueeze(0), "use_cache": False}
        if settings is not None and len(batch.pixels_NCHW):
            pixels = normalise(batch.pixels_NCHW, settings.mean, settings.std)
            inputs["pixel_values"] = pixels[batch.stream_tiles]
        heard: list[Any] = []  # of the text model inside one with vision, which drops them
        inner = getattr(getattr(self._model, "model", None), "language_model", None)
        hook = (
            None
            if inner is None
            else inner.register_forward_hook(
                lambda module, given, said: heard.append(getattr(said, "router_logits", None))
            )
        )
        try:
            found = self._model(**inputs, output_router_logits=True)
        except Exception as error:  # of transformers or the folder's code, of any kind
            raise ConvertError(
                f"{self.folder}: {sample.where}: with output_router_logits it says: "
                f"{cli.one_line(error)}"
            ) from error
        finally:
            if hook is not None:
                hook.remove()
        routers = getattr(found, "router_logits", None) or (heard[-1] if heard else None)
        if not routers:
            raise ConvertError(
                f"{self.folder}: its model gives 0 router logits (output_router_logits); record a "
                "mixture of experts, or convert it (tools/hf_to_megatron.py) and record with "
                "--checkpoint"
            )
        length = len(sample.tokens_T)
        flat = [as_logits(one.reshape(-1, one.shape[-1])[:length].float()) for one in routers]
        return Seen(flat, found.logits[0, :length].float())


def as_logits(said_TE: torch.Tensor) -> torch.Tensor:
    """Returns logits of what a model calls its router logits: some give probabilities, as those of
    transformers 5.5 and DBRX do."""
    sums_T = said_TE.sum(1)
    if (said_TE >= 0).all() and torch.allclose(sums_T, torch.ones_like(sums_T), atol=1e-3):
        return said_TE.log()
    return said_TE


def _run_of(folder: Path, data: DataConfig) -> RunConfig:
    """Returns a run by which rows become samples for the folder's model: its own where it has
    vision, else one without."""
    config = in_transformers_words(read_json(folder / CONFIG))
    if "vision_config" in config:
        opened = open_folder(folder, weights=False)
        return RunConfig(model=opened.model, data=data)
    run = RunConfig(data=data)
    run.model = replace(run.model, vision=None)
    size = config.get("vocab_size")
    run.model.language.vocab_size = size if type(size) is int and 0 < size < 2**31 else 1
    return run


def identity_of(folder: Path) -> str:
    """Returns what tells a folder's model from others: a digest of its config and of the names and
    sizes of its tensors."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for name, stored in sorted(stored_tensors(folder).items()):
        digest.update(f"{name} {stored.dtype} {stored.shape} {stored.file.stat().st_size}".encode())
    return digest.hexdigest()[:32]


def record_hf(
    teacher: TransformersTeacher,
    rows: Rows,
    layers: Sequence[int] | None,
    top: int | None,
    answers: int,
    default_top: int,
    keep: Keep,
) -> tuple[TeacherSizes, list[int]]:
    """Reads rows and hands on what was recorded of each. Returns the teacher and the recorded
    layers.

    Args:
        layers: None: all; counted among those with experts, if others have none.
        top: None: `default_top`, or all experts if there are fewer.
        keep: called with each row, by `place_of`.
    Raises:
        DataError, ConvertError: a row is bad, or the model cannot be asked.
    """
    sizes: TeacherSizes | None = None
    chosen: list[int] = []
    for digest, sample, seen in _seen(teacher, rows):
        experts, every = seen.routers[0].shape[1], list(range(len(seen.routers)))
        chosen = every if layers is None else list(layers)
        count = min(default_top, experts) if top is None else top
        if sizes is None:
            check_top(chosen, every, count, experts)
            sizes = TeacherSizes(
                identity_of(teacher.folder), len(every), experts, seen.logits.shape[1]
            )
        positions = supervised(sample)
        routes = [top_experts(seen.routers[n][positions].softmax(1), count) for n in chosen]
        best = seen.logits[positions].log_softmax(1).topk(answers, dim=1)
        row = Recorded(
            digest,
            token_digest(sample),
            answer_starts(sample, teacher.tokenizer),
            torch.stack([route[0] for route in routes], 1),
            torch.stack([route[1] for route in routes], 1),
            best.indices.int(),
            best.values.clamp(max=0.0),
        )
        keep(place_of(sample.where), row)
    assert sizes is not None  # there is a row at least
    return sizes, chosen


def _seen(teacher: TransformersTeacher, rows: Rows) -> Iterator[tuple[bytes, Sample, Seen]]:
    """Yields of each row its digest, its sample and what the teacher says of it."""
    files, order = open_rows(rows)
    for number in order:
        file, index = files.locate(number)
        row, where = file[index], file.where(index)
        sample = teacher.builder.training(row, where, Path(file.folder))
        yield row_digest(row, where), sample, teacher.see(sample)
