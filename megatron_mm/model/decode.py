"""What the layers of a rank remember of rows of tokens that are generated one by one.

A `DecodeCache` has R rows, each with room for one sample. A *prefill* runs whole prompts and
hands what they leave behind to rows, one prompt to as many rows as want it; a *step* runs one
token of every row. Rows that hold nothing are computed along and mean nothing.

Each kind of layer keeps its own: attention keys and values, the delta rule its convolution's
last inputs and its state, a look the keys and values of the prompt's patches.

Shapes: R rows, r the context-parallel part of them, A rows being filled, N prompts of a prefill,
S positions there is room for, h heads and g key/value groups of this rank, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from megatron_mm.model.layers.gdn.convolution import convolution_step
from megatron_mm.model.layers.gdn.mix import HeadWidths, split_heads
from megatron_mm.model.layers.gdn.step import delta_rule_step
from megatron_mm.model.segments import Segments

ROOM = 64  # positions by which the room for keys and values grows


@dataclass(frozen=True)
class Filling:
    """Which prompts of a prefill go to which rows."""

    rows_A: torch.Tensor  # int64
    prompt_A: torch.Tensor  # int64, number of the sample in the microbatch


@dataclass
class DecodeCache:
    """
    Attributes:
        filling: during a prefill, else None: then it is a step.
        lengths_R: int64, on the CPU: positions that each row holds.
    """

    rows: int
    filling: Filling | None = None
    layers: dict[tuple[str, int], Memory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lengths_R = torch.zeros(self.rows, dtype=torch.int64)

    @property
    def stepping(self) -> bool:
        return self.filling is None

    def attention(self, layer: int) -> KeysAndValues:
        return self._of("attention", layer, KeysAndValues)

    def delta(self, layer: int) -> DeltaState:
        return self._of("delta", layer, DeltaState)

    def look(self, pair: int) -> Patches:
        return self._of("look", pair, Patches)

    @property
    def routes(self) -> Memory:
        """ "experts", int16 [R, layers of this rank, S, k], if routes are written down."""
        return self._of("routes", 0, Memory)

    def _of(self, kind: str, number: int, make: Callable):
        if (kind, number) not in self.layers:
            self.layers[kind, number] = make(self)
        return self.layers[kind, number]

    def keep(self, rows_R: torch.Tensor) -> None:
        """Forget all rows but these, which are numbered anew in this order."""
        self.lengths_R, self.rows = self.lengths_R[rows_R], len(rows_R)
        for memory in self.layers.values():
            memory.keep(rows_R)


class Memory:
    """Tensors whose first dimension is the rows; they are made when the first prompt comes."""

    def __init__(self, cache: DecodeCache):
        self.cache = cache
        self.tensors: dict[str, torch.Tensor] = {}

    def keep(self, rows_R: torch.Tensor) -> None:
        for name, held in self.tensors.items():
            self.tensors[name] = held.index_select(0, rows_R.to(held.device))

    def put(self, name: str, x_ThD: torch.Tensor, segments: Segments) -> None:
        """Hold [R, h, S, D]: the positions of the prompts, or one more of every row, T = R."""
        if not self.cache.stepping:
            self._hand_out_rectangle(name, segments.to_rectangle(x_ThD).transpose(1, 2))
            return
        lengths_R = self.cache.lengths_R
        self._make_room(name, int(lengths_R.max()) + 1, x_ThD.unsqueeze(2))
        place = lengths_R.to(x_ThD.device)
        row = torch.arange(len(place), device=place.device)
        self.tensors[name][row, :, place] = x_ThD

    def _hand_out(self, name: str, of_prompt: torch.Tensor) -> None:
        """Give rows the values [N, ...] of their prompts."""
        filling, device = self.cache.filling, of_prompt.device
        if name not in self.tensors:
            self.tensors[name] = of_prompt.new_zeros(self.cache.rows, *of_prompt.shape[1:])
        rows, prompts = filling.rows_A.to(device), filling.prompt_A.to(device)
        self.tensors[name].index_copy_(0, rows, of_prompt.index_select(0, prompts))

    def _hand_out_rectangle(self, name: str, of_prompt_NhSD: torch.Tensor) -> None:
        """The same where S may be any; what lies past a row's end is never read."""
        self._make_room(name, of_prompt_NhSD.shape[2], of_prompt_NhSD)
        filling, device = self.cache.filling, of_prompt_NhSD.device
        held = self.tensors[name].narrow(2, 0, of_prompt_NhSD.shape[2])
        rows, prompts = filling.rows_A.to(device), filling.prompt_A.to(device)
        held.index_copy_(0, rows, of_prompt_NhSD.index_select(0, prompts))

    def _make_room(self, name: str, positions: int, like: torch.Tensor) -> None:
        """Of [R, h, S, D]: S at least `positions`."""
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


