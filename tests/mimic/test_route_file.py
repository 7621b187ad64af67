"""The file of a teacher's routes: rows found again, other rows and damage refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mm.config import RunConfig
from megatron_mm.data.sample import Sample, SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_mm.errors import DataError
from megatron_mm.mimic.expert_map import ExpertMap, load_expert_map, permuted
from megatron_mm.mimic.loader import with_teacher
from megatron_mm.mimic.make_map import routed_together
from megatron_mm.mimic.recorded import OF_ROW, Recorded, TeacherSizes, write_routes
from megatron_mm.mimic.route_file import RouteFile
from megatron_mm.mimic.route_spool import RouteSpool
from megatron_mm.mimic.text import answer_starts, matching, row_digest, supervised, token_digest

LAYERS, EXPERTS, TOP, ANSWERS = [1, 4], 6, 3, 2
TEXTS = ["cell five is six, cell six is eight", "forty two", "a b c, a b c\n\nd", "größe 7 → 8"]


def rows() -> list[dict]:
    found = [
        {"messages": [{"role": "user", "content": f"Question {n}?"},
                      {"role": "assistant", "content": text}]}
        for n, text in enumerate(TEXTS)
    ]  # fmt: skip
    more = [{"role": "user", "content": "More."}, {"role": "assistant", "content": "and on"}]
    found[2]["messages"] += more
    return found


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two that cut the same texts differently."""
    folder = tmp_path_factory.mktemp("tokenizers")
    corpus = [*TEXTS, "Question 1?", "user", "assistant", "More. and on"] * 4
    coarse = train_sentencepiece(corpus, folder / "coarse.model", 420, ["cell ", " is "])
    return train_sentencepiece(corpus, folder / "fine.model", 380), coarse


def sample_of(row: dict, where: str, tokenizer) -> Sample:
    run = RunConfig()
    run.model = replace(run.model, vision=None)
    run.model.language.vocab_size = 512
    return SampleBuilder(run, tokenizer).training(row, where, Path())


def recorded(row: dict, where: str, tokenizer, seed: int) -> Recorded:
    sample = sample_of(row, where, tokenizer)
    count = len(supervised(sample))
    generator = torch.Generator().manual_seed(seed)
    best = torch.rand(count, len(LAYERS), EXPERTS, generator=generator).softmax(2).topk(TOP, 2)
    tokens = torch.rand(count, 40, generator=generator).log_softmax(1).topk(ANSWERS, 1)
    return Recorded(
        row_digest(row, where),
        token_digest(sample),
        answer_starts(sample, tokenizer),
        best.indices.to(torch.int16),
        best.values.half(),
        tokens.indices.int(),
        tokens.values,
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory, tokenizers) -> Path:
    path = tmp_path_factory.mktemp("routes") / "routes.st"
    held = {("rows.jsonl", n + 1): recorded(row, f"rows.jsonl:{n + 1}", tokenizers[0], n)
            for n, row in enumerate(rows())}  # fmt: skip
    teacher = TeacherSizes("the teacher", 6, EXPERTS, 512)
    write_routes(path, teacher, LAYERS, held, "runs/teacher")
    return path


def ask(file: Path, n: int, tokenizer, row: dict | None = None, answers=True, seed=None, where=""):
    where, row = where or f"other/folder/rows.jsonl:{n + 1}", row or rows()[n]
    sample = sample_of(row, where, tokenizer)
    routes = RouteFile(file, seed)
    return sample, routes.aligned(row, where, sample, tokenizer, answers=answers)


def test_rows_that_wait_on_disk_make_the_same_file(file, tokenizers, tmp_path):
    """In whatever order they came; nothing but the file stays."""
    held = {("rows.jsonl", n + 1): recorded(row, f"rows.jsonl:{n + 1}", tokenizers[0], n)
            for n, row in enumerate(rows())}  # fmt: skip
    path = tmp_path / "new" / "routes.st"
    spool = RouteSpool(path)
    for place in reversed(held):
        spool.add(place, held[place])
    assert len(spool) == len(held) and [*spool] == [*reversed(held)]
    for place, row in held.items():
        assert spool[place].checksum() == row.checksum()
        assert all(torch.equal(getattr(spool[place], n), getattr(row, n)) for n in OF_ROW)
    write_routes(path, TeacherSizes("the teacher", 6, EXPERTS, 512), LAYERS, spool, "runs/teacher")
    assert path.read_bytes() == file.read_bytes()
    assert [*path.parent.iterdir()] == [path]
    none = replace(held["rows.jsonl", 1], answers=torch.empty(3, 0, dtype=torch.int32))
    spool.add(("rows.jsonl", 99), none)
    assert spool["rows.jsonl", 99].answers.shape == (3, 0)


