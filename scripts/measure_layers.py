"""SmolLM2 over texts: plain ADMS, adaptive update and integrated attention at equal bytes.

The texts are rows of one batch, read in chunks through one cache; perplexity is over the tokens
from --first on. Admitted is the share of the tokens that get an entry of their own in the middle,
reach how many tokens the same bytes hold there (the least and the most of any layer); read is the
share of the recent tier's entries that attention reads. With --passkeys, so many numbers are hidden
halfway in --passkey-tokens of the last text, and recalled is how many the model finds again.

    python scripts/measure_layers.py TEXT_FILE ... [--admissions 0.75 0.6] [--blocks 32]
        [--bounds 0.005 0.02] [--gates gates.safetensors ...] [--compressor vq] [--jobs 12]

Tokens a second (of all rows together) are printed where rows of the table are measured one by one.
"""

import argparse
import math
import time
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adms import ADMSKVCache, enable_adms_llm
from adms.attention import IntegratedAttentionConfig
from adms.evaluation.models import load_model
from adms.evaluation.needles import PASSKEY, make_trial
from adms.evaluation.texts import collect_ids
from adms.gates import AdaptiveUpdateConfig

COLUMNS = (
    *("layer", "admitted", "reach", "read", "perplexity", "against plain", "mean"),
    *("tokens/s", "recalled"),
)
# Tokens in which a number of five digits is told.
ANSWER_TOKENS = 7


@torch.inference_mode()
def read_texts(
    model: PreTrainedModel, cache: ADMSKVCache, ids: torch.Tensor, first: int, chunk: int
) -> tuple[torch.Tensor, float]:
    """Mean loss ``[B]`` in nats of the tokens ``first`` on of ``ids [B, N]``, and tokens/s."""
    losses, start = [], time.perf_counter()
    for part, targets in zip(
        ids[:, :-1].split(chunk, 1), ids[:, 1:].split(chunk, dim=1), strict=True
    ):
        logits = model(part, past_key_values=cache).logits.float()
        losses.append(
            torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        )
    # Waits for the device, too.
    loss = torch.cat(losses, dim=1)[:, first - 1 :].mean(1).cpu()
    return loss, ids.numel() / (time.perf_counter() - start)


@torch.inference_mode()
def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: ADMSKVCache,
    text: str,
    trials: int,
    length: int,
) -> float:
    """Share of the numbers hidden halfway in ``length`` tokens of a text that are found again."""
    filler = collect_ids(tokenizer, text, num_tokens=length + 1500 * trials, offset=3000)
    rows, answers = [], []
    for trial in range(trials):
        own = filler[:, 1500 * trial :]
        made = make_trial(tokenizer, own, PASSKEY, length=length, depth=0.5, seed=trial)
        rows.append(torch.cat([made.text, made.question], dim=1))
        answers.append(made.answer)
    ids = torch.cat(rows).to(model.device)
    said = []
    for _ in range(ANSWER_TOKENS):
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        said.append(ids)
    found = tokenizer.batch_decode(torch.cat(said, dim=1))
    hits = [answer in words for answer, words in zip(answers, found, strict=True)]
    return sum(hits) / trials


def layers_to_measure(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each row of the table turns on."""
    rows: dict[str, dict[str, Any]] = {"plain ADMS": {}}
    for share in arguments.admissions:
        for block in arguments.blocks:
            update = AdaptiveUpdateConfig(admission=share, block_tokens=block)
            rows[f"similarity, {share:g} of {block}"] = {"adaptive_update": update}
    for path in arguments.gates:
        rows[f"learned, {path}"] = {
            "adaptive_update": AdaptiveUpdateConfig(policy="learned", gates=path)
        }
    for bound in arguments.bounds:
        config = IntegratedAttentionConfig(mass_bound=bound)
        rows[f"integrated, bound {bound:g}"] = {"integrated_attention": config}
    if arguments.gates and arguments.bounds:
        both = rows[f"learned, {arguments.gates[0]}"]
        rows["both"] = both | rows[f"integrated, bound {arguments.bounds[0]:g}"]
    return rows


def measure(arguments: argparse.Namespace, layers: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    model, tokenizer = load_model(arguments.model, device=arguments.device)
    texts = [
        collect_ids(tokenizer, text, num_tokens=arguments.tokens, offset=arguments.offset)
        for text in arguments.texts
    ]

    def cache() -> ADMSKVCache:
        return enable_adms_llm(
            model,
            start_size=4,
            recent_size=arguments.recent,
            compressed_budget=arguments.budget,
            prefill_chunk_size=arguments.chunk,
            compressor_type=arguments.compressor,
            **layers,
        )

    own = cache()
    ids = torch.cat(texts).to(model.device)
    loss, speed = read_texts(model, own, ids, arguments.first, arguments.chunk)
    summary = own.summary()
    plans = [layer.middle.plan for layer in own.layers if getattr(layer, "middle", None)]
    capacities = [plan.geometry.capacity for plan in plans]
    entries = [
        plan.geometry.entries_per_record / plan.geometry.block_tokens if plan.coder else 1.0
        for plan in plans
    ]
    row = {
        # As plain numbers: a tensor would be shared with a process that ends.
        "loss": loss.tolist(),
        "speed": speed,
        "reach": (min(capacities, default=0), max(capacities, default=0)),
        "admitted": sum(entries) / max(len(entries), 1),
        "integrated": summary.get("integrated_attention", {}),
        "bytes": (own.nbytes, own.max_nbytes),
    }
    del own
    if arguments.passkeys:
        row["recall"] = recall(
            model,
            tokenizer,
            cache(),
            arguments.texts[-1],
            arguments.passkeys,
            arguments.passkey_tokens,
        )
    return row


def written(name: str, row: dict[str, Any], plain: list[float], speed: bool) -> str:
    """A row of the table."""
    loss = row["loss"]
    rises = [own - before for own, before in zip(loss, plain, strict=True)]
    perplexity = " / ".join(f"{math.exp(value):.3f}" for value in loss)
    change = " / ".join(f"{math.expm1(value):+.2%}" for value in rises)
    mean = math.expm1(sum(rises) / len(rises))
    low, high = row["reach"]
    reach = f"{low}" if low == high else f"{low} to {high}"
    read = f"{row['integrated'].get('recent_entries_read', 1.0):.0%}"
    if row["integrated"]:
        read += f", {row['integrated']['mass_given_up']:.1%} given up"
    cells = [name, f"{row['admitted']:.0%}", reach, read, perplexity, change, f"{mean:+.2%}"]
    cells.append(f"{row['speed']:.0f}" if speed else "")
    cells.append(f"{row['recall']:.0%}" if "recall" in row else "")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--admissions", type=float, nargs="*", default=[0.75, 0.6])
    parser.add_argument("--blocks", type=int, nargs="*", default=[32])
    parser.add_argument("--bounds", type=float, nargs="*", default=[0.005, 0.02])
    parser.add_argument("--gates", nargs="*", default=[], help="files from adms train-gates")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--offset", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--first", type=int, default=1280)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--budget", type=int, default=252)
    parser.add_argument("--compressor", default="low_rank")
    parser.add_argument("--passkeys", type=int, default=0)
    parser.add_argument("--passkey-tokens", type=int, default=6000)
    parser.add_argument("--jobs", type=int, default=1, help="rows of the table at a time")
    arguments = parser.parse_args()
    rows = layers_to_measure(arguments)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    # A process for each row also where they run one after another: all start alike.
    with get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        found = pool.imap(partial(measure, arguments), rows.values(), chunksize=1)
        plain = None
        for name, row in zip(rows, found, strict=True):
            plain = plain or row["loss"]
            print(written(name, row, plain, arguments.jobs == 1), flush=True)


if __name__ == "__main__":
    main()