class KeysAndValues(Memory):
    def attend(
        self,
        core_attention: Callable[..., torch.Tensor],
        query_ThD: torch.Tensor,
        key_TgD: torch.Tensor,
        value_TgD: torch.Tensor,
        segments: Segments,
    ) -> torch.Tensor:
        """`core_attention` inside each prompt, or of each row's token over its sample: [T, h, D].
        In a step T is R."""
        for name, x in (("key", key_TgD), ("value", value_TgD)):
            self.put(name, x, segments)
        if not self.cache.stepping:
            return core_attention(query_ThD, key_TgD, value_TgD, segments)
        place = self.cache.lengths_R.to(query_ThD.device)
        longest = int(self.cache.lengths_R.max()) + 1
        rows, heads, width = query_ThD.shape
        seen = (self.tensors[name][:, :, :longest] for name in ("key", "value"))
        # The heads of a group take the place of positions: no key is repeated for them.
        query = query_ThD.reshape(rows, key_TgD.shape[1], -1, width)
        mask = torch.arange(longest, device=place.device) <= place[:, None]
        mixed = F.scaled_dot_product_attention(query, *seen, attn_mask=mask[:, None, None])
        return mixed.reshape(rows, heads, width)


class DeltaState(Memory):
    def mix(
        self,
        mix_and_keep: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        qkv_TC: torch.Tensor,
        conv_weight_CW: torch.Tensor,
        log_decay_Th: torch.Tensor,
        beta_Th: torch.Tensor,
        segments: Segments,
        widths: HeadWidths,
    ) -> torch.Tensor:
        """`mix_and_keep` over the prompts, or one position of each row: [T, value heads, V]."""
        arguments = (qkv_TC, conv_weight_CW, log_decay_Th, beta_Th)
        if not self.cache.stepping:
            mixed, inputs, state = mix_and_keep(*arguments, segments, widths)
            self._hand_out("inputs", inputs)
            self._hand_out("state", state)
            return mixed
        inputs, state = self.tensors["inputs"], self.tensors["state"]
        qkv = convolution_step(qkv_TC, conv_weight_CW, inputs)
        query, key, value = split_heads(qkv, widths)
        return delta_rule_step(query, key, value, log_decay_Th, beta_Th, state)


class Patches(Memory):
    def store(self, key_MhD: torch.Tensor, value_MhD: torch.Tensor, patches: Segments) -> None:
        """After a prefill's look. `patches`: those of each prompt, in the order of the memory."""
        for name, x in (("key", key_MhD), ("value", value_MhD)):
            self._hand_out_rectangle(name, patches.to_rectangle(x).transpose(1, 2))
        self._hand_out("count", patches.lengths)  # on the CPU

    def look(self, query_rhD: torch.Tensor, rows: range) -> torch.Tensor:
        """What each of these rows' tokens finds in all patches of its prompt, [r, h, D]; exactly
        0 without any. Every image of a prompt stands before what is generated."""
        key, value, count = (
            self.tensors[name][rows.start : rows.stop] for name in ("key", "value", "count")
        )
        longest = int(count.max())
        if not longest:
            return torch.zeros_like(query_rhD)
        count = count.to(query_rhD.device, non_blocking=True)
        mask = torch.arange(longest, device=count.device) < count[:, None]
        sees = (count > 0)[:, None, None, None]
        found = F.scaled_dot_product_attention(
            query_rhD.unsqueeze(2),
            key[:, :, :longest],
            value[:, :, :longest],
            attn_mask=mask[:, None, None] | ~sees,
        )
        return torch.where(sees, found, 0.0).squeeze(2)
