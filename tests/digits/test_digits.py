"""The embedded task: answers and steps checked against the scene itself."""

import hashlib
import re
from random import Random

import numpy as np
import pytest
from PIL import Image

from examples.digits import make_digits
from examples.digits.asking import CELL_SIZE, HELD_OUT_SCANS, enlarged, load_scans, render
from examples.digits.scenes import DEFAULT_WEIGHTS, DIGITS
from megatron_mm.data.files.rows import Rows
from megatron_mm.errors import DataError
from megatron_mm.evaluation.scoring import chance, result_key, score

JSONL = ("align", "mix", "rl", "valid")
RECORDED = ["f2ab4e89a66b85a4", "ba3e18c5eae04d8f"]  # sha256


def solve(question: str, digits: list[int], grid: int) -> str:
    """Answer a question from its words alone, independently of the generator."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if question.startswith("Read all cells"):
        return " ".join(map(str, digits))
    if question.startswith("Read row"):
        row = numbers[0]
        return " ".join(str(d) for d in digits[row * grid : row * grid + grid])
    if question.startswith("Read cells"):
        return " ".join(str(digits[n]) for n in numbers)
    if question.startswith("How many"):
        return str(digits.count(numbers[0]))
    if question.startswith("Sum"):
        return str(sum(np.reshape(digits, (grid, grid))[numbers[0]]))
    cell = numbers[0]
    if question.startswith("Digit"):
        return str(digits[cell])
    if question.startswith("Hop"):
        for _ in range(question.count("once") + 2 * question.count("twice")):
            cell = digits[cell]
        return str(digits[cell])
    padded = np.pad(np.reshape(digits, (grid, grid)), 1, constant_values=-1)
    y, x = cell // grid + 1, cell % grid + 1
    found = {
        "Left": padded[y, x - 1],
        "Right": padded[y, x + 1],
        "Above": padded[y - 1, x],
        "Below": padded[y + 1, x],
    }[question.split()[0]]
    assert found >= 0
    return str(found)


@pytest.mark.parametrize("grid", [3, 4])
@pytest.mark.parametrize("key", DEFAULT_WEIGHTS)
def test_answers_and_steps_agree_with_the_scene(grid, key):
    rng = Random(f"{grid} {key}")
    asked = written_out = 0
    for _ in range(200):
        digits = [rng.randrange(10) for _ in range(grid * grid)]
        row = DIGITS.ask(key, digits, grid, rng)
        if row is None:
            assert row is None and key.startswith("multihop")
            continue
        asked += 1
        assert result_key(row) == key
        question, answer = (message["content"] for message in row["messages"])
        assert question.startswith("<image>")
        truth = solve(question.removeprefix("<image>").split("?")[0], digits, grid)
        assert row["ground_truth"] == truth
        assert score(row["scorer"], answer, truth) == 1.0
        assert score(row["scorer"], "x", truth) == 0.0
        if row["form"] == "direct":
            assert answer == truth
            continue
        # The spans are the whole answer, in order, and each value stands at its end.
        written = ", ".join(span["text"] for span in row["spans"])
        assert answer == written or (row["form"] == "free" and answer == truth)
        written_out += answer == written
        for span in row["spans"]:
            *_, value = span["text"].split()
            assert value == span["value"] and span["skill"] in {
                k.split("/")[0] for k in DEFAULT_WEIGHTS
            }
            if match := re.fullmatch(r"cell (\d+) is (\d)", span["text"]):
                assert digits[int(match[1])] == int(match[2])
    assert asked > 150
    # One in ten free answers shows its steps: 4 standard deviations of 200 draws are 17.
    assert {"free": 3 < written_out < 37, "steps": written_out == asked}.get(row["form"], True)


def test_hops_never_leave_the_grid_or_return():
    rng = Random(0)
    assert DIGITS.ask("multihop", [9] * 9, 3, rng) is None
    for _ in range(20):  # any cell -> cell 0, but never 0 -> 0: one hop at most
        row = DIGITS.ask("multihop", [0] * 9, 3, rng)
        assert row is None or "Hop once" in row["messages"][0]["content"]
    for _ in range(50):
        row = DIGITS.ask("multihop/steps", [1, 2, 3, 4, 5, 6, 7, 8, 9], 3, rng)
        cells = [int(n) for n in re.findall(r"cell (\d)", row["messages"][1]["content"])]
        assert len(set(cells)) == len(cells)


def test_held_out_scans_are_disjoint_and_only_they_are_in_valid(digits_folder):
    train, _ = load_scans(held_out=False)
    held, targets = load_scans(held_out=True)
    assert (len(train), len(held)) == (1797 - HELD_OUT_SCANS, HELD_OUT_SCANS)
    assert {t.tobytes() for t in train}.isdisjoint(h.tobytes() for h in held)

    def cells(name):
        """Every 16x16 cell drawn, back at 8x8 (jitter undone by the digit's own bounds)."""
        for path in sorted((digits_folder / "images").glob(f"{name}_*.png")):
            image = np.asarray(Image.open(path))
            for y in range(0, image.shape[0], CELL_SIZE):
                for x in range(0, image.shape[1], CELL_SIZE):
                    yield image[y : y + CELL_SIZE, x : x + CELL_SIZE]

    def drawn(scans):
        """Every way the scans can be drawn with a jitter of up to 1 pixel."""
        return {
            render([enlarged(scan)], 1, np.array([[down, right]])).tobytes()
            for scan in scans
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
        }

    from_train, from_held = drawn(train), drawn(held)
    assert from_train.isdisjoint(from_held)
    assert all(cell.tobytes() in from_train for cell in cells("train"))
    assert all(cell.tobytes() in from_held for cell in cells("valid"))


def test_render_places_each_tile_in_its_cell():
    tiles = [np.full((16, 16), n, dtype=np.uint8) for n in range(1, 5)]
    shifts = np.array([[0, 0], [1, 0], [0, -2], [0, 0]])
    scene = render(tiles, 2, shifts)
    assert scene.shape == (32, 32)
    assert (scene[:16, :16] == 1).all() and (scene[16:, 16:] == 4).all()
    assert (scene[0, 16:] == 0).all() and (scene[1:16, 16:] == 2).all()
    assert (scene[16:, 14:16] == 0).all() and (scene[16:, :14] == 3).all()


def test_the_demo_s_data_stay_as_they_are(digits_folder):
    """Its figures depend on them. Recorded before there was a second kind of scene; of images the
    pixels count, since a PNG's bytes are its library's."""
    lines = [(digits_folder / f"{name}.jsonl").read_bytes() for name in JSONL]
    pixels = [
        np.asarray(Image.open(path)).tobytes()
        for path in sorted((digits_folder / "images").iterdir())
    ]
    found = [hashlib.sha256(b"".join(parts)).hexdigest()[:16] for parts in (lines, pixels)]
    assert found == RECORDED


def test_files(digits_folder, tmp_path):
    align, mix, valid = (Rows(digits_folder / f"{n}.jsonl") for n in ("align", "mix", "valid"))
    assert len(align) == 120 and {align[i]["skill"] for i in range(120)} == {"transcribe"}
    assert 300 < len(mix) <= 320
    keys = [result_key(valid[i]) for i in range(len(valid))]
    assert keys == list(DEFAULT_WEIGHTS) * 10
    for rows, name in ((mix, "train"), (valid, "valid")):
        for i in range(len(rows)):
            (image,) = rows[i]["images"]
            assert image.startswith(f"images/{name}_") and (digits_folder / image).is_file()
    # Both forms of a skill ask the same question about the same scene.
    direct, steps = valid[1], valid[7]
    assert (result_key(direct), result_key(steps)) == ("ocr", "ocr/steps")
    for name in ("scene", "ground_truth", "images"):
        assert direct[name] == steps[name]
    make_digits.main(
        f"--out {tmp_path} --images 40 --valid-images 30 --valid-per-key 10 --jitter 1".split()
    )
    for path in digits_folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(digits_folder)).read_bytes()


