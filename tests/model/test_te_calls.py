"""Every call of ours into Transformer Engine and flash-linear-attention fits their signatures.

Neither can be imported without CUDA's libraries, so their signatures stand here as Python's
`inspect` gave them for transformer-engine 2.20.2 and flash-linear-attention 0.6.0 (a `!` marks
what has no default). megatron-core's classes are read where they are installed.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

MODEL = Path(__file__).parent.parent.parent / "megatron_mm" / "model"

SIGNATURES = {
    "te.DotProductAttention": "num_attention_heads! kv_channels! num_gqa_groups attention_dropout "
    "qkv_format attn_mask_type window_size bottom_right_diagonal softcap sequence_parallel tp_size "
    "get_rng_state_tracker tp_group layer_number attention_type cp_group cp_global_ranks "
    "cp_stream cp_comm_type softmax_scale softmax_type return_max_logit name",
    "self._kernels[shape]": "query_layer key_layer value_layer attention_mask qkv_format "
    "cu_seqlens_q cu_seqlens_kv cu_seqlens_q_padded cu_seqlens_kv_padded max_seqlen_q "
    "max_seqlen_kv attn_mask_type window_size bottom_right_diagonal softcap "
    "checkpoint_core_attention",
    "te.Fp8Padding": "num_gemms! align_size",
    "te.Fp8Unpadding": "num_gemms! align_size",
    "self.padding": "inp! m_splits!",
    "self.unpadding": "inp! m_splits!",
    "check": "return_reason",
    "causal_conv1d": "x! weight bias residual initial_state output_final_state activation backend "
    "cu_seqlens cu_seqlens_cpu chunk_indices cp_context",
    "chunk_gated_delta_rule": "q! k! v! g! beta! scale initial_state output_final_state "
    "use_qk_l2norm_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens "
    "cu_seqlens_cpu chunk_indices cp_context",
}
CORE = ("TEColumnParallelLinear", "TERowParallelLinear", "TEGroupedLinear")


def core_signatures() -> dict[str, str]:
    """Signatures of megatron-core's classes, from their source: an import gives stand-ins."""
    path = Path(importlib.util.find_spec("megatron.core").origin).parent
    tree = ast.parse((path / "extensions" / "transformer_engine.py").read_text(encoding="utf-8"))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in CORE:
            init = next(part for part in node.body if getattr(part, "name", "") == "__init__")
            names = [arg.arg for arg in init.args.args[1:]]
            first = len(names) - len(init.args.defaults)
            words = [name + "!" * (i < first) for i, name in enumerate(names)]
            pairs = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
            words += [arg.arg + "!" * (default is None) for arg, default in pairs]
            found[node.name] = " ".join(words)
    return found


def calls() -> list[tuple[str, ast.Call]]:
    """(what is called, the call) of both files, of everything whose signature is known."""
    known = SIGNATURES.keys() | set(CORE)
    trees = [
        ast.parse((MODEL / name).read_text())
        for name in ("backends/transformer_engine.py", "layers/gdn/fla.py")
    ]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [(ast.unparse(node.func), node) for node in nodes]
    return [(name, node) for name, node in named if name in known]


@pytest.mark.parametrize("name, call", calls(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_call_fits(name, call):
    words = (SIGNATURES | core_signatures())[name].split()
    names = [word.rstrip("!") for word in words]
    given = names[: len(call.args)] + [keyword.arg for keyword in call.keywords]
    assert len(call.args) <= len(names) and len(given) == len(set(given))
    assert set(given) <= set(names), "a parameter that it does not have"
    assert {word[:-1] for word in words if word.endswith("!")} <= set(given), "one is left out"


def test_all_of_them_are_called():
    assert {name for name, _ in calls()} == SIGNATURES.keys() | set(CORE)
