"""What is promised of a real model on real text, with the default configuration."""

import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from adms import disable_adms, enable_adms_llm, enable_streaming_llm

# Some twelve thousand tokens through the model a test: minutes on two cores.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.smollm2,
    pytest.mark.assets,
    pytest.mark.timeout(1800),
]
# The default apart from the three sizes; StreamingLLM gets the same bytes.
SIZES = {"start_size": 4, "compressed_budget": 252, "recent_size": 256}
CHUNK = 64


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> float:
    """Over tokens 1280 to 4096, read in chunks of 64."""
    losses = []
    for start in range(0, ids.shape[1], CHUNK):
        logits = model(ids[:, start : start + CHUNK], past_key_values=cache).logits[0]
        targets = ids[0, start + 1 : start + CHUNK + 1]
        losses.append(
            torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="none")
        )
    return float(torch.cat(losses)[1279:].mean().exp())


@pytest.mark.parametrize(("name", "least"), [("handbook", 0.5), ("pydoc", 0.5)])
def test_the_gap_to_the_full_cache_closes_at_equal_bytes(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    assets_text: Path,
    name: str,
    least: float,
) -> None:
    model, tokenizer = smollm2
    text = "\n\n".join(pydoc_data.topics.topics.values())
    if name == "handbook":
        text = (assets_text / "handbook.txt").read_text()
    ids = torch.tensor(tokenizer(text[:60_000])["input_ids"])[None, 2000 : 2000 + 4096]
    try:
        streaming = enable_streaming_llm(model, 4, 508)
        ours = enable_adms_llm(model, **SIZES)
        full = perplexity(model, ids, DynamicCache())
        window = perplexity(model, ids, streaming)
        mine = perplexity(model, ids, ours)
        assert ours.nbytes <= ours.max_nbytes <= streaming.max_nbytes
    finally:
        disable_adms(model)
    closed = (window - mine) / (window - full)
    assert closed >= least, f"{name}: full {full:.3f}, window {window:.3f}, ADMS {mine:.3f}"


@torch.no_grad()
def test_passkeys_in_the_evicted_middle_are_recalled(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], assets_text: Path
) -> None:
    model, tokenizer = smollm2
    ids = tokenizer((assets_text / "sotu.txt").read_text()[:80_000])["input_ids"]
    question = tokenizer("\nWhat is the pass key? The pass key is")["input_ids"]
    rows, keys = [], ["50494", "99346", "71013"]
    for index, key in enumerate(keys):
        needle = tokenizer(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
        length = 3072 - len(needle["input_ids"]) - len(question)
        body = ids[3000 + 1500 * index :][:length]
        at = length // 2
        rows.append(body[:at] + needle["input_ids"] + body[at:] + question)
    try:
        for cache, expected in (
            (enable_streaming_llm(model, 4, 508), 0),
            (enable_adms_llm(model, **SIZES), len(keys)),
        ):
            logits = model(torch.tensor(rows), past_key_values=cache, logits_to_keep=1).logits
            answer = []
            for _ in range(6):
                answer.append(logits[:, -1].argmax(-1, keepdim=True))
                logits = model(answer[-1], past_key_values=cache).logits
            told = tokenizer.batch_decode(torch.cat(answer, dim=1))
            right = sum(key in text for key, text in zip(keys, told, strict=True))
            # Ten keys a depth show the 95%; with three, one miss would say little.
            assert right >= expected - 1 if expected else right == 0, told
    finally:
        disable_adms(model)


@torch.no_grad()
def test_identity_over_thirty_layers(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], assets_text: Path
) -> None:
    model, tokenizer = smollm2
    ids = torch.tensor(tokenizer((assets_text / "sotu.txt").read_text()[:4000])["input_ids"])
    ids = ids[None, :600]
    expected = model(ids, past_key_values=DynamicCache()).logits
    try:
        cache = enable_adms_llm(model, start_size=4, compressed_budget=400, recent_size=256)
        actual = model(ids, past_key_values=cache).logits
    finally:
        disable_adms(model)
    # Thirty layers of float32 rounding on logits of about 20.
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
