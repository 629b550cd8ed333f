"""Which tokens become landmarks: one choice for all layers.

A layer alone finds a token that is new in the stream only half of the time; the mean over layers
finds it nearly always, and what a model needs of a token it may need in any layer. So each layer
scores what arrives, its scores are brought to its own scale, and their mean decides. A token alone
is of little use without those around it that lead to it: a passage stays whole or not at all. So
scores are averaged over neighbours, and a token counts as much as the best of those means around it
(cf. the pooling of SnapKV, Li et al., 2024, arXiv 2404.14469, which is the average alone). A
passage may have begun before what arrives and may go on behind it, so the last scores are kept, and
the newest tokens stay until it is known what follows them.

Shapes: ``L`` layers, ``B`` rows, ``N`` arriving tokens, ``C`` tokens before them, ``M`` landmarks.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from adms.budget import select_landmarks
from adms.config import ADMSConfig
from adms.tiers.landmarks import CONTEXT, Landmarks

# Tokens over which a score is averaged, and those of which the best mean counts: a sentence.
NEIGHBOURS = 25
PASSAGE = 25
# Weight of what layers say that see a token alone, beside those that compare it with others.
ALONE_WEIGHT = 0.25
# The newest tokens that stay whatever they count, of eight landmarks at most one.
NEWEST = 8


@dataclass
class Candidates:
    """What arrives in layers that are alike and could stay as a landmark.

    Attributes:
        rows: rows of the batch that these are of.
        records: ``[L, B, N, bytes]`` the tokens in the form of landmarks.
        tokens: ``[B, N]`` text positions, -1 where a row has fewer tokens.
        scores: ``[L, B, N]`` importance on each layer's own scale.
        present: the landmarks there are, whose records are ``[L, B, M, bytes]``; None where there
            are none yet.
        before: ``[B, C]`` scores over all layers of the last tokens that arrived before, -inf where
            there were fewer; None where there were none.
        comparing: layers whose metric was shown other tokens.
    """

    rows: list[int]
    records: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    present: Landmarks | None
    before: torch.Tensor | None = None
    comparing: Sequence[int] = ()


def settle(parts: Sequence[list[Candidates]], counts: list[int], config: ADMSConfig) -> None:
    """Replaces candidates by what is to be the landmarks from now on.

    Args:
        parts: candidates of all layers, some layers at a time; each has the same groups of rows in
            the same order. Afterwards ``present`` holds the landmarks, and ``before`` is for the
            tokens that arrive next.
        counts: for each part, how many landmarks its layers have room for.
        config: how places are spread over the text.
    """
    for group in zip(*parts, strict=True):
        first = group[0]
        device = first.scores.device
        scores = _over_layers(group, device)
        scores, earlier, before = _in_context(scores, first.tokens >= 0, first.before)
        choices: dict[tuple[int, torch.device], tuple[torch.Tensor, Landmarks]] = {}
        for candidates, count in zip(group, counts, strict=True):
            key = (count, candidates.scores.device)
            if key not in choices:
                _rescore(candidates, earlier.to(key[1]))
                newest = min(NEWEST, count // 8)
                choices[key] = _choose(candidates, scores.to(key[1]), count, config, newest=newest)
            candidates.present = _taken(candidates, *choices[key])
            candidates.before = before.to(key[1])


def _over_layers(group: Sequence[Candidates], device: torch.device) -> torch.Tensor:
    """Scores ``[B, N]``: those of layers that compare, and a share of the others' mean."""
    every, comparing, first = torch.cat([part.scores.to(device) for part in group]), [], 0
    for part in group:
        comparing += [first + layer for layer in part.comparing]
        first += len(part.scores)
    if len(comparing) in (0, first):
        return every.mean(0)
    shown = torch.stack([every[layer] for layer in comparing])
    # What lies between them, without a list of places that the host would have to send.
    alone = torch.cat(
        [every[last + 1 : layer] for last, layer in pairwise([-1, *comparing, first])]
    )
    return shown.mean(0) + ALONE_WEIGHT * alone.mean(0)


