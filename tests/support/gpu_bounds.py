"""How much a layer may launch and how often the host may wait, on a GPU: the only place of these
bounds. Lower them when the product needs less.

They hold for runs of `SHALLOW` and `DEEP`: the preset `tiny` in bf16 on one rank. Launches do not
depend on widths.
"""

from __future__ import annotations

from typing import NamedTuple

SHALLOW = {"pattern": "GE*E L J", "experts": 8, "topk": 2}
DEEP = SHALLOW | {"pattern": "GE*EGE*E L J"}


class Bound(NamedTuple):
    """Of one layer of a kind, or of all that is no layer."""

    forward: int  # launches
    backward: int  # launches
    waits: int  # of the host in a forward and backward pass
    step: float  # launches in a step of decoding
    step_waits: float


BOUNDS = {
    "GatedDeltaNet": Bound(117, 224, 0, 54, 0),
    "GatedAttention": Bound(64, 81, 0, 32, 0),
    "MixtureOfExperts": Bound(44, 65, 0, 35, 0),
    "Look": Bound(60, 85, 0, 20, 0),
    "VisionLayer": Bound(14, 25, 0, 0, 0),
    "Projector": Bound(6, 8, 0, 0, 0),
    "other": Bound(108, 61, 0, 34, 0),
}
# Of the host in a microbatch, in what is no layer: with 1F1B megatron-core synchronises after every
# exchange between stages (`batch_p2p_sync`), with virtual stages and elsewhere never.
EXCHANGE_WAITS = 2
# Of the host, after the passes of a step.
NORM_WAITS, UPDATE_WAITS = 1, 0


def broken(found) -> list[str]:
    """Returns a line for each bound that a `tools.fake_gpu.measure.Measured` breaks."""
    launches = found.training.launches.by("label", "backward")
    waits = found.training.waits.by("label")
    lines = []
    for label, most in BOUNDS.items():
        layers = found.layers.get(label, 1)
        counted = {
            "launches forward": (launches[label, False], most.forward),
            "launches backward": (launches[label, True], most.backward),
            "training waits": (waits[label], most.waits),
            "launches decoding": (found.decoding["launches", label], most.step),
            "decoding waits": (found.decoding["waits", label], most.step_waits),
        }
        lines += [
            f"{what} of {label}: {number / layers:g} a layer, bound {bound:g}"
            for what, (number, bound) in counted.items()
            if number > bound * layers
        ]
    for what, counts, bound in (
        ("gradient norm", found.norm, NORM_WAITS),
        ("update", found.update, UPDATE_WAITS),
    ):
        if counts.waits.total() > bound:
            lines.append(f"waits of the {what}: {counts.waits.total()}, bound {bound}")
    return lines
