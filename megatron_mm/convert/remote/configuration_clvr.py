"""Config of an InternVL with cross-layer vision refinement or active vision. Travels with exported
weights."""

from transformers import InternVLConfig


class CLVRConfig(InternVLConfig):
    """InternVL's, and under `clvr` what transformers has no words for: the layer pattern with its
    looks (L, J) and glimpses (Q, V), how images enter, the sizes of looks, and the settings and
    tokens of glimpses."""

    model_type = "internvl_clvr"
    clvr: dict | None = None