def test_experts_that_work_together_are_counted_over_some_rows(file):
    whole = routed_together(RouteFile(file), None)
    several = routed_together(RouteFile(file), 2)
    assert whole.shape == (len(LAYERS), EXPERTS, EXPERTS)
    # Each position adds 1 in all, whatever its distribution.
    positions = {n: float(found[0].sum()) for n, found in ((None, whole), (2, several))}
    lengths = load_file(file)["offset"].diff().tolist()
    assert positions[None] == pytest.approx(sum(lengths), rel=1e-5)
    assert any(
        positions[2] == pytest.approx(sum(pair), rel=1e-5)
        for pair in itertools.combinations(lengths, 2)
    )
    assert torch.equal(several, routed_together(RouteFile(file), 2))


def test_a_row_is_found_again(file, tokenizers):
    routes = RouteFile(file)
    assert routes.layers == LAYERS and len(routes) == len(TEXTS) and routes.answers == ANSWERS
    for n, row in enumerate(rows()):
        expected = recorded(row, "rows.jsonl:1", tokenizers[0], n)
        sample, seen = ask(file, n, tokenizers[0])
        assert torch.equal(seen.positions_P, sample.loss_mask_T.nonzero().flatten())
        assert torch.equal(seen.experts_PLk, expected.experts)
        assert torch.equal(seen.weights_PLk, expected.weights)
        assert torch.equal(seen.answers_Pn, expected.answers)
        assert torch.equal(seen.logprobs_Pn, expected.logprobs)


def test_another_tokenizer_finds_the_token_that_wrote_the_character(file, tokenizers):
    """By spelling every token, character by character."""
    fine, coarse = tokenizers
    differ = 0
    for n, row in enumerate(rows()):
        whole = recorded(row, "x:1", fine, n)
        sample, seen = ask(file, n, coarse, answers=False)
        theirs = spelled(sample_of(row, "x:1", fine), fine)
        mine = spelled(sample, coarse)
        assert "".join(theirs) == "".join(mine)
        owner = [i for i, piece in enumerate(theirs) for _ in piece]
        begins = [sum(map(len, mine[:i])) for i in range(len(mine))]
        expected = torch.tensor([owner[begin] for begin in begins])
        assert torch.equal(seen.experts_PLk, whole.experts[expected])
        differ += len(mine) < len(theirs)
        with pytest.raises(DataError, match=r"rows.jsonl:\d: .* distilled between models of one"):
            ask(file, n, coarse) if len(mine) != len(theirs) else ask(file, 0, coarse)
    assert differ >= 2


def spelled(sample: Sample, tokenizer) -> list[str]:
    """What each supervised token writes; one character for the end of a turn."""
    found, ids = [], sample.labels_T[supervised(sample)].tolist()
    pending: list[int] = []
    for i in ids:
        if i == tokenizer.message_end_id:
            found.append("\0")
            continue
        pending.append(i)
        text = tokenizer.decode(pending)
        if "\ufffd" not in text:
            found += [text] + [""] * (len(pending) - 1)
            pending = []
    return found


def test_equal_tokens_match_themselves():
    start = torch.tensor([0, 0, 2, 5], dtype=torch.int32)  # two make one character
    assert matching(start, start).tolist() == [0, 1, 2, 3]
    assert matching(torch.tensor([0, 1, 4, 9], dtype=torch.int32), start).tolist() == [1, 1, 2, 3]


def test_routes_of_another_row_are_a_control(file, tokenizers):
    """No row keeps its own; answers stay."""
    whole = [recorded(row, "x:1", tokenizers[0], n) for n, row in enumerate(rows())]
    taken = []
    for n in range(len(TEXTS)):
        _, seen = ask(file, n, tokenizers[0], seed=3)
        assert torch.equal(seen.answers_Pn, whole[n].answers)
        first = seen.experts_PLk[0], seen.weights_PLk[0]
        match = [
            m
            for m, other in enumerate(whole)
            if torch.equal(first[0], other.experts[0]) and torch.equal(first[1], other.weights[0])
        ]
        taken += match
        assert match != [n]
    assert sorted(taken) == list(range(len(TEXTS)))


