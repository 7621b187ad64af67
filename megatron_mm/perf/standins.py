"""Stand-ins, in a plan, for parts that cannot run on tensors without memory.

Routing is balanced, since no logits are computed. Attention is the fused kernel that keeps
query, key, value, result and the logarithms of its sums. On a GPU a root-mean-square norm is the
one kernel that torch has there (`_fused_rms_norm`), and the gated delta rule is
flash-linear-attention's: its source (0.6, `chunk_gated_delta_rule` and `causal_conv1d`) shows which
tensors it keeps and the sizes it works with; no GPU run has confirmed them yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.optim.adam as adam
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_mm import platform
from megatron_mm.config import ConfigError, RunConfig
from megatron_mm.model.backends.choice import choose
from megatron_mm.model.backends.interface import Backend
from megatron_mm.model.layers.cascade import CascadedExperts
from megatron_mm.model.layers.gdn.convolution import last_inputs
from megatron_mm.model.layers.gdn.mix import split_heads
from megatron_mm.model.layers.moe import MixtureOfExperts
from megatron_mm.perf.assumed import expert_counts
from megatron_mm.perf.recorder import Recorder

CHUNK = 64  # positions; flash-linear-attention's own
Count = Callable[..., None]  # `Recorder.add`: a kernel that no operation shows


def planned_backend(run: RunConfig, kernels: str, count: Count) -> Backend:
    """The backend of a plan: `cuda` as a GPU with flash-linear-attention, `torch` as the CPU.

    Raises:
        ConfigError: for FP8, of which the planner knows nothing.
    """
    check_backend(run)
    local = replace(run.backend, transformer_impl="local", gdn_kernel="torch", compile_vision=False)
    backend = choose(local)
    # Of a prompt torch's kernel asks which samples have more than one chunk.
    backend = replace(backend, mix_and_keep=partial(_fused_mix_and_keep, count))
    torchs = run.backend.gdn_kernel == "torch" or run.backend.deterministic_mode  # as `choose`
    if kernels == "cuda" and not torchs:
        backend = replace(backend, mix=partial(_fused_mix, count))
    return backend


def check_backend(run: RunConfig) -> None:
    """Raises ConfigError for FP8, of which the planner knows nothing."""
    if run.backend.fp8_format is not None:
        raise ConfigError(
            f"fp8_format is {run.backend.fp8_format!r}; allowed in a plan: none, it knows no FP8"
        )


@contextmanager
def fused_kernels(count: Count) -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` of tensors without memory is one kernel, and so is
    its backward pass; torch would choose the way of many products for them. So is `rms_norm`
    where they stand for a GPU's. Set in their module, as a mode would not reach what the backward
    pass computes again."""
    torchs, torchs_norm = F.scaled_dot_product_attention, F.rms_norm

    def chosen(query, *args, **kwargs):
        return (_attention if query.is_meta else torchs)(query, *args, **kwargs)

    def chosen_norm(x, normalized_shape, weight=None, eps=None):
        on_gpu = x.is_meta and platform.compute_capability(x.device) is not None
        # As torch decides there: a weight of another type is multiplied on its own.
        if not on_gpu or (weight is not None and weight.dtype != x.dtype):
            return torchs_norm(x, normalized_shape, weight, eps)
        return _FusedRMSNorm.apply(x, weight, len(normalized_shape), count)

    F.scaled_dot_product_attention, F.rms_norm = chosen, chosen_norm
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = torchs, torchs_norm


def _attention(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False):
    if attn_mask is not None:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask
    )[0]


class _FusedRMSNorm(torch.autograd.Function):
    """Reads x and writes the result; keeps x and a scale a row. Backward it reads both once for
    the gradient of x and once for that of the weight."""

    @staticmethod
    def forward(ctx, x, weight, dims: int, count: Count):
        scale = x.new_empty(x.shape[:-dims], dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        ctx.count = count
        count(moved=2 * x.nbytes)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, d_out):
        x, weight, _ = ctx.saved_tensors
        ctx.count(moved=3 * x.nbytes)
        d_weight = None
        if weight is not None:
            ctx.count(moved=2 * x.nbytes)
            d_weight = torch.empty_like(weight)
        return torch.empty_like(d_out), d_weight, None, None


