"""InternVL around a hybrid text model whose layers look at the image again, or whose experts hand
tokens to further ones. Travels with exported weights.

An intermediate layer looks at a memory (L), and what it finds is added where the pattern says (J;
modeling_look.py). A token may ask for a place of an image (Q) that the slots behind it show (V;
modeling_glimpse.py). Prompts are batched with padding on the left; greedy search and sampling
decode with a cache that keeps the memories' keys and values.
"""

import torch
from torch import nn
from transformers import InternVLForConditionalGeneration
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.internvl.modeling_internvl import (
    InternVLCausalLMOutputWithPast,
    InternVLModel,
)

from .configuration_clvr import CLVRConfig
from .modeling_delegate import Delegate
from .modeling_glimpse import Asked, ForcedSlots, Glimpse, LookRule
from .modeling_look import CLVRLook, Memory

# What a prompt's images are to the model; see CLVRForConditionalGeneration.forward.
IMAGE_INPUTS = (
    "pixel_values",
    "stream_tiles",
    "memory_tiles",
    "memory_number",
    "memory_coordinates",
    "memory_extents",
    "memory_sample",
    "memory_visible_from",
)
# Letters of the pattern: how each is numbered. A mixer opens a layer and an ffn closes it; the k-th
# that closes a pair of a kind adds what the k-th that opens one found.
LETTERS = {"G": "mixer", "*": "mixer", "E": "ffn", "C": "ffn"}
OPENS, CLOSES = {"L": "look", "Q": "glimpse"}, {"J": "look", "V": "glimpse"}


def read_pattern(pattern: str) -> list[tuple[str, int]]:
    """(letter, number) of every sub-layer: that of its layer, or of its pair."""
    roles = LETTERS | {letter: f"opens {kind}" for letter, kind in OPENS.items()}
    roles |= {letter: f"closes {kind}" for letter, kind in CLOSES.items()}
    counts = dict.fromkeys(roles.values(), 0)
    found = []
    for letter in "".join(pattern.split()):
        if letter not in roles:
            raise ValueError(f"hybrid_layer_pattern has {letter!r}; known: {', '.join(roles)}")
        role = roles[letter]
        found.append((letter, counts[role]))
        counts[role] += 1
    return found


def reads(clvr: dict) -> dict[tuple[str, int], dict]:
    """(letter, number) of every look and glimpse -> the memory that it reads."""
    memories = {memory["name"]: memory for memory in clvr["memories"]}
    layers = [layer for layer in read_pattern(clvr["hybrid_layer_pattern"]) if layer[0] in OPENS]
    names = zip(layers, clvr["look_memories"], strict=True)
    return {layer: memories[name] for layer, name in names}


class CLVRParts(nn.Module):
    """The projections of the memories, that of `vision` and those of others by name, and the
    looks."""

    def __init__(self, config: CLVRConfig):
        super().__init__()
        self.memory_proj, self.memory_projs = None, nn.ModuleDict()
        assert config.clvr is not None
        for memory in config.clvr["memories"]:
            linear = nn.Linear(config.vision_config.hidden_size, memory["width"])
            if memory["name"] == "vision":
                self.memory_proj = linear
            else:
                self.memory_projs[memory["name"]] = linear
        looks = {pair: m for (letter, pair), m in reads(config.clvr).items() if letter == "L"}
        self.looks = nn.ModuleDict({str(n): CLVRLook(config, m) for n, m in looks.items()})

    def projections(self) -> dict[str, nn.Linear]:
        """Returns the projections by memory, in the order of the processor."""
        names = list(self.memory_projs)
        found = {} if self.memory_proj is None else {"vision": self.memory_proj}
        return found | {name: self.memory_projs[name] for name in names}


class AVMParts(nn.Module):
    """The glimpses."""

    def __init__(self, config: CLVRConfig):
        super().__init__()
        assert config.clvr is not None
        queries = {pair: m for (letter, pair), m in reads(config.clvr).items() if letter == "Q"}
        self.queries = nn.ModuleDict({str(n): Glimpse(config, m) for n, m in queries.items()})


