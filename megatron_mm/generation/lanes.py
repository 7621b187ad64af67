"""Lanes: the rows in which completions are generated.

A lane is one microbatch of a decoding step. What a step computes with is on the device. Who is in
which row and what has been drawn is kept on the host of every rank of the replica, which learns of
drawn tokens a few steps at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_mm import platform
from megatron_mm.config.layers.queries import QUERY
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.place_tokens import WORDS, PlaceTokens
from megatron_mm.model.decode import ORDINARY, DecodeCache, Filling

FREE = -1


@dataclass(frozen=True)
class Completion:
    """Completion of a prompt.

    Attributes:
        tokens_G: int64, those that the model drew: without the slots behind a query
            (data/looks.py). The last one is a stop token if `finished`; otherwise the length limit
            was reached.
        logprobs_G: fp32, log-probability of each token under the model that drew it, at its
            temperature.
        routes_SLk: int16, if recorded: experts chosen in each MoE layer of this rank, hop by hop
            (model/routing.py), for prompt and completion without its last token, which no router
            saw.
        places_G: int64, where each token stands in the stream, from the first; None: one behind the
            other.
        looked_NQ3: fp32, the place (y, x, scale) of each query in shares of the image, for each
            glimpse (letter Q) of this rank's stages.
    """

    tokens_G: torch.Tensor
    logprobs_G: torch.Tensor
    finished: bool
    routes_SLk: torch.Tensor | None = None
    places_G: torch.Tensor | None = None
    looked_NQ3: torch.Tensor | None = None

    @property
    def routes_GLk(self) -> torch.Tensor:
        """The recorded routes of the positions whose logits were sampled."""
        assert self.routes_SLk is not None, "routes were not recorded"
        if self.places_G is None:
            return self.routes_SLk[-len(self.tokens_G) :]
        return self.routes_SLk[-int(self.places_G[-1]) - 1 :][self.places_G]


class Lane:
    """R rows, each free or generating one completion.

    A row whose completion has ended goes on until the host learns of it; what it draws is ignored.

    Attributes:
        number_R: int64, unique per completion; with the count it seeds the next draw.
        count_R: int64, number of tokens drawn that the host knows.
        prompt_R: int64, length of the row's prompt.
        asked_R: int64, queries of the row's prompt.
        batch: the rows' last tokens, on the device; a step reads them, `advance` writes them.
        uniform_R: fp64, on the device: the numbers that a step draws with.
    """

    def __init__(
        self,
        rows: int,
        max_tokens: int,
        pad_id: int,
        ahead: int,
        looks: LookTokens | None = None,
    ):
        """
        Args:
            ahead: tokens that a row may draw after its last one before the host learns of it.
            looks: None: no token is a query.
        """
        self.cache, self.ahead, self.looks = DecodeCache(rows), ahead, looks
        self.owner_R2 = torch.full((rows, 2), FREE)  # (prompt, index of the completion)
        self.number_R = torch.zeros(rows, dtype=torch.int64)
        self.count_R = torch.zeros(rows, dtype=torch.int64)
        self.prompt_R = torch.zeros(rows, dtype=torch.int64)
        self.asked_R = torch.zeros(rows, dtype=torch.int64)
        self.tokens_RG = torch.zeros(rows, max_tokens, dtype=torch.int64)
        self.logprobs_RG = torch.zeros(rows, max_tokens)
        tokens = torch.full((rows,), pad_id, dtype=torch.int64, device=platform.device())
        self._moving_R = torch.zeros_like(tokens)  # 1 for the rows that are generating
        self._last_R3 = tokens.new_full((rows, WORDS), FREE)  # the last tokens of each row
        if looks is not None and looks.words is not None:
            self.cache.targets_RM3 = self._no_targets(tokens.device)
        self.batch = self._batch(tokens)
        self.uniform_R = torch.zeros(rows, dtype=torch.float64, device=tokens.device)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the tensors of a step are."""
        own = [self.batch.tokens_T, self.cache.lengths_R, self._moving_R, self.uniform_R]
        own += [self.cache.slot_R, self.cache.asks_R, self._last_R3]
        own += [] if self.cache.targets_RM3 is None else [self.cache.targets_RM3]
        held = (x for state in self.cache.layers.values() for x in state.tensors.values())
        return tuple(x.data_ptr() for x in (*own, *held))

    @property
    def active_R(self) -> torch.Tensor:
        return self.owner_R2[:, 0] != FREE

    @property
    def busy_rows(self) -> torch.Tensor:
        """int64 indices of the rows that are generating."""
        return self.active_R.nonzero().flatten()

    @property
    def free(self) -> int:
        return int((~self.active_R).sum())

    @property
    def left(self) -> int:
        """The most tokens that any row may still draw."""
        left_R = self.tokens_RG.shape[1] - self.count_R
        return int(torch.where(self.active_R, left_R, 0).max())

    @property
    def longest(self) -> int:
        """The most positions that any row holds and its last token, which the host knows."""
        return int(torch.where(self.active_R, self.prompt_R + self.count_R, 1).max())

    def fill(
        self, batch: Microbatch, prompts: range, numbers: Sequence[int], group: int
    ) -> Filling:
        """Assigns free rows to `group` completions of each sample of `batch`, and returns them.
        The forward pass of the batch then fills their caches.

        Args:
            prompts: indices of the samples among the prompts.
            numbers: see `Prompts.numbers`.
        """
        (rows,) = (~self.active_R).nonzero(as_tuple=True)
        rows = rows[: len(prompts) * group]
        prompt = torch.arange(len(prompts)).repeat_interleave(group)
        sample = torch.arange(group).repeat(len(prompts))
        filling = self.cache.filling = Filling(rows, prompt)
        lengths = batch.cu_seqlens.diff()
        self.cache.reserve(int(lengths.max()) + self.tokens_RG.shape[1] + self.ahead)
        self.prompt_R[rows] = lengths[prompt]
        self.owner_R2[rows] = torch.stack((prompt + prompts.start, sample), 1)
        self.number_R[rows] = torch.tensor(numbers, dtype=torch.int64)[prompt] * group + sample
        self.count_R[rows] = 0
        ends = batch.cu_seqlens[1:].contiguous()
        of_query = torch.searchsorted(ends, batch.queries.positions_N, right=True)
        self.asked_R[rows] = torch.bincount(of_query, minlength=len(lengths))[prompt]
        there = rows.to(self._moving_R.device)
        self.cache.lengths_R[there] = self.prompt_R[rows].to(there.device)
        self.cache.slot_R[there] = ORDINARY
        self.cache.asks_R[there] = self.asked_R[rows].to(there.device)
        if self.looks is not None and self.looks.words is not None:
            tail_A3 = (ends[prompt].unsqueeze(1) - torch.arange(WORDS, 0, -1)).clamp(min=0)
            # The engine moves the batch to the device later.
            self._last_R3[there] = platform.moved(batch.tokens_T[tail_A3], there.device)
        if self.cache.targets_RM3 is not None:  # what the rows' last completions were given
            self.cache.targets_RM3[there] = torch.nan
        if batch.queries.rows_BM3 is not None and self.looks is not None:
            self._expect(there, platform.moved(batch.queries.rows_BM3[prompt], there.device))
        self._show_active()
        return filling

    def _expect(self, rows: torch.Tensor, targets_AM3: torch.Tensor) -> None:
        """Keeps the places that the queries of rows should ask for."""
        assert self.looks is not None
        if self.cache.targets_RM3 is None:
            self.cache.targets_RM3 = self._no_targets(rows.device)
        held = self.cache.targets_RM3
        most = min(held.shape[1], targets_AM3.shape[1])
        held[rows, :most] = targets_AM3[:, :most]

    def _no_targets(self, device: torch.device) -> torch.Tensor:
        assert self.looks is not None
        return torch.full((self.cache.rows, self.looks.most, 3), torch.nan, device=device)

    def begin(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Takes the first tokens of rows, on the device."""
        there = rows.to(tokens.device)
        self.batch.tokens_T.index_copy_(0, there, tokens)
        if self.looks is not None:
            fresh_R = torch.zeros_like(self._moving_R).index_fill_(0, there, 1).bool()
            self._follow(self.batch.tokens_T, fresh_R)

    def advance(self, tokens_R: torch.Tensor) -> None:
        """Takes the next token of every row, on the device."""
        self.batch.tokens_T.copy_(tokens_R)
        self.cache.lengths_R.add_(self._moving_R)
        if self.looks is not None:
            self._follow(tokens_R, self._moving_R.bool())

    def forced(self, tokens_R: torch.Tensor) -> torch.Tensor:
        """Returns the next token of every row, on the device, from what was drawn: behind a query
        stand its slots, whatever that was."""
        if self.looks is None:
            return tokens_R
        return tokens_R.masked_fill(self._owes_R, self.looks.slot_id)

    @property
    def _owes_R(self) -> torch.Tensor:
        """bool, whether a slot follows the row's token."""
        assert self.looks is not None
        return (self.cache.slot_R >= 0) & (self.cache.slot_R < self.looks.slots)

    def _follow(self, tokens_R: torch.Tensor, moving_R: torch.Tensor) -> None:
        """Keeps up with queries and slots as rows get these tokens."""
        assert self.looks is not None
        owes_R, most = self._owes_R, self.looks.most
        asks_R = (tokens_R == self.looks.query_id) & ~owes_R & moving_R
        asks_R &= self.cache.asks_R < most
        slot_R = torch.where(owes_R, self.cache.slot_R + 1, ORDINARY)
        slot_R = slot_R.masked_fill(asks_R, 0)
        self.cache.slot_R.copy_(torch.where(moving_R, slot_R, self.cache.slot_R))
        self.cache.asks_R.add_(asks_R)
        if self.looks.words is not None:
            self._hear(self.looks.words, asks_R)
            last_R3 = torch.cat((self._last_R3[:, 1:], tokens_R.unsqueeze(1)), 1)
            self._last_R3.copy_(torch.where(moving_R.unsqueeze(1), last_R3, self._last_R3))

    def _hear(self, words: PlaceTokens, asks_R: torch.Tensor) -> None:
        """Keeps the places that the words before new queries say."""
        targets_RM3 = self.cache.targets_RM3
        assert targets_RM3 is not None
        index_R13 = (self.cache.asks_R.clamp(min=1) - 1)[:, None, None].expand(-1, 1, 3)
        said_R13 = words.said(self._last_R3).unsqueeze(1)
        held_R13 = targets_RM3.gather(1, index_R13)
        targets_RM3.scatter_(1, index_R13, torch.where(asks_R[:, None, None], said_R13, held_R13))

    def append(
        self,
        rows: torch.Tensor,
        tokens_An: torch.Tensor,
        logprobs_An: torch.Tensor,
        stops: Sequence[int],
    ) -> Iterator[tuple[int, int, Completion]]:
        """Appends n tokens to each of `rows`, on the host. Yields (prompt, index, completion) for
        completions that end with one of them, and frees their rows."""
        most, known = self.tokens_RG.shape[1], self.count_R[rows]
        new = torch.arange(1, tokens_An.shape[1] + 1)
        stopped_An = torch.isin(tokens_An, torch.tensor(stops, dtype=torch.int64))
        last_An = stopped_An | (known.unsqueeze(1) + new >= most)
        ended_A = last_An.any(1)
        taken_A = torch.where(ended_A, last_An.int().argmax(1) + 1, len(new))
        own_An = new <= taken_A.unsqueeze(1)
        place_An = known.unsqueeze(1) + new - 1
        for held, drawn in ((self.tokens_RG, tokens_An), (self.logprobs_RG, logprobs_An)):
            held[rows.unsqueeze(1).expand_as(own_An)[own_An], place_An[own_An]] = drawn[own_An]
        self.count_R[rows] = known + taken_A
        ends = stopped_An.gather(1, taken_A.unsqueeze(1) - 1).squeeze(1)
        if not ended_A.any():
            return
        done = rows[ended_A]
        routes, looked = self._routes(done), self._looked(done)
        for n, (row, finished) in enumerate(
            zip(done.tolist(), ends[ended_A].tolist(), strict=True)
        ):
            count = int(self.count_R[row])
            tokens_G, logprobs_G = self.tokens_RG[row, :count], self.logprobs_RG[row, :count]
            places_G = looked_NQ3 = None
            if self.looks is not None:
                before = int(self.asked_R[row])
                drawn_G = self.looks.drawn(tokens_G, before)
                asks = len(self.looks.find(tokens_G, before, drawn_G))
                looked_NQ3 = looked[n, before : before + asks]
                tokens_G, logprobs_G = tokens_G[drawn_G], logprobs_G[drawn_G]
                places_G = self.looks.places(tokens_G, before)
                count = int(places_G[-1]) + 1  # without the slots of a query that ends it
            seen = int(self.prompt_R[row]) + count - 1
            own = None if routes is None else routes[n, :, :seen].transpose(0, 1).clone()
            prompt, sample = self.owner_R2[row].tolist()
            self.owner_R2[row] = FREE
            drawn = tokens_G.clone(), logprobs_G.clone()
            yield prompt, sample, Completion(*drawn, finished, own, places_G, looked_NQ3)
        self._show_active()

    def _routes(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Reads the recorded routes of rows in one transfer, [rows, layers, positions, k]."""
        held = self.cache.routes.tensors.get("experts")
        if held is None:
            return None
        longest = int((self.prompt_R[rows] + self.count_R[rows]).max())
        there = platform.moved(rows, held.device)
        return held[:, :, :longest].index_select(0, there).cpu()

    def _looked(self, rows: torch.Tensor) -> torch.Tensor:
        """Reads where the queries of rows have looked, fp32 [rows, most, Q, 3], in one transfer."""
        states = sorted(key for key in self.cache.layers if key[0] == QUERY.letter)
        held = [self.cache.layers[key].tensors.get("looked") for key in states]
        found = [x.index_select(0, platform.moved(rows, x.device)) for x in held if x is not None]
        if not found:  # no step has run yet, or no glimpse is here
            most = 0 if self.looks is None else self.looks.most
            return torch.zeros(len(rows), most, len(states), 3)
        return torch.stack(found, 2).cpu()

    def needed(self, multiple: int) -> int:
        """The rows that are generating, and free ones up to a multiple of `multiple`."""
        return max(1, -(-len(self.busy_rows) // multiple)) * multiple

    def shrink(self, wanted: int) -> None:
        """Drops free rows until `wanted` are left, once these are at most half of all."""
        if 2 * wanted > self.cache.rows:
            return
        busy = self.busy_rows
        (free,) = (~self.active_R).nonzero(as_tuple=True)
        rows = torch.cat((busy, free[: wanted - len(busy)]))
        self.cache.keep(rows)
        names = ("owner_R2", "number_R", "count_R", "prompt_R", "asked_R", "tokens_RG")
        for name in (*names, "logprobs_RG", "_moving_R", "_last_R3", "uniform_R"):
            held = getattr(self, name)
            setattr(self, name, held[rows.to(held.device)])
        self.batch = self._batch(self.batch.tokens_T[rows.to(self.batch.tokens_T.device)])

    def _show_active(self) -> None:
        """Tells the device which rows are generating."""
        self._moving_R.copy_(platform.moved(self.active_R, self._moving_R.device))

    def _batch(self, tokens_R: torch.Tensor) -> Microbatch:
        """One position of every row. Positions are the cache's business."""
        built = Microbatch.build(torch.zeros(len(tokens_R), dtype=torch.int64), [1] * len(tokens_R))
        return replace(built.to(tokens_R.device), tokens_T=tokens_R)
