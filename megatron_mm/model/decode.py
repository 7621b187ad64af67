"""The memory of layers for rows of tokens that are generated one by one.

A `DecodeCache` has R rows, each with room for one sample. A *prefill* runs whole prompts and
hands their states to rows, one prompt to as many rows as want it; a *step* runs one token of every
row. Empty rows are computed but ignored.

Each kind of layer has a `LayerState` of its own beside its mathematics: attention keeps keys and
values, the delta rule its convolution's last inputs and its state, a look the keys and values of
the prompt's patches.

A step waits for nothing: all tensors that it reads are on the device, and all sizes follow from
numbers that the host has. It allocates nothing that stays, and writes its state in place.

Shapes: R rows, A rows being filled, N prompts of a prefill, S positions that there is room for,
h heads of this rank, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from megatron_mm import platform
from megatron_mm.model.segments import Segments

ROOM = 64  # positions by which the room for keys and values grows
ORDINARY = -1  # of a token that is neither a query nor a slot


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
        lengths_R: int64, on the device: positions that each row holds.
        room: positions that a row has room for (`reserve`).
        slot_R: int64, on the device: 0 where a row's token is a query, i where it is the i-th slot
            of one, `ORDINARY` elsewhere.
        asks_R: int64, on the device: queries that a row has had, those of its prompt too.
        targets_RM3: fp32, on the device: the place that each query of a row should ask for, NaN for
            any; None: nobody asks.
        span: positions that a step reads, the new one among them: of no row with a sample more are
            used. The host knows it without asking the device.
    """

    rows: int
    filling: Filling | None = None
    layers: dict[tuple[str, int], LayerState] = field(default_factory=dict)
    room: int = 0
    span: int = 0
    targets_RM3: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.lengths_R = torch.zeros(self.rows, dtype=torch.int64, device=platform.device())
        self.slot_R = torch.full_like(self.lengths_R, ORDINARY)
        self.asks_R = torch.zeros_like(self.lengths_R)
        self._kept: dict[Hashable, Any] = {}

    @property
    def stepping(self) -> bool:
        return self.filling is None

    def state[T: LayerState](self, letter: str, number: int, make: type[T]) -> T:
        """The state of a layer; new and empty when it is first asked for."""
        if (letter, number) not in self.layers:
            self.layers[letter, number] = make(self)
        return cast(T, self.layers[letter, number])  # a letter has states of one type

    @property
    def branches(self) -> tuple[int, ...]:
        """Those of all layers (`LayerState.branches`)."""
        return tuple(number for state in self.layers.values() for number in state.branches)

    @property
    def routes(self) -> LayerState:
        """ "experts", int16 [R, layers of this rank, S, k], if routes are written down."""
        return self.state("routes", 0, LayerState)

    def reserve(self, positions: int) -> None:
        """Makes room for this many positions of a row. The next prefill moves to larger tensors if
        it must."""
        if positions > self.room:
            self.room = -(-positions // ROOM) * ROOM
            self._kept.clear()

    def read(self, positions: int) -> None:
        """Sets `span` for a step after which no row of interest holds more positions. Spans grow
        by an eighth, or a kernel would have a new shape every few steps."""
        size = max(ROOM, 2 ** (positions - 1).bit_length() // 16)
        self.span = min(-(-positions // size) * size, self.room)

    def keep(self, rows_R: torch.Tensor) -> None:
        """Forgets all rows but these, which are numbered anew in this order."""
        rows = rows_R.to(self.lengths_R.device)
        self.lengths_R, self.rows = self.lengths_R.index_select(0, rows), len(rows)
        self.slot_R, self.asks_R = (x.index_select(0, rows) for x in (self.slot_R, self.asks_R))
        for state in self.layers.values():
            state.keep(rows)
        if self.targets_RM3 is not None:
            self.targets_RM3 = self.targets_RM3.index_select(0, rows)
        self._kept.clear()

    # ---- what the steps share

    def kept[T](self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns `make()`, computed by the first step that asks and the same for all others: what
        depends on weights, on the number of rows and on the room alone. A cache does not outlive
        an update of the weights."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @property
    def row_R(self) -> torch.Tensor:
        """int64, 0 to R - 1, on the device."""
        return self.kept("row", lambda: torch.arange(self.rows, device=self.lengths_R.device))

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns what is added to the scores of a step's attention, [R, 1, 1, span]: 0 at the
        positions that a row holds and at its new one, else minus infinity."""
        device = self.lengths_R.device
        place_S = self.kept("places", lambda: torch.arange(self.room, device=device))[: self.span]
        zero_S = self.kept(("zeros", dtype), lambda: place_S.new_zeros(self.room, dtype=dtype))
        later_RS = place_S > self.lengths_R.unsqueeze(1)
        return zero_S[: self.span].masked_fill(later_RS, -torch.inf)[:, None, None]


class LayerState:
    """Tensors whose first dimension is the rows; they are made when the first prompt comes."""

    def __init__(self, cache: DecodeCache):
        self.cache = cache
        self.tensors: dict[str, torch.Tensor] = {}

    @property
    def branches(self) -> tuple[int, ...]:
        """The numbers of the host that a step's computation depends on, beside shapes: a step that
        was recorded with others must not be replayed."""
        return ()

    def keep(self, rows_R: torch.Tensor) -> None:
        """See `DecodeCache.keep`; the rows are on the device."""
        for name, held in self.tensors.items():
            self.tensors[name] = held.index_select(0, rows_R)

    def put(self, name: str, x_ThD: torch.Tensor, segments: Segments | None) -> None:
        """Stores, as [R, h, S, D], the positions of the prompts, or in a step one more position of
        every row (T = R), for which `segments` is not needed."""
        cache = self.cache
        if cache.stepping:
            place = cache.row_R, cache.lengths_R
            self.tensors[name].transpose(1, 2).index_put_(place, x_ThD)
        else:
            assert segments is not None
            of_prompt = segments.to_rectangle(x_ThD).transpose(1, 2)
            self.hand_out_rectangle(name, of_prompt, cache.room)

    @property
    def _filling(self) -> Filling:
        """The rows of the prefill that is running."""
        assert self.cache.filling is not None
        return self.cache.filling

    def hold(self, name: str, x_R: torch.Tensor) -> None:
        """Keeps a value of every row, where the last one of its shape was."""
        held = self.tensors.get(name)
        if held is None or held.shape != x_R.shape:
            self.tensors[name] = x_R
        else:
            held.copy_(x_R)

    def hand_out(self, name: str, of_prompt: torch.Tensor) -> None:
        """Copies the values [N, ...] of prompts to their rows."""
        filling, device = self._filling, of_prompt.device
        if name not in self.tensors:
            self.tensors[name] = of_prompt.new_zeros(self.cache.rows, *of_prompt.shape[1:])
        rows, prompts = filling.rows_A.to(device), filling.prompt_A.to(device)
        self.tensors[name].index_copy_(0, rows, of_prompt.index_select(0, prompts))

    def hand_out_rectangle(self, name: str, of_prompt_NhSD: torch.Tensor, room: int = 0) -> None:
        """Copies values with any number S of positions; those past a row's end are never read.

        Args:
            room: positions to make room for, if more than S.
        """
        self._make_room(name, max(room, of_prompt_NhSD.shape[2]), of_prompt_NhSD)
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
