"""Gated DeltaNet, the `G` layer of Qwen3-Next.

megatron-core's own cannot be built without FLA, ignores sample boundaries and lays its
fused projection out per rank; this one runs anywhere, restarts its state at every sample
and groups the rows of its projection by key head, so a whole checkpoint does not depend
on the tensor-parallel size.

Under context parallelism the ranks trade their part of the sequence for a part of the heads
around the convolution and the delta rule; the gate and the output norm stay at home.

Shapes: t this rank's sequence shard, T whole stream, k local key heads, v value heads per
key head, K and V head widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mm.config import LanguageConfig
from megatron_mm.model.backends.interface import Backend
from megatron_mm.model.context import StreamContext
from megatron_mm.model.decode import LayerState
from megatron_mm.model.layers.gdn.mix import HeadWidths
from megatron_mm.model.layers.gdn.step import by_part
from megatron_mm.model.layers.interface import BuildContext
from megatron_mm.model.layers.norms import GatedRMSNorm
from megatron_mm.model.recompute import core
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.param_layout import constant, normal, place, uniform
from megatron_mm.parallel.sequence import heads_to_sequence, part, sequence_to_heads, take


class DeltaState(LayerState):
    """The convolution's last inputs and the state of the delta rule, of every row."""

    def fill(
        self,
        mix_and_keep: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        *arguments,
    ) -> torch.Tensor:
        """`mix_and_keep` over the prompts, [T, value heads, V]; keeps what it ends with."""
        mixed, inputs, state = mix_and_keep(*arguments)
        order = by_part(state.shape[1], arguments[-1].rows).to(inputs.device)
        self.hand_out("inputs", inputs.index_select(2, order))
        self.hand_out("state", state)
        return mixed


class StepConstants(NamedTuple):
    """Values that the steps of a layer share."""

    order: torch.Tensor  # int64, the features of the projection by part
    sizes: list[int]  # of the convolution's channels together and of the other parts
    taps: tuple[torch.Tensor, ...]  # W times [C]
    rate: torch.Tensor  # fp32 [h], minus exp(A_log)
    dt_bias: torch.Tensor