def test_weights_choose_the_skills(tmp_path):
    others = [f"{key}=0" for key in DEFAULT_WEIGHTS if key != "ocr/steps"]
    command = f"--out {tmp_path} --grid 4 --images 5 --valid-images 9 --valid-per-key 2"
    make_digits.main([*command.split(), "--weights", *others])
    rows = Rows(tmp_path / "mix.jsonl")
    assert {result_key(rows[i]) for i in range(len(rows))} == {"ocr/steps"}
    for wrong in (["--weights", "sums=1"], ["--one", "ocr"], ["--beyond", "-1"]):
        with pytest.raises(SystemExit):
            make_digits.main([*command.split(), *wrong])


@pytest.mark.parametrize("scenes", ["digits", "wide"])
def test_files_beyond_the_training_data(tmp_path, scenes):
    command = f"--out {tmp_path} --scenes {scenes} --images 20 --valid-images 30 --valid-per-key 2"
    make_digits.main([*command.split(), "--beyond", "3", "--one", "multihop/free"])
    kinds = list(make_digits.SCENES[scenes].weights)
    found = {}
    for name in ("rl", "rl_one", "valid_larger", "valid_longer"):
        rows = Rows(tmp_path / f"{name}.jsonl")
        found[name] = [rows[i] for i in range(len(rows))]
    ours = [row for row in found["rl"] if result_key(row) == "multihop/free"]
    assert found["rl_one"] == ours and 0 < len(ours) < len(found["rl"])
    assert [result_key(row) for row in found["valid_larger"]] == kinds * 3
    for row in found["valid_larger"]:
        assert Image.open(tmp_path / row["images"][0]).size == (64, 64)
    hops = [kind for kind in kinds if kind.startswith("multihop")]
    assert [result_key(row) for row in found["valid_longer"]] == hops * 3
    for row in found["valid_longer"]:
        assert Image.open(tmp_path / row["images"][0]).size == (48, 48)
        assert row["form"] == "direct" or len(row["spans"]) == 4  # a cell, and three hops