def test_a_microbatch_lays_routes_where_its_samples_lie(file, tokenizers):
    from megatron_mm.data.collate import collate

    made = [ask(file, n, tokenizers[0]) for n in (1, 0)]
    batch = collate([sample for sample, _ in made], settings=None, pad_id=0, pad_multiple=64)
    found = with_teacher(batch, [seen for _, seen in made], RouteFile(file))
    here = found.loss_mask_T.nonzero().flatten()
    for number, layer in enumerate(LAYERS):
        experts, weights = found.teacher_routes[layer]
        assert torch.equal(experts[here], torch.cat([s.experts_PLk[:, number] for _, s in made]))
        assert (weights[found.loss_mask_T == 0] == 0).all() and len(weights) % 64 == 0
    assert torch.equal(found.teacher_answers[0][here], torch.cat([s.answers_Pn for _, s in made]))
    empty = collate([], settings=None, pad_id=0, pad_multiple=64)
    nothing = with_teacher(empty, [], RouteFile(file))
    assert [*nothing.teacher_routes] == LAYERS and nothing.teacher_answers is None


# ---- bad input ----


def test_other_rows_are_refused_by_file_and_row(file, tokenizers):
    changed = rows()[0]
    changed["messages"][1]["content"] += "."
    with pytest.raises(DataError, match=r"^a/rows.jsonl:1: .* holds another text for this row"):
        ask(file, 0, tokenizers[0], changed, where="a/rows.jsonl:1")
    for where in ("rows.jsonl:9", "others.jsonl:1"):
        with pytest.raises(DataError, match=rf"^{where}: .* holds 4 rows, this is not among them"):
            ask(file, 0, tokenizers[0], where=where)
    shown = rows()[1] | {"images": ["a.png"]}
    assert row_digest(shown, "x") != row_digest(rows()[1], "x")
    bytes_of = [row_digest(rows()[1] | {"images": [b]}, "x") for b in (b"one", b"two")]
    assert bytes_of[0] != bytes_of[1]
    boxes = ([0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0])
    for held in ({"path": "a.png"}, {"bytes": b"one"}):
        images = [*held.values(), *(held | {"box": box} for box in boxes)]
        assert len({row_digest(rows()[1] | {"images": [image]}, "x") for image in images}) == 3


def spoilt(file: Path, out: Path, **changes) -> Path:
    """The file with some tensors replaced, or parts of its head."""
    held = load_file(file)
    head = json.loads(bytes(held["head"].tolist()))
    for name, value in changes.items():
        if name in head:
            head[name] = value
        elif value is None:
            del held[name]
        else:
            held[name] = value(held[name]) if callable(value) else value
    held["head"] = torch.frombuffer(bytearray(json.dumps(head).encode()), dtype=torch.uint8)
    save_file({name: t.contiguous() for name, t in held.items()}, out)
    return out


def test_damage_is_told_with_the_row(file, tokenizers, tmp_path):
    first = len(recorded(rows()[0], "x:1", tokenizers[0], 0).start)

    def flipped(t):
        t = t.clone()
        t[first] = t[first].roll(1, -1)
        return t

    for name in ("experts", "weights", "answers", "logprobs"):
        path = spoilt(file, tmp_path / "damaged.st", **{name: flipped})
        ask(path, 0, tokenizers[0])  # the row before it is whole
        with pytest.raises(
            DataError, match=r"^other/folder/rows.jsonl:2: .* of this row is damaged"
        ):
            ask(path, 1, tokenizers[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "megatron_mm teacher routes 9"}, "this version reads"),
        ({"layers": [4, 1]}, r"layers is \[4, 1\]; it must name some of 0 to 5, ascending"),
        ({"layers": [1, 9]}, "it must name some of 0 to 5"),
        ({"layers": [1]}, r"experts has the shape \[\d+, 2, 3\], expected \[\d+, 1, 3\]"),
        ({"teacher": {"num_layers": 6}}, "num_experts is 'None', no size"),
        ({"files": [3]}, "files is no list of names"),
        ({"files": []}, "names a file beyond its 0"),
        ({"experts": None}, "experts is missing"),
        ({"weights": lambda t: t.float()}, "weights is torch.float32 of 3 dimensions, expected"),
        ({"offset": lambda t: t.flip(0)}, "offset does not cut"),
        ({"row": lambda t: t * 0 + 1}, "a row is in it twice"),
    ],
)
def test_a_file_of_another_kind_is_refused(file, tmp_path, changes, message):
    path = spoilt(file, tmp_path / "odd.st", **changes)
    with pytest.raises(DataError, match=f"^teacher's routes {path}: .*{message}") as error:
        RouteFile(path)
    assert "\n" not in str(error.value)


