"""The front page and the pages of the rooms: every file, flag, link and command in them exists."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from megatron_mm.config.megatron import ALWAYS, REFUSED

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FOLDERS = ("megatron_mm", "tools", "examples")
# Flags of other people's commands, by what a section or command that shows them has in it.
FOREIGN = {
    "torchrun": {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"},
    "pip install": {"--no-build-isolation", "--no-index", "--find-links"},
    "pip wheel": {"--no-build-isolation", "--no-deps"},
    "pip download": {"--no-deps", "--only-binary", "--python-version", "--platform"},
    "apex": {"--cpp_ext", "--cuda_ext"},
    "Megatron's flags that are no settings": {*ALWAYS, *REFUSED, "--freeze-"},  # --freeze-LM
}
SOURCES = ("py", "sh", "yaml", "sbatch", "j2", "jinja", "toml", "txt", "json")

RUN_EXAMPLES = """
import json, sys
from megatron_mm import platform
platform.install()
for page, code in json.load(sys.stdin):
    try:
        exec(compile(code, page, "exec"), {"__name__": "example"})
    except Exception as error:
        sys.exit(f"{page}: {type(error).__name__}: {error} in the example\\n{code}")
"""


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout", allow_module_level=True)
    return [Path(line) for line in done.stdout.splitlines()]


def pages() -> list[Path]:
    found = [ROOT / path for path in tracked() if path.suffix == ".md"]
    assert README in found and len(found) > 15
    return found


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Shell commands on one line each, without what a here-document holds."""
    text = "\n".join(fenced(page, "sh"))
    text = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_front_page_is_short():
    assert len(text_of(README).splitlines()) <= 180


def test_every_source_file_is_named_in_the_page_of_its_room():
    known = {page.parent for page in pages() if page.name == "README.md"}
    files = [path for path in tracked() if path.parts[0] in FOLDERS]
    files = [path for path in files if path.name != "__init__.py" and path.suffix != ".md"]
    missing = []
    for path in files:
        folder = next(parent for parent in (ROOT / path).parents if parent in known)
        inside = (ROOT / path).relative_to(folder).as_posix()
        names = {inside}
        if sum(other.name == path.name for other in files) == 1:
            names.add(path.name)
        if not any(f"`{entry}`" in text_of(folder / "README.md") for entry in names):
            missing.append(f"{name(folder / 'README.md')} lacks {inside}")
    assert len(files) > 200
    assert not missing, "\n".join(missing)


def test_every_file_named_exists():
    known = {path.name for path in tracked()} | {path.as_posix() for path in tracked()}
    named, missing = 0, []
    for page in pages():
        pattern = rf"`([\w./-]+\.(?:{'|'.join(SOURCES)}))`"
        for entry in re.findall(pattern, text_of(page)):
            # What runs write is no source: `results.json`, `map.json`, `runs/...`.
            if entry.endswith(".json") and "benchmarks" not in entry or entry.startswith("runs/"):
                continue
            named += 1
            bases = (page.parent, ROOT / "megatron_mm", ROOT / "tests")
            if entry not in known and not any((base / entry).is_file() for base in bases):
                missing.append(f"{name(page)}: {entry}")
    assert named > 200
    assert not missing, "\n".join(missing)


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere():
    found, broken = 0, []
    for page in pages():
        for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
            if target.startswith(("http:", "https:")):
                continue
            found += 1
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            if not there.exists() or (anchor and anchor not in anchors(there)):
                broken.append(f"{name(page)}: {target}")
    assert found > 60
    assert not broken, "\n".join(broken)


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = [line for page in pages() for line in commands(page)]
    shown += [code for page in pages() for code in re.findall(r"`([^`\n]+)`", text_of(page))]
    targets = {found[1] for line in shown if (found := re.match(r"make ([a-z-]+)", line))}
    assert {"test", "demo", "lint"} <= targets
    assert not [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)]


@cache
def trainers_flags() -> frozenset[str]:
    from megatron_mm.config import make_parser

    return frozenset(re.findall(r"--[a-z][\w-]*", make_parser().format_help()))


