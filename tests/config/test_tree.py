"""Declarations of settings: explanations, bounds, sections that registries decide, plug-ins."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from megatron_mm.config import load
from megatron_mm.config.fields import (
    Bounds,
    Chosen,
    NonNegativeInt,
    PositiveInt,
    Sections,
    explanations,
)
from megatron_mm.config.tree import coerce, from_dict, leaves, merge, to_dict, value_at
from megatron_mm.errors import ConfigError
from megatron_mm.plugins import Registry


@dataclass
class Animal:
    type: str = "cat"
    legs: PositiveInt = 4
    """Legs of the animal,
    counted at rest."""


@dataclass
class Fish(Animal):
    type: str = "fish"
    fins: NonNegativeInt = 2


@dataclass(frozen=True)
class Part:
    settings: type


@dataclass(frozen=True)
class Mode:
    sections: dict[str, type] = field(default_factory=dict)


@dataclass
class Speed:
    limit: float = 1.0


ANIMALS = Registry("animal", {"cat": Part(Animal), "fish": Part(Fish)}, needs=["settings"])
MODES = Registry("mode", {"walk": Mode(), "run": Mode({"running": Speed})}, needs=["sections"])


@dataclass
class Zoo:
    pet: Annotated[Animal | None, Chosen(ANIMALS, "cat")] = field(default_factory=Animal)
    modes: Annotated[dict, Sections(MODES, flat=True)] = field(
        default_factory=lambda: coerce(Annotated[dict, Sections(MODES, flat=True)], {}, "modes")
    )
    named: dict[str, Speed] = field(default_factory=dict)


def test_a_string_behind_a_field_explains_it():
    assert explanations(Fish) == {"legs": "Legs of the animal, counted at rest."}
    legs = next(leaf for leaf in leaves(Zoo) if leaf.name == "legs")
    assert legs.path == ("pet", "legs") and str(legs.bounds) == "more than 0"


def test_the_type_of_a_section_decides_its_keys():
    fish = from_dict(Zoo, {"pet": {"type": "fish", "fins": 3}})
    assert fish.pet == Fish("fish", 4, 3) and from_dict(Zoo, to_dict(fish)) == fish
    assert from_dict(Zoo, {"pet": None}).pet is None
    with pytest.raises(ConfigError, match="unknown key in pet: fins"):
        from_dict(Zoo, {"pet": {"fins": 3}})
    with pytest.raises(ConfigError, match="unknown animal bird; allowed: cat, fish"):
        from_dict(Zoo, {"pet": {"type": "bird"}})


def test_another_type_replaces_a_section():
    cat, fish = {"pet": {"type": "cat", "legs": 3}}, {"pet": {"type": "fish", "fins": 1}}
    assert merge(cat, fish) == fish
    assert merge(fish, {"pet": {"legs": 1}})["pet"] == {"type": "fish", "fins": 1, "legs": 1}


def test_flat_sections_stand_beside_the_fields():
    zoo = from_dict(Zoo, {"running": {"limit": 2}})
    assert zoo.modes == {"running": Speed(2.0)} and to_dict(zoo)["running"] == {"limit": 2.0}
    assert from_dict(Zoo, to_dict(zoo)) == zoo and Zoo().modes == {"running": Speed()}
    limit = next(leaf for leaf in leaves(Zoo) if leaf.name == "limit")
    assert limit.path == ("running", "limit") and value_at(zoo, limit.path) == 2.0
    with pytest.raises(ConfigError, match="did you mean running"):
        from_dict(Zoo, {"runing": {}})
    with pytest.raises(ConfigError, match="unknown key in running: limits"):
        from_dict(Zoo, {"running": {"limits": 1}})


def test_names_of_ones_own_below_a_dict():
    zoo = from_dict(Zoo, {"named": {"slow": {"limit": 0.5}, "fast": {}}})
    assert zoo.named == {"slow": Speed(0.5), "fast": Speed()}
    assert from_dict(Zoo, to_dict(zoo)) == zoo
    with pytest.raises(ConfigError, match="named.slow.limit is 'x'"):
        from_dict(Zoo, {"named": {"slow": {"limit": "x"}}})


def test_settings_of_every_type_are_leaves_once():
    names = [leaf.name for leaf in leaves(Zoo)]
    assert names == ["legs", "fins", "limit"]
    assert value_at(Zoo(), ("pet", "fins")) is None


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        (Bounds(ge=0), [0, 1], [-1, float("nan")], "0 or more"),
        (Bounds(gt=0), [1e-9], [0], "more than 0"),
        (Bounds(ge=0, lt=1), [0, 0.9], [1], "0 to below 1"),
        (Bounds(gt=0, le=1), [0.1, 1], [0, 1.1], "more than 0 to 1"),
    ],
)
def test_bounds(bounds, inside, outside, words):
    assert all(value in bounds for value in inside) and str(bounds) == words
    assert not any(value in bounds for value in outside)


def test_plugins_are_imported_before_the_settings_are_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_plugin.py").write_text("LOADED = True\n")
    (tmp_path / "run.yaml").write_text("plugins: [my_plugin]\n")
    assert load(str(tmp_path / "run.yaml")).plugins == ["my_plugin"]
    assert sys.modules.pop("my_plugin").LOADED
    with pytest.raises(ConfigError, match=r"plugins\[0\] nowhere cannot be imported: ModuleNot"):
        load(str(tmp_path / "run.yaml"), ["--plugins", "nowhere"])
    assert "my_plugin" not in sys.modules
