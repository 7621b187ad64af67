"""From a preset, a YAML file and command line flags to one `RunConfig`.

The three are laid on each other in that order: YAML overrides the preset, flags override
the YAML. In the file `model:` may name a `preset:` beside its own keys, and so may
`model: vision:`; `base:` names a file, relative to its own, that it overrides. Loading
checks names and types; `checks.py` checks the sizes.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_mm.config.flags import parse_early, parse_flags
from megatron_mm.config.objectives import OBJECTIVES, make_known
from megatron_mm.config.presets import preset, vision_preset
from megatron_mm.config.settings import RunConfig
from megatron_mm.config.tree import brief, coerce, from_dict, merge, to_dict
from megatron_mm.errors import ConfigError

logger = logging.getLogger(__name__)

__all__ = [
    "dump_yaml",
    "from_dict",
    "import_plugins",
    "load",
    "read_yaml",
    "run_of_checkpoint",
    "to_dict",
]


PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
MAX_BYTES, MAX_NODES, MAX_DIGITS = 2**20, 10_000, 64


# Numbers, without the forms of YAML 1.1 in which 010 is 8 and 1:30 is 90: these are text.
NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
}


class _PlainLoader(yaml.SafeLoader):
    """Reads what settings are made of: text, numbers, true and false, none, lists, mappings. A date
    is text. PyYAML lets a repeated key silently win over the first; a run must not lose a setting.
    """

    # Without the forms of a date, and without `=`, a forgotten form of a default.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, NUMBERS.get(tag, form))
            for tag, form in forms
            if not tag.endswith((":timestamp", ":value"))
        ]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in PLAIN:
            raise ConfigError(f"{_place(node)}: the tag {kind!r}; allowed: {', '.join(PLAIN)}")
        number = kind in ("int", "float") and isinstance(node, yaml.ScalarNode)
        if number and len(node.value) > MAX_DIGITS:
            raise ConfigError(
                f"{_place(node)}: a number of {len(node.value)} characters; allowed: {MAX_DIGITS}"
            )
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError) as error:  # of a tag's constructor
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{_place(node)}: {str(node.value)[:80]!r} is no {kind}; write it as text"
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            if key.value in seen:
                raise ConfigError(f"{_place(key)}: key {key.value} is given twice; allowed: once")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _place(node: yaml.Node) -> str:
    return f"{node.start_mark.name} line {node.start_mark.line + 1}"


def _check_nodes(root: yaml.Node, path: str) -> None:
    """Counts the values that a file stands for, each alias as all that it repeats.

    Raises:
        ConfigError: there are too many, or one holds itself.
    """
    counts: dict[yaml.Node, int] = {}
    open_nodes: set[yaml.Node] = set()

    def count(node: yaml.Node) -> int:
        if node in open_nodes:
            raise ConfigError(f"{_place(node)}: a value that holds itself; write it without alias")
        if node not in counts:
            open_nodes.add(node)
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            pairs = isinstance(node, yaml.MappingNode)
            below = [part for pair in parts for part in pair] if pairs else parts
            counts[node] = 1 + sum(map(count, below))
            open_nodes.discard(node)
        return counts[node]

    if count(root) > MAX_NODES:
        raise ConfigError(f"config {path} stands for {count(root)} values; allowed: {MAX_NODES}")


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises ConfigError when the file cannot be read, is not YAML, repeats a key, or is more than a
    file of settings: over 1 MiB, 10,000 values, or lists in lists without an end.
    """
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"config {path} has over {MAX_BYTES} bytes; allowed: a YAML file")
        loader = _PlainLoader(content.decode())
        loader.name = str(path)
        node = loader.get_single_node()
        if node is not None:
            _check_nodes(node, path)
        tree = {} if node is None else loader.construct_document(node)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with NUL, or no UTF-8
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"config {path!s}: {reason}; allowed: a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"config {path} is nested too deeply; allowed: a mapping") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        raise ConfigError(f"config {path} holds a {kind}; allowed: a mapping of sections")
    return tree


def _with_bases(path: str) -> dict[str, Any]:
    """The file over its base, over that one's base... Lists are replaced, not joined."""
    chain: list[Path] = []
    trees: list[dict[str, Any]] = []
    at: Path | None = Path(path)
    while at is not None:
        if at.resolve() in chain:
            raise ConfigError(f"config {at} is a base of its own base; allowed: no ring")
        chain.append(at.resolve())
        tree = read_yaml(str(at))
        base = tree.pop("base", None)
        if base is not None and (not isinstance(base, str) or "\0" in base):
            raise ConfigError(
                f"config {at}: base is {brief(base)}; allowed: the path of a YAML file"
            )
        trees.append(tree)
        at = None if base is None else at.parent / base
    whole: dict[str, Any] = {}
    for tree in reversed(trees):
        whole = merge(whole, tree)
    return whole


