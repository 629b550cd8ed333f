"""Perplexity and time of SmolLM2 over a text, dense and with sparse prefill at several densities.

The text is read in chunks through one cache; perplexity is over the tokens from --first on. The
times are of this process's CPU, so that a busy machine does not change them much.

    python scripts/measure_sparse_prefill.py TEXT_FILE [--densities 0.75 0.5 0.25] [--chunk 64]
"""

import argparse
import time

import torch
from transformers import PreTrainedModel

from adms import enable_adms_llm
from adms.attention.sparse_prefill import SparsePrefillConfig
from adms.evaluation.models import load_model


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    ids: torch.Tensor,
    first: int,
    sizes: dict[str, int],
    sparse: SparsePrefillConfig | None,
) -> tuple[float, float]:
    """Perplexity of tokens ``first`` on of ``ids [1, N]``, and seconds of CPU time."""
    cache = enable_adms_llm(model, **sizes, sparse_prefill=sparse)
    losses, start = [], time.process_time()
    for part, targets in zip(
        ids[:, :-1].split(sizes["prefill_chunk_size"], 1),
        ids[0, 1:].split(sizes["prefill_chunk_size"]),
        strict=True,
    ):
        logits = model(part, past_key_values=cache).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    seconds = time.process_time() - start
    return torch.cat(losses)[first - 1 :].mean().exp().item(), seconds


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--scorer", default="sampled_queries")
    parser.add_argument("--offset", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--first", type=int, default=1280)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--recent", type=int, default=2000)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model("smollm2")
    with open(arguments.text, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read(200_000))["input_ids"])
    ids = ids[arguments.offset :][: arguments.tokens][None]
    sizes = {
        "recent_size": arguments.recent,
        "compressed_budget": arguments.budget,
        "prefill_chunk_size": arguments.chunk,
    }
    print("| density | perplexity | against dense | CPU s |\n|---|---|---|---|")
    dense, seconds = measure(model, ids, arguments.first, sizes, None)
    print(f"| dense | {dense:.3f} | | {seconds:.0f} |", flush=True)
    for density in arguments.densities:
        sparse = SparsePrefillConfig(density=density, scorer=arguments.scorer)
        found, seconds = measure(model, ids, arguments.first, sizes, sparse)
        change = f"{found / dense - 1:+.2%}"
        print(f"| {density:.0%} | {found:.3f} | {change} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
