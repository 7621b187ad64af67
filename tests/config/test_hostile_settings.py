"""Settings made to raise what no one expects, or to begin work without an end: one line each."""

import time

import pytest

from megatron_mm.config import ConfigError, load, validate
from megatron_mm.plugins import Registry, parse_specs

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGE_BOMB = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)
DIGITS = "9" * 5000
FILES = {
    "a date": "training: {seed: 2026-01-01}",
    "a date that is none": "training: {seed: 2026-13-45}",
    "a time": "training: {seed: 2026-01-01 10:00:00}",
    "a date as a key": "2026-01-01: 3",
    "a tag of Python": "training: !!python/object/apply:os.system ['touch ran']",
    "a tag of Python's names": "training: {seed: !!python/name:os.system ''}",
    "a tag of one's own": "training: !run {seed: 3}",
    "a set": "training: !!set {seed}",
    "an ordered mapping": "training: !!omap [seed: 3]",
    "bytes": "training: {seed: !!binary AAAA}",
    "a time by tag": "training: {seed: !!timestamp never}",
    "a number by tag": "training: {seed: !!int three}",
    "a float by tag": "training: {seed: !!float three}",
    "a truth by tag": "training: {bf16: !!bool perhaps}",
    "a list by tag": "training: !!seq {a: 1}",
    "nested lists": "training: " + "[" * 20_000,
    "nested closed lists": "training: " + "[" * 3000 + "]" * 3000,
    "nested mappings": "training: " + "{a: " * 3000 + "1" + "}" * 3000,
    "nested blocks": "\n".join(" " * n + "a:" for n in range(800)),
    "digits": f"training: {{seed: {DIGITS}}}",
    "negative digits": f"training: {{seed: -{DIGITS}}}",
    "hexadecimal digits": f"training: {{seed: 0x{DIGITS}}}",
    "octal digits": f"training: {{seed: 0{'7' * 5000}}}",
    "sixties": f"training: {{seed: {'1:' * 5000}1}}",
    "a float of digits": f"optimizer: {{lr: {DIGITS}.0}}",
    "a float as text": f"optimizer: {{lr: '{DIGITS}'}}",
    "infinity": "optimizer: {lr: .inf}",
    "no number": "optimizer: {lr: .nan}",
    "a float too large": "optimizer: {lr: 1.0e+999}",
    "a list in a list": "training: &a [*a]",
    "a mapping in itself": "training: &a {seed: *a}",
    "a merge of itself": "training: &a {<<: *a}",
    "an alias bomb": BOMB,
    "a bomb of merges": MERGE_BOMB,
    "NUL in text": 'checkpoint: {save: "a\\0b"}',
    "NUL in a base": 'base: "a\\0b"',
    "NUL in the file": "training:\0 {seed: 3}",
    "long text": f"checkpoint: {{save: {'a' * 100_000}}}",
    "a long key": f"{'a' * 100_000}: 3",
    "a key of a list": "? [a]\n: 3",
    "a key of nothing": "null: 3",
    "a default's sign": "training: {seed: =}",
    "two documents": "training: {seed: 3}\n---\ntraining: {seed: 4}",
    "an unknown alias": "training: *a",
    "half a file": "training: {seed: 3",
    "tabs": "training:\n\tseed: 3",
    "a million bytes": "# " + "a" * 2**20,
    "no Unicode": b"training: {seed: \xff}",
    "UTF-16": "training: {seed: 3}".encode("utf-16"),
    "empty save": "checkpoint: {save: ''}",
    "blank save": "checkpoint: {save: ' '}",
    "empty output": "logging: {output_dir: ''}",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = FILES[kind]
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    begin = time.process_time()
    with pytest.raises(ConfigError) as caught:
        validate(load(str(path), ["--train-data", "rows.jsonl"]))
    message = str(caught.value)
    assert "\n" not in message and "\0" not in message and len(message) < 1200, message[:2000]
    assert time.process_time() - begin < 3
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


FLAGS = {
    "seed of 2^31": ["--seed", str(2**31)],
    "seed of 2^70": ["--seed", str(2**70)],
    "seed of digits": ["--seed", DIGITS],
    "2^40 batches": ["--global-batch-size", str(2**40)],
    "2^30 batches": ["--global-batch-size", str(2**30)],
    "2^40 rows": ["--micro-batch-size", str(2**40)],
    "2^25 rows": ["--micro-batch-size", str(2**25), "--global-batch-size", str(2**25)],
    "10^5 workers": ["--num-workers", "100000"],
    "10^5 reward workers": ["--objective", "grpo", "--reward-num-workers", "100000"],
    "2^30 completions": ["--objective", "grpo", "--num-generations", str(2**30)],
    "10^6 tiles": ["--max-num-tiles", "1000000"],
    "2^20 experts": ["--num-experts", str(2**20)],
    "2^20 layers of the ViT": ["--vision-num-layers", str(2**20)],
    "a pattern of letters": ["--hybrid-layer-pattern", "GE" * 200_000],
    "a pattern of stars": ["--hybrid-layer-pattern", "*" * 400_000],
    "a pattern of spaces": ["--hybrid-layer-pattern", " " * 400_000],
    "a layout": ["--pipeline-model-parallel-layout", "GE|" * 20_000],
    "samples of digits": ["--train-data", f"rows.jsonl:{DIGITS}"],
    "NUL": ["--save", "a\0b"],
    "a flag of letters": ["--" + "a" * 10_000],
    "a value of letters": ["--bf16", "a" * 10_000],
    "an empty save": ["--save", ""],
    "an empty load": ["--load", ""],
}


@pytest.mark.parametrize("kind", FLAGS)
def test_a_bad_flag_is_one_line(kind):
    begin = time.process_time()
    with pytest.raises(ConfigError) as caught:
        validate(load(None, ["--train-data", "rows.jsonl", *FLAGS[kind]]), 1)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1200
    assert time.process_time() - begin < 3


def test_the_longest_pattern_is_dealt_in_seconds():
    from megatron_mm.config.pattern import stages

    begin = time.process_time()
    found = stages("GE" * 512, 64)
    assert len(found) == 64 and sum(len(stage.layers) for stage in found) == 1024
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    "entry",
    ["exact(" + "[" * 5000, "exact(a=" + "(" * 250 + ")" * 250 + ")", "exact(a={[]: 1})"]
    + [f"exact(a={DIGITS})", "exact\0", "(" * 9000, "-" * 9000 + "1", "a." * 6000, "exact(**{})"],
)
def test_a_reward_that_cannot_be_read_is_one_line(entry):
    registry = Registry("reward", {"exact": "megatron_mm.rl.rewards.text.exact"})
    with pytest.raises(ConfigError, match="cannot be read|dotted path") as caught:
        parse_specs([entry], registry)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