class GatedDeltaNet(nn.Module):
    """One fused projection; for every key head its rows are [q, k, v, z, b, a].

    The convolution's channels are grouped alike: [q, k, v] for every key head.
    """

    State = DeltaState

    def __init__(
        self,
        language: LanguageConfig,
        config: TransformerConfig,
        pg: ProcessGroupCollection,
        out_std: float,
        backend: Backend,
        recompute: bool = False,
    ):
        super().__init__()
        self.mix, self.mix_and_keep = backend.mix, backend.mix_and_keep
        self.mix_step = backend.mix_step
        self.recompute = recompute
        tp, self.cp = pg.tp, pg.cp
        self.key_heads = language.linear_num_key_heads // tp.size()
        self.values_per_key = language.linear_num_value_heads // language.linear_num_key_heads
        self.key_dim = language.linear_key_head_dim
        self.value_dim = language.linear_value_head_dim
        value_rows = self.values_per_key * self.value_dim
        # Widths of q, k, v, z, b, a in one key head's rows.
        self.widths = [self.key_dim, self.key_dim, value_rows, value_rows]
        self.widths += [self.values_per_key, self.values_per_key]
        all_key_heads = language.linear_num_key_heads
        dtype, std = config.params_dtype, language.init_method_std
        self.in_proj = backend.column(
            language.hidden_size,
            all_key_heads * sum(self.widths),
            config=config,
            init=normal(std),
            tp=tp,
        )
        conv_channels = self.key_heads * sum(self.widths[:3])
        kernel = language.linear_conv_kernel_dim
        self.conv_weight = nn.Parameter(torch.empty(conv_channels, kernel, dtype=dtype))
        bound = kernel**-0.5  # torch's own default for a depthwise Conv1d
        place(self.conv_weight, uniform(-bound, bound), split={0: tp})
        value_heads = self.key_heads * self.values_per_key
        self.A_log = nn.Parameter(torch.empty(value_heads, dtype=dtype))
        place(self.A_log, uniform(0.01, 16.0, then=torch.log), split={0: tp})
        self.dt_bias = nn.Parameter(torch.empty(value_heads, dtype=dtype))
        place(self.dt_bias, constant(1.0), split={0: tp})
        self.out_norm = GatedRMSNorm(self.value_dim, language.layernorm_epsilon, dtype=dtype)
        self.out_proj = backend.row(
            all_key_heads * value_rows,
            language.hidden_size,
            config=config,
            init=normal(out_std),
            tp=tp,
        )

    @classmethod
    def build(cls, given: BuildContext) -> GatedDeltaNet:
        language, again = given.run.model.language, given.recompute.core_attn
        return cls(language, given.config, given.pg, given.out_std, given.backend, again)

    def run(
        self, hidden_t1H: torch.Tensor, context: StreamContext, state: DeltaState | None
    ) -> torch.Tensor:
        """See `LayerModule.run`."""
        if state is not None and state.cache.stepping:
            return self.step(hidden_t1H, state)
        return self(hidden_t1H, context.segments, state)

    def forward(
        self, hidden_t1H: torch.Tensor, segments: Segments, state: DeltaState | None = None
    ) -> torch.Tensor:
        """[t, 1, H] -> [t, 1, H]; `state` is that of the rows being filled."""
        fused, _ = self.in_proj(hidden_t1H)
        tokens = fused.shape[0]
        fused = fused.view(tokens, self.key_heads, sum(self.widths))
        qkv_width = sum(self.widths[:3])
        qkv, z, ba = fused.split([qkv_width, self.widths[3], sum(self.widths[4:])], dim=-1)
        if self.cp.size() > 1:
            travels = sequence_to_heads(torch.cat((qkv, ba), dim=-1), self.cp)
            qkv, ba = travels.split([qkv_width, sum(self.widths[4:])], dim=-1)
        mixed = core(self.recompute, self._mix, qkv, ba, segments, state)
        mixed = heads_to_sequence(mixed, self.cp)
        mixed = self.out_norm(mixed, z.reshape(tokens, -1, self.value_dim))
        return self.out_proj(mixed.reshape(tokens, 1, -1))[0]

    def _mix(
        self,
        qkv_TkW: torch.Tensor,
        ba_Tk2v: torch.Tensor,
        segments: Segments,
        state: DeltaState | None,
    ) -> torch.Tensor:
        """Convolution and delta rule over whole samples, [T, k * v, V], for the key heads that
        this context-parallel rank computes."""
        tokens = len(qkv_TkW)
        conv, A_log, dt_bias = self._own_parameters()
        b, a = ba_Tk2v.chunk(2, dim=-1)
        log_decay = -A_log.float().exp() * F.softplus(a.reshape(tokens, -1).float() + dt_bias)
        beta = b.reshape(tokens, -1).sigmoid()
        arguments = (qkv_TkW.reshape(tokens, -1), conv, log_decay, beta, segments, self.head_widths)
        return self.mix(*arguments) if state is None else state.fill(self.mix_and_keep, *arguments)

    @property
    def head_widths(self) -> HeadWidths:
        return HeadWidths(self.key_dim, self.value_dim, self.values_per_key)

    def _own_parameters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Convolution [C, W], A_log and dt_bias of the heads that this context-parallel rank
        mixes."""
        mine = part(self.key_heads, self.cp)
        conv = self.conv_weight.unflatten(0, (self.key_heads, -1))
        A_log, dt_bias = (x.view(self.key_heads, -1) for x in (self.A_log, self.dt_bias))
        conv, A_log, dt_bias = (take(x, mine).flatten(0, 1) for x in (conv, A_log, dt_bias))
        return conv, A_log, dt_bias

    def step(self, hidden_r1H: torch.Tensor, state: DeltaState) -> torch.Tensor:
        """`forward` for one token of every row: one copy puts the parts of the projection apart,
        and what depends on parameters alone is kept."""
        fused, _ = self.in_proj(hidden_r1H)
        tokens, kept = len(fused), state.cache.kept(self, self._constants)
        by_head = fused.view(tokens, self.key_heads, -1)
        qkv_width, z = sum(self.widths[:3]), None
        if self.cp.size() > 1:
            qkv, z, ba = by_head.split([qkv_width, self.widths[3], sum(self.widths[4:])], dim=-1)
            by_head = sequence_to_heads(torch.cat((qkv, ba), dim=-1), self.cp)
        parts = by_head.flatten(1).index_select(1, kept.order).split(kept.sizes, 1)
        if z is None:
            x, z, b, a = parts
        else:
            x, b, a = parts
        log_decay = F.softplus(a.float() + kept.dt_bias).mul_(kept.rate)
        mixed = self.mix_step(
            x,
            kept.taps,
            log_decay,
            b.sigmoid(),
            *(state.tensors[name] for name in ("inputs", "state")),
            self.head_widths,
        )
        mixed = heads_to_sequence(mixed, self.cp)
        mixed = self.out_norm(mixed, z.reshape(tokens, -1, self.value_dim))
        return self.out_proj(mixed.reshape(tokens, 1, -1))[0]

    def _constants(self) -> StepConstants:
        conv, A_log, dt_bias = self._own_parameters()
        keys = len(part(self.key_heads, self.cp))
        widths = self.widths if self.cp.size() == 1 else self.widths[:3] + self.widths[4:]
        channels = by_part(keys, self.head_widths.rows).to(conv.device)
        return StepConstants(
            by_part(keys, widths).to(conv.device),
            [keys * sum(widths[:3]), *(keys * width for width in widths[3:])],
            conv.index_select(0, channels).t().contiguous().unbind(),
            -A_log.float().exp(),
            dt_bias,
        )
