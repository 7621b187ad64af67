"""InternVL around a hybrid text model whose layers look at the image again, or whose experts hand
tokens to further ones. Travels with exported weights.

An intermediate layer's hidden state queries patch features before the pixel shuffle (a memory;
there may be several, each look reads one); what a look (L) finds is added where the pattern says
(J). Prompts are batched with padding on the left; greedy search and sampling decode with a cache
that keeps the memories' keys and values.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import InternVLForConditionalGeneration
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.internvl.modeling_internvl import (
    InternVLCausalLMOutputWithPast,
    InternVLModel,
)
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from .configuration_clvr import CLVRConfig

# What a prompt's images are to the model; see CLVRForConditionalGeneration.forward.
IMAGE_INPUTS = (
    "pixel_values",
    "stream_tiles",
    "memory_tiles",
    "memory_number",
    "memory_coordinates",
    "memory_sample",
    "memory_visible_from",
)
FREQUENCIES = 6  # of the coordinates: 2^0 .. 2^5 half periods over the image


# Letters of the pattern: how each is numbered. A mixer opens a layer and an ffn closes it; the k-th
# that closes a pair adds what the k-th that opens one found.
LETTERS = {"G": "mixer", "*": "mixer", "E": "ffn", "C": "ffn", "L": "opens", "J": "closes"}


def read_pattern(pattern: str) -> list[tuple[str, int]]:
    """(letter, number) of every sub-layer: that of its layer, or of its pair."""
    counts = dict.fromkeys(LETTERS.values(), 0)
    found = []
    for letter in "".join(pattern.split()):
        if letter not in LETTERS:
            raise ValueError(f"hybrid_layer_pattern has {letter!r}; known: {', '.join(LETTERS)}")
        role = LETTERS[letter]
        found.append((letter, counts[role]))
        counts[role] += 1
    return found


class Memory:
    """One memory's patches of a batch of prompts as a rectangle [B, P], and the keys and values of
    each look that reads it."""

    def __init__(self, rows, coordinates, sample, visible_from, batch: int):
        counts = torch.bincount(sample, minlength=batch)
        width = int(counts.max()) if len(sample) else 0
        place = torch.arange(len(sample), device=sample.device)
        place = place - (counts.cumsum(0) - counts)[sample]  # patches are ordered by sample
        self.rows = rows.new_zeros(batch, width, rows.shape[-1])
        self.rows[sample, place] = rows
        self.coordinates = coordinates.new_zeros(batch, width, 2)
        self.coordinates[sample, place] = coordinates
        never = torch.iinfo(torch.int64).max
        self.visible_from = torch.full((batch, width), never, device=sample.device)
        self.visible_from[sample, place] = visible_from
        self.projected: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


class CLVRLook(nn.Module):
    def __init__(self, config: CLVRConfig, memory: dict):
        super().__init__()
        text, extra = config.text_config, config.clvr
        assert extra is not None
        self.reads = memory["name"]
        self.dim = extra["fusion"]["clvr_kv_channels"]
        width = extra["fusion"]["clvr_num_attention_heads"] * self.dim
        hidden, eps = text.hidden_size, text.rms_norm_eps
        self.query_norm = Qwen3NextRMSNorm(hidden, eps)
        self.memory_norm = Qwen3NextRMSNorm(memory["width"], eps)
        self.linear_q = nn.Linear(hidden, width, bias=False)
        # Rows are [key, value] of each head.
        self.linear_kv = nn.Linear(memory["width"], 2 * width, bias=False)
        self.q_norm = Qwen3NextRMSNorm(self.dim, eps)
        self.k_norm = Qwen3NextRMSNorm(self.dim, eps)
        self.linear_coordinates = None
        if memory["coordinates"]:
            self.linear_coordinates = nn.Linear(4 * FREQUENCIES, width, bias=False)
        self.linear_proj = nn.Linear(width, hidden, bias=False)

    def project(self, memory: Memory):
        """Keys and values of the memory, [B, heads, P, dim]."""
        fused = self.linear_kv(self.memory_norm(memory.rows))
        key, value = fused.view(*fused.shape[:2], -1, 2 * self.dim).chunk(2, dim=-1)
        if self.linear_coordinates is not None:
            exponent = torch.arange(FREQUENCIES, device=key.device)
            angles = memory.coordinates.unsqueeze(-1) * (math.pi * 2.0**exponent)
            features = torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(2)
            key = key + self.linear_coordinates(features.to(key.dtype)).view_as(key)
        return self.k_norm(key).transpose(1, 2), value.transpose(1, 2)

    def forward(self, hidden: torch.Tensor, memories: dict[str, Memory], first: int, pair: int):
        """Returns what each position finds, [B, T, H]; exactly 0 where no image stands before it.

        `first` is the place of the first position in its padded row.
        """
        memory = memories[self.reads]
        if pair not in memory.projected:
            memory.projected[pair] = self.project(memory)
        key, value = memory.projected[pair]
        query = self.linear_q(self.query_norm(hidden))
        query = self.q_norm(query.view(*query.shape[:2], -1, self.dim)).transpose(1, 2)
        place = torch.arange(first, first + hidden.shape[1], device=hidden.device)
        visible = place[None, :, None] >= memory.visible_from[:, None, :]
        sees = visible.any(-1)[:, None, :, None]
        mask = visible.unsqueeze(1) | ~sees  # softmax over nothing is NaN
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        found = torch.where(sees, found, 0.0)
        return self.linear_proj(found.transpose(1, 2).flatten(2))


class CLVRParts(nn.Module):
    """The projections of the memories, that of `vision` and those of others by name, and the
    looks."""

    def __init__(self, config: CLVRConfig):
        super().__init__()
        self.memory_proj, self.memory_projs = None, nn.ModuleDict()
        assert config.clvr is not None
        memories = {memory["name"]: memory for memory in config.clvr["memories"]}
        for name, memory in memories.items():
            linear = nn.Linear(config.vision_config.hidden_size, memory["width"])
            if name == "vision":
                self.memory_proj = linear
            else:
                self.memory_projs[name] = linear
        reads = enumerate(config.clvr["look_memories"])
        self.looks = nn.ModuleDict({str(n): CLVRLook(config, memories[name]) for n, name in reads})

    def projections(self) -> dict[str, nn.Linear]:
        """Returns the projections by memory, in the order of the processor."""
        names = list(self.memory_projs)
        found = {} if self.memory_proj is None else {"vision": self.memory_proj}
        return found | {name: self.memory_projs[name] for name in names}


class Delegate(nn.Module):
    """The second hop of a layer of experts (C): tokens that its gate hands over go to further
    experts of the layer, with the first hop's result."""

    def __init__(self, text, settings: dict):
        super().__init__()
        self.settings, hidden = settings, text.hidden_size
        self.norm = Qwen3NextRMSNorm(hidden, text.rms_norm_eps)
        self.gate = nn.Linear(hidden, 1)
        self.router = nn.Linear(hidden, text.num_experts, bias=False)
        self.scale = nn.Parameter(torch.zeros(hidden))
        self.hard = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, stream, normed, result, block):
        """Returns the result with what the second hop adds; `block` is the layer's experts, which
        made it of `normed`."""
        read = stream if self.settings["delegate_input"] == "stream" else stream + result
        z = self.norm(read).flatten(0, 1)
        bias = self.gate.bias.float()
        gate = F.linear(z.float(), self.gate.weight.float(), bias).squeeze(-1).sigmoid()
        rows = (gate > 1.5 * self.hard.float() - 1).nonzero().flatten()
        x, k = z[rows], self.settings["delegate_topk"]
        scores = F.linear(x.float(), self.router.weight.float())
        allowed = scores
        if self.settings["delegate_distinct"]:
            allowed = scores.scatter(1, block.gate(normed)[2][rows], -math.inf)
        best, experts = allowed.topk(k)
        weights = best.softmax(-1) if k > 1 else scores.softmax(-1).gather(1, experts)
        weights = (weights * gate[rows, None]).to(x.dtype)
        found = block.experts(x, experts, weights) * self.scale
        return result.flatten(0, 1).index_add(0, rows, found).view_as(result)


