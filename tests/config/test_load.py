"""Presets, YAML and flags into one run; names and types are refused with one line."""

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_mm.config import (
    ConfigError,
    DataPhase,
    RunConfig,
    dump_yaml,
    from_dict,
    load,
    make_parser,
    preset,
    to_dict,
    validate,
    vision_preset,
)
from megatron_mm.config.flags import flag_name
from megatron_mm.config.tree import leaves

EXAMPLES = sorted(
    path
    for path in (Path(__file__).parents[2] / "examples").rglob("*.yaml")
    if path.parent.name != "launch"  # a manifest, no run
)


@pytest.fixture
def write(tmp_path):
    def _write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return _write


def refused(words, call, *args):
    with pytest.raises(ConfigError) as error:
        call(*args)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("word", ["-1e-3", "-2.", "-.5", "-1.5E+2", "-3"])
def test_a_negative_number_is_no_flag(word):
    run = load(argv=["--objective", "grpo", "--entropy-coef", word, "--reward-weights", "1", word])
    rl = run.objectives["rl"]
    assert (rl.entropy_coef, rl.reward_weights) == (float(word), [1.0, float(word)])


def test_import_brings_no_heavy_library():
    code = (
        "import sys, megatron_mm.config as c; c.load(None, ['--preset', 'tiny']);"
        "print([m for m in ('torch', 'transformers', 'megatron', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr


def test_nothing_given_is_the_schema():
    assert load() == RunConfig()


def test_flags_over_yaml_over_preset(write):
    path = write("model: {preset: tiny, language: {hidden_size: 192, num_experts: 16}}\n")
    run = load(path, ["--num-experts", "32"])
    assert run.model.language.vocab_size == 384  # preset
    assert run.model.language.hidden_size == 192  # YAML
    assert run.model.language.num_experts == 32  # flag
    assert run.model.vision == preset("tiny").vision


def test_preset_flag_replaces_the_preset_but_not_the_overrides(write):
    path = write("model: {preset: tiny, language: {num_experts: 16}}\n")
    model = load(path, ["--preset", "qwen3-next-80b-a3b"]).model
    assert model.vision is None
    assert (model.language.hidden_size, model.language.num_experts) == (2048, 16)


def test_vision_preset_inside_the_model(write):
    text = "model: {preset: mm-80b, vision: {preset: internvit-300m, image_size: 224}}\n"
    model = load(write(text)).model
    assert model.vision == dataclasses.replace(vision_preset("internvit-300m"), image_size=224)
    assert model.hybrid_layer_pattern == preset("mm-80b").hybrid_layer_pattern
    model = load(write("model: {preset: mm-80b, vision: null}\n")).model
    assert model.vision is None
    model = load(write("model: {preset: qwen3-next-80b-a3b, vision: {preset: internvit-6b}}")).model
    assert model.vision == vision_preset("internvit-6b")


def test_presets_are_fresh_each_time():
    preset("tiny").language.hidden_size = 1
    assert preset("tiny").language.hidden_size == 96


@pytest.mark.parametrize(
    "name",
    ["tiny", "small", "qwen3-next-80b-a3b", "mm-80b", "qwen3.5-35b-a3b", "qwen3.5-397b-a17b"],
)
def test_yaml_round_trip(name, write):
    run = load(None, ["--preset", name, "--train-data", "a.jsonl:10", "b.jsonl", "--lr", "1e-5"])
    assert load(write(dump_yaml(run))) == run
    assert from_dict(RunConfig, to_dict(run)) == run
    validate(run, 1)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_parses_and_validates(path):
    validate(load(str(path)))


def test_the_80b_example_fits_256_ranks():
    (path,) = (path for path in EXAMPLES if path.name == "mm-80b.yaml")
    run = load(str(path))
    validate(run, 256)
    refused(["world_size 8", "(1 * 16 * 1 =) 16"], validate, run, 8)


def test_floats_take_ints_and_text_without_a_dot(write):
    run = load(write("optimizer: {lr: 1e-4, min_lr: 0, weight_decay: '0.1'}\n"))
    assert (run.optimizer.lr, run.optimizer.min_lr, run.optimizer.weight_decay) == (1e-4, 0.0, 0.1)
    assert type(run.optimizer.min_lr) is float


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: {}", ["modle", "did you mean model?"]),
        ("optimizer: {zzz: 1}", ["optimizer: zzz", "allowed: adam_beta1, ", "weight_decay"]),
        ("model: {language: {hiden_size: 1}}", ["model.language: hiden_size", "hidden_size?"]),
        ("model: {preset: tinny}", ["model preset tinny", "tiny"]),
        (
            "model: {preset: huge}",
            [
                "huge",
                "allowed: mm-80b, mm-80b-300m, qwen3-next-80b-a3b, qwen3.5-35b-a3b, "
                "qwen3.5-397b-a17b, small, tiny",
            ],
        ),
        ("model: {preset: [tiny]}", ["model.preset is ['tiny']", "allowed: text"]),
        ("model: {vision: {preset: vit}}", ["vit", "allowed: internvit-300m, internvit-6b"]),
        ("model: 3", ["model is 3", "allowed: a mapping with the keys hybrid_layer_pattern"]),
        ("model:", ["model is None", "allowed: a mapping"]),
        ("training: {seed: 1.5}", ["training.seed is 1.5", "allowed: int"]),
        ("training: {seed: '1'}", ["training.seed is '1'", "allowed: int"]),
        ("training: {seed: true}", ["training.seed is True", "allowed: int"]),
        ("training: {train_iters: 010}", ["training.train_iters is '010'", "allowed: int"]),
        ("optimizer:\n  lr: 1:30", ["optimizer.lr is '1:30'", "allowed: float"]),
        ("training: {bf16: 1}", ["training.bf16 is 1", "allowed: true or false"]),
        ("training: {bf16: 'yes'}", ["training.bf16 is 'yes'", "allowed: true or false"]),
        ("optimizer: {lr: fast}", ["optimizer.lr is 'fast'", "allowed: float"]),
        ("optimizer: {lr: true}", ["optimizer.lr is True", "allowed: float"]),
        ("optimizer: {lr: .nan}", ["optimizer.lr is nan", "allowed: float"]),
        ("optimizer: {lr: .inf}", ["optimizer.lr is inf", "allowed: float"]),
        ("optimizer: {lr: null}", ["optimizer.lr is None", "allowed: float"]),
        ("logging: {wandb_mode: on}", ["wandb_mode is True", "disabled, offline, online"]),
        ("model: {fusion: {image_stream: al}}", ["'al'", "allowed: thumbnail, tiles, all"]),
        ("checkpoint: {save: 3}", ["checkpoint.save is 3", "allowed: text or none"]),
        ("data: {image_mean: 0.5}", ["data.image_mean is 0.5", "allowed: a list of float"]),
        ("data: {image_mean: [0.5, x]}", ["data.image_mean[1] is 'x'", "allowed: float"]),
        ("data: {train_data: [a]}", ["train_data[0] is 'a'", "keys path, samples"]),
        (
            "data: {train_data: [{file: a}]}",
            ["data.train_data[0]: file", "mixture, path, samples"],
        ),
        ("data: {train_data: [{path: a, samples: x}]}", ["train_data[0].samples is 'x'", "int"]),
        ("training: {seed: 1, bf16: true, seed: 2}", ["line 1", "key seed is given twice"]),
        ("- 1", ["holds a list", "allowed: a mapping of sections"]),
        ("a: [", ["is not YAML"]),
        ("a: !!python/object:os.system {}", ["line 1: the tag 'python/object:os.system'"]),
    ],
)
def test_bad_yaml(write, text, words):
    refused(words, load, write(text))


