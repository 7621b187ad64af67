"""Letters that are refused: without a part, with a name that is taken, or in plug-ins by halves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from torch import nn

from megatron_mm.config import ConfigError, load, parse_pattern, validate
from megatron_mm.config.fields import PositiveInt
from megatron_mm.config.layers.kinds import LAYERS, LayerKind
from megatron_mm.model.layers.interface import torch_half
from support.batches import small_run
from support.new_letter import MLP, GatedMLP, MLPSettings

pytestmark = pytest.mark.usefixtures("new_letter")


@dataclass
class Clashing:
    hidden_size: PositiveInt = 3


def test_a_setting_whose_name_is_taken_is_refused(monkeypatch):
    kind = replace(MLP, letter="Q", settings=Clashing)
    monkeypatch.setattr(LAYERS, "_parts", LAYERS._parts | {"Q": kind})
    with pytest.raises(ConfigError, match=r"layers.Q.hidden_size has the name of model.language.h"):
        load(None, ["--preset", "tiny"])


def test_a_layer_that_reads_the_memory_needs_one(monkeypatch):
    """Sides are dropped where there is nothing to see; a numbered layer cannot be."""
    kind = replace(MLP, letter="Q", reads_memory=True, settings=None, check=lambda run: None)
    monkeypatch.setattr(LAYERS, "_parts", LAYERS._parts | {"Q": kind})
    run = small_run("GQ L J", vision_memory="none")
    run.model.language.num_experts = 8
    with pytest.raises(ConfigError, match="vision_memory is 'none'; allowed: another one with Q"):
        validate(run)


class Unrunnable(nn.Module):
    State, build = None, GatedMLP.build


def test_a_kind_without_a_part_is_named():
    with pytest.raises(TypeError, match="'flops'"):
        LayerKind(letter="Q", title="nothing", role="ffn", key="nothing")
    for options, words in (
        ({"role": "side"}, "letter Q: role is 'side' and pair is None"),
        ({"pair": "opens"}, "letter Q: role is 'ffn' and pair is 'opens'"),
        ({"module": None}, "letter Q: module is None; allowed: the dotted path"),
        ({"role": "head"}, "letter Q: role is 'head'; allowed: mixer, ffn, side"),
        ({"recompute": "all"}, "letter Q: recompute is 'all'; allowed: moe, None"),
    ):
        with pytest.raises(ConfigError, match=words):
            replace(MLP, **{"letter": "Q"} | options)


@pytest.mark.parametrize(
    ("letter", "part", "words"),
    [
        ("Q", replace(MLP, letter="P"), "letter 'Q' is registered with a kind of letter P"),
        ("|", replace(MLP, letter="|"), "letter '|'; allowed: one character"),
        ("QQ", MLP, "letter 'QQ'; allowed: one character"),
        ("E", replace(MLP, letter="E"), "letter 'E' is registered twice"),
    ],
)
def test_letters_that_cannot_be_registered(letter, part, words):
    with pytest.raises(ConfigError) as error:
        LAYERS.register(letter, part)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_part_that_is_no_kind_is_named(monkeypatch):
    monkeypatch.setattr(LAYERS, "_parts", LAYERS._parts | {"Q": object()})
    with pytest.raises(ConfigError, match="letter Q has no `letter`; it needs letter, title, role"):
        parse_pattern("GE")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (f"{__name__}.Unrunnable", "layer Q (gated MLP): {} has no `run`; it needs build, run"),
        (f"{MLPSettings.__module__}.MLPSettings", "has no `build`"),
        (f"{__name__}.Nothing", "layer Q (gated MLP): {} cannot be imported: AttributeError"),
        ("no.such.module", "layer Q (gated MLP): {} cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_torch_half_without_a_part_is_named(module, words):
    with pytest.raises(ConfigError) as error:
        torch_half(replace(MLP, letter="Q", module=module))
    assert words.format(module) in str(error.value) and "\n" not in str(error.value)


def test_a_plug_in_with_half_a_letter_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_a_letter.py").write_text(
        "from megatron_mm.config.layers.kinds import LayerKind\nLayerKind(letter='R', title='r')"
    )
    with pytest.raises(ConfigError, match=r"plugins\[0\] half_a_letter .* 'role', 'key', and"):
        load(None, ["--plugins", "half_a_letter"])
