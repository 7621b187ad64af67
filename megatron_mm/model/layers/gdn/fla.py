"""The same as `mix.py` with flash-linear-attention's Triton kernels, on the packed stream.

No rectangle is made and query and key are not repeated for each value: the kernels take the
samples' boundaries and know grouped values. Written for flash-linear-attention 0.6
(https://github.com/fla-org/flash-linear-attention).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mm.model.layers.gdn.convolution import last_inputs
from megatron_mm.model.layers.gdn.mix import HeadWidths, split_heads
from megatron_mm.model.layers.gdn.step import convolution_step, split_parts
from megatron_mm.model.segments import Segments


def convolve_and_scan_fla(
    qkv_TC: torch.Tensor,
    conv_weight_CW: torch.Tensor,
    log_decay_Th: torch.Tensor,
    beta_Th: torch.Tensor,
    segments: Segments,
    widths: HeadWidths,
) -> torch.Tensor:
    """Arguments and result of `mix.convolve_and_scan`; CUDA only."""
    arguments = (qkv_TC, conv_weight_CW, log_decay_Th, beta_Th, segments, widths)
    return _run(*arguments, keep=False)[0]


def convolve_scan_and_keep_fla(
    qkv_TC: torch.Tensor,
    conv_weight_CW: torch.Tensor,
    log_decay_Th: torch.Tensor,
    beta_Th: torch.Tensor,
    segments: Segments,
    widths: HeadWidths,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments and result of `mix.convolve_scan_and_keep`; CUDA only."""
    arguments = (qkv_TC, conv_weight_CW, log_decay_Th, beta_Th, segments, widths)
    out, state = _run(*arguments, keep=True)
    state = state.unflatten(1, (-1, widths.values))
    return out, last_inputs(qkv_TC, conv_weight_CW.shape[1], segments), state


def convolve_and_step_fla(
    x_RC: torch.Tensor,
    taps: Sequence[torch.Tensor],
    log_decay_Rh: torch.Tensor,
    beta_Rh: torch.Tensor,
    inputs: torch.Tensor,
    state: torch.Tensor,
    widths: HeadWidths,
) -> torch.Tensor:
    """Arguments and result of `step.convolve_and_step`; CUDA only. The convolution is torch's:
    flash-linear-attention's keeps its inputs in another order."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    both, value = split_parts(convolution_step(x_RC, taps, inputs), state.shape[1], widths)
    query, key = both.unbind(1)
    mixed, moved_on = fused_recurrent_gated_delta_rule(
        q=query.unsqueeze(1).contiguous(),
        k=key.unsqueeze(1).contiguous(),
        v=value.unsqueeze(1).contiguous(),
        g=log_decay_Rh.float().unsqueeze(1),
        beta=beta_Rh.unsqueeze(1),
        initial_state=state.flatten(1, 2),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    state.copy_(moved_on.view_as(state))
    return mixed.squeeze(1)


def _run(qkv_TC, conv_weight_CW, log_decay_Th, beta_Th, segments, widths, keep: bool):
    # Importing it probes for a GPU and for Triton, so not before it is used.
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    # Those on the CPU, and the chunks, spare the kernels waits for the device.
    qkv, _ = causal_conv1d(
        x=qkv_TC.unsqueeze(0),
        weight=conv_weight_CW,
        activation="silu",
        cu_seqlens=segments.cu_seqlens,
        cu_seqlens_cpu=segments.cu_seqlens_cpu,
        chunk_indices=segments.chunks,
    )
    query, key, value = split_heads(qkv, widths)
    mixed, state = chunk_gated_delta_rule(
        q=query.contiguous(),
        k=key.contiguous(),
        v=value.contiguous(),
        g=log_decay_Th.float().unsqueeze(0),
        beta=beta_Th.unsqueeze(0),
        use_qk_l2norm_in_kernel=True,
        output_final_state=keep,
        cu_seqlens=segments.cu_seqlens,
        cu_seqlens_cpu=segments.cu_seqlens_cpu,
        chunk_indices=segments.chunks,
    )
    return mixed.squeeze(0), state