class LetterByLetter:
    """The forward pass of a hybrid text model, over the letters of the layer pattern."""

    watch = None  # diagnostics: (layer, hidden) as each layer ends

    def forward(
        self: nn.Module,  # it is mixed into a text model
        inputs_embeds,
        letters,
        looks,
        queries,
        memories=None,
        asked=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        **kwargs,
    ):
        first = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            count = inputs_embeds.shape[1]
            position_ids = torch.arange(first, first + count, device=inputs_embeds.device)[None]
        about = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        causal, recurrent = create_causal_mask(**about), create_recurrent_attention_mask(**about)
        hidden, waiting = inputs_embeds, {}
        rotary = self.rotary_emb(hidden, position_ids)
        for letter, number in letters:
            if letter in OPENS:
                if memories is not None:
                    given = hidden, memories, first, number
                    if letter == "L":
                        found = looks[str(number)](*given)
                    else:
                        found = queries[str(number)](*given, asked)
                    waiting[OPENS[letter], number] = found
            elif letter in CLOSES:
                found = waiting.pop((CLOSES[letter], number), None)
                hidden = hidden if found is None else hidden + found
            elif LETTERS[letter] == "mixer":
                layer = self.layers[number]
                normed = layer.input_layernorm(hidden)
                if letter == "G":
                    found = layer.linear_attn(
                        hidden_states=normed,
                        cache_params=past_key_values,
                        attention_mask=recurrent,
                    )
                else:
                    found = layer.self_attn(
                        hidden_states=normed,
                        attention_mask=causal,
                        position_ids=position_ids,
                        past_key_values=past_key_values,
                        position_embeddings=rotary,
                    )[0]
                hidden = hidden + found
            else:
                layer = self.layers[number]
                normed = layer.post_attention_layernorm(hidden)
                found = layer.mlp(normed)
                found = found[0] if isinstance(found, tuple) else found
                if letter == "C":
                    found = layer.mlp.delegate(hidden, normed, found, layer.mlp)
                hidden = hidden + found
                if self.watch is not None:
                    self.watch(number, hidden)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values
        )


def letter_by_letter(base: type) -> type:
    """The class of a text model of transformers, its layers run letter by letter."""
    return type(f"CLVR{base.__name__}", (LetterByLetter, base), {})


class CLVRModel(InternVLModel):
    config_class = CLVRConfig

    def __init__(self, config: CLVRConfig):
        super().__init__(config)
        made = letter_by_letter(type(self.language_model))
        self.language_model: nn.Module = made(config.text_config)
        assert config.clvr is not None
        for letter, number in read_pattern(config.clvr["hybrid_layer_pattern"]):
            if letter == "C":
                made_for = Delegate(config.text_config, config.text_config.cascade)
                self.language_model.layers[number].mlp.delegate = made_for
        self.post_init()


