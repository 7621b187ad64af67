"""Every setting explains itself: in --help, in config/README.md, with bounds for every number."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mm.config import RunConfig, make_parser
from megatron_mm.config.flags import flag_name
from megatron_mm.config.reference import page
from megatron_mm.config.tree import Leaf, leaves, optional

LEAVES = list(leaves(RunConfig))
README = Path(__file__).parents[2] / "megatron_mm" / "config" / "README.md"


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.name)
def test_a_setting_is_explained_in_sentences(leaf: Leaf):
    text = leaf.explanation
    assert len(text.split()) >= 3, leaf.path
    assert text.endswith("."), leaf.path
    assert not text.startswith(("Of ", "What ", "As ")), leaf.path


def test_every_number_has_bounds():
    numbers = [leaf for leaf in LEAVES if optional(leaf.hint)[0] in (int, float)]
    assert len(numbers) > 80
    assert [".".join(leaf.path) for leaf in numbers if leaf.bounds is None] == []


def test_help_prints_the_explanations():
    # argparse breaks lines at spaces and hyphens.
    text = "".join(make_parser().format_help().split())
    for leaf in LEAVES:
        assert flag_name(leaf) in text and "".join(leaf.explanation.split()) in text, leaf.path


def test_the_page_of_settings_is_current():
    command = "python -m megatron_mm.config.reference > megatron_mm/config/README.md"
    assert README.read_text(encoding="utf-8") == page(), f"run {command}"
