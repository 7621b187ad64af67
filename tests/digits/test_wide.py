"""The wide scenes: answers and steps checked against the scene itself, drawings against cells."""

from random import Random

import numpy as np
import pytest

from examples.digits.asking import CELL_SIZE, load_scans
from examples.digits.wide import COLOURS, SHAPES, WIDE, draw
from megatron_mm.earl.spans import clauses
from megatron_mm.evaluation.scoring import result_key, score


def scene(rng: Random, grid: int) -> list:
    things = [*range(10), *SHAPES]
    return [(rng.choice(list(COLOURS)), rng.choice(things)) for _ in range(grid**2)]


def solve(question: str, cells: list, grid: int) -> str:
    """Answer a question from its words alone, independently of the generator."""
    words = question.split()
    numbers = [int(word) for word in words if word.isdigit()]
    colours, things = zip(*cells, strict=True)
    if words[0] in ("Digits", "Shapes"):
        return " ".join(str(things[n]) for n in numbers)
    if words[0] == "Colours":
        return " ".join(colours[n] for n in numbers)
    if words[0] == "How":
        return str(colours.count(words[-1]))
    if words[0] == "Same":
        return "yes" if len({colours[n] for n in numbers}) == 1 else "no"
    if words[0] == "Cell":
        (found,) = [n for n in range(len(cells)) if [colours[n], str(things[n])] == words[-2:]]
        return str(found)
    if words[0] == "Hop":
        hops, cell = numbers
        for _ in range(hops):
            cell = things[cell]
        return str(things[cell])
    if words[0] in ("Smallest", "Middle", "Largest"):
        low, middle, high = sorted(things[n] for n in numbers)
        return str({"Smallest": low, "Middle": middle, "Largest": high}[words[0]])
    row, column = divmod(numbers[0], grid)
    down, right = {"Left": (0, -1), "Right": (0, 1), "Above": (-1, 0), "Below": (1, 0)}[words[0]]
    assert 0 <= row + down < grid and 0 <= column + right < grid
    return str(things[(row + down) * grid + column + right])


def holds(text: str, cells: list) -> bool:
    """Whether a clause about one cell is true of the scene; others have no cell of their own."""
    words = text.split()
    if words[0] == "cell":
        colour, thing = cells[int(words[1])]
        return words[3] == (colour if words[2] == "in" else str(thing))
    if words[2:4] == ["is", "cell"]:
        return [cells[int(words[4])][0], str(cells[int(words[4])][1])] == words[:2]
    return True


def test_there_are_nine_skills_and_the_forms_of_each():
    skills = {key.split("/")[0] for key in WIDE.weights}
    assert skills == set(WIDE.questions) and len(skills) == 9
    assert all(f"{skill}/steps" in WIDE.weights for skill in skills)
    assert set(WIDE.reading) < set(WIDE.weights) and "multihop/free" in WIDE.free_keys


@pytest.mark.parametrize("grid", [3, 4])
@pytest.mark.parametrize("key", WIDE.weights)
def test_answers_and_steps_agree_with_the_scene(grid, key):
    rng = Random(f"{grid} {key}")
    asked, answers = 0, set()
    for _ in range(200):
        cells = scene(rng, grid)
        row = WIDE.ask(key, cells, grid, rng)
        if row is None:
            continue
        asked += 1
        assert result_key(row) == key
        question, answer = (message["content"] for message in row["messages"])
        truth = solve(question.removeprefix("<image>").split("?")[0], cells, grid)
        assert row["ground_truth"] == truth
        answers.add(truth)
        assert score(row["scorer"], answer, truth) == 1.0
        assert score(row["scorer"], "x", truth) == 0.0
        labels = clauses(row, answer, "here")
        assert labels and all(label.correct for label in labels)
        assert {label.skill for label in labels} <= set(WIDE.questions)
        if row["form"] == "direct":
            assert answer == truth and labels[0].skill == row["skill"]
            continue
        written = ", ".join(span["text"] for span in row["spans"])
        assert answer == written or (row["form"] == "free" and answer == truth)
        assert row["spans"][-1]["skill"] in (row["skill"], "ocr", "shape", "multihop")
        for span in row["spans"]:
            assert span["text"].split()[-1] == span["value"] and holds(span["text"], cells)
    assert asked > 100 and len(answers) > 1


def test_longer_hops_are_three():
    cells = [("red", n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 0)]
    row = WIDE.ask("multihop/steps", cells, 3, Random(1), longer=True)
    assert "Hop 3 from cell" in row["messages"][0]["content"] and len(row["spans"]) == 4
    assert WIDE.ask("multihop", [("red", "circle")] * 9, 3, Random(1), longer=True) is None


def test_comparisons_are_balanced_and_hops_end_at_digits():
    rng, yes = Random(5), 0
    for _ in range(400):
        row = WIDE.ask("compare", scene(rng, 3), 3, rng)
        yes += row["ground_truth"] == "yes"
        row = WIDE.ask("multihop", scene(rng, 3), 3, rng)
        assert row is None or row["ground_truth"].isdigit()
    assert 150 < yes < 250  # 5 standard deviations of 400 draws are 50


def test_a_drawing_shows_its_cells():
    """Every cell has its colour as ground, and shapes can be told by their area."""
    scans, rng = load_scans(held_out=True), np.random.default_rng(1)
    areas: dict[str, list[int]] = {shape: [] for shape in SHAPES}
    digits = 0
    for _ in range(40):
        picture, cells = draw(scans, 3, 1, rng)
        assert picture.shape == (48, 48, 3) and picture.dtype == np.uint8
        for n, (colour, thing) in enumerate(cells):
            y, x = (CELL_SIZE * v for v in divmod(n, 3))
            tile = picture[y : y + CELL_SIZE, x : x + CELL_SIZE].reshape(-1, 3)
            ground = (tile == COLOURS[colour]).all(1)
            assert ground.sum() > 60
            # What is drawn is lighter in every channel.
            assert (tile[~ground] >= COLOURS[colour]).all() and (~ground).sum() > 10
            if isinstance(thing, str):
                assert (tile[~ground] == 255).all()
                areas[thing].append(int((~ground).sum()))
            digits += isinstance(thing, int)
    assert 180 < digits < 300  # two thirds of 360; 5 standard deviations are 45
    # A shift of one pixel moves at most a line of a shape out of its cell.
    assert len({round(float(np.mean(found))) for found in areas.values()}) == 4
