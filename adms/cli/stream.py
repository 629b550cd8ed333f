"""``adms stream``: a file or standard input through a model, in bounded memory."""

import math
import re
import sys
from codecs import getincrementaldecoder
from collections.abc import Iterator
from io import IncrementalNewlineDecoder
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
import typer
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from adms.cache import ADMSKVCache
from adms.cli.conversation import Detokenizer, Sampler
from adms.cli.memory import Autosave, Rate, open_memory, parse_settings, status_line
from adms.errors import ADMSValueError
from adms.evaluation.console import user_errors
from adms.evaluation.models import load_model

# Bytes read at a time.
BLOCK_BYTES = 4096
# At most so many characters are held back for a good place to cut.
MOST_HELD = 4 * BLOCK_BYTES
# Before a single space between two words: tokenizers that split at white space never join tokens
# across it. Text without any (a list of lines) is cut before a line break.
SPACE_CUT = re.compile(r"(?<=\S)(?= \S)")
LINE_CUT = re.compile(r"(?<=\S)(?=\n\S)")


def stream(
    source: Annotated[str, typer.Argument(help="A text file, or - for standard input.")] = "-",
    model: Annotated[str, typer.Option(help="smollm2, a local folder, or a hub id.")] = "smollm2",
    session: Annotated[
        Path | None, typer.Option(help="File to continue, or to begin; saved as the stream grows.")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Tokens between two saves to --session.")] = 1000,
    generate: Annotated[int, typer.Option(help="Tokens to write after the text ends.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of probability to sample from.")] = 0.9,
    seed: Annotated[int | None, typer.Option(help="Makes the text repeatable.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A parameter of ADMSConfig, e.g. recent_size=512; repeatable."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, bfloat16, auto.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
) -> None:
    """Stream text through a model and report its loss; then go on writing, if asked to."""
    # What is reported goes to standard error, so that generated text can be piped.
    console = Console(stderr=True, highlight=False)
    with user_errors():
        if generate < 0:
            raise ADMSValueError(f"--generate must be at least 0, got {generate}")
        sampler = Sampler(temperature, top_p, seed)
        settings = parse_settings(set_ or [])
        opened_text = open_text(source)
        with console.status("loading the model"):
            loaded, tokenizer = load_model(model, dtype=dtype, device=device)
            opened, _ = open_memory(loaded, session, settings)
        run = StreamRun(loaded, opened.cache, opened.notes)
        autosave = Autosave(session, save_every, run.notes)
        autosave.start(opened.cache)
        if not cuts_cleanly(tokenizer):
            console.print(
                "this tokenizer adds a mark where a text begins, so one comes every "
                f"{BLOCK_BYTES} bytes",
                style="dim",
            )
        with opened_text as text:
            stopped = read_all(console, run, tokenizer, text, autosave)
        if generate and not stopped:
            write_on(run, tokenizer, sampler, generate, autosave)
        autosave.now(opened.cache)


def open_text(source: str) -> BinaryIO:
    """The bytes of a file, or of standard input for ``-``, whatever encoding that is said to have.

    Raises:
        ADMSValueError: the file cannot be read.
    """
    if source == "-":
        return sys.stdin.buffer
    try:
        return open(source, "rb")
    except OSError as error:
        raise ADMSValueError(f"cannot read {source!r}: {error.strerror}") from error


def cuts_cleanly(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text in pieces encodes as the whole."""
    whole, *parts = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("one two three", "one two", " three")
    )
    return whole == [token for part in parts for token in part]


def pieces(source: BinaryIO) -> Iterator[str]:
    """A text in pieces that can be encoded one by one; only a bounded part is ever held.

    Raises:
        ADMSValueError: the text is not UTF-8; everything before the wrong byte was given.
    """
    held, count, wrong = "", 0, None
    decoder = IncrementalNewlineDecoder(getincrementaldecoder("utf-8")(), translate=True)
    more = True
    # A line at a time would hold all of a text without line breaks.
    while more and wrong is None:
        block = source.read(BLOCK_BYTES)
        count, more = count + len(block), bool(block)
        try:
            held += decoder.decode(block, final=not more)
        except UnicodeDecodeError as error:
            # The decoder counts from the first byte of a character that it held back.
            wrong = count - len(error.object) + error.start
            held += decoder.decode(block[: max(0, wrong - count + len(block))])
        cut = _last_cut(held) if more and wrong is None else len(held)
        if cut:
            yield held[:cut]
            held = held[cut:]
    if wrong is not None:
        raise ADMSValueError(f"the text is not UTF-8 (byte {wrong}); convert it")


def _last_cut(text: str) -> int:
    """Where to cut ``text`` so that its pieces encode as the whole; 0 where nowhere yet."""
    for rule in (SPACE_CUT, LINE_CUT):
        places = [found.start() for found in rule.finditer(text)]
        if places:
            return places[-1]
    return len(text) if len(text) > MOST_HELD else 0


class StreamRun:
    """Ids through a cache, with the loss of every token but the first."""

    def __init__(self, model: Any, cache: ADMSKVCache, stored: dict[str, Any]) -> None:
        self.model = model
        self.cache = cache
        # The prediction for the next id; without it (a continued session), one loss is missing.
        self.logits: torch.Tensor | None = None
        self.loss_sum = 0.0
        self.loss_count = 0
        self.stored = stored

    def notes(self) -> dict[str, Any]:
        """What is kept beside the cache: whatever another program noted there."""
        return {name: value for name, value in self.stored.items() if name != "chat"}

    @property
    def loss(self) -> float:
        """Mean loss per token, in nats."""
        return self.loss_sum / self.loss_count if self.loss_count else math.nan

    @torch.no_grad()
    def feed(self, ids: list[int]) -> None:
        """Streams ids."""
        inputs = torch.tensor([ids], device=self.model.device)
        logits = self.model(inputs, past_key_values=self.cache).logits[0].float()
        targets = inputs[0]
        if self.logits is not None:
            predictions = torch.cat([self.logits, logits[:-1]])
        else:
            predictions, targets = logits[:-1], targets[1:]
        if len(targets):
            total = torch.nn.functional.cross_entropy(predictions, targets, reduction="sum")
            self.loss_sum += float(total)
            self.loss_count += len(targets)
        self.logits = logits[-1:]


def read_all(
    console: Console,
    run: StreamRun,
    tokenizer: PreTrainedTokenizerBase,
    text: BinaryIO,
    autosave: Autosave,
) -> bool:
    """Streams a whole text; True if Ctrl-C ended it.

    Raises:
        ADMSValueError: the text is not UTF-8; what came before is saved to the session.
    """
    rate, stopped = Rate(), False
    # A pass's logits over the whole vocabulary are large; a chunk's worth at a time bounds them.
    step = run.cache.sizes.chunk
    try:
        with console.status("reading") as status:
            for piece in pieces(text):
                ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                for start in range(0, len(ids), step):
                    run.feed(ids[start : start + step])
                    rate.tokens += len(ids[start : start + step])
                    autosave.maybe(run.cache)
                    status.update(f"{status_line(run.cache, rate)} | loss {run.loss:.3f}")
    except KeyboardInterrupt:
        stopped = True
    except ADMSValueError as error:
        if autosave.path is None or not run.cache.tokens_seen:
            raise
        autosave.now(run.cache)
        stored = f"{run.cache.tokens_seen:,} tokens are stored in {autosave.path}"
        raise ADMSValueError(f"{error}; {stored}") from error
    line = f"{status_line(run.cache, rate)} | loss {run.loss:.3f} nats per token"
    if stopped:
        line = f"stopped; what was read is in memory | {line}"
    console.print(line, style="dim", markup=False, soft_wrap=True)
    return stopped


def write_on(
    run: StreamRun,
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    count: int,
    autosave: Autosave,
) -> None:
    """Generates to standard output until ``count`` tokens, the end of the text, or Ctrl-C."""
    if run.logits is None:
        raise ADMSValueError("there is no text to go on from; give some, beside the session")
    detokenizer = Detokenizer(tokenizer)
    try:
        for _ in range(count):
            token = sampler(run.logits)
            if token == tokenizer.eos_token_id:
                break
            run.feed([token])
            sys.stdout.write(detokenizer.push(token))
            sys.stdout.flush()
            autosave.maybe(run.cache)
    except KeyboardInterrupt:
        pass
    sys.stdout.write("\n")