def test_routes_that_are_none_are_refused_though_nothing_is_damaged(tokenizers, tmp_path):
    whole = recorded(rows()[0], "x:1", tokenizers[0], 0)
    for changes in (
        {"experts": whole.experts + EXPERTS},
        {"experts": whole.experts - EXPERTS},
        {"weights": whole.weights * 9},
        {"weights": whole.weights * float("nan")},
        {"answers": whole.answers + 512},
        {"logprobs": -whole.logprobs},
        {"start": whole.start.flip(0)},
    ):
        teacher = TeacherSizes("t", 6, EXPERTS, 512)
        held = {("rows.jsonl", 1): replace(whole, **changes)}
        write_routes(tmp_path / "odd.st", teacher, LAYERS, held, "")
        with pytest.raises(DataError, match=r"^other/folder/rows.jsonl:1: .* are no routes of 6"):
            ask(tmp_path / "odd.st", 0, tokenizers[0])


def test_a_file_that_is_none_is_one_line(tmp_path):
    (tmp_path / "text.st").write_text("nothing")
    for path in (tmp_path / "text.st", tmp_path / "missing.st", tmp_path):
        with pytest.raises(DataError, match="^teacher's routes ") as error:
            RouteFile(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---- maps ----


def mapped(**changes) -> ExpertMap:
    a = torch.rand(EXPERTS, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    held = dict(identity="the teacher", layers={0: 1, 2: 4}, experts={0: a, 2: a.flip(0)})
    return ExpertMap(**(held | changes))


def test_a_map_comes_back(file, tmp_path):
    mapped().save(tmp_path / "map.st")
    found = load_expert_map(tmp_path / "map.st", RouteFile(file), [0, 1, 2], 4)
    assert found.layers == {0: 1, 2: 4}
    assert all(torch.equal(found.experts[i], mapped().experts[i]) for i in (0, 2))
    control = permuted(found, 1)
    for index in (0, 2):
        assert (control.experts[index] != found.experts[index]).any(0).all()  # none is at its place
        assert torch.equal(
            control.experts[index].sort(1).values, found.experts[index].sort(1).values
        )
    assert permuted(found, 1).experts[2].equal(control.experts[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": "another"}, "made for the teacher another, .* is of the teacher"),
        ({"layers": {0: 1, 7: 4}}, r"layer 7 of the student is none of its layers .*\(0, 1, 2\)"),
        ({"layers": {0: 1, 2: 3}}, r"layer 2 listens to the teacher's layer 3, recorded are 1, 4"),
        ({"experts": {0: torch.ones(6, 4) / 4, 2: torch.ones(6, 4) / 3}},
         r"layer 2, the teacher's expert 0: its shares sum to 1.33333, not 1"),
        ({"experts": {0: torch.eye(6)[:, :4], 2: torch.ones(6, 4) / 4}},
         r"layer 0, the teacher's expert 4: its shares sum to 0, not 1"),
        ({"experts": {0: torch.full((6, 4), float("nan")), 2: torch.ones(6, 4) / 4}}, "sum to nan"),
        ({"experts": {0: torch.eye(4), 2: torch.eye(4)}},
         r"experts has the shape \[2, 4, 4\], its layers, .* are \[2, 6, 4\]"),
    ],
)  # fmt: skip
def test_a_map_that_does_not_fit_is_refused(file, tmp_path, changes, message):
    mapped(**changes).save(tmp_path / "map.st")
    with pytest.raises(DataError, match=f"^expert map {tmp_path / 'map.st'}: .*{message}") as error:
        load_expert_map(tmp_path / "map.st", RouteFile(file), [0, 1, 2], 4)
    assert "\n" not in str(error.value)


def test_the_tokenizer_of_a_worker_is_the_same(tokenizers):
    """Files name no tokenizer: what counts is what it writes."""
    again = load_tokenizer(tokenizers[0].path)
    sample = sample_of(rows()[0], "x:1", again)
    assert token_digest(sample) == recorded(rows()[0], "x:1", tokenizers[0], 0).tokens
