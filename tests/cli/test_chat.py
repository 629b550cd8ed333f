"""``adms chat``: one wrong message ends nothing, and the session is saved however the chat ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adms.cli.chat import Terminal
from adms.evaluation.models import load_model
from adms.session import load_session

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat_model(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template."""
    model, tokenizer = load_model(tiny_model_folder)
    tokenizer.chat_template = TEMPLATE
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_message_that_is_not_utf8_is_left_out(
    chat_model: Path, tmp_path: Path, errors: str
) -> None:
    session = tmp_path / "memory.adms"
    result = subprocess.run(
        [sys.executable, "-m", "adms.cli", "chat", "--model", chat_model, "--device", "cpu"]
        + ["--session", session, "--max-new-tokens", "2"],
        input=b"first\nsec\xffond\nthird\n",
        env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"},
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert b"error: your message is not UTF-8 (byte 3) and was left out" in result.stdout
    # The two good ones were answered.
    assert result.stdout.count(b"tokens seen") == 2
    assert load_session(session, load_model(chat_model)[0]).cache.tokens_seen > 50


def test_an_unforeseen_end_saves_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = object.__new__(Terminal)
    saved = []

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(terminal, "talk_on", broken, raising=False)
    monkeypatch.setattr(terminal, "save_at_end", lambda: saved.append(True), raising=False)
    with pytest.raises(ZeroDivisionError):
        terminal.run()
    assert saved == [True]
