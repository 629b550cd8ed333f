"""``calibrate``: fits the code of the middle tier to a model by hand, on texts of one's own."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adms.calibration import Calibration
from adms.enable import disable_adms, enable_streaming_llm, host_of, is_enabled
from adms.errors import ADMSTypeError, ADMSValueError
from adms.moments import fit_to_own_texts, fit_to_texts, plan_calibration
from adms.outputs import ready_file
from adms.patches import find_family


def calibrate(
    model: nn.Module,
    texts: Sequence[str | torch.Tensor] | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    seed: int = 0,
) -> Calibration:
    """Fits the directions along which a model's keys and values vary, with a progress bar.

    Optional: without it the first stream that needs them fits them to short texts that the model
    writes itself. Mixed texts serve best; a few thousand tokens are enough.

    Args:
        model: a transformers causal language model of a supported family; it is left as it was.
        texts: strings, or one-dimensional tensors of token ids; None lets the model write them.
        path: where to write the result as safetensors.
        tokenizer: of strings; None takes the one that belongs to ``model.name_or_path``.
        seed: of whatever is drawn at random.

    Returns:
        What ``enable_adms_llm(model, calibration=...)`` takes, as it takes ``path``.

    Raises:
        ADMSTypeError: an argument of a wrong type.
        ADMSValueError: no texts, or one without tokens; or ``path`` cannot be written.
        UnsupportedModelError: the architecture has no patch.

    Source: cf. KVTC (2025), arXiv 2511.01815, for bases calibrated once per model; differs in
    weights by the queries' power and in texts of the model's own.
    """
    if not isinstance(model, nn.Module):
        raise ADMSTypeError(f"model must be a transformers model, got {type(model).__name__}")
    host = host_of(model)
    family = find_family(host)
    if path is not None:
        ready_file(path)
    ids = None if texts is None else _ids(_checked(texts), host, tokenizer)
    was_enabled = is_enabled(host)
    calibration = plan_calibration(host, family)
    try:
        # The cache is of no interest, but an enabled model shows its keys before positions.
        enable_streaming_llm(host, start_size=1, recent_size=8, prefill_chunk_size=1)
        if ids is None:
            fit_to_own_texts(host, calibration, seed)
        else:
            positions = family.max_positions(family.decoder(host).config)
            fit_to_texts(host, calibration, ids, positions, seed)
    finally:
        if not was_enabled:
            disable_adms(host)
    if path is not None:
        calibration.save(path)
    return calibration


def _ids(texts: list[Any], model: Any, tokenizer: Any) -> list[torch.Tensor]:
    if tokenizer is None and any(isinstance(text, str) for text in texts):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    found = [
        text if isinstance(text, torch.Tensor) else torch.tensor(tokenizer(text)["input_ids"])
        for text in texts
    ]
    for index, ids in enumerate(found):
        if len(ids) == 0:
            raise ADMSValueError(f"text {index} has no tokens; leave it out")
    return found


def _checked(texts: Any) -> list[Any]:
    """A list of strings or of one-dimensional token ids.

    Raises:
        ADMSTypeError: anything else.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ADMSTypeError(
            f"texts must be a list of strings or of token id tensors, got {type(texts).__name__}"
        )
    if not texts:
        raise ADMSValueError("texts is empty; give some, or None to let the model write its own")
    for text in texts:
        is_ids = isinstance(text, torch.Tensor) and text.dim() == 1 and not text.is_floating_point()
        if not isinstance(text, str) and not is_ids:
            raise ADMSTypeError(
                "texts must hold strings or one-dimensional tensors of token ids, got "
                f"{type(text).__name__}"
            )
    return list(texts)
