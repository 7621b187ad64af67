"""Records of finished runs: kept in a file for each seed, and joined with those of folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from examples.digits import compare_arms, earl_table
from examples.digits.records import basic, packed, read_records, scores_of
from examples.digits.scores import read_scores

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"multihop/free": (0.0, 1.0, 1.0), "ocr": (1.0, 0.0, 1.0), "transcribe": (0.5, 1.0, 0.25)}


def write_run(run: Path, flip: bool = False, steps: int = 3) -> None:
    """A finished run: its questions come kind by kind in turn, as in the data."""
    run.mkdir(parents=True)
    rows = [(key, number) for number in range(3) for key in KINDS]
    lines = [
        json.dumps({"index": i, "key": key, "score": KINDS[key][number] if not flip else 1.0})
        for i, (key, number) in enumerate(rows)
    ]
    (run / "answers.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    records = [{"iteration": n + 1, "reward/task/multihop/free": 0.8} for n in range(steps)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")


def write_seed(out: Path, seed: int, questions: str = "the same", steps: int = 7) -> None:
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    (data / "valid.jsonl").write_text(questions)
    for name in ("base", "sft/plain"):
        write_run(out / f"seed{seed}" / name, steps=3)
    write_run(out / f"seed{seed}" / "one/grpo", flip=seed == 2, steps=steps)


def test_scores_are_packed_and_back(tmp_path):
    write_run(tmp_path / "run")
    scores = read_scores(tmp_path / "run" / "answers.jsonl")
    assert packed(scores) == {
        "multihop/free": "011", "ocr": "101", "transcribe": [0.5, 1.0, 0.25],
    }  # fmt: skip
    again = scores_of(basic(tmp_path / "run"))
    assert {k: tuple(of_key.values()) for k, of_key in again.items()} == KINDS
    assert [*again["ocr"]] == [0, 1, 2] and basic(tmp_path / "run")["iterations"] == 3


def test_a_table_of_kept_seeds_is_that_of_their_folders(tmp_path, capsys):
    whole, one, other = (tmp_path / name / "tiny" for name in ("whole", "one", "other"))
    for out, seeds in ((whole, (1, 2, 10)), (one, (1, 10)), (other, (2,))):
        for seed in seeds:
            write_seed(out, seed)
    expected = earl_table.summary(whole)
    assert expected["seeds"] == ["seed1", "seed2", "seed10"]
    assert expected["one"][0]["steps"] == [5.0, 5.0, 5.0]
    assert expected["one"][0]["gain"]["value"] == pytest.approx(1 / 3 / 3)
    # The other machine's seed, beside the folders of this one.
    command = ["earl", "--table", "--out", str(tmp_path / "other"), "--keep", str(tmp_path / "k")]
    assert compare_arms.main(command) == 0
    (kept,) = (tmp_path / "k" / "tiny").iterdir()
    assert kept.name == "seed2.json" and len(kept.read_text().splitlines()) == 1 + 3 + 1
    shutil.copy(kept, one)
    assert earl_table.summary(one) | {"model": "tiny"} == expected
    # What is in a file is not made again.
    with pytest.raises(SystemExit, match="seed2.json holds base; leave it out of --seeds or --arm"):
        compare_arms.main(["earl", "--out", str(tmp_path / "one"), "--seeds", "2"])
    assert not (one / "data" / "tokenizer.model").exists()
    # Files alone, kept once more from a folder that holds a file.
    assert compare_arms.main([*command[:3], str(tmp_path / "one"), *command[4:]]) == 0
    assert earl_table.summary(tmp_path / "k" / "tiny") == expected
    capsys.readouterr()


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (
            {"questions": "others"},
            "the runs of the folder and seed2.json were asked different questions",
        ),
        ({"steps": 9}, "one/grpo has 9 steps in seed2 and 7 in seed1; a table needs seeds of one"),
        ({"seed": 1}, "seed1.json: base is in the folder seed1 as well; remove one"),
    ],
)
def test_seeds_that_do_not_belong_together(tmp_path, other, expected):
    write_seed(tmp_path / "a" / "tiny", 1)
    write_seed(tmp_path / "b" / "tiny", **({"seed": 2} | other))
    command = ["earl", "--table", "--out", str(tmp_path / "b"), "--keep", str(tmp_path / "a")]
    assert compare_arms.main(command) == 0
    with pytest.raises(SystemExit, match=expected):
        compare_arms.main(["earl", "--table", "--out", str(tmp_path / "a")])


def test_other_arms_of_a_seed_join_it(tmp_path):
    write_seed(tmp_path / "a" / "tiny", 1)
    write_seed(tmp_path / "b" / "tiny", 1)
    whole = earl_table.summary(tmp_path / "a" / "tiny")
    shutil.rmtree(tmp_path / "a" / "tiny" / "seed1" / "one")
    shutil.rmtree(tmp_path / "b" / "tiny" / "seed1" / "sft")
    shutil.rmtree(tmp_path / "b" / "tiny" / "seed1" / "base")
    command = ["earl", "--table", "--out", str(tmp_path / "b"), "--keep", str(tmp_path / "a")]
    assert compare_arms.main(command) == 0
    assert earl_table.summary(tmp_path / "a" / "tiny") == whole and whole["one"]


def test_records_are_not_kept_among_the_runs(tmp_path):
    write_seed(tmp_path / "tiny", 1)
    with pytest.raises(SystemExit, match="is the folder of the runs; give another"):
        compare_arms.main(["earl", "--table", "--out", str(tmp_path), "--keep", str(tmp_path)])
    assert read_records(tmp_path / "nothing", basic) == {}


@pytest.mark.parametrize(("model", "seeds"), [("tiny", 6), ("wide", 3)])
def test_earls_page_shows_the_tables_of_the_kept_seeds(model, seeds):
    """Each seed's scores are in the repository, so the tables can be made again."""
    found = earl_table.summary(ROOT / "examples" / "benchmarks" / "seeds" / model)
    assert len(found["seeds"]) == seeds
    page = (ROOT / "megatron_mm" / "earl" / "README.md").read_text()
    assert [table for table in earl_table.tables_of_page(found) if table not in page] == []
