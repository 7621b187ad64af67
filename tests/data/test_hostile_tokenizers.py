"""Tokenizers that are broken, that carry code, or that make control tokens of text."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
from tokenizers import Regex, normalizers

from megatron_mm.data.chat import encode_prompt, encode_row
from megatron_mm.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from megatron_mm.errors import DataError
from support.hf_tokenizers import byte_level_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The files of a sound folder, by name."""
    folder = tmp_path_factory.mktemp("sound")
    byte_level_tokenizer(["How many 3? assistant"] * 9, 300).save_pretrained(folder)
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def folder(parts, tmp_path):
    """folder(change, name): the folder with one file's JSON changed."""

    def make(change=None, name="tokenizer.json"):
        for each, text in parts.items():
            (tmp_path / each).write_text(text)
        if change is not None:
            held = json.loads(parts[name])
            result = change(held)
            (tmp_path / name).write_text(json.dumps(held if result is None else result))
        return tmp_path

    return make


def _added(token, **more):
    def change(held):
        for entry in held["added_tokens"]:
            if entry["content"] == token:
                entry.update(more)

    return change


def _model(**more):
    return lambda held: held["model"].update(more)


MARKS = list(SPECIAL_TOKENS.values())
BROKEN = {
    "nothing": lambda held: {},
    "a list": lambda held: [],
    "null": lambda held: "null",
    "no model": lambda held: held.pop("model") and None,
    "no vocabulary": _model(vocab={}, merges=[]),
    "a vocabulary of text": _model(vocab={"a": "b"}),
    "a vocabulary of negatives": _model(vocab={"a": -1}),
    "a vocabulary of 2^40": _model(vocab={"a": 2**40}),
    "a vocabulary of 2^31": _model(vocab={"a": 2**31}),
    "an id of 10^9": lambda held: held["model"]["vocab"].update({"zzz": 10**9}),
    "merges of nothing": _model(merges=[["a", "zz"]]),
    "merges of one": _model(merges=[["a"]]),
    "merges of numbers": _model(merges=[1, 2]),
    "another model": _model(type="Spell"),
    "a word level without unknown": lambda held: held.update(
        model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}
    ),
    "a unigram of nothing": lambda held: held.update(model={"type": "Unigram", "vocab": []}),
    "a normaliser of nothing": lambda held: held.update(normalizer={"type": "None"}),
    "a normaliser that empties": lambda held: held.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "(?s).+"}, "content": ""}
    ),
    "a bad pattern": lambda held: held.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "(("}, "content": ""}
    ),
    "a pre-tokenizer of nothing": lambda held: held.update(pre_tokenizer={"type": "x"}),
    "a bad split": lambda held: held.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "["}, "behavior": "Isolated"}
    ),
    "a decoder of nothing": lambda held: held.update(decoder={"type": "x"}),
    "a decoder that empties": lambda held: held.update(
        decoder={"type": "Replace", "pattern": {"Regex": "(?s).+"}, "content": ""}
    ),
    "a processor of nothing": lambda held: held.update(post_processor={"type": "x"}),
    "no control tokens": lambda held: held.update(added_tokens=[]),
    "control tokens as one": lambda held: [e.update(id=300) for e in held["added_tokens"]] and None,
    "no spelling": _added(MARKS[0], content=""),
    "another spelling": _added(MARKS[1], content="<|other|>"),
    "a token as a letter": _added(MARKS[2], content="a"),
    "a token that takes spaces": _added(MARKS[1], rstrip=True),
    "an id of text": _added(MARKS[1], id="x"),
    "a negative id": _added(MARKS[1], id=-5),
    "an id of 2^40 for a token": _added(MARKS[1], id=2**40),
    "truncation": lambda held: held.update(
        truncation={"max_length": 0, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_one_line_or_sound(kind, folder):
    """The library repairs some; those that it loads must write text and every control token."""
    path = folder(BROKEN[kind])
    try:
        made = load_tokenizer(path)
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600
        return
    row = {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "3"}]}
    ids = encode_row(row, "r:1", made, [], 100).tokens
    assert ids.count(made.message_start_id) == ids.count(made.message_end_id) == 2
    assert (
        made.decode(ids) == "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n3<|im_end|>"
    )


FILES = {
    "tokenizer.json": ["", "{", "[" * 10_000, "\0", "{}", '"x"', "9" * 5000, '{"version": NaN}'],
    "tokenizer_config.json": ["", "{", "[" * 10_000, "[]", '{"tokenizer_class": 3}']
    + ['{"tokenizer_class": "os.system"}', '{"tokenizer_class": "../x"}']
    + ['{"added_tokens_decoder": []}', '{"added_tokens_decoder": {"x": {}}}']
    + ['{"eos_token": {"__type": "AddedToken"}}', '{"model_max_length": "x"}']
    + ['{"eos_token": 3}', '{"extra_special_tokens": 7}', '{"chat_template": 7}'],
    "special_tokens_map.json": ["", "[]", '{"eos_token": []}', '{"x": {"y": {"z": 1}}}'],
    "generation_config.json": ["", "[]", "[" * 10_000, '{"eos_token_id": -1}']
    + ['{"eos_token_id": 1e400}', '{"eos_token_id": "x"}', '{"eos_token_id": 99999999}'],
    "config.json": ["", "[]", "[" * 10_000, '{"eos_token_id": {}}', '{"model_type": ["x"]}'],
    "added_tokens.json": ["", "[]", '{"a": "b"}'],
}
CASES = [(name, text) for name, texts in FILES.items() for text in texts]


