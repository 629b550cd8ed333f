"""Where texts come from, and their ids."""

import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch

from adms.errors import ADMSError, ADMSValueError
from adms.evaluation import texts
from adms.evaluation.texts import encode_text, load_text


class Words:
    """Stands in for a tokenizer: one id a word, its length."""

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [len(word) for word in text.split()]}


class TestFiles:
    def test_reads_utf8(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_text("naïve 日本\n", encoding="utf-8")
        assert load_text(file) == "naïve 日本\n"
        assert load_text(str(file)) == "naïve 日本\n"

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "notes").write_text("here")
        assert load_text("~/notes") == "here"

    @pytest.mark.parametrize("name", ["gone.txt", "./gone", "~/gone", "a/b/gone", ""])
    def test_missing(self, name: str) -> None:
        with pytest.raises(ADMSValueError, match="no text file at"):
            load_text(name)

    def test_missing_path_is_no_data_set(self) -> None:
        with pytest.raises(ADMSValueError, match="no text file at"):
            load_text(Path("gone"))

    def test_not_utf8(self, tmp_path: Path) -> None:
        file = tmp_path / "latin.txt"
        file.write_bytes("naïve".encode("latin-1"))
        with pytest.raises(ADMSValueError, match=r"not text in UTF-8 \(byte 2\)"):
            load_text(file)

    def test_empty(self, tmp_path: Path) -> None:
        file = tmp_path / "empty.txt"
        file.write_text(" \n")
        with pytest.raises(ADMSValueError, match="is empty"):
            load_text(file)


class TestPydoc:
    def test_is_the_default_and_long(self) -> None:
        text = load_text()
        assert text == load_text("pydoc")
        assert len(text) > 400_000
        assert "\n\n" in text

    def test_python_without_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(ADMSError, match="no module pydoc_data.*name a text file"):
            load_text("pydoc")


class TestDataSets:
    @pytest.fixture
    def serve(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple]]:
        """Puts a data set in the hub's place; returns the calls that asked for it."""

        def serve(**columns: list) -> list[tuple]:
            calls: list[tuple] = []

            def load_dataset(
                name: str, config: str | None, *, split: str, streaming: bool
            ) -> datasets.IterableDataset:
                calls.append((name, config, split))
                return datasets.Dataset.from_dict(columns).to_iterable_dataset()

            monkeypatch.setattr(datasets, "load_dataset", load_dataset)
            return calls

        return serve

    def test_joins_rows(self, serve) -> None:
        calls = serve(text=["one", "two", "three"])
        assert load_text("wikitext", config="v1", split="test") == "one\n\ntwo\n\nthree"
        assert calls == [("wikitext", "v1", "test")]

    def test_max_rows(self, serve) -> None:
        serve(text=["one", "two", "three"])
        assert load_text("owner/name", max_rows=2) == "one\n\ntwo"

    def test_column(self, serve) -> None:
        serve(text=["one"], story=["two"])
        assert load_text("name", column="story") == "two"

    def test_unknown_column(self, serve) -> None:
        serve(text=["one"], story=["two"])
        with pytest.raises(ADMSValueError, match="no column 'body'; it has text, story"):
            load_text("name", column="body")

    def test_column_of_numbers(self, serve) -> None:
        serve(text=[1, 2])
        with pytest.raises(ADMSValueError, match="does not hold strings"):
            load_text("name")

    def test_unreachable(self) -> None:
        with pytest.raises(ADMSValueError, match="cannot read text from 'no_such_data_set'.*file"):
            load_text("no_such_data_set")

    def test_max_rows_is_checked(self) -> None:
        with pytest.raises(ADMSValueError, match="max_rows must be at least 1, got 0"):
            load_text("name", max_rows=0)


class TestEncode:
    def test_all(self) -> None:
        ids = encode_text(Words(), "a bb ccc")
        assert ids.dtype == torch.long
        assert ids.tolist() == [[1, 2, 3]]

    def test_slice(self) -> None:
        assert encode_text(Words(), "a bb ccc dddd", offset=1, num_tokens=2).tolist() == [[2, 3]]
        assert encode_text(Words(), "a bb ccc dddd", offset=2).tolist() == [[3, 4]]

    @pytest.mark.parametrize(("offset", "num_tokens"), [(2, 2), (3, None), (0, 4), (9, 1)])
    def test_too_short(self, offset: int, num_tokens: int | None) -> None:
        with pytest.raises(ADMSValueError, match="the text has 3 tokens, but"):
            encode_text(Words(), "a bb ccc", offset=offset, num_tokens=num_tokens)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"offset": -1}, "offset must be at least 0, got -1"),
            ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ],
    )
    def test_bad_numbers(self, arguments: dict[str, int], message: str) -> None:
        with pytest.raises(ADMSValueError, match=message):
            encode_text(Words(), "a", **arguments)

    @pytest.mark.smollm2
    def test_with_a_real_tokenizer(self, smollm2) -> None:
        _, tokenizer = smollm2
        text = load_text()[:20_000]
        ids = encode_text(tokenizer, text)
        assert tokenizer.decode(ids[0]) == text
        assert torch.equal(encode_text(tokenizer, text, offset=7, num_tokens=5), ids[:, 7:12])

    @pytest.mark.assets
    @pytest.mark.parametrize("name", ["handbook.txt", "sotu.txt"])
    def test_asset_texts(self, assets_text: Path, name: str) -> None:
        assert len(load_text(assets_text / name)) > 400_000


def test_rows_are_added_until_the_length_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"row {'x' * (index % 5)}y" for index in range(100)]
    asked: list[int] = []

    def load(name: object, *, max_rows: int, **_: object) -> str:
        asked.append(max_rows)
        return "\n\n".join(rows[:max_rows])

    monkeypatch.setattr(texts, "load_text", load)
    ids = texts.collect_ids(Words(), "set", num_tokens=90, offset=3, rows_at_a_time=10)
    assert ids.shape == (1, 90) and asked == [10, 20, 40, 80]
    whole = Words()("\n\n".join(rows), add_special_tokens=False, verbose=False)["input_ids"]
    assert ids[0].tolist() == whole[3:93]
    with pytest.raises(ADMSValueError, match="200 tokens"):
        texts.collect_ids(Words(), "set", num_tokens=201, rows_at_a_time=10)


def test_a_short_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "short.txt"
    file.write_text("three words here")
    with pytest.raises(ADMSValueError, match="3 tokens"):
        texts.collect_ids(Words(), file, num_tokens=4)
