"""The memory of layers for rows of tokens that are generated one by one.

A `DecodeCache` has R rows, each with room for one sample. A *prefill* runs whole prompts and
hands their states to rows, one prompt to as many rows as want it; a *step* runs one token of every
row. Empty rows are computed but ignored.

Each kind of layer has a `LayerState` of its own beside its mathematics: attention keeps keys and
values, the delta rule its convolution's last inputs and its state, a look the keys and values of
the prompt's patches.

Shapes: R rows, A rows being filled, N prompts of a prefill, S positions that there is room for,
h heads of this rank, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch

from megatron_mm.model.segments import Segments

ROOM = 64  # positions by which the room for keys and values grows


@dataclass(frozen=True)
class Filling:
    """The rows that prompts of a prefill go to."""

    rows_A: torch.Tensor  # int64
    prompt_A: torch.Tensor  # int64, number of the sample in the microbatch


@dataclass
class DecodeCache:
    """
    Attributes:
        filling: during a prefill; None during a step.
        layers: (letter, its number or pair) -> state of that layer.
        lengths_R: int64, on the CPU: positions that each row holds.
    """

    rows: int
    filling: Filling | None = None
    layers: dict[tuple[str, int], LayerState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lengths_R = torch.zeros(self.rows, dtype=torch.int64)

    @property
    def stepping(self) -> bool:
        return self.filling is None

    def state[T: LayerState](self, letter: str, number: int, make: type[T]) -> T:
        """The state of a layer; new and empty when it is first asked for."""
        if (letter, number) not in self.layers:
            self.layers[letter, number] = make(self)
        return cast(T, self.layers[letter, number])  # a letter has states of one type

    @property
    def routes(self) -> LayerState:
        """ "experts", int16 [R, layers of this rank, S, k], if routes are written down."""
        return self.state("routes", 0, LayerState)

    def keep(self, rows_R: torch.Tensor) -> None:
        """Forgets all rows but these, which are numbered anew in this order."""
        self.lengths_R, self.rows = self.lengths_R[rows_R], len(rows_R)
        for state in self.layers.values():
            state.keep(rows_R)


class LayerState:
    """Tensors whose first dimension is the rows; they are made when the first prompt comes."""

    def __init__(self, cache: DecodeCache):
        self.cache = cache
        self.tensors: dict[str, torch.Tensor] = {}

    def keep(self, rows_R: torch.Tensor) -> None:
        """See `DecodeCache.keep`."""
        for name, held in self.tensors.items():
            self.tensors[name] = held.index_select(0, rows_R.to(held.device))

    def put(self, name: str, x_ThD: torch.Tensor, segments: Segments) -> None:
        """Stores, as [R, h, S, D], the positions of the prompts, or in a step one more position of
        every row (T = R)."""
        if not self.cache.stepping:
            self.hand_out_rectangle(name, segments.to_rectangle(x_ThD).transpose(1, 2))
            return
        lengths_R = self.cache.lengths_R
        self._make_room(name, int(lengths_R.max()) + 1, x_ThD.unsqueeze(2))
        place = lengths_R.to(x_ThD.device)
        row = torch.arange(len(place), device=place.device)
        self.tensors[name][row, :, place] = x_ThD

    @property
    def _filling(self) -> Filling:
        """The rows of the prefill that is running."""
        assert self.cache.filling is not None
        return self.cache.filling

    def hand_out(self, name: str, of_prompt: torch.Tensor) -> None:
        """Copies the values [N, ...] of prompts to their rows."""
        filling, device = self._filling, of_prompt.device
        if name not in self.tensors:
            self.tensors[name] = of_prompt.new_zeros(self.cache.rows, *of_prompt.shape[1:])
        rows, prompts = filling.rows_A.to(device), filling.prompt_A.to(device)
        self.tensors[name].index_copy_(0, rows, of_prompt.index_select(0, prompts))

    def hand_out_rectangle(self, name: str, of_prompt_NhSD: torch.Tensor) -> None:
        """Copies values with any number S of positions; those past a row's end are never read."""
        self._make_room(name, of_prompt_NhSD.shape[2], of_prompt_NhSD)
        filling, device = self._filling, of_prompt_NhSD.device
        held = self.tensors[name].narrow(2, 0, of_prompt_NhSD.shape[2])
        rows, prompts = filling.rows_A.to(device), filling.prompt_A.to(device)
        held.index_copy_(0, rows, of_prompt_NhSD.index_select(0, prompts))

    def _make_room(self, name: str, positions: int, like: torch.Tensor) -> None:
        """Makes S of [R, h, S, D] at least `positions`."""
        held = self.tensors.get(name)
        if held is not None and held.shape[2] >= positions:
            return
        room = -(-positions // ROOM) * ROOM
        heads, width = like.shape[1], like.shape[-1]
        # Zeros: what is masked still takes part, with a weight of 0, and 0 x NaN is NaN.
        grown = like.new_zeros(self.cache.rows, heads, room, width)
        if held is not None:
            grown[:, :, : held.shape[2]] = held
        self.tensors[name] = grown
