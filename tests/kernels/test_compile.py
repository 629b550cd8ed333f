"""The kernels compile for a GPU, without one: the interpreter accepts more than the compiler."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from adms.kernels import has_triton
from tests.kernels.material import blocked_part, coded_part, draw, exact_part, rotations

pytestmark = [
    # Triton 3.9 announces a change of a default.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.skipif(not has_triton(), reason="triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter"
    ),
]


class Recorder:
    """Stands for a kernel; compiles it for what it is called with."""

    def __init__(self, kernel: Any, *, aligned: bool = False) -> None:
        self.kernel = kernel
        #: as at a launch: multiples of 16 are known, and ones are constants
        self.aligned = aligned
        self.calls = 0
        self.ptx: list[str] = []
        self.cubins: list[bytes] = []

    def __getitem__(self, grid: Any) -> Any:
        return self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        named = ("num_warps", "num_stages", "maxnreg")
        options = {name: kwargs.pop(name) for name in named if name in kwargs}
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        constants = {
            (index,): given[parameter.name]
            for index, parameter in enumerate(self.kernel.params)
            if parameter.is_constexpr
        }
        signature = {
            parameter.name: "constexpr" if parameter.is_constexpr else kind(given[parameter.name])
            for parameter in self.kernel.params
        }
        attributes = {}
        for index, parameter in enumerate(self.kernel.params if self.aligned else ()):
            value, name = given[parameter.name], parameter.name
            if parameter.is_constexpr or parameter.do_not_specialize or isinstance(value, float):
                continue
            if isinstance(value, int) and value == 1:
                signature[name], constants[(index,)] = "constexpr", 1
            elif (value if isinstance(value, int) else value.data_ptr()) % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.ptx.append(found.asm["ptx"])
        self.cubins.append(found.asm["cubin"])
        self.calls += 1


def kind(argument: Any) -> str:
    """What Triton calls an argument's type."""
    if isinstance(argument, float):
        return "fp32"
    if isinstance(argument, int):
        return "i32"
    names = {
        torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8",
        torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    }  # fmt: skip
    return "*" + names[argument.dtype]


def usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers of a thread and bytes that spill, as ``REG`` and ``STACK``."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("triton brings no cuobjdump")
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [tool, "--dump-resource-usage", file]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", said)}


def unfenced_products(ptx: str) -> int:
    """Products that read shared memory by themselves, not fenced from what threads wrote there.

    Every thread has to fence what it has written before the barrier, not behind it. What is written
    later and read by ``ldmatrix`` is an operand that reaches the product in registers.
    """
    found, state, published = 0, "none", False
    for line in ptx.splitlines():
        if "st.shared" in line or "stmatrix" in line:
            published = published if state == "written" else state == "seen"
            state = "written"
        elif "fence.proxy.async" in line and state == "written":
            state = "fenced"
        elif ("bar.sync" in line and state == "fenced") or (
            "ldmatrix" in line and state == "written" and published
        ):
            state = "seen"
        elif "wgmma.mma_async" in line and state != "seen":
            found += 1
    return found


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 64), (torch.bfloat16, 128), (torch.float16, 16)]
)
def test_kernels_compile_for_hopper(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adms.kernels import decode_attention_triton as host

    recorders = {}
    names = ("exact_tiles", "directions_of_keys", "coded_tiles", "projected", "merge")
    for name in (*names, "write_token"):
        module = host.kernels if hasattr(host.kernels, name) else host.adding
        recorders[name] = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, recorders[name])
    heads, kv_heads = 8, 2
    exact = [exact_part(1, kv_heads, 20, size), exact_part(1, kv_heads, 20, size, weighted=True)]
    for part in exact:
        for name in ("keys", "values", "cos", "sin"):
            object.__setattr__(part, name, getattr(part, name).to(dtype))
    coded = [
        blocked_part(1, kv_heads, host.WIDE_FROM, size, blocks=2),
        coded_part("quantized", 1, kv_heads, host.WIDE_FROM, size)[0],
        coded_part("quantized", 1, kv_heads, 20, size)[0],
    ]
    query = draw(1, heads, size, seed=0).to(dtype)
    cos, sin = (table[:, 0].to(dtype) for table in rotations(1, 1, size))
    host.fused_decode_attention(query, cos, sin, exact, coded, 0.1)
    key = draw(1, kv_heads, 1, size, seed=0).to(dtype)
    ring, flag = exact[0].keys, torch.zeros(1, dtype=torch.uint8)
    host.fused_write_token(key, key, ring, ring, torch.tensor([1]), flag)
    assert {name: one.calls for name, one in recorders.items()} == {
        "exact_tiles": 2, "directions_of_keys": 3, "coded_tiles": 3, "projected": 3, "merge": 1,
        "write_token": 1,
    }  # fmt: skip
    every = [ptx for one in recorders.values() for ptx in one.ptx]
    assert any("wgmma.mma_async" in ptx for ptx in every) == (dtype != torch.float32)
    assert sum(unfenced_products(ptx) for ptx in every) == 0


def test_the_search_for_codewords_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from adms.kernels import codewords_triton as host

    recorder = Recorder(host.kernels.assign_codes)
    monkeypatch.setattr(host.kernels, "assign_codes", recorder)
    stages = torch.ones(1, 2, dtype=torch.int64)
    host.fused_assign(draw(1, 2, 4, 8, seed=0), stages, stages)
    assert recorder.calls == 1


@pytest.mark.parametrize("size", [16, 128, 256])
@pytest.mark.parametrize("biased", [True, False])
def test_attention_of_a_chunk_compiles(
    biased: bool, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every form for this size, whole and split; nothing spills, and operands are copied."""
    from adms.kernels import chunk_attention_triton as host

    recorders = {}
    for name in ("chunk_tiles", "merge_splits"):
        recorders[name] = Recorder(getattr(host, name), aligned=True)
        monkeypatch.setattr(host, name, recorders[name])
    dtype = torch.float16 if size == 16 else torch.bfloat16
    for tokens, splits in ((64, 1), (64, 2), (8, 1), (8, 2)):
        query = torch.empty(1, 8, tokens, size, dtype=dtype)
        held, new = (torch.empty(1, 2, count, size, dtype=dtype) for count in (2904, tokens))
        bias = torch.empty(1, 2, 1, 2904, dtype=dtype) if biased else None
        host.fused_chunk_attention(query, held, held, bias, new, new, 0.1, splits=splits)
    tiles, merges = recorders["chunk_tiles"], recorders["merge_splits"]
    assert (tiles.calls, merges.calls) == (4, 2)
    for ptx in tiles.ptx:
        assert "wgmma.mma_async" in ptx and re.search(r"cp\.async\.c[ag]\.shared", ptx)
        assert unfenced_products(ptx) == 0
    for cubin in tiles.cubins + merges.cubins:
        used = usage(cubin, tmp_path)
        assert used["REG"] <= 255 and used["STACK"] == used["LOCAL"] == 0
