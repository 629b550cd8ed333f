"""The lm-evaluation-harness as a client: a perplexity task through an ADMS cache.

    pip install lm_eval
    python examples/lm_eval_harness.py --text_file book.txt --max_tokens 4096

Every document is read once through a fresh cache, however long it is, where the harness would cut
it into windows of the trained length.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from adms import enable_adms_llm
from adms.evaluation.console import user_errors
from adms.evaluation.models import load_model
from adms.evaluation.texts import collect_ids, decode_ids


class StreamingLM(HFLM):
    """The harness's own model class; only the forward pass differs."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int, **parameters: Any) -> None:
        # One row at a time: the harness pads on the right, which a stream would have to forget.
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1)
        self.parameters = parameters

    def _model_call(self, inps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        cache = enable_adms_llm(self.model, **self.parameters)
        with torch.no_grad():
            return self.model(inps, past_key_values=cache).logits


def perplexity_task(documents: list[str], folder: Path) -> dict[str, Any]:
    """A task of the harness over a local data set."""
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return {
        "task": "local_perplexity",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }


def evaluate(model: Any, tokenizer: Any, documents: list[str], **parameters: Any) -> dict[str, Any]:
    """The harness's results for documents read through ADMS with these parameters."""
    longest = max(len(tokenizer(text)["input_ids"]) for text in documents)
    client = StreamingLM(model, tokenizer, longest + 1, **parameters)
    with tempfile.TemporaryDirectory() as folder:
        task = perplexity_task(documents, Path(folder))
        found = simple_evaluate(model=client, tasks=[task], bootstrap_iters=0)
    return dict(found["results"]["local_perplexity"])


def main() -> None:
    """Parses the flags and prints the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_name_or_path", default="smollm2")
    parser.add_argument("--text_file", default="pydoc", help="a file in UTF-8, or pydoc")
    parser.add_argument("--max_tokens", type=int, default=2048, help="of the document")
    parser.add_argument("--recent_size", type=int, default=256)
    parser.add_argument("--compressed_budget", type=int, default=252)
    given = parser.parse_args()
    with user_errors():
        model, tokenizer = load_model(given.model_name_or_path)
        ids = collect_ids(tokenizer, given.text_file, num_tokens=given.max_tokens)
        sizes = {"recent_size": given.recent_size, "compressed_budget": given.compressed_budget}
        print(evaluate(model, tokenizer, [decode_ids(tokenizer, ids[0])], **sizes))


if __name__ == "__main__":
    main()
