"""Facts hidden in a text and questions about them: passkey, several keys, key-value lookup.

A trial is a filler text with sentences put in at chosen depths, a question at the end, and the
answer. All of it follows from a seed.
"""

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from adms.errors import ADMSValueError
from adms.evaluation.texts import decode_ids

PASSKEY, MULTIKEY, LOOKUP = "passkey", "multikey", "lookup"
KINDS = (PASSKEY, MULTIKEY, LOOKUP)

_NAMES = ("Alder", "Birch", "Cedar", "Dogwood", "Elder", "Fir", "Ginkgo", "Hazel")
_WORDS = (
    "amber",
    "basalt",
    "copper",
    "denim",
    "ebony",
    "flint",
    "granite",
    "ivory",
    "jade",
    "linen",
    "marble",
    "nickel",
    "onyx",
    "pearl",
    "quartz",
    "ruby",
    "slate",
    "topaz",
)


@dataclass(frozen=True)
class Trial:
    """One question about a text.

    Attributes:
        text: ``[1, N]`` filler with the facts in it.
        question: ``[1, M]``.
        answer: what the answer has to begin with.
    """

    text: torch.Tensor
    question: torch.Tensor
    answer: str


@dataclass(frozen=True)
class Facts:
    """Sentences to hide, a question about one of them, and its answer."""

    sentences: tuple[str, ...]
    asked: int
    question: str
    answer: str


def make_facts(kind: str, seed: int) -> Facts:
    """The facts of one trial.

    Args:
        kind: ``"passkey"`` (one number), ``"multikey"`` (four numbers under names, one of them
            asked for), ``"lookup"`` (eight pairs of a number and a word in one list).
        seed: decides the numbers, names and which is asked for.

    Raises:
        ADMSValueError: an unknown kind.
    """
    draw = random.Random(f"{kind} {seed}")
    if kind == PASSKEY:
        key = str(draw.randint(10000, 99999))
        return Facts(
            (f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n",),
            0,
            "\n\nWhat is the pass key? The pass key is",
            key,
        )
    if kind == MULTIKEY:
        names = draw.sample(_NAMES, 4)
        keys = [str(key) for key in draw.sample(range(10000, 100000), 4)]
        asked = draw.randrange(4)
        return Facts(
            tuple(
                f"\n\nThe pass key of {name} is {key}. Remember it. {key} is the pass key of "
                f"{name}.\n\n"
                for name, key in zip(names, keys, strict=True)
            ),
            asked,
            f"\n\nWhat is the pass key of {names[asked]}? The pass key of {names[asked]} is",
            keys[asked],
        )
    if kind == LOOKUP:
        keys = [str(key) for key in draw.sample(range(1000, 10000), 8)]
        words = draw.sample(_WORDS, 8)
        asked = draw.randrange(8)
        pairs = "".join(f"{key}: {word}\n" for key, word in zip(keys, words, strict=True))
        return Facts(
            (f"\n\nA list of numbers and words:\n{pairs}\n",),
            0,
            f"\n\nIn the list of numbers and words, which word stood beside {keys[asked]}?\n"
            f"{keys[asked]}:",
            words[asked],
        )
    raise ADMSValueError(f"unknown kind of trial {kind!r}; expected one of {', '.join(KINDS)}")


def make_trial(
    tokenizer: PreTrainedTokenizerBase,
    filler: torch.Tensor,
    kind: str,
    *,
    length: int,
    depth: float,
    seed: int,
) -> Trial:
    """Hides facts in a filler text.

    Args:
        tokenizer: of the model.
        filler: ``[1, F]`` ids of a long text, at least ``length`` of them.
        kind: of trial, see ``make_facts``.
        length: tokens of text and question together.
        depth: where the fact asked for begins, 0 (start) to 1 (end) of the text; further facts are
            spread evenly over the text.
        seed: of the facts.

    Raises:
        ADMSValueError: the filler is too short, or the length too small for the facts.
    """
    if not 0.0 <= depth <= 1.0:
        raise ADMSValueError(f"depth must lie in 0..1, got {depth}")
    facts = make_facts(kind, seed)
    pieces = [_encode(tokenizer, sentence) for sentence in facts.sentences]
    question = _encode(tokenizer, facts.question)
    room = length - question.shape[1] - sum(piece.shape[1] for piece in pieces)
    if room < 1:
        raise ADMSValueError(
            f"length {length} leaves no room for text beside the facts; use at least "
            f"{length - room + 1}"
        )
    if filler.shape[1] < room:
        raise ADMSValueError(
            f"the filler text has {filler.shape[1]} tokens, a length of {length} needs {room}; use "
            "a longer text or a smaller length"
        )
    others = len(pieces) - 1
    places = [(place + 0.5) / others for place in range(others)]
    places.insert(facts.asked, depth)
    order = sorted(range(len(pieces)), key=lambda index: places[index])
    parts, used = [], 0
    for index in order:
        until = round(places[index] * room)
        parts += [filler[:, used:until], pieces[index]]
        used = until
    parts.append(filler[:, used:room])
    return Trial(torch.cat(parts, dim=1), question, facts.answer)


def is_correct(tokenizer: PreTrainedTokenizerBase, produced: torch.Tensor, answer: str) -> bool:
    """Whether an answer begins with what was asked for, whitespace aside."""
    return decode_ids(tokenizer, produced).strip().startswith(answer)


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str) -> int:
    """Tokens an answer needs at most, a space or newline before it included."""
    return int(_encode(tokenizer, f" {answer}").shape[1]) + 1


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)[None]
