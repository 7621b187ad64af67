"""Opens a Hugging Face folder: model config, image token, tensors, and the files of tokenizer and
processor. Code in the folder is never run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm.checkpoint import sealed
from megatron_mm.checkpoint.plain_pickle import shown
from megatron_mm.config import (
    ConfigError,
    DataConfig,
    FusionConfig,
    ModelConfig,
    effective_pattern,
    from_dict,
    from_transformers_dict,
    parse_pattern,
    read_memories,
    without_clvr,
)
from megatron_mm.config.hf import fused_type, in_transformers_words
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.config.memories import VISION
from megatron_mm.convert.hf_files import INDEX, MALFORMED, PICKLES, Stored, stored_tensors
from megatron_mm.convert.mapping import (
    DELEGATES,
    EMBEDDING,
    HEAD,
    PROJECTOR,
    SIDES,
    Group,
    ParamMapping,
    StateMapping,
    may_lack,
    read_mapping,
)
from megatron_mm.data.place_names import PLACE_TOKENS
from megatron_mm.data.tokenizer import LOOK, LOOK_CONTEXT
from megatron_mm.errors import CheckpointError, ConvertError
from megatron_mm.parallel.param_layout import ParamLayout

CONFIG, CLVR_KEY, IMAGE_CONTEXT = "config.json", "clvr", "<IMG_CONTEXT>"
MOST_JSON = 256 * 2**20  # bytes; the largest tokenizers have about 35 MB
NOTES = "huggingface"  # key of `HFFolder.notes` in a checkpoint's `extra`
# Files copied along with the weights. Code is not among them.
TRAVELS = (
    "tokenizer*.json",
    "tokenizer*.model",
    "*.tiktoken",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
)


@dataclass
class HFFolder:
    """Opened Hugging Face model, from one folder or two.

    Attributes:
        model: config of the folder's model; its output layer is always a tensor of its own.
        tied: whether the config ties the output layer to the embedding.
        tensors: stored tensors of all folders, by name.
        look_ids: of a model that glimpses, of the tokens of `look_names`.
        new: groups of mcore parameters that the folder may lack; `declared`: those among them that
            it must have, because its config has their letters.
        assets: files that are copied along.
        data: how the folder reads images, if it is an export of ours.
    """

    folder: Path
    model: ModelConfig
    tied: bool
    image_token_id: int | None
    tensors: dict[str, Stored] = field(default_factory=dict)
    look_ids: tuple[int, ...] | None = None
    new: tuple[Group, ...] = (SIDES, DELEGATES)
    declared: tuple[str, ...] = ()
    assets: list[Path] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)

    def mapping(self, parameters: Mapping[str, ParamLayout]) -> StateMapping:
        """Maps the stored tensors to the parameters of the model."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        return read_mapping(
            self.model, parameters, shapes, new=self.new, declared=self.declared, tied=self.tied
        )

    def may_lack(self, mcore: str) -> bool:
        """Whether the folder may lack a parameter of the model."""
        return any(may_lack(mcore, group, self.declared) for group in self.new)

    @property
    def notes(self) -> dict[str, Any]:
        """Metadata needed for export that ModelConfig does not hold."""
        found: dict[str, Any] = {"image_token_id": self.image_token_id, "tied": self.tied}
        return found | ({} if self.look_ids is None else {"look_ids": list(self.look_ids)})

    def dtype(self, link: ParamMapping) -> torch.dtype:
        """Returns the dtype of the tensors that make a parameter: that of the first."""
        return self.tensors[link.named(0)[0]].dtype

    def read(self, name: str, first: int | None, last: int | None) -> torch.Tensor:
        return self.tensors[name].read(first, last)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a small file.

    Raises:
        ConvertError: it is no JSON, no object, or larger than any tokenizer.
    """
    try:
        content = json.loads(sealed.read_all(path, MOST_JSON))
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from None
    except CheckpointError as error:  # of read_all, with the path in it
        raise ConvertError(str(error)) from None
    except MALFORMED as error:
        raise ConvertError(f"{path} is not JSON: {shown(error)}") from None
    if not isinstance(content, dict):
        raise ConvertError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def open_folder(hf: Path, hf_vision: Path | None = None, *, weights: bool = True) -> HFFolder:
    """Opens a fused or text-only folder, or the folders of a language model and of a ViT.

    Args:
        weights: whether to read tensors; False reads only the configs.

    Raises:
        ConvertError: a file is missing or damaged, disagrees with another, or describes a model
            that is not supported.
    """
    new = (SIDES, DELEGATES) if hf_vision is None else (SIDES, DELEGATES, PROJECTOR)
    try:
        config = in_transformers_words(read_json(hf / CONFIG))
        _check_quantised(hf, config)
        if CLVR_KEY in config:  # exported by megatron_mm
            config["model_type"] = fused_type(config.get("vision_config") or {})
        if hf_vision is not None:
            config = _fused(config, hf, hf_vision)
        model = _with_clvr(from_transformers_dict(config), config)
        look_ids, declared = _look_ids(model, config), _declared(model)
    except ConfigError as error:
        raise ConvertError(f"{hf / CONFIG}: {error}") from None
    except MALFORMED as error:
        raise ConvertError(f"{hf / CONFIG} describes no model: {shown(repr(error), 200)}") from None
    tied = not model.language.untie_embeddings_and_output_weights
    model.language.untie_embeddings_and_output_weights = True
    tensors: dict[str, Stored] = {}
    if weights:
        tensors = stored_tensors(hf)
        if hf_vision is not None:
            more = stored_tensors(hf_vision)
            shared = sorted(tensors.keys() & more.keys())
            if shared:
                raise ConvertError(f"{shared[0]} is in {hf} and in {hf_vision}")
            tensors = tensors | more
    image = _image_token(hf, config, model)
    folders = [hf] if hf_vision is None else [hf_vision, hf]  # of equal names, the language model's
    assets = {path.name: path for folder in folders for path in travelling(folder)}
    made = [*assets.values()]
    return HFFolder(
        hf,
        model,
        tied,
        image,
        tensors,
        look_ids=look_ids,
        new=new,
        declared=declared,
        assets=made,
        data=_reading(assets),
    )


def _reading(assets: Mapping[str, Path]) -> DataConfig:
    """Returns the settings of images that the processor of an export holds, else the defaults."""
    path = assets.get("processor_config.json")
    tiles = read_json(path).get("tiles") if path is not None else None
    if not isinstance(tiles, dict):
        return DataConfig()
    names = {"mean": "image_mean", "std": "image_std"}
    held = {names.get(key, key): value for key, value in tiles.items()}
    known = {f.name for f in fields(DataConfig)}
    return from_dict(DataConfig, {k: v for k, v in held.items() if k in known}, str(path))


def travelling(folder: Path) -> list[Path]:
    """Files of a folder that are copied along with the weights."""
    return [p for pattern in TRAVELS for p in sorted(folder.glob(pattern)) if p.is_file()]


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights in any format, or an index of them."""
    return any(p.suffix in (".safetensors", *PICKLES) or p.name == INDEX for p in folder.glob("*"))


