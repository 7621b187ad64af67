"""What is recorded of a teacher: by hand, on every layout, and of transformers; the commands.

A function that starts with `on_rank_` runs on every rank.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from PIL import Image

from megatron_mm.config import RunConfig
from megatron_mm.data.collate import collate
from megatron_mm.data.files.rows import Rows as RowsOf
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.earl.skill_map import SkillMap, save_skill_map
from megatron_mm.mimic.expert_map import load_expert_map
from megatron_mm.mimic.record import record
from megatron_mm.mimic.record_hf import as_logits
from megatron_mm.mimic.recorded import Recorded, TeacherSizes, write_routes
from megatron_mm.mimic.rounds import Rows
from megatron_mm.mimic.route_file import RouteFile
from megatron_mm.mimic.survey import survey
from megatron_mm.model.layers.moe import Router
from support.exports import converted, grounding_tokenizer, save_origin
from support.folders import one_rank_job
from support.tools import load_tool
from support.trainers import LAYOUTS, digits_run, new_trainer
from support.weights import random_engine, randomise_engine

SAMPLES, TOP, ANSWERS = 20, 3, 4


def on_rank_record(run: RunConfig, data: str, layers: list[int]) -> dict:
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    engine = random_engine(run)
    return recorded(engine, tokenizer, Rows([data], SAMPLES, 3), layers, TOP, ANSWERS)


def recorded(*given) -> dict:
    """Returns what `record` hands on: all rows on rank 0, none elsewhere."""
    found: dict = {}
    record(*given, found.__setitem__ if dist.get_rank() == 0 else None)
    return found


@pytest.fixture(scope="module")
def data(scenes) -> str:
    return str(scenes / "mix.jsonl")


@pytest.fixture(scope="module")
def alone(ranks, scenes, data) -> dict[tuple[str, int], Recorded]:
    return ranks(1, on_rank_record, digits_run(scenes), data, [0, 1])[0]


def _noting(router: Router, seen: dict, hidden: torch.Tensor) -> torch.Tensor:
    seen[router.layer_number - 1] = logits = type(router).gating(router, hidden)
    return logits


def on_rank_by_hand(run: RunConfig, data: str, number: int):
    """The probabilities of one row's routers, [P, E] each, and of its next tokens, [P, V]."""
    engine, tokenizer = random_engine(run), load_tokenizer(run.data.tokenizer_model)
    rows, builder = RowsOf(Path(data)), SampleBuilder(run, tokenizer)
    sample = builder.training(rows[number], rows.where(number), rows.folder)
    batch = collate([sample], settings=builder.settings, pad_id=tokenizer.pad_id)
    seen: dict = {}
    for module in engine.chunks[0].modules():
        if isinstance(module, Router):
            module.gating = partial(_noting, module, seen)
    with torch.no_grad():
        logits = engine.chunks[0](batch).logits()
    here = sample.loss_mask_T.nonzero().flatten()
    routers = [seen[n].flatten(0, 1)[here].softmax(1) for n in sorted(seen)]
    return routers, logits[here].log_softmax(1), sample.labels_T[here].tolist()


def test_a_row_is_what_its_routers_say(ranks, scenes, data, alone):
    assert len(alone) == SAMPLES and {name for name, _ in alone} == {"mix.jsonl"}
    for (_, row), found in list(alone.items())[:3]:
        routers, logprobs, labels = ranks(1, on_rank_by_hand, digits_run(scenes), data, row - 1)[0]
        assert len(found.start) == len(labels)
        for layer, p in enumerate(routers):
            best = p.topk(TOP, 1)
            assert torch.equal(found.experts[:, layer].long(), best.indices)
            # fp16 in the file, and sums over a packed stream: 5e-4 and some 1e-6.
            torch.testing.assert_close(
                found.weights[:, layer].float(), best.values, rtol=1e-3, atol=1e-6
            )
        best = logprobs.topk(ANSWERS, 1)
        assert torch.equal(found.answers.long(), best.indices)
        torch.testing.assert_close(found.logprobs, best.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["TP2", "PP2", "EP2", "CP2", "DP2", "PP2xVPP2"])