@contextmanager
def updating(recorder: Recorder, norm: float) -> Iterator[None]:
    """Inside, an optimizer's step runs on tensors without memory: torch's fused Adam takes them, as
    it takes a GPU's, and a number that the host reads from one is `norm`."""
    check = adam._device_dtype_check_for_fused
    adam._device_dtype_check_for_fused = lambda *args, **kwargs: None
    try:
        with recorder.answering(norm):
            yield
    finally:
        adam._device_dtype_check_for_fused = check


def balance(
    model: torch.nn.Module, tokens: int, wait: Callable[[], None], share: float = 1.0
) -> None:
    """Makes the layers of experts of a stage dispatch as `balanced_routes` would, for a stream of
    this many tokens.

    Args:
        share: of them, what a second hop is handed.
        wait: called where the host waits for the numbers of rows, as on a GPU.
    """
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            dispatcher = BalancedDispatcher.like(module.token_dispatcher, tokens, wait)
            module.token_dispatcher = dispatcher
            dispatchers = [dispatcher]
            if isinstance(module, CascadedExperts):
                dispatchers.append(_hand_over(module, share, tokens, wait))
            if module.alone:  # it asks its router for the counts
                module.experts.groups = partial(_balanced, module.experts.groups, dispatchers)


def _hand_over(
    module: CascadedExperts, share: float, tokens: int, wait: Callable[[], None]
) -> BalancedDispatcher:
    """Makes a layer hand over the first tokens of every rank's part of the stream, this share of
    them, and dispatch them alike; returns the dispatcher."""
    shards = module.config.tensor_model_parallel_size * module.config.context_parallel_size
    here = round(share * (tokens // shards))

    def pick(handed_t: torch.Tensor) -> torch.Tensor:
        wait()
        return torch.arange(here, device=handed_t.device)

    module.delegate.pick = pick
    second = BalancedDispatcher.like(module.second_dispatcher, here * shards, wait)
    module.second_dispatcher = second
    return second


def _balanced(
    groups: Callable, dispatchers: list[BalancedDispatcher], tokens_per_expert, tokens_RH
):
    """Arguments and result of `GroupedExperts.groups`; the number of rows tells the hop."""
    counts = [dispatcher.counts_here() for dispatcher in dispatchers]
    return groups(next(c for c in counts if int(c.sum()) == len(tokens_RH)), tokens_RH)


class BalancedDispatcher(MoEAlltoAllTokenDispatcher):
    """megatron-core's, where the counts follow from the positions and not from the router."""

    tokens = 0  # of the whole stream
    wait: Callable[[], None]

    @classmethod
    def like(
        cls, other: MoEAlltoAllTokenDispatcher, tokens: int, wait: Callable[[], None]
    ) -> BalancedDispatcher:
        made = cls.__new__(cls)
        made.__dict__.update(vars(other))
        made.tokens, made.wait = tokens, wait
        return made

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert=None):
        if point == self.cuda_sync_point:
            self.wait()
        return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Sets what megatron-core's sets, from real numbers; int64 [local experts]."""
        top_k, here = self.config.moe_router_topk, routing_map.sum(dim=0).long()
        self.num_out_tokens = len(routing_map) * top_k
        if self.ep_size == self.tp_size == 1:
            counts = self._counts([dist.get_rank()])
            self._maybe_update_cuda_sync_point("before_finish")
        else:
            gather_from_sequence_parallel_region(here, group=self.tp_ep_group)  # as they do
            counts = self._counts(dist.get_process_group_ranks(self.tp_ep_group))
            self._maybe_update_cuda_sync_point("before_ep_alltoall")
        counts = counts.view(self.ep_size, self.tp_size, self.num_experts).transpose(0, 1)
        mine = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        local = counts[:, :, mine].contiguous()
        if self.ep_size > 1 or self.tp_size > 1:
            sends = self._counts([dist.get_rank()]).view(self.ep_size, self.num_local_experts)
            self.input_splits = sends.sum(1)
            per_rank = local.sum(2)
            self.output_splits = per_rank[self.tp_rank]
            self.output_splits_tp = per_rank.sum(1)
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = local.view(-1, self.num_local_experts)
            self._maybe_update_cuda_sync_point("before_permutation_2")
        return local.sum((0, 1))

    def counts_here(self) -> torch.Tensor:
        """int64 [E]: the rows that this rank's part of the stream sends to each expert."""
        return self._counts([dist.get_rank()])[0]

    def _counts(self, ranks: list[int]) -> torch.Tensor:
        """int64 [ranks, E]: the rows that each rank's part of its stream sends to each expert."""
        config = self.config
        shards = config.tensor_model_parallel_size * config.context_parallel_size
        part = self.tokens // shards
        # Ranks are numbered tp first, then cp, which is the order of the parts.
        parts = [range(rank % shards * part, (rank % shards + 1) * part) for rank in ranks]
        counts = [expert_counts(p, config.moe_router_topk, self.num_experts) for p in parts]
        return torch.stack(counts)


def _fused_mix(count: Count, qkv_TC, conv_weight_CW, log_decay_Th, beta_Th, segments, widths):
    """Arguments and result of `gdn.mix.convolve_and_scan`."""
    mixed = _FusedConvolution.apply(qkv_TC, conv_weight_CW)
    query, key, value = (x.contiguous() for x in split_heads(mixed, widths))
    del mixed
    return _FusedDeltaRule.apply(query, key, value, log_decay_Th.float(), beta_Th, count)


def _fused_mix_and_keep(count: Count, qkv_TC, conv_weight_CW, log_decay_Th, beta_Th, *cut):
    """Arguments and result of `gdn.mix.convolve_scan_and_keep`."""
    segments, widths = cut
    mixed = _fused_mix(count, qkv_TC, conv_weight_CW, log_decay_Th, beta_Th, *cut)
    heads = log_decay_Th.shape[1] // widths.values, widths.values
    state = log_decay_Th.new_zeros(
        len(segments.sizes), *heads, widths.key, widths.value, dtype=torch.float32
    )
    return mixed, last_inputs(qkv_TC, conv_weight_CW.shape[1], segments), state


class _FusedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TC, weight_CW):
        ctx.save_for_backward(x_TC, weight_CW)
        return x_TC + 0.0  # one pass over it

    @staticmethod
    def backward(ctx, d_out):
        x_TC, weight_CW = ctx.saved_tensors
        return x_TC + d_out, torch.empty_like(weight_CW)


