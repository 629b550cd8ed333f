"""Perplexity of a model over a text, dense and with sparse prefill, written into a folder.

The text is read in chunks through one cache; perplexity is over the tokens from --measure-from on.
Seconds are of this process's CPU, so that a busy machine does not change them much.

    python scripts/measure_sparse_prefill.py TEXT_FILE [--densities 0.5,0.25] [--chunk 64]
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from adms import ADMSConfig, enable_adms_llm
from adms.attention.sparse_prefill import SAMPLED_QUERIES, SparsePrefillConfig
from adms.evaluation.console import user_errors
from adms.evaluation.models import load_model
from adms.evaluation.run_folder import Row, markdown_table, write_run
from adms.evaluation.settings import short_name
from adms.evaluation.statistics import perplexity
from adms.evaluation.texts import collect_ids


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    ids: torch.Tensor,
    first: int,
    config: ADMSConfig,
    sparse: SparsePrefillConfig | None,
) -> Row:
    """Perplexity of tokens ``first`` on of ``ids [1, N]``, and seconds of CPU time."""
    cache = enable_adms_llm(model, config, sparse_prefill=sparse)
    chunk = cache.sizes.chunk
    losses, start = [], time.process_time()
    for part, targets in zip(ids[:, :-1].split(chunk, 1), ids[0, 1:].split(chunk), strict=True):
        logits = model(part, past_key_values=cache).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    seconds = time.process_time() - start
    return {
        "density": sparse.density if sparse else 1.0,
        "perplexity": perplexity(torch.cat(losses)[first - 1 :].numpy()),
        "cpu_s": seconds,
    }


def display(rows: list[Row]) -> list[Row]:
    """The rows in the columns that people read; the first is dense."""
    dense = rows[0]["perplexity"]
    return [
        {
            "density": "dense" if row is rows[0] else f"{row['density']:.0%}",
            "perplexity": f"{row['perplexity']:.3f}",
            "against dense": "" if row is rows[0] else f"{row['perplexity'] / dense - 1:+.2%}",
            "CPU s": f"{row['cpu_s']:.0f}",
        }
        for row in rows
    ]


def main() -> None:
    """Reads the text once for each density and prints the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", help="a file in UTF-8, or pydoc")
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder or a hub id")
    parser.add_argument("--densities", type=numbers, default="0.5,0.25")
    parser.add_argument("--scorer", default=SAMPLED_QUERIES)
    parser.add_argument("--offset", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--measure-from", type=int, default=1280)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--recent", type=int, default=2000)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("outputs/sparse_prefill"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with user_errors():
        config = ADMSConfig(
            recent_size=arguments.recent,
            compressed_budget=arguments.budget,
            prefill_chunk_size=arguments.chunk,
        )
        variants = [None] + [
            SparsePrefillConfig(density=density, scorer=arguments.scorer)
            for density in arguments.densities
        ]
        model, tokenizer = load_model(arguments.model)
        ids = collect_ids(
            tokenizer, arguments.text, num_tokens=arguments.tokens, offset=arguments.offset
        )
        rows: list[Row] = []
        for sparse in variants:
            rows.append(measure(model, ids, arguments.measure_from, config, sparse))
            print(display(rows)[-1], flush=True)
        name, text = short_name(arguments.model), short_name(arguments.text)
        about = (
            f"{name}, float32, {arguments.tokens} tokens of {text} from token {arguments.offset}, "
            f"perplexity over tokens {arguments.measure_from} to {arguments.tokens}. "
            f"Configuration: {', '.join(f'{k} {v}' for k, v in config.to_dict().items())}."
        )
        settings = {**vars(arguments), "model": name, "text": text, "adms": config.to_dict()}
        del settings["output"]
        body = f"{about}\n\n{markdown_table(display(rows))}"
        print(write_run(arguments.output, "Sparse prefill", settings, rows, body))


if __name__ == "__main__":
    main()