def test_every_layout_records_the_same(ranks, scenes, data, alone, layout):
    size, sizes = LAYOUTS[layout]
    found, *others = ranks(size, on_rank_record, digits_run(scenes, **sizes), data, [0, 1])
    assert found.keys() == alone.keys() and not any(others)
    positions = equal = 0
    for place, mine in found.items():
        theirs = alone[place]
        assert (mine.digest, mine.tokens) == (theirs.digest, theirs.tokens)
        assert torch.equal(mine.start, theirs.start)
        # Rounding may exchange two experts, or tokens, that are nearly as likely.
        torch.testing.assert_close(mine.weights, theirs.weights, rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(mine.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
        positions += mine.experts.numel()
        equal += int((mine.experts == theirs.experts).sum())
        assert (mine.answers == theirs.answers).float().mean() > 0.9
    assert equal >= 0.998 * positions


def test_chosen_layers_and_no_answers(ranks, scenes, data, alone):
    run = digits_run(scenes)
    found = ranks(1, on_rank_some, run, data)[0]
    for place, mine in found.items():
        assert torch.equal(mine.experts, alone[place].experts[:, 1:, :2])
        assert mine.answers.shape == (len(mine.start), 0) == mine.logprobs.shape


def on_rank_some(run: RunConfig, data: str) -> dict:
    engine, tokenizer = random_engine(run), load_tokenizer(run.data.tokenizer_model)
    return recorded(engine, tokenizer, Rows([data], SAMPLES, 3), [1], 2, 0)


def on_rank_survey(run: RunConfig, data: str, routes: str):
    engine, tokenizer = random_engine(run), load_tokenizer(run.data.tokenizer_model)
    return survey(engine, tokenizer, Rows([data], SAMPLES, 3), RouteFile(routes)).parts


def test_a_survey_of_the_teacher_itself(ranks, scenes, data, alone, tmp_path):
    """All experts recorded: each layer's CKA with itself is 1; the sums are those of one rank on
    every layout."""
    run = digits_run(scenes)
    held = ranks(1, on_rank_whole, run, data)[0]
    path = tmp_path / "routes.st"
    write_routes(path, TeacherSizes("t", 2, 8, 512), [0, 1], held, "")
    expected = ranks(1, on_rank_survey, run, data, str(path))[0]
    count, teacher, student, *_ = expected
    assert int(count) == sum(len(one.start) for one in held.values())
    torch.testing.assert_close(teacher, student, rtol=1e-3, atol=1e-3)  # fp16
    torch.testing.assert_close(student.sum(1), count.expand(2))
    for layout in ("TP2", "PP2xVPP2", "EP2"):
        size, sizes = LAYOUTS[layout]
        for parts in ranks(size, on_rank_survey, digits_run(scenes, **sizes), data, str(path)):
            for one, other in zip(parts, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # fp32 logits


def on_rank_whole(run: RunConfig, data: str) -> dict:
    engine, tokenizer = random_engine(run), load_tokenizer(run.data.tokenizer_model)
    return recorded(engine, tokenizer, Rows([data], SAMPLES, 3), [0, 1], 8, 0)


# ---- the commands ----


@pytest.fixture
def tool(capsys):
    """`tool(name, *flags)` in this process: (status, stdout, the error line)."""

    def call(name, *flags):
        capsys.readouterr()
        status = load_tool(name).main([str(flag) for flag in flags])
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        printed, errors = capsys.readouterr()
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        return status, printed, lines

    return call


def on_rank_save(run: RunConfig, folder: Path) -> None:
    run.checkpoint.save = str(folder)
    trainer = new_trainer(run)
    randomise_engine(trainer.engine)
    trainer.save()
    trainer.saver.finish()
    trainer.source.close()


@pytest.fixture(scope="module")
def checkpoints(ranks, scenes, tmp_path_factory) -> tuple[Path, Path]:
    """A teacher of three layers of 10 experts, and a student of two of 8."""
    folder = tmp_path_factory.mktemp("models")
    teacher = digits_run(scenes, num_experts=10)
    teacher.model.hybrid_layer_pattern = "GE L *E J GE"
    ranks(1, on_rank_save, teacher, folder / "teacher")
    ranks(1, on_rank_save, digits_run(scenes), folder / "student")
    return folder / "teacher", folder / "student"


def test_from_checkpoints_to_maps(tool, checkpoints, scenes, data, tmp_path):
    teacher, student = checkpoints
    routes, out = tmp_path / "routes.st", tmp_path / "map.st"
    flags = ("--data", data, "--out", routes, "--layers", 0, 2)
    status, printed, errors = tool("record_routes", "--checkpoint", teacher, *flags)
    assert status == 0, errors
    assert printed.splitlines()[-1] == f"written: {routes}, 48 rows, 2 layers, 10 experts of each"
    opened = RouteFile(routes)
    assert opened.layers == [0, 2] and opened.answers == 64 and opened.teacher.num_layers == 3
    survey = ("--checkpoint", student, "--data", data, "--samples", 24)
    skills = [tmp_path / "teacher.json", tmp_path / "student.json"]
    for path, layers, experts in zip(skills, (3, 2), (10, 8), strict=True):
        save_skill_map(SkillMap(layers, experts, 2, {"ocr": [[1]] * layers}), path)
    ways = {
        "transport": survey,
        "clusters": ("--method", "clusters", "--config", tmp_path / "run.yaml"),
        "skills": ("--method", "skills", "--skill-maps", *skills, *survey, "--layers", 1),
    }
    (tmp_path / "run.yaml").write_text("model: {preset: tiny}\n")
    for name, given in ways.items():
        status, printed, errors = tool("map_experts", "--routes", routes, "--out", out, *given)
        assert status == 0, errors
        layers = [0, 1] if name != "clusters" else [0, 1, 2, 3]
        found = load_expert_map(out, opened, layers, 8)
        assert found.info["method"] == name and {*found.layers.values()} <= {0, 2}
        if name == "transport":
            assert found.layers == {0: 0, 1: 2} and found.info["layers_by"] == "cka"
        if name == "clusters":
            assert found.info["layers_by"] == "depth" and found.layers[3] == 2
            sizes = found.experts[0].sum(0)
            assert sizes.max() - sizes.min() == 1 and sizes.sum() == 10
        if name == "skills":
            assert [*found.layers] == [1]
            assert found.experts[1][1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("record_routes", ("--data", "x", "--out", "y"), "give one of --checkpoint and --hf"),
        ("record_routes", ("--checkpoint", "c", "--data", "x", "--out", "y", "--top", "0"),
         "--top is 0; allowed: 1 or more"),
        ("record_routes", ("--checkpoint", "c", "--data", "x", "--out", "y", "--layers", "2", "1"),
         "--layers is [2, 1]; allowed: different layers, ascending"),
        ("record_routes", ("--checkpoint", "c", "--data", "x", "--out", "y", "--lr", "1"),
         "--lr is not for recording"),
        ("record_routes", ("--hf", "h", "--data", "x", "--out", "y", "--batch-size", "4"),
         "--batch-size is 4; allowed with --hf: left out"),
        ("map_experts", ("--routes", "r", "--out", "y", "--method", "skills", "--batch-size", "4"),
         "--batch-size is 4; allowed: this value with --checkpoint"),
        ("map_experts", ("--routes", "r", "--out", "y"), "--method transport needs --checkpoint"),
        ("map_experts", ("--routes", "r", "--out", "y", "--method", "skills"),
         "--skill-maps and --method skills go together"),
        ("map_experts", ("--routes", "r", "--out", "y", "--data", "x"),
         "--checkpoint and --data go together"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit(tool, name, flags, message):
    status, _, errors = tool(name, *flags)
    assert status == 2 and len(errors) == 1 and message in errors[0]


def test_what_cannot_be_recorded_is_one_line(tool, checkpoints, data, tmp_path):
    teacher, student = checkpoints
    out = tmp_path / "routes.st"
    (tmp_path / "file").touch()
    for flags, message in (
        (
            ("--out", tmp_path / "file" / "a.st"),
            "a.st cannot be written: File exists; allowed: a file in a folder",
        ),
        (("--layers", 7), "--layers names 7; allowed: the teacher's layers of experts, 0, 1, 2"),
        (("--top", 11), "--top is 11; allowed: up to 10, the teacher's experts"),
        (("--data", tmp_path / "none.jsonl"), "none.jsonl"),
        (("--data", data, data), "2 files have the name mix.jsonl, by which routes are found"),
    ):
        given = ("--checkpoint", teacher, "--data", data, "--out", out, *flags)
        status, _, errors = tool("record_routes", *given)
        assert status == 1 and len(errors) == 1 and message in errors[0]
    assert not out.exists()
    given = ("--checkpoint", student, "--data", data, "--out", tmp_path / "map.st")
    status, _, errors = tool("map_experts", "--routes", out, *given)
    assert status == 1 and errors == [f"error: teacher's routes {out}: No such file or directory"]


# ---- transformers ----

TALKS = [("What stands in cell 5?", "7 8"), ("user", "what  stands\n\n\nin cell"), ("a", "?")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, Path]:
    """A text model with experts and a fused one, of each its checkpoint beside it, and rows."""
    found = {}
    for fused in (False, True):
        found[fused] = root = tmp_path_factory.mktemp("hf")
        save_origin(root, fused=fused)
        with one_rank_job():
            converted([root / "language"], root / "checkpoint", looks=False)
        Image.new("RGB", (32, 16), (200, 10, 30)).save(root / "a.png")
        shown = {"images": ["a.png"]} if fused else {}
        rows = [
            {
                "messages": [
                    {"role": "user", "content": "<image>" * fused + asked},
                    {"role": "assistant", "content": said},
                ],
                **shown,
            }
            for asked, said in TALKS
        ]
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


@pytest.fixture(scope="module")
def folder(folders) -> Path:
    return folders[False]


@pytest.mark.parametrize("fused", [False, True])
def test_ours_equals_transformers(tool, folders, fused, tmp_path):
    folder = folders[fused]
    language, data = folder / "language", folder / "rows.jsonl"
    ways = {
        "ours": ("--checkpoint", folder / "checkpoint", "--tokenizer-model", language),
        "theirs": ("--hf", language),
    }
    for name, flags in ways.items():
        given = ("--data", data, "--out", tmp_path / name, "--top", 3, "--answers", 5)
        status, _, errors = tool("record_routes", *flags, *given)
        assert status == 0, errors
    ours, theirs = RouteFile(tmp_path / "ours"), RouteFile(tmp_path / "theirs")
    assert ours.layers == theirs.layers == [0, 1, 2, 3]
    assert ours.places.keys() == theirs.places.keys() and len(ours) == len(TALKS)
    assert ours.teacher.identity != theirs.teacher.identity
    for place, number in ours.places.items():
        one = ours.recorded(number, "x:1")
        other = theirs.recorded(theirs.places[place], "x:1")
        assert (one.digest, one.tokens) == (other.digest, other.tokens)
        assert torch.equal(one.experts, other.experts) and torch.equal(one.answers, other.answers)
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-3, atol=1e-5)  # fp16
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-4)


def test_probabilities_are_no_logits():
    """Some models give the softmax as their router logits; a second one would flatten it."""
    logits_TE = 2 * torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    expected = logits_TE.softmax(1)
    for said in (logits_TE, expected):
        torch.testing.assert_close(as_logits(said).softmax(1), expected, rtol=1e-5, atol=1e-7)


def test_a_folder_that_cannot_teach_is_one_line(tool, folder, tmp_path):
    """Without experts; with code of its own; with other layers than it has; with images."""
    dense = tmp_path / "dense"
    tokenizer = grounding_tokenizer()
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    corrected = tmp_path / "corrected"
    config = transformers.Glm4MoeConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=1,
    )  # fmt: skip
    transformers.Glm4MoeForCausalLM(config).save_pretrained(corrected)
    tokenizer.save_pretrained(corrected)
    coded = tmp_path / "coded"
    coded.mkdir()
    for path in (folder / "language").iterdir():
        (coded / path.name).write_bytes(path.read_bytes())
    held = json.loads((coded / "config.json").read_text())
    held["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (coded / "config.json").write_text(json.dumps(held))
    shown = tmp_path / "shown.jsonl"
    row = {"messages": [{"role": "user", "content": "<image>?"},
                        {"role": "assistant", "content": "7"}], "images": ["a.png"]}  # fmt: skip
    shown.write_text(json.dumps(row) + "\n")
    language, rows = folder / "language", folder / "rows.jsonl"
    for where, data, flags, message in (
        (dense, rows, (), "its model gives 0 router logits (output_router_logits); record a mixt"),
        (corrected, rows, (), "1 of its routers choose with a correction (model.layers.1.mlp.gate"),
        (coded, rows, (), "carries code: --trust-remote-code runs it"),
        (language, rows, ("--layers", 4), "--layers names 4; allowed: the teacher's layers of exp"),
        (language, shown, (), "shown.jsonl:1: 1 images but the model has no vision"),
        (tmp_path / "none", rows, (), "none"),
    ):
        given = ("--hf", where, "--data", data, "--out", tmp_path / "out.st", *flags)
        status, _, errors = tool("record_routes", *given)
        assert status == 1 and len(errors) == 1 and message in errors[0], errors
    assert not (tmp_path / "out.st").exists()
