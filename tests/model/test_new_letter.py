"""A letter of one's own, that of `support/new_letter.py`, is registered here and nowhere else:
training, recomputation, checkpoints, layouts, decoding, planning, counting, settings and LoRA know
it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mm.checkpoint import sharded
from megatron_mm.config import (
    ConfigError,
    LoraConfig,
    RunConfig,
    dump_yaml,
    load,
    parse_pattern,
    to_transformers_dict,
    validate,
)
from megatron_mm.config.cost import costs
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.convert import hf_model, parity, to_hf
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.evaluation.questions import EvalSet
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.sampling import Sampling
from megatron_mm.model.layers import interface
from megatron_mm.model.layers.lora import is_adapter
from megatron_mm.model.multimodal import build
from megatron_mm.perf.flops import executed_flops, total
from megatron_mm.perf.pieces import trace_pieces
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import small_model, small_run
from support.checkpoint_runs import create, tiny_run, train, whole
from support.folders import assert_same, read_all, save_fused, to_checkpoint, to_folder
from support.invariance import invariance_run
from support.layouts import parallel_config, step_gradients
from support.new_letter import MLP, PATTERN, MLPSettings, mlp_width, on_rank, with_mlp
from support.planned_layouts import layout_run, measure, planned, the_batch
from support.slow_generate import generate as slow_generate
from support.trainers import digits_run, new_trainer
from support.weights import random_engine

pytestmark = pytest.mark.usefixtures("new_letter")

# ---- settings


def test_its_settings_are_flags_and_yaml(tmp_path):
    run = load(
        None, ["--preset", "tiny", "--hybrid-layer-pattern", "GM*E", "--mlp-hidden-size", "24"]
    )
    assert run.model.layers == {"M": MLPSettings(24)}
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(run))
    assert load(str(path)) == run
    assert load(None, ["--preset", "tiny", "--hybrid-layer-pattern", "GM*E"]).model.layers == {
        "M": MLPSettings()
    }
    # A model without the letter does not depend on who has registered it.
    assert load(None, ["--preset", "tiny", "--mlp-hidden-size", "24"]).model.layers == {}


def test_its_settings_are_checked():
    run = with_mlp(small_run(), width=41)
    run.model.language.num_experts = 8
    validate(run)
    run.parallel.tensor_model_parallel_size = 2
    with pytest.raises(ConfigError, match="mlp_hidden_size 41 does not divide by tensor_model_par"):
        validate(run)
    with pytest.raises(ConfigError, match="--mlp-hidden-size is 'x'; allowed: int"):
        load(None, ["--preset", "tiny", "--hybrid-layer-pattern", "GM*E", "--mlp-hidden-size", "x"])


def test_the_pattern_knows_it():
    layers = parse_pattern(PATTERN)
    assert [(layer.kind, layer.number) for layer in layers if layer.kind in "ME"] == [
        ("M", 0),
        ("E", 1),
        ("E", 2),
        ("M", 3),
    ]
    for pattern, words in (
        ("GMM", "'M' at position 3 needs a mixer (G or *) of its own before it"),
        ("G*M", "'G' at position 1 needs an E or C or M before '*' at position 2"),
        ("GX", "unknown letter 'X' at position 2; allowed: G, *, E, L, J, Q, V, C, M"),
    ):
        with pytest.raises(ConfigError) as error:
            parse_pattern(pattern)
        assert words in str(error.value) and "\n" not in str(error.value)


# ---- training, checkpoints, layouts


def saves_and_goes_on(run: RunConfig, folder: Path) -> tuple[dict, list[float]]:
    engine = create(run)
    train(engine, range(2))
    sharded.save(engine, {}, folder, 2)
    return whole(engine), train(engine, range(2, 5))


def resumes(run: RunConfig, folder: Path) -> tuple[dict, list[float]]:
    run.training.seed += 1  # what is not loaded differs
    engine = create(run)
    sharded.load(engine, folder)
    return whole(engine), train(engine, range(2, 5))


def test_it_trains_on_a_pipeline_and_resumes_on_tensor_parallel_ranks(ranks, tmp_path):
    def steps(parallel: dict, **training) -> RunConfig:
        run = with_mlp(tiny_run(parallel, **training))
        run.optimizer.lr = 1e-3
        return run

    pipeline = steps({"pp": 2}, recompute_granularity="full")
    saved, losses = ranks(2, on_rank, saves_and_goes_on, pipeline, tmp_path)[0]
    found, again = ranks(2, on_rank, resumes, steps({"tp": 2}), tmp_path)[0]
    assert (
        found.keys() == saved.keys()
        and "weight.language.layers.3.mlp.inner.linear_up.weight" in saved
    )
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor), name
    # The bound of checkpoint/test_reshard.py, for the same steps: sums in another order.
    assert again == pytest.approx(losses, rel=1e-6)
    assert len(set(losses)) == 3


def gradient_run(**training) -> RunConfig:
    return invariance_run(with_mlp(small_run()), **training)


@pytest.fixture(scope="module")
def reference(ranks):
    return {
        pad: ranks(1, on_rank, step_gradients, gradient_run(), parallel_config(), None, pad)[0]
        for pad in (1, 2)
    }


@pytest.mark.parametrize(
    ("sizes", "recompute"),
    [
        ({"pp": 2}, {"recompute_granularity": "full"}),
        ({"pp": 2}, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
        ({"tp": 2}, {}),
        ({"cp": 2}, {}),
    ],
)
def test_gradients_do_not_depend_on_the_layout(ranks, reference, sizes, recompute):
    run, parallel = gradient_run(**recompute), parallel_config(**sizes)
    loss, found = ranks(2, on_rank, step_gradients, run, parallel)[0]
    expected_loss, expected = reference[sizes.get("tp", 1) * sizes.get("cp", 1)]
    assert found.keys() == expected.keys()
    assert any(".mlp.inner.linear_gate" in name for name in found)
    # The bound of parallel/test_invariance.py: fp32 sums in another order.
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, value in expected.items():
        if name != "replicas":
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def balance_of_a_step(run: RunConfig) -> float:
    return new_trainer(run).step()["moe/load_balancing_loss"]


def test_layers_without_experts_have_no_share_in_their_balance(ranks, scenes):
    """1 is perfect; the mean over all four layers would be about half of it."""
    balance = ranks(1, on_rank, balance_of_a_step, with_mlp(digits_run(scenes)))[0]
    assert 0.95 < balance < 2


# ---- decoding

ASKED, NEW_TOKENS, NEVER = (0, 12, 8, 5), 6, -1


def decoded(run: RunConfig) -> list[list[int]]:
    """With caches, one token a step."""
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    prompts = Prompts(lambda i: questions[ASKED[i]].sample, ASKED)
    sampling = Sampling((NEVER,), NEW_TOKENS, 0.0, seed=3)
    found = generate(engine, prompts, sampling, max_num_seqs=4, pad_id=tokenizer.pad_id)
    return [completion.tokens_G.tolist() for (completion,) in found]


def computed_in_full(run: RunConfig) -> list[list[int]]:
    """Without caches: the whole sequence again for every token."""
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    answers = slow_generate(
        engine,
        [questions.joined([questions[i].sample]) for i in ASKED],
        stop_id=NEVER,
        pad_id=tokenizer.pad_id,
        max_new_tokens=NEW_TOKENS,
    )
    return [answer[0].tolist() for answer in answers]


def test_it_decodes_with_a_cache(ranks, scenes):
    run = with_mlp(digits_run(scenes))
    expected = ranks(1, on_rank, computed_in_full, run)[0]
    assert len({tuple(answer) for answer in expected}) == len(ASKED)
    run.parallel.pipeline_model_parallel_size = 2
    assert ranks(2, on_rank, decoded, run) == [expected] * 2


# ---- planning and counting


def plan_run(sizes: dict) -> RunConfig:
    run = layout_run(sizes, 1)  # routes are planned for layers 0 and 1: those have the experts
    return with_mlp(run, "GE *E GM L J *M")


def test_a_plan_is_what_a_step_takes(ranks):
    run = plan_run({"pp": 2, "recompute_granularity": "full"})
    plans = planned(run, 2)
    assert "M" in plans[1].layers[0]
    real = ranks(2, on_rank, measure, run, plans[0].microbatches)
    for plan, (state, peak, work, flops) in zip(plans, real, strict=True):
        assert plan.state == state and plan.step.sent == work.sent
        assert plan.activations == pytest.approx(peak, rel=0.05)  # as in perf/test_planned_layouts
        assert plan.step.flops == work.flops == flops > 0


def test_a_search_has_its_piece():
    run = plan_run({"tp": 2})
    pieces = trace_pieces(run, images=1, supervised=1.0)
    assert pieces.plans.keys() == {
        "first",
        "first, encoder beside",
        "last",
        *"G*EMJ",
        "L vision",
    }
    hidden, width = run.model.language.hidden_size, mlp_width(run)
    assert pieces.plans["M"].elements == (3 * hidden * width // 2 + hidden, 0)  # and its norm


@pytest.mark.parametrize("lora_rank", [None, 3])
def test_its_flops_are_those_of_torch(ranks, lora_rank):
    run = plan_run({})
    run.lora = LoraConfig(lora_rank=lora_rank)
    *_, counted = ranks(1, on_rank, measure, run, 1)[0]
    batch = the_batch(run)
    parts = executed_flops(run, batch, len(SupervisedFineTuning().positions(batch)))
    assert total(parts) == counted
    hidden, width = run.model.language.hidden_size, mlp_width(run)
    products = 3 * 2 * len(batch.tokens_T) * hidden * width  # of one layer; the model has two
    adapters = 2 * len(batch.tokens_T) * (lora_rank or 0) * (hidden + width)
    assert parts["mlp"].forward == 2 * (products + adapters)
    tokens, letters = run.data.seq_length, costs(run).letters
    assert letters["M"] == 3 * 2 * tokens * hidden * width and letters.keys() == {*"G*EMLJ"}


# ---- LoRA


def test_lora_adapts_the_linears_that_it_names(pg):
    run = with_mlp(small_run())
    run.lora = LoraConfig(lora_rank=3)
    names = [name for name, _ in build(run, pg)[0].named_parameters()]
    adapters = {name for name in names if is_adapter(name) and ".mlp." in name}
    assert adapters == {
        f"language.layers.{number}.mlp.inner.linear_down.lora.{part}"
        for number in (0, 3)
        for part in "ab"
    }


def test_the_example_of_the_readme_is_a_plug_in(tmp_path, monkeypatch):
    parts = {letter: kind for letter, kind in LAYERS._parts.items() if letter != "M"}
    monkeypatch.setattr(LAYERS, "_parts", parts)
    monkeypatch.syspath_prepend(tmp_path)
    text = (Path(interface.__file__).parent / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(# my_letters.py.*?)```", text, re.DOTALL)[1]
    (tmp_path / "my_letters.py").write_text(code)
    flags = ["--preset", "tiny", "--hybrid-layer-pattern", "GM*E", "--mlp-hidden-size", "512"]
    run = load(None, ["--plugins", "my_letters", *flags])
    validate(run)
    assert run.model.layers["M"].mlp_hidden_size == 512
    rows, hidden = run.data.seq_length, run.model.language.hidden_size
    assert costs(run).letters["M"] == 3 * 2 * rows * hidden * 512


# ---- conversion


def test_it_is_converted_both_ways_and_computes_what_transformers_does(one_rank, tmp_path):
    pattern = "GM*E*M"
    model = small_model(pattern, image_stream="all", vision_memory="none")
    model = replace(model, layers={"M": MLPSettings(40)})
    hf = save_fused(tmp_path / "in", model)
    assert type(hf.model.language_model.layers[0].mlp).__name__ == "Qwen3NextMLP"
    source = to_checkpoint(tmp_path / "in", tmp_path / "mega")
    assert source.model.hybrid_layer_pattern == pattern
    assert source.model.layers == {"M": MLPSettings(40)}
    to_folder(tmp_path / "mega", tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), read_all(tmp_path / "in"))
    # Layer by layer and the logits, to the bound of tools/check_parity.py.
    opened, run = to_hf.open_checkpoint(tmp_path / "mega"), RunConfig(model=source.model)
    loaded = hf_model.load_transformers(tmp_path / "out", trust_remote_code=False)
    cases = parity.built_in_cases(run, source.image_token_id)
    mcore = parity.mcore_model(opened, one_rank)
    found = list(parity.compare_outputs(opened, mcore, loaded, run, cases))
    assert len(found) >= 4 and max(case.size for case in found) <= parity.TOLERANCE


@pytest.mark.launches
def test_commands_take_its_module_and_say_that_it_is_missing(one_rank, tmp_path):
    """A checkpoint names the modules of its letters and imports none of them by itself."""
    model = small_model("GM*E*M", image_stream="all", vision_memory="none")
    save_fused(tmp_path / "in", replace(model, layers={"M": MLPSettings(40)}))
    (tmp_path / "my_letters.py").write_text(
        "from megatron_mm.config.layers.kinds import LAYERS\n"
        "from support.new_letter import MLP\n"
        "LAYERS.register('M', MLP)\n"
    )
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(map(str, (root, root / "tests", tmp_path)))

    def call(tool: str, *flags: object) -> subprocess.CompletedProcess:
        command = [sys.executable, root / "tools" / tool, *flags]
        return subprocess.run(
            [*map(str, command)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    own = ("--plugins", "my_letters")
    made = call("hf_to_megatron.py", "--hf", tmp_path / "in", "--out", tmp_path / "mega", *own)
    assert made.returncode == 0, made.stderr
    out = ("--checkpoint", tmp_path / "mega", "--out", tmp_path / "out")
    found = call("megatron_to_hf.py", *out)
    assert found.returncode == 1 and found.stderr.count("\n") == 1
    assert "M; allowed: C, Q; the run had plug-ins: name them with --plugins 'my_letters'" in (
        found.stderr
    )
    found = call("megatron_to_hf.py", *out, *own)
    assert found.returncode == 0, found.stderr
    assert_same(read_all(tmp_path / "out"), read_all(tmp_path / "in"))


def test_a_letter_without_words_in_transformers_is_one_line(monkeypatch):
    monkeypatch.setitem(LAYERS._parts, "M", replace(MLP, hf_config=None))
    with pytest.raises(ConfigError, match=r"letter M \(gated MLP\) has no words in transformers'"):
        to_transformers_dict(with_mlp(small_run()).model, image_token_id=1)