class LetterByLetter:
    """The forward pass of a hybrid text model, over the letters of the layer pattern."""

    watch = None  # diagnostics: (layer, hidden) as each layer ends

    def forward(
        self: nn.Module,  # it is mixed into a text model
        inputs_embeds,
        letters,
        looks,
        memories=None,
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
            role = LETTERS[letter]
            if role == "opens":
                if memories is not None:
                    waiting[number] = looks[str(number)](hidden, memories, first, number)
            elif role == "closes":
                hidden = hidden + waiting.pop(number) if number in waiting else hidden
            elif role == "mixer":
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
        self.clvr = CLVRParts(config)
        assert config.clvr is not None
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

    def memories(self, features, tiles, number, coordinates, sample, visible_from, batch):
        """Returns the memories by name; `number` says which of them each tile is in."""
        number = torch.zeros_like(tiles) if number is None else number
        of_patch = number.repeat_interleave(features.shape[1])
        found = {}
        for index, (name, project) in enumerate(self.clvr.projections().items()):
            rows, here = features[tiles[number == index]].flatten(0, 1), of_patch == index
            about = coordinates[here], sample[here], visible_from[here]
            found[name] = Memory(project(rows), *about, batch)
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
            "memory_sample": torch.cat(owner).repeat_interleave(patches),
            "memory_visible_from": images["memory_visible_from"][rows],
        }

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        stream_tiles=None,
        memory_tiles=None,
        memory_number=None,
        memory_coordinates=None,
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
        of every memory patch its centre (y, x), its prompt and the first place of the padded prompt
        that may look at it."""
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
                about = memory_coordinates, memory_sample, memory_visible_from, len(inputs_embeds)
                memories = self.memories(features, memory_tiles, memory_number, *about)
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
            memories,
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
