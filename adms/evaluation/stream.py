"""Reading a text through a cache: the loss of every token, and the bytes held on the way.

Shapes: ``B`` texts of one length, ``N`` tokens, ``V`` vocabulary.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from adms.errors import ADMSValueError
from adms.evaluation.methods import Method
from adms.evaluation.statistics import Losses


@dataclass(frozen=True)
class Trace:
    """What reading a text showed.

    Attributes:
        losses: ``[B, N - 1]`` float32, in nats; entry ``i`` is the loss of token ``i + 1``.
        tokens: tokens read of each text after each chunk.
        nbytes: bytes of the cache after each chunk.
        seconds: time of the whole reading.
        fit_seconds: time of what was fitted to the model before; None where nothing was.
        last_logits: ``[B, V]``, of the tokens that would follow.
    """

    losses: Losses
    tokens: list[int]
    nbytes: list[int]
    seconds: float
    fit_seconds: float | None
    last_logits: torch.Tensor

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all texts read in a second."""
        return len(self.losses) * self.tokens[-1] / self.seconds


def check_length(method: Method, tokens: int) -> None:
    """Refuses a text that a cache without eviction has no positions for.

    Raises:
        ADMSValueError: there are more tokens than positions.
    """
    if method.max_tokens is not None and tokens > method.max_tokens:
        raise ADMSValueError(
            f"{method.label} needs {tokens} positions and the model was trained on "
            f"{method.max_tokens}; read fewer tokens, or leave the method out"
        )


@torch.no_grad()
def read(
    model: PreTrainedModel,
    method: Method,
    ids: torch.Tensor,
    *,
    chunk: int,
    on_chunk: Callable[[int], object] | None = None,
) -> Trace:
    """Streams texts through a cache in chunks, as the model is used: nothing is computed twice.

    Args:
        model: the model, in evaluation mode.
        method: an opened method; it goes on from where it is.
        ids: ``[B, N]``, rows of a batch.
        chunk: tokens of one forward pass. Under eviction results depend on it, since a chunk sees
            the cache before it and itself.
        on_chunk: called with the number of tokens after each chunk.

    Raises:
        ADMSValueError: the text has no two tokens.
    """
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ADMSValueError(f"ids must be [B, N] with at least 2 tokens, got {list(ids.shape)}")
    if chunk < 1:
        raise ADMSValueError(f"chunk must be at least 1, got {chunk}")
    ids = ids.to(model.device)
    total = ids.shape[1]
    losses: list[torch.Tensor] = []
    tokens, nbytes = [], []
    last: Any = None
    fit_seconds = method.fit(total, len(ids))
    start_time = time.perf_counter()
    for start in range(0, total, chunk):
        piece = ids[:, start : start + chunk]
        logits = model(piece, past_key_values=method.cache).logits.float()
        following = ids[:, start + 1 : start + 1 + piece.shape[1]]
        known = logits[:, : following.shape[1]].transpose(1, 2)
        losses.append(cross_entropy(known, following, reduction="none"))
        last = logits[:, -1]
        tokens.append(start + piece.shape[1])
        nbytes.append(method.nbytes)
        if on_chunk is not None:
            on_chunk(piece.shape[1])
    seconds = time.perf_counter() - start_time
    return Trace(
        np.asarray(torch.cat(losses, dim=1).cpu().numpy()),
        tokens,
        nbytes,
        seconds,
        fit_seconds,
        last.cpu(),
    )


@torch.no_grad()
def read_only(
    model: PreTrainedModel, method: Method, ids: torch.Tensor, *, chunk: int
) -> Iterator[tuple[int, int]]:
    """Reads texts ``[B, N]`` of one length through a cache, without losses.

    Yields:
        After each chunk its tokens and the bytes of the cache.
    """
    ids = ids.to(model.device)
    for start in range(0, ids.shape[1], chunk):
        piece = ids[:, start : start + chunk]
        model(piece, past_key_values=method.cache, logits_to_keep=1)
        yield piece.shape[1], method.nbytes


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    method: Method,
    ids: torch.Tensor,
    *,
    chunk: int,
    max_new_tokens: int,
) -> torch.Tensor:
    """Reads questions and answers greedily.

    Args:
        model: the model.
        method: an opened method; it has read what the questions are about.
        ids: ``[B, N]``, questions of one length.
        chunk: tokens of one forward pass.
        max_new_tokens: length of the answers.

    Returns:
        ``[B, max_new_tokens]`` ids.
    """
    ids = ids.to(model.device)
    for start in range(0, ids.shape[1], chunk):
        logits = model(
            ids[:, start : start + chunk], past_key_values=method.cache, logits_to_keep=1
        ).logits
    produced = [logits[:, -1:].argmax(-1)]
    while len(produced) < max_new_tokens:
        logits = model(produced[-1], past_key_values=method.cache).logits
        produced.append(logits[:, -1:].argmax(-1))
    return torch.cat(produced, dim=1).cpu()
