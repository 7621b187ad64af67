"""Pruned models compute what the whole one does without the others: on the layouts of the command,
in training and in transformers."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.shards import weight_key
from megatron_mm.config import RunConfig, num_layers
from megatron_mm.convert import to_hf
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.earl.prune import Choice, parts, write_pruned
from megatron_mm.earl.skill_map import SkillMap, save_skill_map
from megatron_mm.engine.engine import Engine
from megatron_mm.evaluation.evaluate import evaluate
from megatron_mm.parallel import groups
from support.batches import microbatch
from support.exports import converted, save_origin
from support.folders import one_rank_job, save_text
from support.launches import free_port
from support.skill_maps import the_map
from support.tools import load_tool
from support.trainers import EP2, PP2, TP2, digits_run, new_trainer
from support.weights import random_engine

# --- the model ------------------------------------------------------------------------------

CHOICE = Choice([[0, 1, 4, 5], [0, 3, 4, 7]], None)


def save_random(run: RunConfig, folder: Path) -> None:
    sharded.save(random_engine(run), {}, folder, 3)


def loaded(run: RunConfig, folder: Path) -> Engine:
    engine = Engine.create(run, groups.build(run.parallel))
    assert sharded.load(engine, folder, finetune=True)["initialized"] == []
    engine.training(False)
    return engine


def prune(run: RunConfig, folder: Path, target: Path) -> str:
    checkpoint = to_hf.open_checkpoint(folder)
    args = CHOICE, target, run.parallel, {"skills": ["spatial"]}, dist.group.WORLD
    return write_pruned(checkpoint, *args, quiet=True)


def pruned_run(run: RunConfig) -> RunConfig:
    run = replace(run, model=replace(run.model))
    run.model.language = replace(run.model.language, num_experts=4)
    return run


def others() -> dict[int, torch.Tensor]:
    masks = torch.ones(2, 8, dtype=torch.bool)
    for layer, experts in enumerate(CHOICE.experts):
        masks[layer, experts] = False
    return dict(enumerate(masks))


@pytest.fixture(scope="module")
def whole(ranks, scenes, tmp_path_factory) -> Path:
    """The checkpoint of a random model with 8 experts in each of 2 layers."""
    folder = tmp_path_factory.mktemp("whole")
    ranks(1, save_random, digits_run(scenes), folder)
    return folder


@pytest.fixture(scope="module")
def pruned(ranks, scenes, whole, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    made, left_out = ranks(1, prune, digits_run(scenes), whole, folder)[0]
    assert made == folder / "iter_0000003" and left_out == []
    return folder


def test_experts_and_router_rows_are_cut_and_nothing_else(whole, pruned):
    before, after = to_hf.open_checkpoint(whole), to_hf.open_checkpoint(pruned)
    language = after.model.language
    assert (language.num_experts, language.moe_router_topk) == (4, 2)
    assert replace(language, num_experts=8) == before.model.language
    assert before.parameters.keys() == after.parameters.keys()
    cut = 0
    for name in before.parameters:
        one, other = (x.reader.read(weight_key(name)) for x in (before, after))
        if "router" in name or ".experts." in name:
            one = one[CHOICE.experts[int(name.split(".")[2])]]
            cut += 1
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert cut == 2 * 3
    stored = json.loads((pruned / "iter_0000003" / "run.json").read_text())
    assert stored["extra"]["pruned"] == {"skills": ["spatial"]}
    assert stored["config"]["model"]["language"]["num_experts"] == 4


def test_as_much_room_is_asked_for_as_is_written(whole, pruned):
    """Experts that are left out are read, and take no room on the disk."""
    work, _ = parts(to_hf.open_checkpoint(whole), CHOICE)
    after = to_hf.open_checkpoint(pruned)
    tensors = [after.reader.read(weight_key(name)) for name in after.parameters]
    assert sum(part.written for part in work) == sum(tensor.nbytes for tensor in tensors)
    assert sum(part.bytes for part in work) > sum(part.written for part in work)


@torch.no_grad()
def logits(engine: Engine) -> torch.Tensor:
    batch = microbatch(engine.run.model, 77)
    everywhere = torch.arange(len(batch.tokens_T))
    (found,) = engine.forward([batch], lambda batch: everywhere, lambda found, **_: found.logits())
    return found


def three_logits(run: RunConfig, whole: Path, pruned: Path) -> list[torch.Tensor]:
    """Returns those of the whole model, of it without the other experts, of the pruned model."""
    engine = loaded(run, whole)
    found = [logits(engine)]
    with engine.forbidding(others()):
        found.append(logits(engine))
    made, run = engine.groups, pruned_run(run)
    engine = Engine.create(run, made)
    sharded.load(engine, pruned, finetune=True)
    engine.training(False)
    return [*found, logits(engine)]


# The routers' product over 4 rows in place of 8 may add in another order: fp32's 6e-8, grown over
# two layers. The difference seen was 0.
ROUNDING = 1e-6


def test_logits_are_the_whole_models_with_the_others_forbidden(ranks, scenes, whole, pruned):
    free, forbidden, smaller = ranks(1, three_logits, digits_run(scenes), whole, pruned)[0]
    assert (free - forbidden).norm() > 0.1 * free.norm(), "the experts matter too little to tell"
    assert (smaller - forbidden).norm() <= ROUNDING * forbidden.norm()


@pytest.mark.parametrize("layout", [EP2, TP2 | PP2], ids=str)
def test_two_ranks_write_the_same_from_shards_of_any_layout(
    ranks, scenes, pruned, whole, tmp_path, layout
):
    size = 4 if len(layout) > 1 else 2
    run = digits_run(scenes, **layout)
    ranks(size, save_random, run, tmp_path / "whole")
    ranks(2, prune, digits_run(scenes), tmp_path / "whole", tmp_path / "pruned")
    one, other = to_hf.open_checkpoint(pruned), to_hf.open_checkpoint(tmp_path / "pruned")
    for name in one.parameters:
        key = weight_key(name)
        assert torch.equal(one.reader.read(key), other.reader.read(key)), name


def steps(run: RunConfig) -> list[float]:
    trainer = new_trainer(run)
    return [trainer.step()["train/lm_loss"] for _ in range(2)]


def test_the_trainer_goes_on_from_it(ranks, scenes, pruned):
    run = pruned_run(digits_run(scenes))
    run.checkpoint.load, run.checkpoint.finetune = str(pruned), True
    (losses,) = ranks(1, steps, run)
    assert losses[1] < losses[0]


# --- the command ----------------------------------------------------------------------------


def answers(run: RunConfig, whole: Path) -> tuple[list[str], list[str]]:
    """Returns the model's answers with all experts, and with the others forbidden."""
    engine = loaded(run, whole)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    free = evaluate(engine, tokenizer)[1]
    with engine.forbidding(others()):
        forbidden = evaluate(engine, tokenizer)[1]
    return tuple([record["prediction"] for record in found] for found in (free, forbidden))