def test_missing_file():
    refused(["nowhere.yaml", "No such file", "allowed: a YAML file"], load, "nowhere.yaml")


def test_leaf_names_are_unique_and_each_is_a_flag():
    names = [leaf.name for leaf in leaves(RunConfig)]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert not {"config", "preset", "help"} & set(names)
    text = make_parser().format_help()
    assert all(flag_name(leaf) in text for leaf in leaves(RunConfig))
    assert "default: 0.0001 [optimizer]" in text


def test_every_kind_of_flag():
    argv = "--no-tensorboard --bf16 --tensor-model-parallel-size 2 --lr=2e-3 --save-interval none"
    argv += " --save out --image-mean 0.5 -0.5 1 --vision-memory none --eval-interval 5"
    argv += " --train-data a.jsonl:5 s3://x/b.jsonl --expert-tensor-parallel-size 1"
    run = load(None, argv.split())
    assert (run.logging.tensorboard, run.training.bf16) == (False, True)
    assert run.parallel.tensor_model_parallel_size == 2
    assert run.parallel.expert_tensor_parallel_size == 1
    assert (run.optimizer.lr, run.data.image_mean) == (2e-3, [0.5, -0.5, 1.0])
    assert (run.checkpoint.save, run.checkpoint.save_interval) == ("out", None)
    assert (run.model.fusion.vision_memory, run.evaluation.eval_interval) == ("none", 5)
    assert run.data.train_data == [DataPhase("a.jsonl", 5), DataPhase("s3://x/b.jsonl", None)]


def test_a_flag_can_take_back_what_the_file_says(write):
    path = write("checkpoint: {save: out}\ntraining: {bf16: true}\n")
    run = load(path, ["--save", "none", "--no-bf16"])
    assert (run.checkpoint.save, run.training.bf16) == (None, False)