def _fused(text: dict, hf: Path, hf_vision: Path) -> dict[str, Any]:
    if "text_config" in text:
        raise ConvertError(f"{hf} is a fused model already: leave --hf-vision out")
    vision = in_transformers_words(read_json(hf_vision / CONFIG))
    if "vision_config" in vision:
        raise ConvertError(f"{hf_vision} is a fused model: --hf-vision takes a ViT alone")
    return {
        "model_type": fused_type(vision),
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
    }


def _with_clvr(model: ModelConfig, config: Mapping[str, Any]) -> ModelConfig:
    """Adds the settings that transformers lacks, which an export keeps under a key of its own."""
    extra = config.get(CLVR_KEY)
    if extra is None:
        return model
    pattern = extra["hybrid_layer_pattern"]
    if without_clvr(pattern) != model.hybrid_layer_pattern:
        raise ConfigError(f"{CLVR_KEY}.hybrid_layer_pattern is {pattern!r}, of other layers")
    fusion = from_dict(FusionConfig, extra["fusion"], CLVR_KEY + ".fusion")
    layers = dict(model.layers)
    for letter, section in extra.get("layers", {}).items():
        kind = LAYERS[letter]
        if kind.settings is not None:
            layers[letter] = from_dict(kind.settings, section, f"{CLVR_KEY}.layers.{letter}")
    return replace(model, hybrid_layer_pattern=pattern, fusion=fusion, layers=layers)


def _declared(model: ModelConfig) -> tuple[str, ...]:
    """Prefixes of the parameters of the side letters of a folder's own config."""
    layers = parse_pattern(effective_pattern(model))
    found = [
        f"language.{LAYERS[layer.kind].key}.{layer.pair}."
        for layer in layers
        if LAYERS[layer.kind].pair == "opens"
    ]
    for memory in read_memories(model):
        of_name = "memory_proj." if memory.name == VISION else f"memory_projs.{memory.name}."
        found.append(f"vision.{of_name}")
    return tuple(found)


def look_names(model: ModelConfig) -> dict[str, str]:
    """Returns the tokens of a model's looks by their keys beside its pattern: a query, its slots
    and, where words say the place, the first of these. Empty for a model without glimpses."""
    settings = query_settings(model)
    if settings is None:
        return {}
    found = {"query_token_id": LOOK, "slot_token_id": LOOK_CONTEXT}
    spoken = settings.query_place == "tokens"
    return found | ({"place_token_id": PLACE_TOKENS[0]} if spoken else {})