class CLVRForConditionalGeneration(InternVLForConditionalGeneration):
    config_class = CLVRConfig

    def __init__(self, config: CLVRConfig):
        super().__init__(config)
        self.model = CLVRModel(config)
        self.clvr, self.avm = CLVRParts(config), AVMParts(config)
        assert config.clvr is not None
        self.rule = LookRule.of(config.clvr)
        self.letters = read_pattern(config.clvr["hybrid_layer_pattern"])
        self.post_init()

    def features(self, pixel_values):
        """Returns the patch features [N, P, V] of tiles [N, 3, S, S]."""
        pixels = pixel_values.to(self.model.vision_tower.dtype)
        return self.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]

    def image_tokens(self, features, stream_tiles):
        """Returns the image tokens [k, H] of the stream; without `stream_tiles`, of all tiles."""
        stream = features if stream_tiles is None else features[stream_tiles]
        vision = self.config.vision_config
        sides = [s // p for s, p in zip(vision.image_size, vision.patch_size, strict=True)]
        stream = stream.reshape(len(stream), *sides, -1)
        stream = self.model.pixel_shuffle(stream, scale_factor=self.config.downsample_ratio)
        stream = self.model.multi_modal_projector(stream.flatten(1, 2))
        return stream.flatten(0, 1)

    def memories(self, features, tiles, number, about, batch: int):
        """Returns the memories by name; `number` says which of them each tile is in, and `about`
        has for every patch its centre, its side, its prompt and from where it is visible."""
        number = torch.zeros_like(tiles) if number is None else number
        of_patch = number.repeat_interleave(features.shape[1])
        found = {}
        for index, (name, project) in enumerate(self.clvr.projections().items()):
            rows, here = features[tiles[number == index]].flatten(0, 1), of_patch == index
            found[name] = Memory(batch, project(rows), *(each[here] for each in about))
        return found

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs
    ):
        """Repeats every prompt for several sequences or beams. They share the tiles of their
        prompt, so that only what points to tiles is repeated, prompt by prompt."""
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        if images.get("pixel_values") is not None and images.get("stream_tiles") is None:
            images["stream_tiles"] = torch.arange(len(images["pixel_values"]))
        before = input_ids
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        if expand_size > 1 and images.get("stream_tiles") is not None:
            images |= self._repeated(images, before, expand_size)
        return input_ids, kwargs | images

    def _repeated(self, images, input_ids, times: int) -> dict[str, torch.Tensor]:
        """Repeats the tiles' places for `_expand_inputs_for_generation`."""
        stream, tiles = images["stream_tiles"], images.get("memory_tiles")
        of_prompt = (input_ids == self.config.image_token_id).sum(1)
        of_prompt = of_prompt * len(stream) // of_prompt.sum().clamp(min=1)  # tokens to tiles
        parts = stream.split(of_prompt.tolist())
        repeated = {"stream_tiles": torch.cat([part for part in parts for _ in range(times)])}
        if tiles is None:  # the export has no looks
            return repeated
        sample, number = images["memory_sample"], images.get("memory_number")
        number = torch.zeros_like(tiles) if number is None else number
        patches = len(sample) // max(1, len(tiles))  # of one tile
        prompt_of_tile = sample[::patches] if patches else sample
        order, owner = [], []
        for memory in number.unique().tolist():
            for prompt in range(len(input_ids)):
                here = ((number == memory) & (prompt_of_tile == prompt)).nonzero().flatten()
                for copy in range(times):
                    order.append(here)
                    owner.append(torch.full_like(here, prompt * times + copy))
        picked = torch.cat(order)
        rows = (picked[:, None] * patches + torch.arange(patches, device=picked.device)).flatten()
        return repeated | {
            "memory_tiles": tiles[picked],
            "memory_number": number[picked],
            "memory_coordinates": images["memory_coordinates"][rows],
            "memory_extents": images["memory_extents"][rows],
            "memory_sample": torch.cat(owner).repeat_interleave(patches),
            "memory_visible_from": images["memory_visible_from"][rows],
        }

    def _get_logits_processor(self, *args, **kwargs):
        """Adds, last, what forces the slots behind a query."""
        found = super()._get_logits_processor(*args, **kwargs)
        if self.rule is not None:
            found.append(ForcedSlots(self.rule))
        return found

    def _reorder_cache(self, past_key_values, beam_idx):
        """Takes what queries found along with the beams that asked."""
        past_key_values.reorder_cache(beam_idx)
        asked = getattr(past_key_values, "asked", None)
        if asked is not None:
            asked.reorder(beam_idx)
        return past_key_values

    def asked(self, input_ids, past_key_values) -> Asked | None:
        """The queries up to these tokens; None for a model without glimpses."""
        if self.rule is None:
            return None
        if input_ids is None:
            raise ValueError("queries and slots are known by their ids: give input_ids")
        asked = getattr(past_key_values, "asked", None) or Asked.start(self.rule, len(input_ids))
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        if held != asked.tokens:
            raise ValueError(f"a cache of {held} tokens, of which {asked.tokens} were read here")
        asked.read(input_ids)
        if past_key_values is not None:
            past_key_values.asked = asked
        return asked

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        stream_tiles=None,
        memory_tiles=None,
        memory_number=None,
        memory_coordinates=None,
        memory_extents=None,
        memory_sample=None,
        memory_visible_from=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        use_cache=None,
        **kwargs,
    ):
        """The image arguments are what the processor of this folder makes: which tiles stand in the
        token stream, which in a memory, the number of that memory (default: all in the first), and
        of every memory patch its centre (y, x), its side, its prompt and the first place of the
        padded prompt that may look at it. Centres and sides are shares of the image."""
        places = sorted({str(place) for place in getattr(self, "hf_device_map", {}).values()})
        if len(places) > 1:  # accelerate moves what whole layers take, and these are run by halves
            raise ValueError(
                f"the model lies on {len(places)} devices ({', '.join(places)}), its looks, "
                "glimpses and second hops need one: device_map=0 or 'cpu'"
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        cached = use_cache if use_cache is not None else self.config.text_config.use_cache
        if cached and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        memories = getattr(past_key_values, "clvr", None)
        if pixel_values is not None and len(pixel_values):
            features = self.features(pixel_values)
            stream = self.image_tokens(features, stream_tiles)
            if memory_tiles is not None:
                about = memory_coordinates, memory_extents, memory_sample, memory_visible_from
                memories = self.memories(
                    features, memory_tiles, memory_number, about, len(inputs_embeds)
                )
            here = (input_ids == self.config.image_token_id).unsqueeze(-1)
            if int(here.sum()) != len(stream):
                raise ValueError(f"{int(here.sum())} image tokens, {len(stream)} image features")
            inputs_embeds = inputs_embeds.masked_scatter(here, stream.to(inputs_embeds.dtype))
            if past_key_values is not None:
                past_key_values.clvr = memories
        outputs = self.model.language_model(
            inputs_embeds,
            self.letters,
            self.clvr.looks,
            self.avm.queries,
            memories,
            self.asked(input_ids, past_key_values),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size)
        return InternVLCausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )
