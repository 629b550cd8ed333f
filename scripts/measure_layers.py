"""SmolLM2 over a text: plain ADMS, adaptive update and integrated attention at equal bytes.

The text is read in chunks through one cache; the loss is over the tokens from --first on. Admitted
is the share of the tokens that get an entry of their own in the middle, reach how many tokens the
same bytes hold there; read is the share of the recent tier's entries that attention reads.

    python scripts/measure_layers.py TEXT_FILE [--admissions 0.75 0.6] [--bounds 0.005 0.02]
        [--gates gates.safetensors] [--compressor vq]
"""

import argparse
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from adms import ADMSKVCache, enable_adms_llm
from adms.attention import IntegratedAttentionConfig
from adms.evaluation.models import load_model
from adms.evaluation.texts import collect_ids
from adms.gates import AdaptiveUpdateConfig


@torch.inference_mode()
def read_text(
    model: PreTrainedModel, cache: ADMSKVCache, ids: torch.Tensor, first: int, chunk: int
) -> tuple[float, float]:
    """Mean loss in nats of the tokens ``first`` on of ``ids [1, N]``, and tokens a second."""
    losses, start = [], time.perf_counter()
    for part, targets in zip(ids[:, :-1].split(chunk, 1), ids[0, 1:].split(chunk), strict=True):
        logits = model(part, past_key_values=cache).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    # Waits for the device, too.
    loss = torch.cat(losses)[first - 1 :].mean().item()
    return loss, ids.shape[1] / (time.perf_counter() - start)


def layers_to_measure(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each row of the table turns on."""
    rows: dict[str, dict[str, Any]] = {"plain ADMS": {}}
    for share in arguments.admissions:
        rows[f"similarity {share:g}"] = {"adaptive_update": AdaptiveUpdateConfig(admission=share)}
    if arguments.gates:
        learned = AdaptiveUpdateConfig(policy="learned", gates=arguments.gates)
        rows[f"learned {learned.admission:g}"] = {"adaptive_update": learned}
    for bound in arguments.bounds:
        config = IntegratedAttentionConfig(mass_bound=bound)
        rows[f"integrated, bound {bound:g}"] = {"integrated_attention": config}
    return rows


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("--admissions", type=float, nargs="*", default=[0.75, 0.6])
    parser.add_argument("--bounds", type=float, nargs="*", default=[0.005, 0.02])
    parser.add_argument("--gates", help="a file from adms train-gates")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--offset", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--first", type=int, default=1280)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--budget", type=int, default=252)
    parser.add_argument("--compressor", default="low_rank")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, device=arguments.device)
    ids = collect_ids(
        tokenizer, arguments.text, num_tokens=arguments.tokens, offset=arguments.offset
    ).to(model.device)
    print("| layer | admitted | reach | read | loss | perplexity | against plain | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    plain = None
    for name, layers in layers_to_measure(arguments).items():
        cache = enable_adms_llm(
            model,
            start_size=4,
            recent_size=arguments.recent,
            compressed_budget=arguments.budget,
            prefill_chunk_size=arguments.chunk,
            compressor_type=arguments.compressor,
            **layers,
        )
        loss, speed = read_text(model, cache, ids, arguments.first, arguments.chunk)
        plain = loss if plain is None else plain
        summary = cache.summary()
        update = layers.get("adaptive_update")
        admitted = 1.0 if update is None else update.block_sizes(1)[1] / update.block_tokens
        read = summary.get("integrated_attention", {}).get("recent_entries_read", 1.0)
        perplexity = torch.tensor([loss, loss - plain]).exp().tolist()
        print(
            f"| {name} | {admitted:.0%} | {summary['middle']['capacity_tokens']} | {read:.0%} | "
            f"{loss:.4f} | {perplexity[0]:.3f} | {perplexity[1] - 1:+.2%} | {speed:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