@pytest.fixture(scope="module")
def questions(ranks, scenes, whole, tmp_path_factory) -> tuple[Path, float]:
    """A file of questions, and the share of those that the two models answer alike. The truth of
    kind "free" is the answer with all experts, that of "few" the one without the others."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "images").symlink_to(scenes / "images")
    run = digits_run(scenes, max_new_tokens=3)
    free, few = ranks(1, answers, run, whole)[0]
    rows = [json.loads(line) for line in (scenes / "valid.jsonl").read_text().splitlines()]
    lines, same = [], []
    for row, one, other in zip(rows, free, few, strict=True):
        if not (one.strip() and other.strip()):
            continue
        same.append(one.strip() == other.strip())
        shared = {key: row[key] for key in ("messages", "images") if key in row}
        for skill, truth in (("free", one), ("few", other)):
            shared |= {"skill": skill, "ground_truth": truth.strip(), "scorer": "exact"}
            lines.append(json.dumps(shared))
    assert len(same) >= 6 and not all(same)
    (folder / "valid.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "valid.jsonl", sum(same) / len(same)


@pytest.fixture(scope="module")
def map_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("map") / "map.json"
    save_skill_map(the_map(), path)
    return path


@pytest.fixture
def tool(capsys):
    """`tool(name, *flags)` in this process: (status, stdout, stderr)."""

    def call(name, *flags):
        capsys.readouterr()
        status = load_tool(name).main([str(flag) for flag in flags])
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        return status, *capsys.readouterr()

    return call


def check_record(folder: Path, valid: Path, same: float) -> None:
    record = json.loads((folder / "pruning.json").read_text())
    assert record["experts"] == CHOICE.experts and record["kept"] == 4
    assert record["num_experts"] == 8 and record["valid_data"] == str(valid)
    before, after = (
        {kind: result["accuracy"] for kind, result in record[when].items()}
        for when in ("before", "after")
    )
    assert before == {"free": 1.0, "few": same} and after == {"free": same, "few": 1.0}


def test_the_command_tells_accuracy_before_and_after(tool, whole, map_file, questions, tmp_path):
    valid, same = questions
    out = tmp_path / "new" / "spatial"
    flags = ("--checkpoint", whole, "--skill-map", map_file, "--skills", "spatial", "--out", out)
    more = ("--valid", valid, "--max-new-tokens", 3)
    status, said, errors = tool("prune_experts", *flags, *more)
    assert status == 0, errors
    check_record(out, valid, same)
    lines = said.splitlines()
    assert lines[0] == "kept: 4 of 8 experts in each of 2 layers"
    assert lines[1].split() == ["kind", "n", "chance", "of", "8", "of", "4", "change"]
    assert lines[2].split()[0] == "few" and lines[2].split()[-1] == f"{1 - same:+.3f}"
    places = out / "iter_0000003", out / "pruning.json", out / "report.html"
    assert lines[-1] == f"written: {', '.join(map(str, places))}"
    page = (out / "report.html").read_text()
    assert "<h2>Kept for spatial</h2>" in page and "<th>4 experts</th>" in page
    assert f"<td>{100 * same:.1f}%</td><td>100.0%</td>" in page

    status, _, errors = tool("prune_experts", *flags, *more)
    assert status == 1 and "holds checkpoints already: nothing is overwritten" in errors


def launched(port: int, flags: list[str]) -> tuple[int, str]:
    """The tool's exit status and output in a job of its own, as torchrun would start it."""
    names = {"RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size(), "MASTER_PORT": port}
    dist.destroy_process_group()
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        for name, value in (names | {"MASTER_ADDR": "127.0.0.1"}).items():
            patch.setenv(name, str(value))
        return load_tool("prune_experts").main(flags), out.getvalue()


def test_the_command_runs_on_a_layout(ranks, whole, map_file, questions, tmp_path):
    valid, same = questions
    flags = ["--checkpoint", whole, "--skill-map", map_file, "--skills", "spatial"]
    flags += ["--out", tmp_path, "--valid", valid, "--max-new-tokens=3"]
    flags += ["--expert-model-parallel-size=2"]
    said = ranks(2, launched, free_port(), [str(flag) for flag in flags])
    assert [status for status, _ in said] == [0, 0] and said[1][1] == ""
    check_record(tmp_path, valid, same)
    run = json.loads((tmp_path / "iter_0000003" / "run.json").read_text())
    assert run["layout"]["ep"] == run["config"]["parallel"]["expert_model_parallel_size"] == 2


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"--checkpoint": "nowhere"}, 1, "cannot load nowhere: there is no such folder"),
        ({"--skill-map": "nowhere.json"}, 1, "skill map nowhere.json: No such file"),
        ({"--skills": "colour"}, 2, "--skills names 'colour'; allowed: ocr, spatial, count"),
        ({"--keep": "1"}, 2, "--keep is 1; allowed: 2, which a token takes, to 7 of the 8 experts"),
        ({"--lr": "1"}, 2, "--lr is not for pruning; allowed: this tool's flags"),
        ({"--hf-out": "/tmp"}, 2, "--hf-out is /tmp, which exists; allowed: a new folder"),
        ({"--assets": "/tmp"}, 2, "--assets is given without --hf-out"),
        ({"--valid": "nowhere.jsonl"}, 1, "nowhere.jsonl: there is no such file"),
        ({"--tensor-model-parallel-size": "2"}, 2, "world_size"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(
    tool, whole, map_file, tmp_path, change, status, words
):
    flags = {"--checkpoint": whole, "--skill-map": map_file, "--skills": "spatial"}
    flags |= {"--out": tmp_path / "out"} | change
    found, said, errors = tool("prune_experts", *(word for pair in flags.items() for word in pair))
    assert (found, said) == (status, ""), errors
    assert errors.startswith("error: ") and errors.count("\n") == 1 and words in errors
    assert not (tmp_path / "out").exists()


def test_another_layout_must_hold_the_experts_that_stay(ranks, whole, map_file, tmp_path):
    flags = ["--checkpoint", whole, "--skill-map", map_file, "--skills", "spatial", "--keep=5"]
    flags += ["--out", tmp_path / "out", "--expert-model-parallel-size=2"]
    said = ranks(2, launched, free_port(), [str(flag) for flag in flags])
    assert said == [(2, ""), (2, "")] and not (tmp_path / "out").exists()


# --- transformers ---------------------------------------------------------------------------


def convertible_map(path: Path, checkpoint: Path) -> Path:
    """A map of clusters for the model of a checkpoint; its skill keeps one expert more than a token
    takes."""
    model = to_hf.open_checkpoint(checkpoint).model
    k, experts = model.language.moe_router_topk, model.language.num_experts
    layers = num_layers(model.hybrid_layer_pattern)
    common = [
        [*range(1, k + 1)] if layer % 2 else [*range(experts - k, experts)]
        for layer in range(layers)
    ]
    save_skill_map(SkillMap(layers, experts, k, {"one": [[0]] * layers}, {}, common), path)
    return path


def test_the_export_computes_the_same_in_transformers(tool, tmp_path):
    """check_parity compares every tensor, inputs, the outputs of every layer and the logits."""
    origin = save_origin(tmp_path / "origin", fused=True)
    with one_rank_job():
        base = converted(origin, tmp_path / "base", looks=False)
    path = convertible_map(tmp_path / "map.json", base)
    out, hf = tmp_path / "out", tmp_path / "hf"
    status, said, errors = tool(
        *("prune_experts", "--checkpoint", base, "--skill-map", path, "--skills", "one"),
        *("--out", out, "--hf-out", hf),
    )
    assert status == 0, errors
    assert said.splitlines()[-1].endswith(f"report.html, {hf}")
    model, kept = (to_hf.open_checkpoint(folder).model.language for folder in (base, out))
    assert kept.num_experts == model.moe_router_topk + 1 < model.num_experts
    config = json.loads((hf / "config.json").read_text())["text_config"]
    assert config["num_experts"] == kept.num_experts
    assert config["num_experts_per_tok"] == model.moe_router_topk
    status, said, errors = tool("check_parity", "--hf", hf, "--checkpoint", out)
    assert status == 0, errors
    assert "every layer and the logits agree" in said


def test_multi_token_prediction_is_left_out(tool, tmp_path):
    """It has experts of its own, as many as the model had."""
    save_text(tmp_path / "origin", mtp=True)
    base = tmp_path / "base"
    status, _, errors = tool("hf_to_megatron", "--hf", tmp_path / "origin", "--out", base)
    assert status == 0, errors
    path = convertible_map(tmp_path / "map.json", base)
    status, said, errors = tool(
        *("prune_experts", "--checkpoint", base, "--skill-map", path, "--skills", "one"),
        *("--out", tmp_path / "out"),
    )
    assert status == 0, errors
    assert said.splitlines()[1].startswith("left out (3): mtp.fc.weight, ")
    assert to_hf.open_checkpoint(tmp_path / "out").carried == []