def _in_context(
    scores: torch.Tensor, present: torch.Tensor, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smoothed scores ``[B, N]``, of the tokens before ``[B, C]``, and the last scores now."""
    if before is None:
        before = scores.new_full((len(scores), CONTEXT), -torch.inf)
    known = torch.cat([before, scores.masked_fill(~present, -torch.inf)], dim=1)
    there = known > -torch.inf
    found = smoothed(known.masked_fill(~there, 0), there)
    # Rows are padded at their ends.
    last = present.sum(1, keepdim=True) + torch.arange(CONTEXT, device=known.device)
    return found[:, CONTEXT:], found[:, :CONTEXT], known.gather(1, last)


def _rescore(candidates: Candidates, earlier: torch.Tensor) -> None:
    """Lets landmarks among the last tokens count what ``earlier [B, C]`` says, if it is more."""
    if candidates.present is None:
        return
    tokens, scores = candidates.present.tokens, candidates.present.scores
    place = CONTEXT - (candidates.tokens[:, :1] - tokens)
    # Empty slots and tokens of long ago keep theirs.
    others = (place < 0) | (tokens < 0)
    anew = earlier.gather(1, place.clamp(0, CONTEXT - 1)).masked_fill(others, -torch.inf)
    candidates.present = dataclasses.replace(candidates.present, scores=scores.maximum(anew))


def choose(
    candidates: Candidates, count: int, config: ADMSConfig, limits: torch.Tensor
) -> Landmarks:
    """The landmarks of rows that decide by themselves, the foremost choice first.

    Args:
        candidates: what arrives, and what is there; its tensors are without layers.
        count: landmarks to give for each row.
        config: how places are spread over the text.
        limits: ``[B]`` how many of them a row has room for.
    """
    return _taken(candidates, *_choose(candidates, candidates.scores, count, config, limits))


def _taken(candidates: Candidates, chosen: torch.Tensor, landmarks: Landmarks) -> Landmarks:
    """Landmarks with each layer's own records, by the choice ``[B, M]`` that was made for all."""
    records = candidates.records
    if candidates.present is not None:
        records = torch.cat([candidates.present.records, records], dim=-2)
    missing = chosen.shape[1] - records.shape[-2]
    if missing > 0:
        records = torch.nn.functional.pad(records, (0, 0, 0, missing))
    own = torch.arange(chosen.shape[0], device=chosen.device)[:, None]
    return Landmarks(records[..., own, chosen, :], landmarks.tokens, landmarks.scores)


def smoothed(scores: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """The best mean ``[B, N]`` around each token, of those tokens that are ``present``."""
    kept = torch.stack([scores * present, present.to(scores.dtype)])
    around = torch.nn.functional.avg_pool1d(kept, NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2)
    means = around[0] / around[1].clamp(min=1 / (2 * NEIGHBOURS))
    means = means.masked_fill(~present, -torch.inf)
    best = torch.nn.functional.max_pool1d(means, PASSAGE, stride=1, padding=PASSAGE // 2)
    return best.masked_fill(~present, 0)


def _choose(
    candidates: Candidates,
    scores: torch.Tensor,
    count: int,
    config: ADMSConfig,
    limits: torch.Tensor | None = None,
    newest: int = 0,
) -> tuple[torch.Tensor, Landmarks]:
    """Which of the present and the arriving stay ``[B, M]``, and their tokens and scores.

    The ``newest`` tokens of a row stay whatever their scores.
    """
    tokens = candidates.tokens
    if candidates.present is not None:
        tokens = torch.cat([candidates.present.tokens, tokens], dim=1)
        scores = torch.cat([candidates.present.scores, scores], dim=1)
    missing = count - tokens.shape[1]
    if missing > 0:
        tokens = torch.nn.functional.pad(tokens, (0, missing), value=-1)
        scores = torch.nn.functional.pad(scores, (0, missing))
    recent = tokens > tokens.amax(1, keepdim=True) - newest
    chosen = select_landmarks(
        scores.masked_fill(recent, torch.inf),
        tokens,
        count,
        segments=config.coverage_segments,
        priority=config.coverage_priority,
        limits=limits,
    )
    landmarks = Landmarks(
        records=candidates.records[..., :0, :],
        tokens=tokens.gather(1, chosen),
        scores=scores.gather(1, chosen),
    )
    return chosen, landmarks
