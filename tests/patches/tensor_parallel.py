"""What each rank of the tensor-parallel test runs; called by torchrun with a folder."""

import sys
from pathlib import Path

import torch

# Run as a script, so the checkout is not on the path, nor pytest's finder for adms.patches active.
sys.path.insert(0, str(Path(__file__).parents[2]))
from torch import distributed  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402

import conftest  # noqa: E402, F401
from adms import (  # noqa: E402
    ADMSConfig,
    ADMSKVCache,
    CacheStateError,
    Calibration,
    SessionFileError,
    calibrate,
    enable_adms_llm,
)
from adms.entries import Entries  # noqa: E402
from adms.tiers.middle import MiddlePlan  # noqa: E402
from tests.patches.tiny import ids, tiny  # noqa: E402

# Blocks of one head, and of two (the larger vocabulary lets their bases be 2% of the weights); one
# whose first layer has a window of its own.
MODELS: dict[str, dict[str, int]] = {
    "llama": {"num_key_value_heads": 4},
    "gpt-neox": {"vocab_size": 352},
    "gemma2": {"num_key_value_heads": 4},
}
TRAINED, STREAM, NEW = 512, 600, 200
CONFIGS = {
    "default": ADMSConfig(),
    "per head": ADMSConfig(compressor_type="quantized", importance_metric="coding_error"),
}
# Ranks sum up in another order than one process, so that hidden states differ in their last bits.
# Once in a while a codeword that is hardly the nearest then gives way to another one, or a mean is
# rounded to the next float16.
LOGITS, ENTRIES = 0.02, 0.02
OTHER_CODES = 0.01


def produced(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    config: ADMSConfig,
    calibration: Calibration | Path | None = None,
) -> tuple[torch.Tensor, torch.Tensor, MiddlePlan, torch.Tensor, Entries]:
    """Greedy tokens, logits; of one layer its plan, its landmarks' tokens and what it has coded."""
    cache = enable_adms_llm(model, config, calibration=calibration)
    output = model.generate(
        inputs,
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
    )
    middle, rows = cache.layers[1].middle, range(len(inputs))
    if not cache.nbytes <= cache.max_nbytes:
        raise SystemExit(f"{cache.nbytes} bytes, at most {cache.max_nbytes}")
    return (
        output.sequences,
        torch.stack(output.logits, 1),
        middle.plan,
        middle.landmark_tokens(),
        middle.read([cache.timeline.middle_tokens(row) for row in rows]),
    )


def compare(whole: PreTrainedModel, model: PreTrainedModel, name: str) -> None:
    """Compares this rank's tokens with those of the model in one process."""
    # Whatever the vocabulary, ids that every model has.
    inputs, rank = ids(2, STREAM), distributed.get_rank()
    for title, config in CONFIGS.items():
        if title == "per head" and name != "llama":
            continue
        tokens, logits, plan, landmarks, codes = produced(model, inputs, config)
        alone, expected, whole_plan, expected_landmarks, all_codes = produced(whole, inputs, config)
        where = f"{name}, {title}, rank {rank}"
        if not torch.equal(tokens, alone):
            first = int((tokens != alone).any(0).nonzero()[0])
            raise SystemExit(f"{where}: other tokens than one process from {first} on")
        error = float((logits - expected).abs().max())
        if error > LOGITS:
            raise SystemExit(f"{where}: logits differ by {error}")
        own = all_codes.keys.chunk(2, dim=1)[rank]
        other = float(((codes.keys - own).abs() > ENTRIES).any(3).float().mean())
        if other > OTHER_CODES:
            raise SystemExit(f"{where}: {other} of the codes of keys are other ones")
        print(f"{where}: logits within {error:.1e}, {other:.2%} of the codes are other ones")
        if not torch.equal(landmarks, expected_landmarks):
            raise SystemExit(f"{where}: other landmarks than one process")
        if plan.coder is None or whole_plan.coder is None:
            raise SystemExit(f"{where}: nothing is coded")
        if 2 * plan.shape.num_heads != whole_plan.shape.num_heads:
            raise SystemExit(f"{where}: a rank holds {plan.shape} of {whole_plan.shape}")
        if plan.geometry != whole_plan.geometry or plan.arena_bytes > whole_plan.arena_bytes:
            raise SystemExit(f"{where}: {plan} in place of {whole_plan}")


def main(folder: Path) -> None:
    """Compares every model."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for name, changes in MODELS.items():
        whole, saved = tiny(name, max_position_embeddings=TRAINED, **changes), folder / name
        if rank == 0:
            whole.save_pretrained(saved)
        distributed.barrier()
        model = AutoModelForCausalLM.from_pretrained(
            saved, tp_plan="auto", attn_implementation=whole.config._attn_implementation
        ).eval()
        compare(whole, model, name)
        if name == "llama":
            check_files(whole, model, folder)
        distributed.barrier()
        if rank == 0:
            (folder / f"{name}.ok").write_text(f"{distributed.get_world_size()} ranks")
    distributed.destroy_process_group()


def check_files(whole: PreTrainedModel, model: PreTrainedModel, folder: Path) -> None:
    """A calibration of ranks is that of one process; a session needs all heads."""
    texts = [ids(1, 300)[0]]
    calibrate(model, texts, folder / "ranks.safetensors")
    distributed.barrier()
    cache = enable_adms_llm(whole, calibration=folder / "ranks.safetensors")
    found, expected = cache.binding_for_use.calibration, calibrate(whole, texts)
    if found is None or not found.equals(expected):
        raise SystemExit("ranks wrote another calibration than one process")
    inputs = ids(1, STREAM)
    tokens, *_ = produced(model, inputs, ADMSConfig(), folder / "ranks.safetensors")
    alone, *_ = produced(whole, inputs, ADMSConfig(), expected)
    if not torch.equal(tokens, alone):
        raise SystemExit("with a calibration, ranks produce other tokens than one process")
    session = folder / f"stream-{distributed.get_rank()}.adms"
    enable_adms_llm(whole).save(session)
    for what, error in (
        (lambda: ADMSKVCache.load(session, model=model), SessionFileError),
        (lambda: enable_adms_llm(model).save(session), CacheStateError),
    ):
        try:
            what()
        except error:
            continue
        raise SystemExit("a session was saved from, or loaded to, the heads of one rank")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