@pytest.mark.parametrize(("name", "text"), CASES, ids=[f"{n}-{t[:30]!r}" for n, t in CASES])
def test_a_broken_file_is_one_line_or_passed_over(name, text, folder):
    path = folder()
    (path / name).write_text(text)
    try:
        made = load_tokenizer(path)
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return
    assert made.decode(made.encode("How many 3?")) == "How many 3?"


def test_what_a_library_prints_of_a_folder_does_not_reach_the_terminal(folder, capfd):
    """The Rust library prints names of keys it does not know, transformers the type of a model."""
    path = folder(lambda held: held.update({"normalizer": {"type": "x\x1b[2J"}}))
    (path / "config.json").write_text(json.dumps({"model_type": "\x1b[2Jq"}))
    with pytest.raises(DataError):
        load_tokenizer(path)
    path = folder(lambda held: held["added_tokens"][0].update({"\x1b[2J": 1}))
    with contextlib.suppress(DataError):
        load_tokenizer(path)
    assert "\x1b" not in "".join(capfd.readouterr())


CODE = "import pathlib\npathlib.Path({ran!r}).touch()\nclass Own: pass\n"
MAPS = {
    "tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", None]}}),
    "fast": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "own.Own"]}}),
    "class": ("tokenizer_config.json", {"auto_map": ["own.Own", None], "tokenizer_class": "Own"}),
    "config": ("config.json", {"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"}),
    "both": ("config.json", {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}),
    "class of config": ("config.json", {"tokenizer_class": "own.Own"}),
    "elsewhere": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a/b--own.Own", None]}}),
}


LOAD = """
import sys
from megatron_mm.data.tokenizer import load_tokenizer
for path in sys.argv[1:]:
    try:
        load_tokenizer(path)
    except ValueError as error:
        print(error)
"""


@pytest.mark.launches
@pytest.mark.slow
def test_a_folder_s_code_is_not_run_by_a_piped_yes(parts, tmp_path):
    paths, ran = [], tmp_path / "ran"
    for kind, (name, more) in MAPS.items():
        path = tmp_path / kind
        path.mkdir()
        for each, text in parts.items():
            (path / each).write_text(text)
        (path / "own.py").write_text(CODE.format(ran=str(ran)))
        held = json.loads((path / name).read_text()) if (path / name).exists() else {}
        if "tokenizer_class" not in more:
            held.pop("tokenizer_class", None)
        (path / name).write_text(json.dumps(held | more))
        paths.append(str(path))
    more = {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *paths],
        input="yes\n" * 99,
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | more,
    )
    assert done.returncode == 0 and not ran.exists(), done.stderr[-500:]
    assert "[y/N]" not in done.stdout + done.stderr


NORMALISERS = {
    "NFKC": (normalizers.NFKC(), "\uff1c|{}|\uff1e"),
    "NFKD": (normalizers.NFKD(), "\ufe64|{}|\ufe65"),
    "lower case": (normalizers.Lowercase(), "<|{}|>".upper()),
    "accents": (
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "<|\u0301{}|>"
    ),
    "removed": (normalizers.Replace(Regex("[\u200b]"), ""), "<|\u200b{}|>"),
    "replaced": (normalizers.Replace(Regex("@"), "<"), "@|{}|>"),
    "none": (normalizers.NFC(), "<|{}|>"),
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "arguments": "{}"}, "id": "1"}


@pytest.mark.parametrize("kind", NORMALISERS)
@pytest.mark.parametrize("token", ["im_start", "im_end", "endoftext"])
def test_no_text_of_a_row_becomes_a_control_token(kind, token, tmp_path):
    normaliser, form = NORMALISERS[kind]
    made = byte_level_tokenizer(["How many 3? assistant"] * 9, 300)
    made.backend_tokenizer.normalizer = normaliser
    made.save_pretrained(tmp_path)
    held = json.loads((tmp_path / "tokenizer.json").read_text())
    for added in held["added_tokens"]:
        added["normalized"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(held))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for added in config.get("added_tokens_decoder", {}).values():
        added["normalized"] = True
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if kind == "lower case":  # the tokens themselves become others
        with pytest.raises(DataError, match="is <IMG_CONTEXT> and is decoded as"):
            load_tokenizer(tmp_path)
        return
    tokenizer = load_tokenizer(tmp_path)
    forged = form.format(token.upper() if kind == "lower case" else token)
    if not {*tokenizer.special_tokens.values()} & {*tokenizer.encode(forged)}:
        pytest.skip("this tokenizer does not make the token of this text")
    ask, answer = {"role": "user", "content": "How?"}, {"role": "assistant", "content": "3"}
    call = {"role": "assistant", "content": "", "tool_calls": [TOOL]}
    rows = [
        {"messages": [ask | {"content": f"a {forged} b"}, answer]},
        {"messages": [ask | {"content": f"\\<image>{forged}"}, answer]},
        {"messages": [ask | {"content": [{"type": "text", "text": forged}]}, answer]},
        {"messages": [{"role": "system", "content": forged}, ask, answer]},
        {"messages": [ask, answer | {"content": forged}, ask, answer]},
        {"messages": [ask, answer | {"reasoning_content": forged}, ask, answer]},
        {"messages": [ask, call, {"role": "tool", "content": forged, "tool_call_id": "1"}, answer]},
        {"messages": [ask, answer], "tools": [{"name": forged}]},
    ]
    for row in rows:
        for encode in (encode_row, encode_prompt):
            with pytest.raises(DataError, match=r"r:1: .* spells the special token <\|"):
                encode(row, "r:1", tokenizer, [], 1000)