@cache
def flags_of(tool: str) -> frozenset[str]:
    """Flags that a tool reads beside the trainer's: texts in its source, or in that of the module
    whose `main` it calls, that are a flag and nothing else."""
    files, found = [ROOT / tool], set()
    for module in re.findall(r"^from ([\w.]+) import main", files[0].read_text(), re.MULTILINE):
        files.append(ROOT / (module.replace(".", "/") + ".py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"^--[a-z][\w-]*$", node.value))
    return frozenset(found)


def unknown_flags(text: str) -> set[str]:
    """Flags in a text that neither the trainer, nor a tool named in it, nor a command of others
    named in it has."""
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text)) - trainers_flags()
    for tool in re.findall(r"(?:tools/)?(\w+\.py)\b", text):
        if (ROOT / "tools" / tool).is_file():
            found -= flags_of(f"tools/{tool}")
    for word, flags in FOREIGN.items():
        if word in text:
            found -= flags
    return found


def test_every_flag_exists():
    """A command has its own tool's flags, prose those of any tool that the page names."""
    unknown = []
    for page in pages():
        parts = [*commands(page), text_of(page)]
        unknown += [f"{name(page)}: {flag}" for part in parts for flag in unknown_flags(part)]
    assert {"--save", "--finetune"} <= trainers_flags()
    assert not unknown, "\n".join(unknown)


ADDED = re.compile(r"metrics\.(?:ratio|mean|sum|max|loss_term)\(\s*\"([a-z_]+(?:/[a-z_]+)+)\"")
IN_DOCSTRINGS = {"moe/chosen_logit", "moe/entropy"}  # examples


def test_every_metric_is_explained():
    texts = [text_of(page) for page in pages()]
    sources = [text_of(ROOT / p) for p in tracked() if p.suffix == ".py" and p.parts[0] in FOLDERS]
    added = {name for source in sources for name in ADDED.findall(source)} - IN_DOCSTRINGS
    assert len(added) > 15 and {"train/lm_loss", "moe/mimic_kl"} <= added
    assert sorted(n for n in added if not any(f"`{n}`" in text for text in texts)) == []


def test_a_wrong_flag_would_be_seen():
    assert unknown_flags("python tools/plan.py --world-size 4 --gpu H100 --lr 1") == set()
    assert unknown_flags("python tools/plan.py --hf DIR") == {"--hf"}
    assert unknown_flags("with `--learning-speed 3`") == {"--learning-speed"}


@pytest.mark.parametrize("page", pages(), ids=name)
def test_shell_commands_parse_and_name_files_that_exist(page):
    for block in fenced(page, "sh"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}{done.stderr}"
    missing = []
    for command in commands(page):
        words = shlex.split(command, comments=True)
        for before, word in zip(["", *words], words, strict=False):
            if word.startswith(("tools/", "examples/", "tests/")) and not (ROOT / word).exists():
                missing.append(word)
            if before == "-m" and word.startswith("megatron_mm."):
                there = ROOT / word.replace(".", "/")
                if not (there.with_suffix(".py").is_file() or (there / "__main__.py").is_file()):
                    missing.append(word)
    assert not missing


def test_training_commands_of_the_front_page_are_valid(monkeypatch):
    """Each gives a run whose sizes fit the number of ranks that torchrun starts."""
    from megatron_mm.config import load, validate

    monkeypatch.chdir(ROOT)
    copies, valid = {}, 0
    for command in commands(README):
        words = shlex.split(command, comments=True)
        if words[0] == "cp":
            copies[words[2]] = words[1]
        if words[:1] == ["torchrun"] and "megatron_mm.train" in words:
            flags = [copies.get(word, word) for word in words[words.index("-m") + 2 :]]
            sizes = [int(words[words.index(f) + 1]) for f in ("--nnodes", "--nproc-per-node")]
            validate(load(None, flags), sizes[0] * sizes[1])
            valid += 1
    assert valid == 2


def test_python_examples_run(tmp_path):
    """In a process of their own, since they register parts and import what they like."""
    examples = [(name(page), code) for page in pages() for code in fenced(page, "python")]
    done = subprocess.run(
        [sys.executable, "-c", RUN_EXAMPLES],
        input=json.dumps(examples),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert len(examples) > 8
    assert done.returncode == 0, done.stderr
