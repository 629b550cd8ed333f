"""A tiny model in a folder, with a tokenizer of its own, for runs from end to end."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Join
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as Pieces
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama over bytes, trained length 256, as ``save_pretrained`` writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(Pieces.alphabet())
    bytes_only = Tokenizer(BPE({char: index for index, char in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = Pieces(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = Join()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some thousand bytes in which words return."""
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    words = [f"word{index * index % 17} stands here. " for index in range(400)]
    file.write_text("".join(words), encoding="utf-8")
    return file
