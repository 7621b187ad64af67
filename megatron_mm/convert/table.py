"""The table of names of a model: its families' rows, the projector's, CLVR's and glimpses'.

Both directions, the plan, the check and the tests read these rows and nothing else
(model/families/rows.py says what a row is).
"""

from __future__ import annotations

from megatron_mm.config import ModelConfig
from megatron_mm.config.families import language_family, vision_family
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.model.families.rows import Form, Row, Spelling, released_row, row
from megatron_mm.plugins import import_object

__all__ = ["AVM", "CLVR", "PROJECTOR", "SPELLINGS", "Form", "Row", "Spelling", "rows", "row"]

# What `save_pretrained` writes today comes first: it is what a fused model is exported as.
SPELLINGS = {
    "transformers": Spelling(
        "language_model.model.", "language_model.", "vision_tower.", "multi_modal_projector."
    ),
    # save_original_format=False, and the names inside the model
    "stacked": Spelling(
        "model.language_model.",
        "",
        "model.vision_tower.",
        "model.multi_modal_projector.",
        stacked=True,
    ),
    "release": Spelling(
        "language_model.model.", "language_model.", "vision_model.", "mlp1.", release=True
    ),
    "text": Spelling("model."),
    "text-stacked": Spelling("model.", stacked=True),
    # one encoder alone: as released, and as transformers' own class of it
    "encoder-release": Spelling("model.", release=True),
    "encoder": Spelling("model."),
}
PROJECTOR = tuple(
    released_row(f"{mcore}.{part}", f"{{projector}}{name}.{part}", f"{{projector}}{number}.{part}")
    for mcore, name, number in (
        ("vision.projector.norm", "layer_norm", 0),
        ("vision.projector.linear_fc1", "linear_1", 1),
        ("vision.projector.linear_fc2", "linear_2", 3),
    )
    for part in ("weight", "bias")
)
# CLVR and active vision are ours alone; the remote code of an export uses these names.
CLVR = (
    row("vision.memory_proj.{rest}", "clvr.memory_proj.{rest}"),
    row("vision.memory_projs.{rest}", "clvr.memory_projs.{rest}"),
    row("language.looks.{pair}.{rest}", "clvr.looks.{pair}.{rest}"),
)
AVM = (row("language.queries.{pair}.{rest}", "avm.queries.{pair}.{rest}"),)


def rows(model: ModelConfig) -> tuple[Row, ...]:
    """Every row that a model of these families may need. A letter that the family does not know
    brings rows of its own."""
    known = language_family(model).hf_rows()
    found = [row for part in known.values() for row in part]
    for kind in LAYERS.used(model.hybrid_layer_pattern):
        if kind.letter not in known and kind.hf_rows is not None:
            found += import_object(kind.hf_rows, f"layer {kind.letter} ({kind.title}): rows")
    if model.vision is not None:
        found += [*vision_family(model).hf_rows(), *PROJECTOR, *CLVR, *AVM]
    return tuple(found)
