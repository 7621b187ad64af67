"""Layouts on which the small model must have one rank's gradients, and how close these must be."""

from __future__ import annotations

import torch

from megatron_mm.config import RunConfig
from support.batches import small_run

# fp32 sums in another order. The worst seen is 3.1e-6 (dt_bias and A_log, whose gradients are
# differences of large terms); pipeline layouts are bitwise identical. A lost reduction or a
# detached tensor gives more than BROKEN, as tests/parallel/test_invariance.py asserts.
TOLERANCE = 1e-5
BROKEN = 1e-2
CANCELLING = ("A_log", "dt_bias")

# Two key/value groups: on four tensor-parallel ranks two ranks share one. Five heads in the ViT.
LAYOUTS = {
    "TP2": (2, dict(tp=2, etp=1)),
    "TP2 with expert-TP2": (2, dict(tp=2, etp=2)),
    "TP4": (4, dict(tp=4)),
    "CP2": (2, dict(cp=2)),
    "CP4": (4, dict(cp=4)),
    "PP2": (2, dict(pp=2)),
    "PP4": (4, dict(pp=4)),
    "PP2xVPP2": (2, dict(pp=2, vpp=2)),
    "PP4xVPP2": (4, dict(pp=4, vpp=2)),
    "EP2": (2, dict(ep=2)),
    "DP2": (2, dict()),
    "TP2xCP2": (4, dict(tp=2, cp=2)),
    "TP2xPP2": (4, dict(tp=2, pp=2)),
    "TP2xEP2": (2, dict(tp=2, ep=2, etp=1)),
    "TP2xEP2 with expert-TP2": (4, dict(tp=2, ep=2, etp=2)),
    "PP2xEP2": (4, dict(pp=2, ep=2)),
    "PP2xDP2": (4, dict(pp=2)),
    "TP2xPP2xEP2": (4, dict(tp=2, pp=2, ep=2, etp=1)),
    "PP2xCP2xEP2": (4, dict(pp=2, cp=2, ep=2)),
    "TP2xPP2xVPP2xEP2": (4, dict(tp=2, pp=2, vpp=2, ep=2, etp=1)),
    "PP2xVPP2xCP2": (4, dict(pp=2, vpp=2, cp=2)),
}

# Recomputing runs the same operations again, so it changes no bit on one rank; on several the
# order of accumulation of gradients may change.
RECOMPUTE = {
    "full": dict(recompute_granularity="full", recompute_num_layers=2),
    "full, odd blocks": dict(recompute_granularity="full", recompute_num_layers=3),
    "core_attn": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    "all modules": dict(
        recompute_granularity="selective", recompute_modules=["core_attn", "moe", "vision"]
    ),
}


def invariance_run(run: RunConfig | None = None, **training) -> RunConfig:
    """Returns a run, default the small model's, with the standard deviation that real models start
    from.

    At five times that value, layers amplify rounding until fp32 itself is off by 4e-5.
    """
    run = run or small_run()
    run.model.language.init_method_std = run.model.vision.vision_init_method_std = 0.02
    for name, value in training.items():
        setattr(run.training, name, value)
    return run


def worst(ours: dict, theirs: dict) -> tuple[float, str]:
    """Returns the largest relative difference of two sets of gradients, and whose it is."""
    assert ours.keys() == theirs.keys()
    errors = {
        name: float((ours[name] - theirs[name]).norm() / _size(name, theirs).clamp(min=1e-20))
        for name in theirs
        if name != "replicas"
    }
    name = max(errors, key=errors.get)
    return errors[name], name


def _size(name: str, gradients: dict) -> torch.Tensor:
    """The norm of a gradient. For a difference of large terms at least a tenth of the largest such
    norm of any layer: layers were seen to differ 66 times in it, with the same rounding (4e-10)."""
    norm, last = gradients[name].norm(), name.rpartition(".")[2]
    if last not in CANCELLING:
        return norm
    alike = [g.norm() for n, g in gradients.items() if n.endswith(f".{last}")]
    return torch.stack([norm, *(0.1 * other for other in alike)]).max()


def compare(found: tuple, expected: tuple, tolerance: float = TOLERANCE) -> None:
    """Asserts that two results of `step_gradients` have the same loss and gradients."""
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    error, parameter = worst(gradients, expected_gradients)
    assert abs(loss - expected_loss) <= tolerance * abs(expected_loss)
    assert error <= tolerance, f"{parameter}: {error:.2e}"
    assert gradients["replicas"] <= tolerance
