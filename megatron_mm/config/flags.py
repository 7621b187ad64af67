"""Command line flags, generated from the settings, where defaults and explanations stand.

`tensor_model_parallel_size` is `--tensor-model-parallel-size 2`, a bool is `--bf16` or
`--no-bf16`, a setting that may be absent also takes the word `none`, a list takes several
words behind one flag; those of `--train-data` are `path[:samples]`, one for each phase of the
curriculum.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NoReturn, get_args, get_origin

from megatron_mm.config import megatron
from megatron_mm.config.settings import DataPhase, RunConfig
from megatron_mm.config.tree import ABSENT, Leaf, brief, coerce, expected, leaves, optional
from megatron_mm.errors import ConfigError


@dataclass
class Flags:
    """The flags of a command line. `values` holds only the leaves that were given, by path;
    `accepted` a line for each flag of Megatron's that always holds."""

    config: str | None = None
    preset: str | None = None
    values: dict[tuple[str, ...], Any] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # argparse takes -1e-3 and -2. for flags.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        # argparse prints its usage and exits; with almost two hundred flags that hides the message.
        raise ConfigError(message)


class _Once(argparse.Action):
    """Stores a list. A second one would replace the first, as of the phases of a curriculum."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, name: str | None = None
    ) -> None:
        if hasattr(namespace, self.dest):
            parser.error(f"{name} is given twice; allowed: once, with all its values behind it")
        setattr(namespace, self.dest, values)


def flag_name(leaf: Leaf) -> str:
    """The flag of a leaf, e.g. `--micro-batch-size`."""
    return "--" + leaf.name.replace("_", "-")


def default_text(leaf: Leaf) -> str:
    """The default as a flag takes it."""
    return ABSENT if leaf.default in (None, "", []) else str(leaf.default)


def names_text(leaf: Leaf) -> str:
    """The names that a setting may have; empty unless it names a part of a registry."""
    return f"{', '.join(leaf.named.registry)} or a dotted path" if leaf.named else ""


def explained(leaf: Leaf) -> str:
    """The explanation of a setting, its bounds and its default, in one line."""
    bounds = f"{leaf.bounds}; " if leaf.bounds else ""
    names = f"{names_text(leaf)}; " if leaf.named else ""
    section = ".".join(leaf.path[:-1]) or "run"
    return f"{leaf.explanation} {bounds}{names}default: {default_text(leaf)} [{section}]".strip()


@dataclass(frozen=True)
class Early:
    """Flags that are read before the others: plug-ins and an objective may add some."""

    config: str | None
    plugins: list[str] | None
    objective: str | None


def parse_early(argv: Sequence[str]) -> Early:
    """Reads `--config`, `--plugins` and `--objective`, ignores the rest. Raises ConfigError."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--plugins", nargs="+")
    parser.add_argument("--objective")
    given, _ = parser.parse_known_args(list(argv))
    return Early(given.config, given.plugins, given.objective)


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """Adds `--plugins` to the parser of a command that reads checkpoints or folders."""
    parser.add_argument(
        "--plugins",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules that register letters of your own; a checkpoint imports none",
    )


def make_parser() -> argparse.ArgumentParser:
    """The parser of all flags; values stay text until `parse_flags` reads them."""
    parser = _Parser(
        prog="python -m megatron_mm.train",
        usage="%(prog)s --config FILE [--flag value ...]",
        allow_abbrev=False,  # an abbreviation changes its meaning when a setting is added
        argument_default=argparse.SUPPRESS,
        description="Flags override the YAML file; the YAML file overrides the preset.",
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file that holds a run")
    parser.add_argument("--preset", metavar="NAME", help="the model to start from")
    groups: dict[str, Any] = {}
    taken = {"config": "--config", "preset": "--preset", "help": "--help"}
    for leaf in leaves(RunConfig):
        path = ".".join(leaf.path)
        if leaf.name in taken:
            raise ConfigError(
                f"setting {path} has the name of {taken[leaf.name]}; every setting is a flag, "
                "choose another name"
            )
        taken[leaf.name] = path
        section = ".".join(leaf.path[:-1]) or "run"
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        inner, _ = optional(leaf.hint)
        text = explained(leaf).replace("%", "%%")
        if inner is bool:
            options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif get_origin(inner) is list:
            (item,) = get_args(inner)
            word = {DataPhase: "PATH[:SAMPLES]", float: "NUMBER"}.get(item)
            options = {"action": _Once, "nargs": "+"}
            options["metavar"] = word or expected(item).replace(", ", "|")
        else:
            word = {int: "INT", float: "FLOAT", str: "TEXT"}.get(inner)
            options = {"metavar": word or expected(inner).replace(", ", "|")}
        groups[section].add_argument(flag_name(leaf), dest=leaf.name, help=text, **options)
    return parser


def parse_flags(argv: Sequence[str]) -> Flags:
    """Reads a command line. Raises ConfigError for an unknown flag, an unreadable value, or a flag
    of Megatron's that means something else here."""
    given, rest = make_parser().parse_known_args(list(argv))
    rest, accepted = megatron.take(rest)
    by_name = {leaf.name: leaf for leaf in leaves(RunConfig)}
    if rest and rest[0].startswith("-"):
        names = ["--config", "--preset", *megatron.ALWAYS]
        for leaf in by_name.values():
            names.append(flag_name(leaf))
            if leaf.hint is bool:
                names.append(names[-1].replace("--", "--no-", 1))
        raise _unknown_flag(rest[0].split("=")[0], names)
    if rest:
        raise ConfigError(
            f"unexpected value {brief(rest[0])}; allowed: values behind their flag, "
            f"and none behind --flag or --no-flag"
        )
    values = vars(given)
    flags = Flags(values.pop("config", None), values.pop("preset", None), accepted=accepted)
    for name, text in values.items():
        leaf = by_name[name]
        flags.values[leaf.path] = _read(leaf.hint, text, flag_name(leaf))
    return flags


def _unknown_flag(word: str, names: list[str]) -> ConfigError:
    near = get_close_matches(word, names, n=3, cutoff=0.6)
    # Without a near miss a list of all the flags would be a page long.
    hint = f"did you mean {' or '.join(near)}?" if near else "allowed: the flags of --help"
    return ConfigError(f"unknown flag {word[:80]}; {hint}")


def _read(hint: Any, text: Any, key: str) -> Any:
    """The text of one flag as its type, in the plain form that `from_dict` takes."""
    inner, may_be_none = optional(hint)
    if may_be_none and text == ABSENT:
        return None
    if text == [ABSENT]:
        return []
    if inner == list[DataPhase]:
        return [_phase(part, key) for part in text]
    if inner in (int, list[int]):
        try:
            text = int(text) if inner is int else [int(part) for part in text]
        except ValueError:
            raise ConfigError(f"{key} is {brief(text)}; allowed: {expected(hint)}") from None
    return coerce(hint, text, key)


def _phase(text: str, key: str) -> dict[str, Any]:
    path, colon, samples = text.rpartition(":")
    if not colon or "/" in samples:  # no number of samples; a folder may well contain a colon
        return {"path": text, "samples": None}
    if not samples.isdecimal() or len(samples) > 18:
        raise ConfigError(
            f"{key} is {brief(text)}; allowed: path or path:samples with a whole number"
        )
    return {"path": path, "samples": int(samples)}
