"""The lm-evaluation-harness as a client."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from adms.evaluation.models import load_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed; pip install lm_eval",
)


@pytest.mark.filterwarnings("ignore")
def test_perplexity_task_equals_our_own_figure(tiny_model_folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "lm_eval_harness", Path(__file__).parents[2] / "examples" / "lm_eval_harness.py"
    )
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model, tokenizer = load_model(tiny_model_folder)
    text = "some words that come again and again. " * 20
    sizes = {
        "start_size": 2, "recent_size": 16, "compressed_budget": 24, "prefill_chunk_size": 8,
    }  # fmt: skip
    found = example.evaluate(model, tokenizer, [text], **sizes)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    # The harness puts the first token's context in front: the end-of-text token.
    joined = torch.cat([torch.tensor([tokenizer.eos_token_id]), ids])[None]
    from adms import enable_adms_llm

    with torch.no_grad():
        logits = model(joined[:, :-1], past_key_values=enable_adms_llm(model, **sizes)).logits[0]
    loss = cross_entropy(logits.double(), ids, reduction="sum").item()
    expected = loss / len(text.encode()) / math.log(2)
    assert found["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
