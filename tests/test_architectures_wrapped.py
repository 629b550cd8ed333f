"""Models that something else has wrapped: accelerate, ranks, PEFT, quantised linears."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from adms import disable_adms, enable_adms_llm
from tests.patches.tiny import ids, tiny
from tests.test_architectures import ALL, SMALL, dense, run
from tests.test_architectures_generate import GREEDY

OFFLOADED = ["llama", "falcon", "falcon-alibi", "mpt", "opt", "gpt-neox", "gemma2"]


def layer_prefix(model: PreTrainedModel) -> tuple[str, list[str]]:
    """The base model's name and those of its parts, layers one by one."""
    base = model.base_model_prefix
    inner, path = model.base_model, base
    if hasattr(inner, "decoder"):
        inner, path = inner.decoder, f"{base}.decoder"
    parts = []
    for name, child in inner.named_children():
        if isinstance(child, torch.nn.ModuleList):
            parts += [f"{path}.{name}.{index}" for index in range(len(child))]
        else:
            parts.append(f"{path}.{name}")
    return base, parts


def offload(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with its first layer on disk and its second one offloaded from memory."""
    from accelerate import dispatch_model

    _, parts = layer_prefix(model)
    layers = [part for part in parts if part.rsplit(".", 1)[-1].isdigit()]
    places: dict[str, str] = {part: "cpu" for part in parts}
    places[layers[0]] = "disk"
    head = next(name for name, _ in model.named_children() if name != model.base_model_prefix)
    places[head] = "cpu"
    return dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", OFFLOADED)
def test_layers_on_disk(name: str, when: str, tmp_path: Path) -> None:
    plain, inputs = tiny(name), ids(2, 60)
    expected = run(plain, inputs, enable_adms_llm(plain, SMALL))
    tokens = plain.generate(inputs, past_key_values=enable_adms_llm(plain, SMALL), **GREEDY)
    model = tiny(name)
    if when == "before":
        enable_adms_llm(model, SMALL)
    model = offload(model, tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    cache = enable_adms_llm(model, SMALL)
    torch.testing.assert_close(run(model, inputs, cache), expected, atol=1e-6, rtol=0)
    cache = enable_adms_llm(model, SMALL)
    produced = model.generate(inputs, past_key_values=cache, **GREEDY)
    assert produced.tolist() == tokens.tolist()
    torch.testing.assert_close(dense(model, inputs[:, :30]), dense(plain, inputs[:, :30]))
    disable_adms(model)
    torch.testing.assert_close(dense(model, inputs[:, :30]), dense(plain, inputs[:, :30]))


def test_device_map_of_from_pretrained(tmp_path: Path) -> None:
    plain, inputs = tiny("llama"), ids(2, 60)
    expected = run(plain, inputs, enable_adms_llm(plain, SMALL))
    disable_adms(plain)
    plain.save_pretrained(tmp_path / "model")
    _, parts = layer_prefix(plain)
    places = {**{part: "cpu" for part in parts}, "lm_head": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    cache = enable_adms_llm(model, SMALL)
    torch.testing.assert_close(run(model, inputs, cache), expected, atol=1e-6, rtol=0)


def test_hooks_that_go_take_nothing_of_adms_with_them(tmp_path: Path) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    plain, inputs = tiny("falcon"), ids(1, 40)
    expected = run(plain, inputs, enable_adms_llm(plain, SMALL))
    model = tiny("falcon")
    state = model.state_dict()
    offload(model, tmp_path)
    enable_adms_llm(model, SMALL)
    remove_hook_from_submodules(model)
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(run(model, inputs, enable_adms_llm(model, SMALL)), expected)
    disable_adms(model)
    with pytest.raises(RuntimeError):
        run(model, inputs, enable_adms_llm(plain, SMALL))
    torch.testing.assert_close(dense(model, inputs), dense(plain, inputs))


# --- PEFT ---------------------------------------------------------------------------------------

TARGETS = {"llama": ["q_proj", "v_proj"], "falcon": ["query_key_value"], "mpt": ["Wqkv"]}


def with_adapter(model: PreTrainedModel, name: str) -> torch.nn.Module:
    """The model with a LoRA adapter that changes its output."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[name]))
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped.eval()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", list(TARGETS))
def test_lora_adapter(name: str, when: str) -> None:
    model, inputs = tiny(name), ids(2, 30)
    bare = dense(model, inputs)
    if when == "before":
        early = enable_adms_llm(model, ALL)
    wrapped = with_adapter(model, name)
    expected = dense(wrapped, inputs)
    assert (expected - bare).abs().max() > 0.1
    caches = [enable_adms_llm(wrapped, ALL)]
    if when == "before":
        caches.append(early)
    for cache in caches:
        torch.testing.assert_close(run(wrapped, inputs, cache, 4), expected, atol=2e-5, rtol=0)
    theirs = wrapped.generate(input_ids=inputs, **GREEDY)
    produced = wrapped.generate(
        input_ids=inputs, past_key_values=enable_adms_llm(wrapped, ALL), **GREEDY
    )
    assert produced.tolist() == theirs.tolist()


# --- quantised linears --------------------------------------------------------------------------


class Int8Linear(torch.nn.Module):
    """A linear layer with int8 weights and no floating ``weight``, as quantisers make them."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(states.dtype) * self.scale
        return torch.nn.functional.linear(states, weight, self.bias)


def replace_linears(module: torch.nn.Module) -> None:
    """Puts ``Int8Linear`` in place of every linear layer below ``module``."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, Int8Linear(child.requires_grad_(False)))
        else:
            replace_linears(child)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "falcon", "mpt", "opt"])
def test_int8_linears(name: str, when: str) -> None:
    model, inputs = tiny(name), ids(2, 30)
    if when == "before":
        enable_adms_llm(model, ALL)
    replace_linears(model.base_model)
    expected = dense(model, inputs)
    cache = enable_adms_llm(model, ALL)
    torch.testing.assert_close(run(model, inputs, cache, 4), expected, atol=2e-5, rtol=0)
    assert cache.layers[0].exact.keys.dtype == torch.float32


@pytest.mark.parametrize("when", ["before", "after"])
def test_torchao_int8(when: str) -> None:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed; Int8Linear stands in for it"
    )
    model, inputs = tiny("llama"), ids(2, 30)
    if when == "before":
        enable_adms_llm(model, ALL)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    expected = dense(model, inputs)
    cache = enable_adms_llm(model, ALL)
    torch.testing.assert_close(run(model, inputs, cache, 4), expected, atol=2e-5, rtol=0)


# --- tensor parallelism -------------------------------------------------------------------------


@pytest.mark.slow
def test_tensor_parallel_on_two_ranks(tmp_path: Path) -> None:
    """Tokens of two gloo ranks equal those of one process, under eviction."""
    root = Path(__file__).parent.parent
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(root / "tests" / "patches" / "tensor_parallel.py"),
        str(tmp_path),
    ]
    # Ranks with more threads than there are cores for them spin while they wait for each other:
    # with two threads each on two cores this takes ten times as long.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=root, env=one_thread, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("llama", "gpt-neox", "gemma2"):
        assert (tmp_path / f"{name}.ok").read_text() == "2 ranks"
