"""Settings in megatron-core's words: the one place where a TransformerConfig is made."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mm.config import RunConfig, effective_pattern, num_layers
from megatron_mm.config.families import vision_family, vision_settings
from megatron_mm.config.objectives import declaration
from megatron_mm.model.backends.choice import fuses_permutation


def language_config(run: RunConfig) -> TransformerConfig:
    """Configures the language stack, the schedule, DDP and the optimizer."""
    language, parallel, training = run.model.language, run.parallel, run.training
    backend = run.backend
    tp = parallel.tensor_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    interleaved = virtual > 1
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    return TransformerConfig(
        num_layers=num_layers(effective_pattern(run.model)),
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_attention_heads,  # grouping is our attention's business
        kv_channels=language.kv_channels,
        ffn_hidden_size=language.moe_ffn_hidden_size,
        layernorm_epsilon=language.layernorm_epsilon,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        num_moe_experts=language.num_experts,
        moe_router_topk=language.moe_router_topk,
        moe_ffn_hidden_size=language.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=language.moe_shared_expert_intermediate_size,
        moe_shared_expert_gate=True,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=declaration(run).moe_aux_loss_coeff(run),
        moe_router_dtype=language.moe_router_dtype,
        moe_token_dispatcher_type=parallel.moe_token_dispatcher_type,
        moe_shared_expert_overlap=parallel.moe_shared_expert_overlap,
        moe_permute_fusion=fuses_permutation(),
        # Its kernel would choose the experts without asking for given, drawn or forbidden ones.
        moe_router_fusion=False,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if interleaved else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size or tp,
        sequence_parallel=tp > 1,  # never without: docs/design.md 4.3
        # The stream's length differs between microbatches (parallel/stage_exchange.py).
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1,
        # The interleaved schedule is silently wrong with batched exchanges, and 1F1B does not
        # know overlapped ones (docs/design.md 4.4).
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        calculate_per_token_loss=True,
        perform_initialization=False,  # parallel/param_layout.py does it, whatever the layout
        # The experts' stacks and the linears outside of the language stack cannot.
        gradient_accumulation_fusion=False,
        transformer_impl=backend.transformer_impl,
        deterministic_mode=backend.deterministic_mode,
        fp8=backend.fp8_format,
        fp8_recipe=backend.fp8_recipe,
        fp8_amax_history_len=backend.fp8_amax_history_len,
        fp8_amax_compute_algo=backend.fp8_amax_compute_algo,
        first_last_layers_bf16=backend.first_last_layers_bf16,
        num_layers_at_start_in_bf16=backend.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=backend.num_layers_at_end_in_bf16,
        bf16=training.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
    )


def vision_config(run: RunConfig, language: TransformerConfig, tp: int) -> TransformerConfig:
    """Configures the linears of the vision encoder and of the projector, which `tp` ranks share: no
    sequence parallelism, no experts, no FP8."""
    return replace(
        language,
        tensor_model_parallel_size=tp,
        **vision_family(run.model).core(vision_settings(run.model), tp),
        sequence_parallel=False,
        fp8=None,
        first_last_layers_bf16=False,
        num_moe_experts=None,
        moe_ffn_hidden_size=None,
        moe_shared_expert_intermediate_size=None,
        moe_shared_expert_gate=False,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=tp,
        gated_linear_unit=False,
    )
