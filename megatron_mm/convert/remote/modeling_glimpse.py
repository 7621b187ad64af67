"""Glimpses: a token asks for a place of an image, the slots behind it show what is there. Travels
with exported weights.

A *query* is a token that the model writes; K *slots* follow it, whatever the model would have
written there. At letter Q of the layer pattern the hidden state of the query, or the three tokens
before it, say where to look and how closely, and a memory is read there; at letter V what was found
is added to the slots.

Shapes: B prompts, T tokens, N queries, K slots of each, h heads, D width of a head; of one prompt
S slots, P patches, I images.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import LogitsProcessor
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

ORDINARY = -1  # of a token that is neither a query nor a slot
PLACES, SCALES = 32, 6  # tokens of places: of y, of x, and of sides


@dataclass(frozen=True)
class LookRule:
    """Which tokens are queries and slots: the first `most` queries of a prompt and its answer, and
    the `slots` tokens behind each. Where words say a place, `place_id` is the first of their
    tokens, and `least` the smallest side of a window."""

    query_id: int
    slot_id: int
    slots: int
    most: int
    place_id: int | None = None
    least: float = 1.0

    @classmethod
    def of(cls, clvr: dict) -> "LookRule | None":
        """None for a model without glimpses."""
        settings = clvr.get("layers", {}).get("Q")
        if settings is None:
            return None
        slots, most = settings["query_grid"] ** 2, settings["max_queries"]
        ids = clvr["query_token_id"], clvr["slot_token_id"]
        return cls(*ids, slots, most, clvr.get("place_token_id"), settings["query_min_scale"])

    def said(self, before: torch.Tensor) -> torch.Tensor:
        """The places (y, x, s) that three tokens spell, fp32 [..., 3]; the whole image if they are
        none. The tokens are PLACES of y, PLACES of x, SCALES of s, in this order."""
        assert self.place_id is not None
        first = [self.place_id + n * PLACES for n in range(3)]
        number = before - torch.tensor(first, device=before.device)
        sizes = torch.tensor([PLACES, PLACES, SCALES], device=before.device)
        known = ((number >= 0) & (number < sizes)).all(-1, keepdim=True)
        at = (number[..., :2] + 0.5) / PLACES
        scale = torch.exp(math.log(self.least) * (number[..., 2:].float() / (SCALES - 1)))
        whole = torch.tensor([0.5, 0.5, 1.0], device=before.device)
        return torch.where(known, torch.cat((at, scale), -1), whole)


@dataclass
class Asked:
    """The queries of a batch up to some token. It stands beside the cache of the layers.

    Attributes:
        owed: slots that are still to come, of each prompt's last query.
        count: queries that each prompt has had.
        tokens: that were read.
        slot: int64 [B, T] of the tokens that were read last: 0 for a query, i for the i-th slot of
            one, `ORDINARY` for others.
        found: by the number of the pair, what the last query of each prompt found, [B, K, H].
        last: int64 [B, 3], the tokens before those that are read next, where words say a place.
        said: fp32 [B, T, 3], the place that the three tokens before each of them spell.
    """

    rule: LookRule
    owed: list[int]
    count: list[int]
    tokens: int = 0
    slot: torch.Tensor | None = None
    found: dict[int, torch.Tensor] = field(default_factory=dict)
    last: torch.Tensor | None = None
    said: torch.Tensor | None = None

    @classmethod
    def start(cls, rule: LookRule, batch: int) -> "Asked":
        return cls(rule, [0] * batch, [0] * batch)

    def read(self, ids: torch.Tensor) -> None:
        """Reads the next tokens [B, T]."""
        slots, length = self.rule.slots, ids.shape[1]
        self.slot = torch.full_like(ids, ORDINARY)
        order = torch.arange(slots + 1, device=ids.device)
        ends = []
        for row, owed in enumerate(self.owed):
            self.slot[row, :owed] = order[slots + 1 - owed :][:length]
            ends.append(owed)
        for row, place in (ids == self.rule.query_id).nonzero().tolist():
            if place >= ends[row] and self.count[row] < self.rule.most:
                ends[row] = place + slots + 1
                self.slot[row, place : ends[row]] = order[: length - place]
                self.count[row] += 1
        self.owed = [max(0, end - length) for end in ends]
        self.tokens += length
        if self.rule.place_id is not None:
            before = ids.new_full((len(ids), 3), ORDINARY) if self.last is None else self.last
            whole = torch.cat((before, ids), 1)
            self.said = self.rule.said(whole.unfold(1, 3, 1)[:, :length])
            self.last = whole[:, -3:]

    def reorder(self, rows: torch.Tensor) -> None:
        """Takes the place of these rows, in this order, as beams do."""
        order = rows.tolist()
        self.owed, self.count = ([held[row] for row in order] for held in (self.owed, self.count))
        self.found = {pair: found.index_select(0, rows) for pair, found in self.found.items()}
        self.last = None if self.last is None else self.last.index_select(0, rows)


class ForcedSlots(LogitsProcessor):
    """Lets nothing but slots follow a query. They cost a beam nothing."""

    def __init__(self, rule: LookRule):
        self.rule = rule

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        asked = Asked.start(self.rule, len(input_ids))
        asked.read(input_ids)
        rows = [row for row, owed in enumerate(asked.owed) if owed]
        if rows:
            scores = scores.clone()
            scores[rows] = -torch.inf
            scores[rows, self.rule.slot_id] = 0.0
        return scores


def place(asked_N3: torch.Tensor, least: float, floor: torch.Tensor) -> torch.Tensor:
    """(y, x, s), fp32 [N, 3] in shares of the image: y and x between 0 and 1, s between `least` and
    1, and no smaller than the floor."""
    share_N3 = asked_N3.float().sigmoid()
    scale_N1 = torch.exp(math.log(least) * share_N3[:, 2:]).maximum(floor.float())
    return torch.cat((share_N3[:, :2], scale_N1), 1)


class Glimpse(nn.Module):
    """Letter Q. A slot reads the patches of its prompt by Gaussians around its cell of the window
    that its query asks for, over places and over log2 of the sides of patches, and by content as
    far as `content` lets it. With several images it divides itself among them by content."""

    def __init__(self, config, memory: dict):
        super().__init__()
        text, extra = config.text_config, config.clvr
        settings = extra["layers"]["Q"]
        self.reads = memory["name"]
        self.grid, self.slots = settings["query_grid"], settings["query_grid"] ** 2
        self.spread, self.scale_spread = settings["query_spread"], settings["query_scale_spread"]
        self.least = settings["query_min_scale"]
        heads, self.dim = (
            extra["fusion"][key] for key in ("clvr_num_attention_heads", "clvr_kv_channels")
        )
        width, hidden, eps = heads * self.dim, text.hidden_size, text.rms_norm_eps
        self.query_norm = Qwen3NextRMSNorm(hidden, eps)
        self.linear_place = nn.Linear(hidden, 3)
        self.linear_q = nn.Linear(hidden, width, bias=False)
        self.memory_norm = Qwen3NextRMSNorm(memory["width"], eps)
        # Rows are [key, value] of each head.
        self.linear_kv = nn.Linear(memory["width"], 2 * width, bias=False)
        self.q_norm = Qwen3NextRMSNorm(self.dim, eps)
        self.k_norm = Qwen3NextRMSNorm(self.dim, eps)
        self.content = nn.Parameter(torch.zeros(heads))
        self.linear_proj = nn.Linear(width, hidden, bias=False)
        # The smallest side that a window may have, which a schedule of training sets.
        self.min_scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, hidden: torch.Tensor, memories: dict, first: int, pair: int, asked: Asked):
        """Returns what each position shows, [B, T, H]: exactly 0 for all but slots, and for those
        before which no image stands.

        Args:
            first: the place of the first position in its padded row.
            asked: has read these tokens; it keeps what the last query of each row found.
        """
        batch, _, width = hidden.shape
        slot = asked.slot
        assert slot is not None
        asks = slot == 0
        row_N, at_N = asks.nonzero(as_tuple=True)
        before = asked.found.get(pair)
        if before is None:
            before = hidden.new_zeros(batch, self.slots, width)
        told = None if asked.said is None else asked.said[asks]
        found = self.look(hidden, memories[self.reads], first, pair, asks, told)
        table = torch.cat((before, found))
        # Of each token, the query that it follows; those of earlier calls come first.
        count = asks.cumsum(1)
        earlier = count[:, -1].cumsum(0) - count[:, -1] + batch - 1
        own = torch.arange(batch, device=hidden.device)[:, None]
        query = torch.where(count > 0, count + earlier[:, None], own)
        asked.found[pair] = table[query[:, -1]]
        shows = (slot > 0).nonzero(as_tuple=True)
        shown = torch.zeros_like(hidden)
        shown[shows] = table[query[shows], slot[shows] - 1]
        return shown

    def look(self, hidden, memory, first: int, pair: int, asks, told):
        """Findings of the slots of each query, [N, K, H], prompt by prompt. `told`: the places that
        words say, [N, 3]; None: hidden states say them."""
        rows_NH = hidden[asks]
        if not len(rows_NH):
            return hidden.new_zeros(0, self.slots, hidden.shape[-1])
        normed = self.query_norm(rows_NH)
        place_N3 = told
        if told is None:
            place_N3 = place(self.linear_place(normed), self.least, self.min_scale)
        query_NhD = self.q_norm(self.linear_q(normed).view(len(rows_NH), -1, self.dim))
        key, value = self.project(memory, pair)
        found, done = [], 0
        for row, at in enumerate(asks):
            at = at.nonzero().flatten() + first
            if not len(at):
                continue
            mine, patches = slice(done, done + len(at)), slice(memory.counts[row])
            behind = torch.arange(1, self.slots + 1, device=at.device)
            found.append(
                self.read(
                    query_NhD[mine].repeat_interleave(self.slots, 0),
                    place_N3[mine].repeat_interleave(self.slots, 0),
                    (behind - 1).repeat(len(at)),
                    key[row, :, patches],
                    value[row, :, patches],
                    memory.places[row, patches],
                    memory.visible_from[row, patches] <= (at[:, None] + behind).reshape(-1, 1),
                    memory.image[row, patches],
                )
            )
            done += len(at)
        found_ShD = torch.cat(found)
        return self.linear_proj(found_ShD.flatten(1)).view(len(rows_NH), self.slots, -1)

    def project(self, memory, pair: int):
        """Keys and values of the memory, [B, h, P, D], computed once for a prompt."""
        name = f"glimpse {pair}"
        if name not in memory.projected:
            fused = self.linear_kv(self.memory_norm(memory.rows))
            key, value = fused.view(*fused.shape[:2], -1, 2 * self.dim).chunk(2, dim=-1)
            memory.projected[name] = self.k_norm(key).transpose(1, 2), value.transpose(1, 2)
        return memory.projected[name]

    def read(
        self, query_ShD, place_S3, index_S, key_hPD, value_hPD, places_P3, visible_SP, image_P
    ):
        """Findings of the slots of one prompt, [S, h, D]."""
        sees_S = visible_SP.any(1)
        if not sees_S.any():
            return torch.zeros_like(query_ShD)
        near_SP = self.nearness(place_S3, index_S, places_P3)
        query_hSD, scale = query_ShD.transpose(0, 1), self.dim**-0.5
        alike_hSP = (query_hSD @ key_hPD.transpose(1, 2)).float() * scale
        scores_hSP = near_SP + self.content.float()[:, None, None] * alike_hSP
        images = int(image_P[-1]) + 1
        if images > 1:
            of_image_PI = image_P[:, None] == torch.arange(images, device=image_P.device)
            total_hID = of_image_PI.T.to(key_hPD.dtype) @ key_hPD
            mean_hID = total_hID / of_image_PI.sum(0)[:, None]
            alike_hSI = (query_hSD @ mean_hID.transpose(1, 2)).float() * scale
            unseen_SI = ~(visible_SP[:, :, None] & of_image_PI).any(1)
            share_hSI = alike_hSI.masked_fill(unseen_SI, -torch.inf).log_softmax(-1)
            scores_hSP = scores_hSP + share_hSI[..., image_P]
        hidden_SP = ~visible_SP & sees_S[:, None]  # softmax over nothing is NaN
        scores_hSP = torch.where(sees_S[:, None], scores_hSP, 0.0)
        weights_hSP = scores_hSP.masked_fill(hidden_SP, -torch.inf).softmax(-1)
        found_hSD = weights_hSP.to(value_hPD.dtype) @ value_hPD
        return torch.where(sees_S[:, None], found_hSD, 0.0).transpose(0, 1)

    def nearness(self, place_S3, index_S, places_P3):
        """The part of the scores that follows from places, fp32 [S, P]."""
        centre = (torch.arange(self.grid, device=place_S3.device) + 0.5) / self.grid - 0.5
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        offset_S2 = torch.stack((y.flatten(), x.flatten()), -1)[index_S]
        goal_S2 = place_S3[:, :2] + place_S3[:, 2:] * offset_S2
        cell_S1 = place_S3[:, 2:] / self.grid
        away_SP2 = (places_P3[:, :2] - goal_S2[:, None]) / (self.spread * cell_S1)[:, None]
        octaves_SP = (places_P3[:, 2] - cell_S1.log2()) / self.scale_spread
        return -0.5 * (away_SP2.square().sum(-1) + octaves_SP.square())