def test_longer_hops_are_asked_in_words_of_the_training_data():
    digits, rng = [1, 2, 3, 4, 5, 6, 7, 8, 0], Random(3)
    for _ in range(20):
        row = DIGITS.ask("multihop/steps", digits, 3, rng, longer=True)
        question = row["messages"][0]["content"].removeprefix("<image>").split("?")[0]
        assert row["ground_truth"] == solve(question, digits, 3)
        start = int(question[-1])
        assert row["ground_truth"] == str((start + 4) % 9)  # each cell names the next
    assert DIGITS.ask("multihop", [1, 2, 0, 9, 9, 9, 9, 9, 9], 3, rng, longer=True) is None


def test_scoring():
    assert score("exact", " 7\n", "7") == 1 and score("exact", "77", "7") == 0
    assert score("per_word", "3 1 5", "3 1 4") == pytest.approx(2 / 3)
    assert score("per_word", "3 1", "3 1 4") == pytest.approx(2 / 3)
    assert score("per_word", "3 1 4 1", "3 1 4") == pytest.approx(3 / 4)
    assert score("per_word", "", "3") == 0
    assert score("last_word", "cell 1 is 3, total 12.", "12") == 1
    assert score("last_word", "12, or 13", "12") == 0 and score("last_word", "", "12") == 0
    assert score("last_word", "x = -1.5", "-1.5") == 1
    assert score("per_clause", "cell 0 is 3, cell 1 is 5", "3 1") == 0.5
    with pytest.raises(DataError, match="scorer 'bleu' is unknown; use one of exact"):
        score("bleu", "a", "a")
    assert result_key({"skill": "ocr"}) == "ocr" and result_key({}) == "all"
    assert result_key({"skill": "ocr", "form": "steps"}) == "ocr/steps"


def test_chance_is_the_best_constant_answer():
    assert chance([("a", "exact", t) for t in "1123"]) == {"a": 0.5}
    for scorer in ("per_word", "per_clause"):
        answers = [("b", scorer, t) for t in ("1 2", "1 3", "4 3")]
        assert chance(answers) == {"b": pytest.approx(2 / 3)}  # "1 3"
