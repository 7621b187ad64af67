"""The text of a row's answers, by which a teacher's tokens find a student's.

A position stands for the token that it predicts. The supervised tokens of a row, one turn after the
other, write its answers; each turn's end counts as one character more. Two tokenizers write the
same characters, so a student's position, about to write character c, listens to the teacher's
position that wrote c.

Shapes: T tokens of a sample, P supervised ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from megatron_mm.data.chat import tools_of, turns
from megatron_mm.data.files.forms import HeldImage, held_and_box
from megatron_mm.data.messages import check_messages
from megatron_mm.data.sample import Sample
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.spans import token_pieces

DIGEST = 16  # bytes


def row_digest(row: Mapping[str, Any], where: str) -> bytes:
    """Returns what tells a row from others: a digest of its turns as the template writes them, of
    what is learnt, and of the names or bytes of its images, with their boxes.

    Args:
        where: "file:row", for messages.
    Raises:
        DataError: for a row that is no conversation.
    """
    written = turns(check_messages(row, where), tools_of(row, where))
    said = [[turn.role, list(turn.texts), turn.learnt] for turn in written]
    images = [_shown(image) for image in row.get("images") or ()]
    # Every character can be written so, half a surrogate pair too.
    whole = [said, images, *([] if row.get("looks") is None else [row["looks"]])]
    text = json.dumps(whole, ensure_ascii=True)
    return hashlib.sha256(text.encode()).digest()[:DIGEST]


def _shown(image: HeldImage) -> Any:
    """Returns what tells an image from others."""
    held, box = held_and_box(image)
    name = hashlib.sha256(held).hexdigest() if isinstance(held, bytes) else held
    return name if box is None else [name, box]


def supervised(sample: Sample) -> torch.Tensor:
    """Returns int64 [P], ascending: the positions that predict a token of an answer."""
    return sample.loss_mask_T.nonzero().flatten()


def token_digest(sample: Sample) -> bytes:
    """Returns a digest of the tokens of a sample's answers. Where it is the same, so are the
    positions."""
    ids_P = sample.labels_T[supervised(sample)]
    return hashlib.sha256(ids_P.numpy().tobytes()).digest()[:DIGEST]


def answer_starts(sample: Sample, tokenizer: Tokenizer) -> torch.Tensor:
    """Returns int32 [P]: the character at which each token of the sample's answers begins. Words of
    places that no text spells begin where the token behind them does, and have no length."""
    positions = supervised(sample).tolist()
    # Both are of the positions that predict them.
    added, asks = ({place - 1 for place in places} for places in (sample.added, sample.queries))
    starts: list[int] = []
    base, turn = 0, []
    for place, position in enumerate(positions):
        turn.append(position)
        behind = position + 1 + (sample.slots if position in asks else 0)
        if place + 1 < len(positions) and positions[place + 1] == behind:
            continue
        own = [int(sample.labels_T[p]) for p in turn if p not in added]
        pieces = token_pieces(own[:-1], tokenizer)  # the last token ends the turn
        length = pieces[-1][1] if pieces else 0
        begins, number = [*(start for start, _ in pieces), length], 0
        for p in turn:
            starts.append(base + begins[number])
            number += p not in added
        base, turn = base + length + 1, []
    return torch.tensor(starts, dtype=torch.int32)


def matching(starts_P: torch.Tensor, teacher_P: torch.Tensor) -> torch.Tensor:
    """Returns int64 [P], the teacher's token that wrote the character at which each of the
    student's begins.

    Args:
        starts_P, teacher_P: `answer_starts` of both, of any numbers of tokens.
    """
    if torch.equal(starts_P, teacher_P):  # also where several tokens make one character
        return torch.arange(len(starts_P))
    return (torch.searchsorted(teacher_P, starts_P, right=True) - 1).clamp(min=0)
