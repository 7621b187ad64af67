"""Config of an InternVL with cross-layer vision refinement. Travels with exported weights."""

from transformers import InternVLConfig


class CLVRConfig(InternVLConfig):
    """InternVL's, and under `clvr` what transformers has no words for: the layer pattern with its
    looks (L) and injections (J), how images enter, and the sizes of the looks."""

    model_type = "internvl_clvr"
    clvr: dict | None = None
