"""What each rank of the tensor-parallel test runs; called by torchrun with a folder."""

import sys
from pathlib import Path

import torch

# Run as a script, so the checkout is not on the path, nor pytest's finder for adms.patches active.
sys.path.insert(0, str(Path(__file__).parents[2]))
from torch import distributed  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import conftest  # noqa: E402, F401
from adms import ADMSConfig, enable_adms_llm  # noqa: E402
from tests.patches.tiny import ids, tiny  # noqa: E402
from tests.test_architectures import run  # noqa: E402
from tests.test_architectures_generate import GREEDY  # noqa: E402

# Bases and landmarks are joint over the heads of a rank, so only a code of single heads gives the
# tokens of one process.
PER_HEAD = ADMSConfig(
    start_size=2,
    recent_size=12,
    compressed_budget=8,
    compression_interval=2,
    prefill_chunk_size=8,
    compressor_type="quantized",
    importance_ratio=0.0,
)


def main(folder: Path) -> None:
    """Compares this rank's tokens with those of the model in one process."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for name in ("llama", "gpt-neox", "gemma2"):
        whole, inputs = tiny(name), ids(2, 60)
        saved = folder / name
        if rank == 0:
            whole.save_pretrained(saved)
        distributed.barrier()
        model = AutoModelForCausalLM.from_pretrained(
            saved, tp_plan="auto", attn_implementation=whole.config._attn_implementation
        ).eval()
        cache = enable_adms_llm(model, PER_HEAD)
        bound = cache.max_nbytes * 2
        logits = run(model, inputs, cache)
        torch.testing.assert_close(
            logits, run(whole, inputs, enable_adms_llm(whole, PER_HEAD)), atol=3e-5, rtol=0
        )
        held = cache.layers[1].exact.keys.shape[1]
        heads = getattr(whole.config, "num_key_value_heads", whole.config.num_attention_heads)
        if held != heads // 2:
            raise SystemExit(f"{name}: a rank holds {held} of {heads} KV heads")
        if not cache.nbytes <= cache.max_nbytes <= bound:
            raise SystemExit(f"{name}: {cache.nbytes} bytes, at most {cache.max_nbytes}, {bound}")
        arguments = {**GREEDY, "max_new_tokens": 24}
        ours = model.generate(inputs, past_key_values=enable_adms_llm(model, PER_HEAD), **arguments)
        alone = whole.generate(
            inputs, past_key_values=enable_adms_llm(whole, PER_HEAD), **arguments
        )
        if ours.tolist() != alone.tolist():
            raise SystemExit(f"{name}: rank {rank} generated other tokens than one process")
        distributed.barrier()
        if rank == 0:
            (folder / f"{name}.ok").write_text(f"{distributed.get_world_size()} ranks")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
