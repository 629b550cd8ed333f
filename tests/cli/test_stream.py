"""``adms stream``: what it says of texts that it cannot read, and what is kept of them."""

import io
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adms.cli import app
from adms.cli.stream import BLOCK_BYTES, pieces
from adms.errors import ADMSValueError
from adms.session import load_session

SIZES = ["--set", "start_size=2", "--set", "compressed_budget=40", "--set", "recent_size=16"]


def test_lines_end_alike_and_characters_are_whole_at_the_edges_of_blocks() -> None:
    text = "né \r\n日本 word\r" * BLOCK_BYTES
    read = "".join(pieces(io.BytesIO(text.encode())))
    assert read == text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("wrong", [0, 1, 4095, 4096, 4097, 9001, 20_000])
@pytest.mark.parametrize("byte", [b"\xff", b"\xe6\x97a"])
def test_the_byte_that_is_not_utf8(wrong: int, byte: bytes) -> None:
    good = ("some é words " * 2000).encode()
    while good[wrong] & 0xC0 == 0x80:
        wrong += 1
    given: list[str] = []
    with pytest.raises(ADMSValueError, match=rf"byte {wrong}\)"):
        for piece in pieces(io.BytesIO(good[:wrong] + byte + good[wrong:])):
            given.append(piece)
    assert "".join(given).encode() == good[:wrong]


def test_what_came_before_a_wrong_byte_is_stored(tiny_model_folder: Path, tmp_path: Path) -> None:
    session = tmp_path / "memory.adms"
    place = ["--model", str(tiny_model_folder), "--device", "cpu", "--session", str(session)]
    result = CliRunner().invoke(
        app, ["stream", "-", *place, *SIZES], input=b"words " * 1000 + b"\xff end"
    )
    assert result.exit_code == 2, result.output
    assert "not UTF-8 (byte 6000)" in result.stderr
    assert f"6,000 tokens are stored in {session}" in result.stderr
    from adms.evaluation.models import load_model

    assert load_session(session, load_model(tiny_model_folder)[0]).cache.tokens_seen == 6000
