"""Choice of the code that computes the language stack: torch, or Transformer Engine and FLA.

Layers ask a `Backend` for their parts and never look further. Both backends make the same
parameters with the same names, shapes and layouts, so the same seed is the same model and a
checkpoint written with one loads with the other.

Parts that the backend does not decide stay in torch, in bf16 under FP8: the embedding, the output
layer and the router, where rounding changes a choice between tokens or experts; norms, which
are not products; CLVR, whose memory has any number of rows and whose products are small; and
the ViT and the projector, where a tile's 1,025 positions fit no FP8 product.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils

from megatron_mm.config import BackendConfig, ConfigError, ParallelConfig
from megatron_mm.model.backends.fla_here import missing_fla
from megatron_mm.model.backends.interface import Backend
from megatron_mm.model.layers.attention import causal_attention
from megatron_mm.model.layers.experts import GroupedExperts
from megatron_mm.model.layers.gdn.mix import convolve_and_scan, convolve_scan_and_keep
from megatron_mm.model.layers.gdn.step import convolve_and_step
from megatron_mm.model.layers.linear import Column, Row, column, row

INSTALL_TE = (
    "pip install -e '.[cuda]' on a machine with CUDA, then "
    "pip install --no-build-isolation 'transformer-engine[pytorch]'"
)
# What torch's delta rule costs in its place; predicted, no GPU has measured it:
# tools/plan.py --config examples/mm-80b.yaml --world-size 256 --gpu H100 [--gdn-kernel torch]
COST_WITHOUT_FLA = "a step of mm-80b on 256 H100 takes 1.2 times as long (9.8 against 8.1 s)"


def choose(settings: BackendConfig) -> Backend:
    """The backend that the settings ask for, on the machine at hand.

    Raises:
        ConfigError: if this machine lacks it.
    """
    if settings.compile_vision and not torch.cuda.is_available():
        # platform.py makes torch.compile do nothing, for megatron-core's many small functions.
        raise ConfigError(
            "compile_vision is true, but there is no CUDA device; allowed here: false"
        )
    # With deterministic_mode flash-linear-attention is refused (config/precision.py).
    mixing = _gdn_kernels("torch" if settings.deterministic_mode else settings.gdn_kernel)
    if settings.transformer_impl == "local":
        return Backend(
            column=column,
            row=row,
            shared_expert=MLPSubmodules(linear_fc1=Column, linear_fc2=Row),
            experts=GroupedExperts,
            core_attention=lambda: causal_attention,
            **mixing,
            precision=lambda config, layer: nullcontext(),
        )
    problem = missing_transformer_engine()
    if problem is not None:
        raise ConfigError(f"transformer_impl is 'transformer_engine', but {problem}")
    from megatron_mm.model.backends import transformer_engine as backend_te

    backend_te.check_device(settings)
    return Backend(
        column=backend_te.column,
        row=backend_te.row,
        shared_expert=backend_te.shared_expert(),
        experts=backend_te.TEGroupedExperts,
        core_attention=backend_te.PackedAttention,
        **mixing,
        precision=backend_te.precision,
    )


def _gdn_kernels(asked: str) -> dict[str, Callable]:
    """The functions of gated DeltaNet by their names in `Backend`."""
    problem = missing_fla()
    if asked == "torch" or (asked == "auto" and problem is not None):
        return {
            "mix": convolve_and_scan,
            "mix_and_keep": convolve_scan_and_keep,
            "mix_step": convolve_and_step,
        }
    if problem is not None:
        raise ConfigError(f"gdn_kernel is 'fla', but {problem}")
    from megatron_mm.model.layers.gdn import fla

    return {
        "mix": fla.convolve_and_scan_fla,
        "mix_and_keep": fla.convolve_scan_and_keep_fla,
        "mix_step": fla.convolve_and_step_fla,
    }


def check_dispatcher(parallel: ParallelConfig) -> None:
    """Raises ConfigError if this machine lacks the library that dispatches tokens to experts."""
    if parallel.moe_token_dispatcher_type != "flex":
        return
    problem = None
    if not torch.cuda.is_available():
        problem = "there is no CUDA device; allowed here: alltoall"
    elif importlib.util.find_spec("deep_ep") is None:
        problem = "DeepEP is not installed: build github.com/deepseek-ai/DeepEP, or use alltoall"
    if problem is not None:
        raise ConfigError(f"moe_token_dispatcher_type is 'flex', but {problem}")


def missing_transformer_engine() -> str | None:
    """The reason why Transformer Engine cannot be used here, in one line with the remedy; None if
    it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device; allowed here: local"
    try:
        importlib.metadata.version("transformer-engine")
        import transformer_engine.pytorch  # noqa: F401
    except importlib.metadata.PackageNotFoundError:
        return f"Transformer Engine is not installed: {INSTALL_TE}"
    # A wheel without its CUDA part, or built for another torch, fails in many ways.
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return (
            f"Transformer Engine does not load ({type(error).__name__}: {reason[0][:120]}): "
            f"{INSTALL_TE}"
        )
    return None


def fuses_permutation() -> bool:
    """Whether megatron-core's dispatcher can sort tokens by expert with Transformer Engine's
    kernels, whichever layers compute: one each way in place of a sort, and no wait for the sizes
    of the chunks."""
    kernels = (
        moe_utils.fused_permute,
        moe_utils.fused_permute_with_probs,
        moe_utils.fused_sort_chunks_by_index,
        moe_utils.fused_sort_chunks_by_index_with_probs,
        moe_utils.fused_unpermute,
    )
    return None not in kernels and missing_transformer_engine() is None


def slow_delta_rule(settings: BackendConfig) -> str | None:
    """The loss of a run on a GPU that lacks flash-linear-attention, in one line with the remedy;
    None if nothing, or if the settings ask for torch's kernel."""
    asked = settings.gdn_kernel != "auto" or settings.deterministic_mode
    problem = missing_fla()
    if asked or problem is None or not torch.cuda.is_available():
        return None
    return (
        f"the gated delta rule runs in torch, {problem}; as tools/plan.py predicts, "
        f"{COST_WITHOUT_FLA}; --gdn-kernel torch keeps it so without this warning"
    )