def _look_ids(model: ModelConfig, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the ids of the tokens of looks of a folder whose model glimpses."""
    names = look_names(model)
    if CLVR_KEY not in config or not names:
        return None
    found = {key: config[CLVR_KEY][key] for key in names}
    for key, index in found.items():
        if type(index) is not int or not 0 <= index < model.language.vocab_size:
            allowed = f"0 to {model.language.vocab_size - 1}"
            raise ConfigError(f"{CLVR_KEY}.{key} is {shown(repr(index))}; allowed: {allowed}")
    return tuple(found.values())


def _image_token(folder: Path, config: Mapping[str, Any], model: ModelConfig) -> int | None:
    """Returns the id of the image token; None if unknown or without vision.

    Raises:
        ConvertError: config and tokenizer disagree, or the id is out of range.
    """
    if model.vision is None:
        return None
    said, found = config.get("image_token_id"), tokenizer_id(folder, IMAGE_CONTEXT)
    if said is not None and type(said) is not int:
        raise ConvertError(f"{folder / CONFIG}: image_token_id is no whole number: {shown(said)}")
    if said is not None and found is not None and said != found:
        raise ConvertError(
            f"{folder / CONFIG}: image_token_id is {said}, but {IMAGE_CONTEXT} is {found} in the "
            "tokenizer beside it"
        )
    image = found if said is None else said
    size = model.language.vocab_size
    if image is not None and not 0 <= image < size:
        raise ConvertError(
            f"{folder / CONFIG}: image_token_id is {image}; allowed: 0 to {size - 1}"
        )
    return image


def _check_quantised(hf: Path, config: Mapping[str, Any]) -> None:
    """Raises ConvertError for weights that are no numbers of their own, such as FP8 releases."""
    for part in (config, *(config.get(key) for key in ("text_config", "vision_config"))):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if settings:
            method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
            raise ConvertError(
                f"{hf / CONFIG} has a quantization_config ({shown(repr(method), 100)}): quantised "
                "weights are not taken; use the release in bf16"
            )


def tokenizer_id(folder: Path, token: str) -> int | None:
    """Returns the id of a special token in a folder's tokenizer; None if it has no such token.

    Raises:
        ConvertError: a file of the tokenizer is damaged.
    """
    for name, listed in (
        ("tokenizer.json", _added_tokens),
        ("tokenizer_config.json", _added_tokens_decoder),
        ("added_tokens.json", dict.items),
    ):
        path = folder / name
        if not path.is_file():
            continue
        content = read_json(path)
        try:
            found = next((number for text, number in listed(content) if text == token), None)
            if found is not None:
                return int(found)
        except MALFORMED as error:
            raise ConvertError(f"{path} lists no tokens: {shown(repr(error), 200)}") from None
    return None


def _added_tokens(content: dict) -> list[tuple[str, Any]]:
    return [(entry.get("content"), entry.get("id")) for entry in content.get("added_tokens") or []]


def _added_tokens_decoder(content: dict) -> list[tuple[str, Any]]:
    decoder = content.get("added_tokens_decoder") or {}
    return [(entry.get("content"), number) for number, entry in decoder.items()]


def check_folder(source: HFFolder, mapping: StateMapping) -> None:
    """Checks completeness, dtypes, and, if embeddings are tied, that both copies are equal.

    Raises:
        ConvertError: names the first bad tensor.
    """
    problem = mapping.problem()
    if problem:
        raise ConvertError(f"{source.folder}: {problem}")
    for link in mapping.links:
        kinds: dict[torch.dtype, str] = {}
        for name, _ in link.hf_tensors():
            kinds.setdefault(source.tensors[name].dtype, name)
        strange = next((k for k in kinds if not k.is_floating_point or k.itemsize < 2), None)
        if strange is not None:
            raise ConvertError(f"{kinds[strange]} is {strange}: quantised weights are not taken")
        if len(kinds) > 1:
            (a, first), (b, second) = list(kinds.items())[:2]
            raise ConvertError(f"{first} is {a} but {second} is {b}: they make one parameter")
    if source.tied and not mapping.tied:
        ends = {
            link.mcore: link.names[0] for link in mapping.links if link.mcore in (EMBEDDING, HEAD)
        }
        embedding, head = (source.tensors[ends[name]] for name in (EMBEDDING, HEAD))
        if not same_bits(embedding, head):
            raise ConvertError(
                f"{ends[HEAD]} differs from {ends[EMBEDDING]}, but {source.folder / CONFIG} ties "
                "them (InternVL's tie_word_embeddings is true unless set): set it to false there"
            )


def same_bits(a: Stored, b: Stored, rows: int = 4096) -> bool:
    """Whether two stored tensors are bitwise identical. Reads `rows` rows at a time."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    steps = range(0, a.shape[0], rows)
    ends = [(i, min(i + rows, a.shape[0])) for i in steps]
    return all(equal_bits(a.read(*end), b.read(*end)) for end in ends)


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are bitwise identical: -0.0 is not 0.0, and a NaN equals itself."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))