def load(path: str | None = None, argv: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file (or `--config`, which wins over `path`) and flags describe. Flags of
    Megatron's that always hold are said.

    Raises ConfigError with one line for the first name, type or preset that is wrong.
    """
    early = parse_early(argv)
    path = early.config or path
    tree = _with_bases(path) if path else {}
    import_plugins(tree.get("plugins", []) if early.plugins is None else early.plugins)
    make_known(early.objective or _objective(tree))
    flags = parse_flags(argv)
    for line in flags.accepted:
        logger.info("%s", line)
    if flags.preset is not None or "model" in tree:
        tree["model"] = _over_presets(tree.get("model", {}), flags.preset)
    for leaf, value in flags.values.items():
        tree = merge(tree, _nested(tree, leaf, value))
    return from_dict(RunConfig, tree)


def run_of_checkpoint(tree: Mapping[str, Any]) -> RunConfig:
    """The run that a checkpoint holds. An objective that was given by a dotted path is left out
    with its settings: a model is converted or probed without it, and its module may not be here.
    Its plug-ins are code, which no checkpoint has imported: they are named in `--plugins`.

    Raises:
        ConfigError: as `from_dict`, with the plug-ins that are missing.
    """
    name = _objective(tree)
    if isinstance(name, str) and name not in OBJECTIVES:
        known = to_dict(RunConfig())
        tree = {key: value for key, value in tree.items() if key in known}
        kept = {k: v for k, v in tree["training"].items() if k != "objective"}
        tree = tree | {"training": kept}
    try:
        return from_dict(RunConfig, tree)
    except ConfigError as error:
        named = tree.get("plugins")
        missing = [m for m in named if m not in sys.modules] if isinstance(named, list) else []
        if not missing:
            raise
        raise ConfigError(
            f"{error}; the run had plug-ins: name them with --plugins {brief(' '.join(missing))} "
            "if you trust them"
        ) from None


def _objective(tree: Mapping[str, Any]) -> Any:
    training = tree.get("training")
    return training.get("objective") if isinstance(training, Mapping) else None


def import_plugins(modules: Any) -> None:
    """Imports the modules that `plugins` names, which register parts of their own.

    Raises:
        ConfigError: for a module that cannot be imported, in one line.
    """
    for index, module in enumerate(coerce(list[str], modules, "plugins")):
        try:
            importlib.import_module(module)
        # Other people's modules fail in any way while they are imported.
        except Exception as problem:
            reason = " ".join(str(problem).split())
            raise ConfigError(
                f"plugins[{index}] {module} cannot be imported: {type(problem).__name__}: "
                f"{reason}; give a module on PYTHONPATH"
            ) from None


def _over_presets(model: Any, chosen: str | None) -> Any:
    """The model section with its presets written out below it. `chosen` is `--preset`."""
    if not isinstance(model, Mapping):
        return model  # from_dict has the message for it
    model = dict(model)
    named = model.pop("preset", None)
    name = named if chosen is None else chosen
    base = {} if name is None else to_dict(preset(coerce(str, name, "model.preset")))
    if isinstance(model.get("vision"), Mapping) and "preset" in model["vision"]:
        vision = dict(model["vision"])
        name = coerce(str, vision.pop("preset"), "model.vision.preset")
        base["vision"], model["vision"] = to_dict(vision_preset(name)), vision
    return merge(base, model)


def _nested(tree: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for the path (a, b), where a flag may not bring an absent part to life:
    `--image-size` on a text-only model would otherwise silently give it a whole ViT."""
    at: Any = tree
    for depth, key in enumerate(path[:-1], start=1):
        at = at.get(key, {}) if isinstance(at, Mapping) else {}
        if at is None:
            flag, part = "--" + path[-1].replace("_", "-"), ".".join(path[:depth])
            raise ConfigError(f"{flag} needs {part}, which is none; allowed: give {part} in YAML")
    for key in reversed(path):
        value = {key: value}
    return value


def dump_yaml(config: Any) -> str:
    """A config as YAML text that `load` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
