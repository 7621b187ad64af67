"""Faults that pass every test on the CPU, each planted in the product and caught."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from megatron_mm.parallel import groups
from support.gpu_bounds import SHALLOW, broken
from support.plant import planted
from tools.fake_gpu import install
from tools.fake_gpu.measure import measure, measured_run

MODEL = "megatron_mm.model"


class Fault(NamedTuple):
    """Where it is planted, and the error that it causes, or the bound that it breaks."""

    owner: str
    function: str
    old: str
    new: str
    caught: str


NORM = "self.optimizer.prepare_grads()"
FAULTS = {
    "a position left on the CPU": Fault(
        f"{MODEL}.multimodal:MultimodalModel",
        "_predictions",
        "platform.moved(positions - first, hidden_t1H.device)",
        "positions - first",
        "found at least two devices, cuda:0",
    ),
    "a buffer on the CPU": Fault(
        f"{MODEL}.layers.attention",
        "rotary_table",
        ", device=position_ids_T.device",
        "",
        "found at least two devices, cuda:0",
    ),
    "a CPU tensor to NCCL": Fault(
        "megatron_mm.engine.engine:Engine",
        "gradient_norm",
        NORM,
        f"{NORM}; torch.distributed.all_reduce(torch.ones(1), group=self.groups.pg.dp)",
        "No backend type associated with device type cpu",
    ),
    "a wait in every delta rule": Fault(
        f"{MODEL}.layers.gdn.layer:GatedDeltaNet",
        "_mix",
        "beta = b.reshape(tokens, -1).sigmoid()",
        "beta = b.reshape(tokens, -1).sigmoid(); assert beta.isfinite().all()",
        "training waits of GatedDeltaNet",
    ),
    "a wait in every expert layer more": Fault(
        f"{MODEL}.layers.moe:MixtureOfExperts",
        "run",
        "return self(hidden_t1H, context)",
        "float(hidden_t1H.sum()); return self(hidden_t1H, context)",
        "training waits of MixtureOfExperts",
    ),
    "a copy that waits, in every batch": Fault(
        "megatron_mm.data.batch",
        "_moved",
        "platform.moved(held, device)",
        "held.to(device)",
        "training waits of other",
    ),
    "kernels in every norm": Fault(
        f"{MODEL}.stack:SubLayer",
        "forward",
        "self.norm(hidden_t1H, ",
        "self.norm(hidden_t1H + 0 + 0 + 0 + 0 + 0, ",
        "launches forward of GatedAttention",
    ),
}


def on_rank_fault(fault: Fault) -> str:
    """Returns what is said about the product with the fault in it."""
    gpu = install()
    run = measured_run(**SHALLOW)
    job = groups.build(run.parallel)
    try:
        with planted(*fault[:4]):
            return "\n".join(broken(measure(gpu, run, job)))
    except (RuntimeError, TypeError) as error:
        return str(error)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(gpu_ranks, name):
    assert FAULTS[name].caught in gpu_ranks(1, on_rank_fault, FAULTS[name])[0]
