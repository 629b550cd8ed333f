"""Which tokens become landmarks: one choice for all layers.

A layer alone finds a token that is new in the stream only half of the time; the mean over layers
finds it nearly always, and what a model needs of a token it may need in any layer. So each layer
scores what arrives, its scores are brought to its own scale, and their mean decides.

Shapes: ``B`` rows, ``N`` arriving tokens, ``L`` landmarks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adms.budget import select_landmarks
from adms.config import ADMSConfig
from adms.tiers.landmarks import Landmarks


@dataclass
class Candidates:
    """What arrives in one layer and could stay as a landmark.

    Attributes:
        rows: rows of the batch that these are of.
        records: ``[B, N, bytes]`` the tokens in the form of landmarks.
        tokens: ``[B, N]`` text positions, -1 where a row has fewer tokens.
        scores: ``[B, N]`` importance on the layer's own scale.
        present: the landmarks there are; None where there are none yet.
    """

    rows: list[int]
    records: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    present: Landmarks | None


def settle(layers: Sequence[list[Candidates]], counts: list[int], config: ADMSConfig) -> None:
    """Replaces each layer's candidates by what is to be its landmarks from now on.

    Args:
        layers: per layer, candidates of the same groups of rows in the same order. Afterwards
            ``present`` holds the landmarks.
        counts: per layer, how many landmarks it has room for.
        config: how places are spread over the text.
    """
    for group in zip(*layers, strict=True):
        first = group[0]
        device = first.scores.device
        scores = torch.stack([part.scores.to(device) for part in group]).mean(0)
        choices: dict[tuple[int, torch.device], tuple[torch.Tensor, Landmarks]] = {}
        for candidates, count in zip(group, counts, strict=True):
            key = (count, candidates.scores.device)
            if key not in choices:
                choices[key] = _choose(candidates, scores.to(key[1]), count, config)
            chosen, landmarks = choices[key]
            records = candidates.records
            if candidates.present is not None:
                records = torch.cat([candidates.present.records, records], dim=1)
            missing = count - records.shape[1]
            if missing > 0:
                records = torch.nn.functional.pad(records, (0, 0, 0, missing))
            own = torch.arange(chosen.shape[0], device=chosen.device)[:, None]
            candidates.present = Landmarks(records[own, chosen], landmarks.tokens, landmarks.scores)


def _choose(
    candidates: Candidates, scores: torch.Tensor, count: int, config: ADMSConfig
) -> tuple[torch.Tensor, Landmarks]:
    """Which of the present and the arriving stay ``[B, L]``, and their tokens and scores."""
    tokens = candidates.tokens
    if candidates.present is not None:
        tokens = torch.cat([candidates.present.tokens, tokens], dim=1)
        scores = torch.cat([candidates.present.scores, scores], dim=1)
    missing = count - tokens.shape[1]
    if missing > 0:
        tokens = torch.nn.functional.pad(tokens, (0, missing), value=-1)
        scores = torch.nn.functional.pad(scores, (0, missing))
    chosen = select_landmarks(
        scores,
        tokens,
        count,
        segments=config.coverage_segments,
        priority=config.coverage_priority,
    )
    landmarks = Landmarks(
        records=candidates.records[:, :0],
        tokens=tokens.gather(1, chosen),
        scores=scores.gather(1, chosen),
    )
    return chosen, landmarks
