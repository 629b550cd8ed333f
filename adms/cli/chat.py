"""``adms chat``: a terminal chat that never forgets to stay small."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from adms.cache import ADMSKVCache
from adms.cli.conversation import Conversation, Sampler
from adms.cli.memory import (
    Autosave,
    Rate,
    describe_memory,
    open_memory,
    parse_settings,
    status_line,
)
from adms.errors import ADMSError, ADMSValueError
from adms.evaluation.console import user_errors
from adms.evaluation.models import load_model
from adms.session import load_session, save_session

HELP = """\
/save [FILE]   write the conversation's memory to a file
/load FILE     go on from a file
/inspect       what the memory holds
/forget        empty the memory and start afresh
/read FILE     send a text file as your message
/help          this list
/quit          leave (also Ctrl-D)
Text in three double quotes may have many lines. Ctrl-C stops an answer, not the chat."""


def chat(
    model: Annotated[str, typer.Option(help="smollm2, a local folder, or a hub id.")] = "smollm2",
    session: Annotated[
        Path | None, typer.Option(help="File to continue, or to begin; saved as the chat grows.")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Tokens between two saves to --session.")] = 1000,
    system: Annotated[str | None, typer.Option(help="System message of a new chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.2,
    top_p: Annotated[float, typer.Option(help="Share of probability to sample from.")] = 0.9,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A parameter of ADMSConfig, e.g. recent_size=512; repeatable."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, bfloat16, auto.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
) -> None:
    """Chat with a model in bounded memory, for as long as you like."""
    console = Console(highlight=False)
    with user_errors():
        sampler = Sampler(temperature, top_p, seed)
        settings = parse_settings(set_ or [])
        if max_new_tokens < 1:
            raise ADMSValueError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
        with console.status("loading the model"):
            loaded, tokenizer = load_model(model, dtype=dtype, device=device)
            opened, continued = open_memory(loaded, session, settings)
        terminal = Terminal(console, loaded, tokenizer, sampler, max_new_tokens, system)
        terminal.autosave = Autosave(session, save_every, terminal.notes)
        terminal.open(opened.cache, opened.notes if continued else None)
        if continued:
            console.print(f"[dim]continuing {session}[/dim]", soft_wrap=True)
        terminal.run()


class Terminal:
    """Input, output and commands around a conversation."""

    def __init__(
        self,
        console: Console,
        model: object,
        tokenizer: object,
        sampler: Sampler,
        max_new_tokens: int,
        system: str | None,
    ) -> None:
        self.console = console
        self.model = model
        self.tokenizer = tokenizer
        self.sampler = sampler
        self.max_new_tokens = max_new_tokens
        self.system = system
        self.autosave = Autosave(None, 1, dict)
        self.conversation: Conversation | None = None

    @property
    def talk(self) -> Conversation:
        """The conversation under way."""
        if self.conversation is None:
            raise RuntimeError("a terminal that was not opened")
        return self.conversation

    def notes(self) -> dict:
        """What is saved beside the cache."""
        return self.talk.notes()

    def open(self, cache: ADMSKVCache, stored: dict | None) -> None:
        """Talks through ``cache`` from now on."""
        self.conversation = Conversation(
            self.model,
            self.tokenizer,  # type: ignore[arg-type]
            cache,
            self.sampler,
            system=self.system,
            stored=stored,
            after_pass=lambda: self.autosave.maybe(cache),
        )
        self.autosave.start(cache)

    # --- the loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Until the user leaves, or an error ends the chat; either way the session is saved."""
        try:
            self.talk_on()
        finally:
            self.save_at_end()

    def talk_on(self) -> None:
        """Messages and commands until the user leaves."""
        # Bytes that are no text arrive as surrogates, which `ask` refuses; strict decoding would
        # lose the lines after them too.
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")
        # With it, a pasted text arrives as one message, and lines can be edited.
        with contextlib.suppress(ImportError):
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")
        self.console.print("[dim]/help lists the commands; Ctrl-C stops an answer[/dim]")
        while True:
            try:
                text = self.ask()
            except EOFError:
                self.console.print()
                break
            except KeyboardInterrupt:
                self.console.print("\n[dim]nothing to stop; /quit leaves[/dim]")
                continue
            except ADMSValueError as error:
                self.report(f"error: {error}")
                continue
            if not text.strip():
                continue
            if text.startswith("/"):
                if not self.command(text.strip()):
                    break
                continue
            self.turn(text)

    def ask(self) -> str:
        """One message; three double quotes open one of many lines.

        Raises:
            ADMSValueError: it is not UTF-8.
        """
        text = input("you> " if sys.stdin.isatty() else "")
        if text.lstrip().startswith('"""'):
            text = text.lstrip()[3:]
            while '"""' not in text:
                text += "\n" + input("...> " if sys.stdin.isatty() else "")
            text = text[: text.index('"""')].strip("\n")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            wrong = len(text[: error.start].encode())
            raise ADMSValueError(
                f"your message is not UTF-8 (byte {wrong}) and was left out; convert it"
            ) from error
        return text

    def turn(self, text: str) -> None:
        """Reads a message and answers it; Ctrl-C ends either and the memory stays consistent."""
        talk = self.talk
        try:
            rate = Rate()
            with self.console.status("reading") as status:
                for stored, whole in talk.read(text):
                    rate.tokens = stored
                    status.update(f"reading {stored:,} of {whole:,} tokens ({rate})")
        except KeyboardInterrupt:
            stored, whole = talk.settle()
            if stored == 0:
                self.report("stopped; your message is not in memory")
            elif stored < whole:
                kept = f"{stored:,} of {whole:,} tokens"
                self.report(f"stopped; {kept} of your message are in memory, unanswered")
            else:
                self.report("stopped; your message is in memory, unanswered")
            return
        except ADMSError as error:
            talk.settle()
            self.report(f"error: {error}")
            return
        rate = Rate()
        begun = talk.cache.tokens_seen
        try:
            for piece in talk.answer(self.max_new_tokens):
                rate.tokens += 1
                self.write(piece)
            self.write("\n")
        except KeyboardInterrupt:
            self.write(talk.unshown() + "\n")
            stored = talk.cache.tokens_seen - begun
            self.report(f"stopped; the answer is in memory as far as shown ({stored} tokens)")
        except ADMSError as error:
            self.write("\n")
            self.report(f"error: {error}")
        self.report(status_line(talk.cache, rate))

    def write(self, text: str) -> None:
        """Puts out text as it is, at once."""
        self.console.file.write(text)
        self.console.file.flush()

    def report(self, text: str) -> None:
        """A line about the chat itself."""
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def save_at_end(self) -> None:
        """Saves to ``--session`` if there is anything new."""
        talk = self.talk
        if self.autosave.path is not None and talk.cache.tokens_seen:
            self.autosave.now(talk.cache)
            self.report(f"saved to {self.autosave.path}")

    # --- commands --------------------------------------------------------------------------------

    def command(self, text: str) -> bool:
        """Carries out a command; False ends the chat."""
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        try:
            match name:
                case "/quit" | "/exit":
                    return False
                case "/help":
                    self.console.print(HELP, markup=False)
                case "/inspect":
                    self.inspect()
                case "/forget":
                    self.talk.forget()
                    self.autosave.start(self.talk.cache)
                    self.report("the memory is empty")
                case "/save":
                    self.save(rest)
                case "/load":
                    self.load(rest)
                case "/read":
                    self.read_file(rest)
                case _:
                    self.report(f"unknown command {name}; /help lists them")
        except KeyboardInterrupt:
            self.report("stopped; nothing was changed")
        except ADMSError as error:
            self.report(f"error: {error}")
        return True

    def inspect(self) -> None:
        """Shows what each tier holds."""
        table = Table(show_header=False, box=None)
        for name, value in describe_memory(self.talk.cache):
            table.add_row(name, value)
        self.console.print(table)

    def save(self, name: str) -> None:
        """Saves to a file, the session's own if none is named."""
        path = Path(name) if name else self.autosave.path
        if path is None:
            self.report("name a file: /save FILE")
            return
        save_session(self.talk.cache, path, notes=self.notes())
        self.report(f"saved {self.talk.cache.tokens_seen:,} tokens' memory to {path}")

    def load(self, name: str) -> None:
        """Goes on from a file; on an error everything stays as it is."""
        if not name:
            self.report("name a file: /load FILE")
            return
        loaded = load_session(Path(name), self.model)  # type: ignore[arg-type]
        self.open(loaded.cache, loaded.notes)
        self.report(f"{loaded.cache.tokens_seen:,} tokens seen in {name}")

    def read_file(self, name: str) -> None:
        """Sends a text file as a message."""
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            self.report(f"cannot read {name!r}: {error}")
            return
        if text:
            self.turn(text)
        else:
            self.report(f"{name} is empty")