class _FusedDeltaRule(torch.autograd.Function):
    """Keeps the normalised query and key with their scales, value, the summed decay, beta and the
    inverse of every chunk's triangular system; works with the state at every chunk's start."""

    @staticmethod
    def forward(ctx, query, key, value, log_decay, beta, count: Count):
        tokens, heads, width = value.shape
        query, key = query + 0.0, key + 0.0
        scales = [
            torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for x in (query, key)
        ]
        decay = log_decay.cumsum(0)
        inverse = value.new_empty(tokens, heads, CHUNK)
        work = _delta_rule_inside(key, value)
        count(_delta_rule_flops(key, value), fp32=value.dtype is torch.float32)
        ctx.count = count
        ctx.save_for_backward(query, key, *scales, value, decay, beta, inverse)
        out = value + 0.0
        del work
        return out

    @staticmethod
    def backward(ctx, d_out):
        query, key, _, _, value, decay, beta, _ = ctx.saved_tensors
        work = [*_delta_rule_inside(key, value), *_delta_rule_inside(key, value)]
        once = _delta_rule_flops(key, value)
        # Forward again, then twice as much.
        ctx.count(3 * once, again=once, fp32=value.dtype is torch.float32)
        grads = query + 0.0, key + 0.0, value + d_out, decay + 0.0, beta + 0.0
        del work
        return *grads, None


def _delta_rule_inside(key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """Tensors that the kernels pass to each other: two of the keys' size, two of the values',
    states at the start of every chunk."""
    tokens, heads, width = value.shape
    wide = key.shape[-1]
    chunks = -(-tokens // CHUNK)
    shapes = [(tokens, heads, wide)] * 2 + [(tokens, heads, width)] * 2
    made = [value.new_empty(shape) for shape in shapes]
    return [*made, value.new_empty(chunks, heads, wide, width)]


def _delta_rule_flops(key: torch.Tensor, value: torch.Tensor) -> int:
    """FLOPs of the chunked forward pass (arXiv 2412.06464, section 3.3): K K^T, Q K^T, T with both,
    P U inside a chunk; W S, Q S and K^T U with the state."""
    tokens, heads, width = value.shape
    wide = key.shape[-1]
    inside = 2 * CHUNK * (2 * wide + wide + width + width)
    return tokens * heads * (inside + 3 * 2 * wide * width)