def test_none_is_the_word_for_what_is_absent_in_files_too(write):
    """The page of the settings prints it as the default."""
    base = "checkpoint: {save: out, load: there}\ndata: {extra_columns: [a], valid_data: b}\n"
    path = write(base + "logging: {wandb_project: none}\n")
    assert load(path).logging.wandb_project == "none"  # text that must be there
    name = Path(path).name
    over = write(
        f"base: {name}\ncheckpoint: {{save: none}}\ndata: {{extra_columns: none}}\n", "over.yaml"
    )
    run = load(over, ["--load", "none"])
    assert (run.checkpoint.save, run.checkpoint.load, run.data.extra_columns) == (None, None, [])
    run = load(path, ["--extra-columns", "none", "--valid-data", "none"])
    assert (run.data.extra_columns, run.data.valid_data, run.checkpoint.save) == ([], None, "out")


def test_config_flag_wins_over_the_path(write):
    assert load("nowhere.yaml", ["--config", write("training: {seed: 7}")]).training.seed == 7


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lrr", "1"], ["unknown flag --lrr", "did you mean", "--lr"]),
        (["--no-bf61"], ["unknown flag --no-bf61", "--no-bf16"]),
        (["--qqqqqq=3"], ["unknown flag --qqqqqq;", "--help"]),
        (["--tensor-model-parallel", "2"], ["--tensor-model-parallel;", "-parallel-size"]),
        (["--lr"], ["--lr", "expected one argument"]),
        (["--lr", "fast"], ["--lr is 'fast'", "allowed: float"]),
        (["--seed", "1.5"], ["--seed is '1.5'", "allowed: int"]),
        (["--seed", "none"], ["--seed is 'none'", "allowed: int"]),
        (["--save-interval", "x"], ["--save-interval is 'x'", "allowed: int or none"]),
        (["--bf16", "true"], ["unexpected value 'true'", "--no-flag"]),
        (["--image-stream", "one"], ["--image-stream is 'one'", "thumbnail, tiles, all"]),
        (
            ["--train-data", "a:100", "--lr", "1", "--train-data", "b"],
            ["--train-data is given twice", "all its values behind it"],
        ),
        (["--image-std", "1", "x"], ["--image-std[1] is 'x'", "allowed: float"]),
        (["--train-data", "a.jsonl:many"], ["'a.jsonl:many'", "path:samples"]),
        (["--preset", "huge"], ["huge", "allowed: mm-80b"]),
        (
            ["--preset", "qwen3-next-80b-a3b", "--image-size", "224"],
            ["--image-size needs model.vision, which is none"],
        ),
    ],
)
def test_bad_flags(argv, words):
    refused(words, load, None, argv)


def test_a_mixture_and_the_data_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "data:\n  train_data:\n"
        "    - {mixture: [{path: a.jsonl, weight: 3}, {path: b.parquet}], samples: 1000}\n"
        "    - {path: c.jsonl}\n"
    )
    flags = ["--packing", "--num-workers", "4", "--max-image-tokens", "3072"]
    data = load(str(path), flags).data
    first, second = data.train_data
    assert [(s.path, s.weight) for s in first.mixture] == [("a.jsonl", 3.0), ("b.parquet", 1.0)]
    assert (first.path, first.samples, second.path, second.mixture) == ("", 1000, "c.jsonl", [])
    assert (data.packing, data.num_workers, data.max_image_tokens) == (True, 4, 3072)
    path.write_text("data: {train_data: [{mixture: [{path: a, weight: .nan}]}]}")
    with pytest.raises(ConfigError, match=r"mixture\[0\].weight is nan; allowed: float"):
        load(str(path))


def test_a_file_over_its_base(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(
        "model: {preset: tiny}\ntraining: {train_iters: 5, seed: 3}\ndata: {seq_length: 64}\n"
    )
    (tmp_path / "sub" / "middle.yaml").write_text("base: ../base.yaml\ntraining: {seed: 4}\n")
    (tmp_path / "sub" / "top.yaml").write_text("base: middle.yaml\ndata: {seq_length: 32}\n")
    run = load(str(tmp_path / "sub" / "top.yaml"), ["--train-iters", "7"])
    assert (run.training.train_iters, run.training.seed, run.data.seq_length) == (7, 4, 32)
    assert run.model == preset("tiny")
    (tmp_path / "base.yaml").write_text("base: sub/top.yaml\n")
    with pytest.raises(ConfigError, match="is a base of its own base"):
        load(str(tmp_path / "sub" / "top.yaml"))
    (tmp_path / "base.yaml").write_text("base: [a]\n")
    with pytest.raises(ConfigError, match="allowed: the path of a YAML file"):
        load(str(tmp_path / "base.yaml"))
