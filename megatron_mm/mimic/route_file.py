"""Reads the file of a teacher's routes (recorded.py), row by row, and aligns them to samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_mm.data.sample import Sample
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import DataError
from megatron_mm.mimic.recorded import FORMAT, OF_ROW, TENSORS, Recorded, TeacherSizes, place_of
from megatron_mm.mimic.side_files import SideFile
from megatron_mm.mimic.text import (
    DIGEST,
    answer_starts,
    matching,
    row_digest,
    supervised,
    token_digest,
)

SLACK = 0.01  # of a sum of probabilities in fp16: 64 of them, each off by 5e-4 of itself at most


class AlignedRow(NamedTuple):
    """A teacher's routes and answers at the supervised positions of a sample.

    Attributes:
        positions_P: int64, ascending, in the sample.
        experts_PLk, weights_PLk, answers_Pn, logprobs_Pn: as in the file.
    """

    positions_P: torch.Tensor
    experts_PLk: torch.Tensor
    weights_PLk: torch.Tensor
    answers_Pn: torch.Tensor
    logprobs_Pn: torch.Tensor


class RouteFile:
    """An opened file of routes.

    Attributes:
        teacher: whose they are; layers: the recorded ones, ascending.
        answers: next tokens that are recorded at a position.
    Args:
        shuffle_seed: a control: each row has the routes of another.
    Raises:
        DataError: at construction and on access, for a file or a row that cannot be used.
    """

    def __init__(self, path: str | Path, shuffle_seed: int | None = None):
        self._file = SideFile(path, "teacher's routes", FORMAT, TENSORS)
        self.name, head = self._file.name, self._file.head
        self.teacher = self._teacher(head.get("teacher"))
        self.layers = self._layers(head.get("layers"))
        self._check_shapes()
        self._places = self._read_places(head.get("files"))
        self._digest = self._file.read("digest").numpy()
        self._tokens = self._file.read("tokens").numpy()
        self._checksum = self._file.read("checksum").tolist()
        self.answers = self._file.shape("answers")[1]
        self._other: list[int] | None = None
        if shuffle_seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(shuffle_seed))
            others = torch.empty_like(order)
            others[order] = order.roll(-1)  # one circle: no row keeps its own
            self._other = others.tolist()

    def __len__(self) -> int:
        return len(self._checksum)

    @property
    def places(self) -> Mapping[tuple[str, int], int]:
        """(file's name, row from 1) -> the row's number in the file."""
        return self._places

    def _teacher(self, held: Any) -> TeacherSizes:
        sizes = self._file.sizes(held, "num_layers", "num_experts", "vocab_size")
        identity = held.get("identity")
        if not isinstance(identity, str):
            raise DataError(f"{self.name}: the teacher has no identity; record again")
        return TeacherSizes(identity, *sizes)

    def _layers(self, held: Any) -> list[int]:
        most = self.teacher.num_layers
        if (
            not isinstance(held, list)
            or not held
            or any(type(layer) is not int or not 0 <= layer < most for layer in held)
            or held != sorted(set(held))
        ):
            raise DataError(
                f"{self.name}: layers is {str(held)[:80]}; it must name some of 0 to {most - 1}, "
                "ascending; record again"
            )
        return held

    def _check_shapes(self) -> None:
        shape = self._file.shape
        rows, positions = shape("row")[0], shape("start")[0]
        layers, k = len(self.layers), shape("experts")[2]
        wanted: dict[str, tuple[int, ...]] = {
            "file": (rows,),
            "digest": (rows, DIGEST),
            "tokens": (rows, DIGEST),
            "checksum": (rows,),
            "offset": (rows + 1,),
            "experts": (positions, layers, k),
            "weights": (positions, layers, k),
            "answers": (positions, shape("answers")[1]),
            "logprobs": (positions, shape("answers")[1]),
        }
        for name, size in wanted.items():
            if shape(name) != size:
                raise DataError(
                    f"{self.name}: {name} has the shape {list(shape(name))}, expected "
                    f"{list(size)}; record again"
                )
        if not rows or not 1 <= k <= self.teacher.num_experts:
            raise DataError(
                f"{self.name}: {rows} rows with {k} of {self.teacher.num_experts} experts; "
                "record at least one of each"
            )
        offset = self._offset = self._file.read("offset")
        steps = offset.diff()
        if int(offset[0]) or int(offset[-1]) != positions or bool((steps < 1).any()):
            raise DataError(
                f"{self.name}: offset does not cut {positions} positions into {rows} rows; "
                "record again"
            )

    def _read_places(self, files: Any) -> dict[tuple[str, int], int]:
        file, row = self._file.read("file").tolist(), self._file.read("row").tolist()
        if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
            raise DataError(f"{self.name}: files is no list of names; record again")
        if any(not 0 <= number < len(files) for number in file):
            raise DataError(f"{self.name}: it names a file beyond its {len(files)}; record again")
        places = {(files[n], r): i for i, (n, r) in enumerate(zip(file, row, strict=True))}
        if len(places) < len(row):
            raise DataError(f"{self.name}: a row is in it twice; record again")
        return places

    def number_of(self, row: Mapping[str, Any], where: str) -> int:
        """Returns the number of a row in the file.

        Args:
            where: "file:row", for messages too.
        Raises:
            DataError: it was not recorded, or is another than the one that was.
        """
        place = place_of(where)
        number = self._places.get(place)
        if number is None:
            raise DataError(
                f"{where}: {self.name} holds {len(self)} rows, this is not among them; record the "
                "routes of these data"
            )
        digest = row_digest(row, where)
        if self._digest[number].tobytes() != digest:
            raise DataError(
                f"{where}: {self.name} holds another text for this row (digest "
                f"{self._digest[number].tobytes().hex()[:12]}, the row's is {digest.hex()[:12]}); "
                "record the routes of these data"
            )
        return number

    def recorded(self, number: int, where: str) -> Recorded:
        """Reads what was recorded of a row, checked."""
        first, last = self._offset[number : number + 2].tolist()
        parts = {name: self._file.read(name, first, last) for name in OF_ROW}
        digests = self._digest[number].tobytes(), self._tokens[number].tobytes()
        found = Recorded(*digests, **parts)
        if found.checksum() != self._checksum[number]:
            raise DataError(
                f"{where}: {self.name}: what it holds of this row is damaged (checksum "
                f"{found.checksum()}, recorded {self._checksum[number]}); record again"
            )
        experts, weights, answers = found.experts, found.weights.float(), found.answers
        sound = bool((experts >= 0).all()) and bool((experts < self.teacher.num_experts).all())
        sound &= bool((weights >= 0).all()) and bool((weights.sum(2) <= 1 + SLACK).all())
        sound &= bool((answers >= 0).all()) and bool((answers < self.teacher.vocab_size).all())
        sound &= bool((found.logprobs <= 0).all()) and bool(found.logprobs.isfinite().all())
        sound &= bool((found.start >= 0).all()) and bool((found.start.diff() >= 0).all())
        if not sound:
            raise DataError(
                f"{where}: {self.name}: what it holds of this row are no routes of "
                f"{self.teacher.num_experts} experts with probabilities; record again"
            )
        return found

    def aligned(
        self,
        row: Mapping[str, Any],
        where: str,
        sample: Sample,
        tokenizer: Tokenizer,
        *,
        answers: bool,
    ) -> AlignedRow:
        """Returns what the teacher says of a sample's supervised positions.

        Args:
            answers: whether its next tokens are needed, too, for which both need one tokenizer.
        """
        number = self.number_of(row, where)
        own = self.recorded(number, where)
        positions = supervised(sample)
        same = own.tokens == token_digest(sample)
        if not same and answers:
            raise DataError(
                f"{where}: {self.name} holds {len(own.start)} tokens of its answers, here are "
                f"{len(positions)}, or others; next tokens can be distilled between models of one "
                "tokenizer only: set mimic_kd_coeff to 0"
            )
        starts = own.start if same else answer_starts(sample, tokenizer)
        if int(starts[-1]) != int(own.start[-1]):
            raise DataError(
                f"{where}: {self.name} holds {int(own.start[-1])} characters of its answers, this "
                f"tokenizer writes {int(starts[-1])}; one of the two changes text, record with "
                "another"
            )
        taken = own
        if self._other is not None:
            other = self._other[number]
            taken = self.recorded(other, where)
        match = (
            torch.arange(len(starts)) if taken is own and same else matching(starts, taken.start)
        )
        return AlignedRow(
            positions,
            taken.experts[match],
            taken.weights[match],
            own.answers if answers else own.answers[:0],
            own.logprobs if answers else own.logprobs[:0],
        )
