"""What README.md and docs/ promise: figures with their commands, and commands that there are."""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from adms.cli import app
from adms.evaluation import demo

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

# By the first cell of their header: tables of names and what they mean.
NOT_MEASURED = ("parameter", "file", "`--methods`", "profile")
PROGRAMS = ("accelerate", "adms", "bash", "pytest", "python")


class Block(NamedTuple):
    """A part of a page between blank lines; fenced code is one part."""

    kind: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """The parts of a Markdown page: ``table``, ``picture``, ``code`` or ``text``."""
    lines = page.splitlines()
    at = 0
    while at < len(lines):
        start = at
        if not lines[at].strip():
            at += 1
            continue
        if lines[at].startswith("```"):
            at = lines.index("```", at + 1) + 1
            kind = "shell" if lines[start] in ("```", "```bash") else "listing"
            yield Block(kind, "\n".join(lines[start + 1 : at - 1]), start + 1)
            continue
        while at < len(lines) and lines[at].strip() and not lines[at].startswith("```"):
            at += 1
        text = "\n".join(lines[start:at])
        kinds = {"|": "table", "!": "picture", "    ": "shell"}
        kind = next((name for mark, name in kinds.items() if text.startswith(mark)), "text")
        yield Block(kind, text, start + 1)


def commands(shell: str) -> Iterator[list[str]]:
    """The words of each command of a code block that runs something of this project."""
    for line in shell.replace("\\\n", " ").splitlines():
        for part in line.split(" | "):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words and words[0] in PROGRAMS:
                yield words


def inline_commands(text: str) -> Iterator[list[str]]:
    """Commands in the backticks of a paragraph."""
    for span in re.findall(r"`([^`\n]+)`", text):
        if span.split()[0] in PROGRAMS:
            yield shlex.split(span)


def first_cell(table: str) -> str:
    return table.split("|")[1].strip()


README = list(blocks(PAGES[0].read_text(encoding="utf-8")))
SHOWN = [
    pytest.param(place, id=f"line {block.line}")
    for place, block in enumerate(README)
    if block.kind == "picture"
    or (block.kind == "table" and first_cell(block.text) not in NOT_MEASURED)
]


@pytest.mark.parametrize("place", SHOWN)
def test_every_table_and_figure_has_its_command_under_it(place: int) -> None:
    under = README[place + 1]
    assert under.kind == "shell", f"line {under.line} should be the command: {under.text[:60]!r}"
    assert list(commands(under.text)), f"line {under.line} runs nothing of this project"


def test_pictures_and_linked_files_are_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).is_file(), f"{page.name} links to {target}"


COMMANDS = list(
    dict.fromkeys(
        shlex.join(words)
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"))
        for words in (commands if block.kind == "shell" else inline_commands)(block.text)
    )
)


class Parsed(Exception):
    """The arguments were understood; nothing is run."""


def parse_script(script: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a script with argparse parse these arguments, and stops it there."""
    assert "ArgumentParser" in script.read_text(), f"{script} parses no arguments"
    real = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *arguments: object, **named: object) -> None:
        real(self, *arguments, **named)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def parse_typer(application: typer.Typer, words: list[str]) -> None:
    """Has a typer command parse these arguments; mentioned by name alone it need not be whole."""
    command = typer.main.get_command(application)
    if hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    if words:
        command.make_context("adms", words)
    else:
        assert CliRunner().invoke(application, ["--help"]).exit_code == 0


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = [word for word in shlex.split(line) if word != "..."]
    if program == "accelerate":
        assert words[:3] == ["launch", "-m", "adms.cli"]
        program, words = "adms", words[3:]
    if program == "adms":
        if words:
            parse_typer(app, words)
        return
    if program == "pytest":
        files = [word for word in words if word.startswith("tests/")]
        assert files and all(any(ROOT.glob(word.split("::")[0])) for word in files)
        return
    place, word = next((n, word) for n, word in enumerate(words) if not word.startswith("-"))
    found = sorted(ROOT.glob(word))
    assert found, f"{line} runs {word}, which is not there"
    script, rest = found[0], words[place + 1 :]
    if program == "python":
        parse_script(script, rest, monkeypatch)
    elif script.name == "demo.sh":
        shown = typer.Typer()
        shown.command()(demo.main)
        parse_typer(shown, rest)
    elif script.name == "run_adms_report.sh":
        parse_typer(app, ["report", *rest])
