"""Visits, and fake GPUs for their checks, some with a planted fault. Those are called in the
process that runs the checks, before it imports torch."""

from __future__ import annotations

import json
import os
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from megatron_mm.benchmark.gpu.command import main


def pretend() -> Any:
    """A fake GPU."""
    from tools.fake_gpu import install

    return install()


def visit(folder: Path, *words: str, pretend=pretend) -> tuple[int, dict[str, dict]]:
    """Exit code, and rows by name in their order."""
    file = folder / "rows.jsonl"
    code = main(["--dry", "--out", str(file), *words], pretend)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return code, {row["name"]: row for row in rows}


def with_wrong_delta_rule() -> Any:
    """One on which the delta rule forgets too slowly: decays are 1 % off. The CPU's is right."""
    gpu = pretend()
    from megatron_mm.model.layers.gdn import mix

    right = mix.stream_delta_rule

    def wrong(query, key, value, log_decay, *rest):
        return right(query, key, value, log_decay * (0.99 if key.is_cuda else 1.0), *rest)

    mix.stream_delta_rule = wrong
    return gpu


def with_stand_ins() -> Any:
    """One with packages that answer as ours: in the place of flash-linear-attention's kernels, and
    of Transformer Engine's layers."""
    gpu = pretend()
    from megatron_mm.benchmark.gpu import te
    from megatron_mm.model.layers.gdn.convolution import stream_conv
    from megatron_mm.model.layers.gdn.delta_rule import delta_rule_and_state, stream_delta_rule

    def sizes(cu_seqlens_cpu):
        return tuple(cu_seqlens_cpu.diff().tolist())

    def causal_conv1d(*, x, weight, activation, cu_seqlens, cu_seqlens_cpu, chunk_indices):
        return stream_conv(x[0], weight, sizes(cu_seqlens_cpu)).unsqueeze(0), None

    def chunk_gated_delta_rule(*, q, k, v, g, beta, output_final_state, cu_seqlens_cpu, **_):
        given = (*(x[0] for x in (q, k, v, g, beta)), sizes(cu_seqlens_cpu))
        if not output_final_state:
            return stream_delta_rule(*given).unsqueeze(0), None
        out, state = delta_rule_and_state(*given)
        return out.unsqueeze(0), state.flatten(1, 2)

    _stand_in("fla.modules.causal_conv1d", causal_conv1d=causal_conv1d)
    _stand_in("fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunk_gated_delta_rule)
    instead = type("Instead", (), dict.fromkeys(("is_available", "is_enabled"), lambda self: True))
    _stand_in("fla.ops.common.backends.tilelang", CommonTileLangBackend=instead)
    _stand_in("transformer_engine.pytorch", is_fp8_available=lambda return_reason: (False, "none"))
    made = te.aligned_run
    te.missing_transformer_engine = lambda: None
    te.aligned_run = lambda impl, **more: made("local", **more)
    return gpu


def _stand_in(name: str, **contents: Any) -> None:
    """Puts a module, and the packages that it is in, where an import finds them."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        module = sys.modules.setdefault(path, types.ModuleType(path))
        module.__spec__ = ModuleSpec(path, None)
    vars(module).update(contents)


def with_a_dying_check() -> Any:
    """One on which the check of the delta rule ends the process, and that of experts ends CUDA."""
    gpu = pretend()
    import torch

    from megatron_mm.benchmark.gpu import delta_rule, experts

    def ends_cuda(visit, row):
        def unusable():
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        torch.cuda.synchronize = unusable
        raise ValueError("planted")

    delta_rule.check = lambda visit, row: os._exit(9)
    experts.check = ends_cuda
    return gpu


def that_hangs() -> Any:
    """One that does not start."""
    time.sleep(600)
