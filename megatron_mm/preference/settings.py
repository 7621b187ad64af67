"""The settings of training on preference pairs, and what follows from them alone. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megatron_mm.config.fields import Bounds, PositiveFloat
from megatron_mm.config.settings import RunConfig
from megatron_mm.errors import ConfigError
from megatron_mm.plugins import Registry
from megatron_mm.rl.reference_settings import check_reference

_LOSSES = "megatron_mm.preference.losses"
# Name -> (pairs, settings) -> the loss of each pair; losses.py.
PREFERENCE_LOSSES: Registry = Registry(
    "loss_type",
    {
        name: f"{_LOSSES}.{name}"
        for name in (
            *("sigmoid", "hinge", "robust", "ipo", "bco_pair"),
            *("apo_zero", "apo_down", "sppo_hard", "nca_pair", "sft"),
        )
    },
    kind="function",
)
# MPO, arXiv 2411.10442, with the weights of InternVL's training scripts.
PRESETS = {"mpo": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}}
SMOOTHED = ("sigmoid", "robust")  # the losses that read dpo_label_smoothing


@dataclass
class DPOConfig:
    """Preference pairs. Names are TRL's, with a prefix where another section has the name."""

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    """Losses of a pair, which are added up: sigmoid, hinge, robust, ipo, bco_pair, apo_zero,
    apo_down, sppo_hard, nca_pair, sft or dotted paths; or mpo alone, which is sigmoid, bco_pair and
    sft with the weights 0.8, 0.2 and 1."""
    loss_weights: list[float] = field(default_factory=list)
    """Weight of each loss. Default: those of mpo, else 1 each."""
    dpo_beta: PositiveFloat = 0.1
    """Scale of the implicit reward beta * log(p / p_reference)."""
    dpo_label_smoothing: Annotated[float, Bounds(ge=0, lt=0.5)] = 0.0
    """Share of pairs whose sides are taken to be the wrong way round, in sigmoid and robust."""
    dpo_ref_load: str | None = None
    """Checkpoint of the reference model. Default: the weights that the run starts from, without
    LoRA's adapters if it has them."""


def loss_terms(dpo: DPOConfig) -> dict[str, float]:
    """Returns the weight of each loss by its name.

    Raises:
        ConfigError: for weights that do not match, a loss that is named twice, or mpo beside
            another.
    """
    names, weights = list(dpo.loss_type), list(dpo.loss_weights)
    preset = PRESETS.get(names[0]) if len(names) == 1 else None
    if preset is not None:
        names, weights = list(preset), weights or list(preset.values())
    mixed = [name for name in names if name in PRESETS]
    if not names or mixed or len({*names}) < len(names):
        alone = ", ".join(PRESETS)
        raise ConfigError(
            f"dpo.loss_type is {dpo.loss_type!r}; allowed: at least 1 loss, each once, or {alone} "
            "alone"
        )
    if len(weights) not in (0, len(names)):
        raise ConfigError(
            f"dpo.loss_weights has {len(weights)} numbers for {len(names)} losses "
            f"({', '.join(names)}); allowed: none, or one for each"
        )
    weights = weights or [1.0] * len(names)
    if min(weights) < 0 or not any(weights):
        raise ConfigError(
            f"dpo.loss_weights is {dpo.loss_weights!r}; allowed: 0 or more each, at least 1 above 0"
        )
    return dict(zip(names, weights, strict=True))


def check_dpo(run: RunConfig) -> None:
    """Raises ConfigError for settings that do not fit each other. Bounds are checked already."""
    dpo = run.section(DPOConfig)
    names = [*loss_terms(dpo)]
    for name in names:
        PREFERENCE_LOSSES.check(name)
    reads = any(name in SMOOTHED or name not in PREFERENCE_LOSSES for name in names)
    if dpo.dpo_label_smoothing and not reads:
        raise ConfigError(
            f"dpo.dpo_label_smoothing is {dpo.dpo_label_smoothing}; allowed: 0 with loss_type "
            f"{', '.join(names)}, or this value with {' or '.join(SMOOTHED)}"
        )
    check_reference(run, None)
