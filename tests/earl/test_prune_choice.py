"""Which experts a pruned model keeps."""

from __future__ import annotations

import pytest

from megatron_mm.earl.prune import Choice, choose
from megatron_mm.errors import ConfigError, RLError
from support.skill_maps import KNOCK_OUT, the_map


def kept(*args, **kwargs) -> list[list[int]]:
    return choose(*args, **kwargs).experts


def test_the_clusters_and_the_common_one_stay():
    assert choose(the_map({}), ["spatial"], None) == Choice([[0, 1, 4, 5], [0, 3, 4, 7]], None)
    assert kept(the_map({}), ["ocr", "count"], 4) == [[0, 3, 4, 6], [2, 3, 4, 6]]


def test_more_are_filled_up_by_what_breaks_without_them():
    found = choose(the_map(), ["spatial"], 6)
    # Layer 0: 3 (0.2), 2 (0.1); 6 would help. Layer 1: 1 (0.1), 5 (0.05).
    assert found == Choice([[0, 1, 2, 3, 4, 5], [0, 1, 3, 4, 5, 7]], "knock_out")


def test_fewer_are_those_of_the_clusters_that_break_most():
    assert kept(the_map(), ["spatial"], 2) == [[1, 5], [0, 7]]
    assert kept(the_map(), ["spatial"], 3) == [[0, 1, 5], [0, 3, 7]]


def test_skills_count_alike_whatever_their_scale():
    """By plain sums expert 6 of layer 0 would come before 2 in both cases."""
    scores = the_map({"knock_out": KNOCK_OUT | {"ocr": [[0, 0, 0, 9, 0, 0, 8, 0], [0] * 8]}})
    # 8 / 9 - 0.3 / 0.5 > 0.1 / 0.5
    assert kept(scores, ["ocr", "spatial"], 6)[0] == [0, 1, 3, 4, 5, 6]
    scores = the_map({"knock_out": KNOCK_OUT | {"ocr": [[0, 0, 0, 9, 0, 0, 4, 0], [0] * 8]}})
    # 4 / 9 - 0.3 / 0.5 < 0.1 / 0.5
    assert kept(scores, ["ocr", "spatial"], 6)[0] == [0, 1, 2, 3, 4, 5]


def test_layers_of_unequal_clusters_get_as_many_as_the_largest():
    uneven = the_map(spatial=[[1, 5], []])
    assert kept(uneven, ["spatial"], None) == [[0, 1, 4, 5], [0, 3, 4, 7]]


def test_a_map_of_format_1_is_filled_by_use():
    use = {"spatial": [[0.1, 0.2, 0.3, 0, 0, 0.4, 0, 0], [0.3, 0.1, 0, 0, 0.4, 0, 0, 0.2]]}
    found = choose(the_map({"use": use}, common=None), ["spatial"], 3)
    assert found == Choice([[1, 2, 5], [0, 4, 7]], "use")
    with pytest.raises(ConfigError, match="the map is of format 1, which has no cluster.*: 2, wh"):
        choose(the_map({"use": use}, common=None), ["spatial"], None)


def test_a_model_that_no_map_has_aligned_keeps_what_it_uses_whatever_the_clusters():
    use = {"spatial": [[0.1, 0.2, 0.3, 0, 0, 0.4, 0, 0], [0.3, 0.1, 0, 0, 0.4, 0, 0, 0.2]]}
    found = choose(the_map({"use": use}), ["spatial"], 3, clusters=False)
    assert found == Choice([[1, 2, 5], [0, 4, 7]], "use")
    assert kept(the_map({"use": use}), ["spatial"], 3) != found.experts
    found = choose(the_map({"use": use}), ["spatial"], 4, clusters=False)  # as many as a cluster
    assert found == Choice([[0, 1, 2, 5], [0, 1, 4, 7]], "use")


@pytest.mark.parametrize(
    ("info", "skills", "keep", "error", "words"),
    [
        (None, ["ocr", "colour"], 4, ConfigError, "names 'colour'; allowed: ocr, spatial, count"),
        (None, ["ocr"], 1, ConfigError, "--keep is 1; allowed: 2, which a token takes, to 7 of"),
        (None, ["ocr"], 8, ConfigError, "--keep is 8; allowed: 2, which a token takes, to 7 of"),
        ({}, ["spatial"], 5, RLError, "have 4 experts in layer 0, 5 are to be kept, and the map"),
        ({"knock_out": {"ocr": KNOCK_OUT["ocr"]}}, ["spatial"], 5, RLError, "2 layers x 8 exp"),
        ({"knock_out": [[1]]}, ["spatial"], 5, RLError, "2 layers x 8 experts"),
        ({"knock_out": {"ocr": [[0] * 8]}}, ["ocr"], 5, RLError, "2 layers x 8 experts"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(info, skills, keep, error, words):
    with pytest.raises(error, match=words) as found:
        choose(the_map(info), skills, keep)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("cluster", "common", "words"),
    [([[], [1]], [[0], []], "have up to 1 exp"), ([[0, 1, 2, 3]] * 2, [[4, 5, 6, 7]] * 2, "to 8")],
)
def test_clusters_of_too_few_and_of_all_experts_ask_for_a_number(cluster, common, words):
    with pytest.raises(ConfigError, match=words):
        choose(the_map({}, common, one=cluster), ["one"], None)
