"""Retrieval of planted codes: a five-digit code stands somewhere in a long text and is asked for at its end."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clla import console
from clla.errors import UsageError
from clla.evaluate.perplexity import Subject, stream_logits

STATEMENT = "\nThe secret code is {code}. Remember it.\n"
QUESTION = "\nWhat is the secret code? The secret code is "


@dataclass(frozen=True)
class Trial:
    """Attributes: input_ids: [1, T] text, question and code; answer: number of tokens of the code."""

    input_ids: Tensor
    answer: int


@dataclass(frozen=True)
class Retrieval:
    """Attributes: nll: of the whole code, nats, mean over trials; exact: share of codes greedy decoding gets right."""

    nll: float
    exact: float


def check_room(tokenizer: Any, context: int) -> None:
    """Refuse a context that has no room for text around a planted code.

    Raises:
        UsageError: it has none.
    """
    make_trials(tokenizer, torch.zeros(1, dtype=torch.long), context=context, count=1)


def plantable(tokenizer: Any, context: int) -> int:
    """The tokens around a planted code, or 0, with a word why, where the context has no room for one."""
    try:
        check_room(tokenizer, context)
    except UsageError as error:
        console.say(f"No codes are planted: {error.got}")
        return 0
    return context


def make_trials(tokenizer: Any, filler: Tensor, *, context: int, count: int, seed: int = 0) -> list[Trial]:
    """Plant codes at evenly spread depths of filler text.

    Args:
        tokenizer: the model's.
        filler: [N] token ids of ordinary text, used in turn.
        context: T, tokens in all.
        count: of trials.
        seed: of the codes.

    Raises:
        UsageError: the context has no room for text around a code and its question.
    """
    rng = random.Random(seed)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    prefix, question, trials = list(tokenizer("")["input_ids"]), encode(QUESTION), []
    for i in range(count):
        code = str(rng.randrange(10000, 100000))
        statement, answer = encode(STATEMENT.format(code=code)), encode(code)
        room = context - len(prefix) - len(statement) - len(question) - len(answer)
        if room < 1:
            raise UsageError(
                f"a code planted in {context} tokens, of which it takes {context - room} with its question",
                expected="some text around it",
                remedy="raise --retrieval-context, or pass --no-retrieval",
            )
        start = rng.randrange(max(1, len(filler) - room))
        text = filler.repeat(room // len(filler) + 1)[start : start + room].tolist()
        depth = int(len(text) * (i + 0.5) / count)
        ids = prefix + text[:depth] + statement + text[depth:] + question + answer
        trials.append(Trial(torch.tensor([ids]), len(answer)))
    return trials


def retrieve(subject: Subject, trials: list[Trial], *, chunk: int, device: torch.device) -> Retrieval:
    """NLL of the planted codes, and the share that greedy decoding would give, through a subject's cache."""
    nll, exact = 0.0, 0
    for trial in trials:
        ids = trial.input_ids.to(device)
        # Only the end is scored, but the whole text streams through the cache.
        tail = torch.cat([log_probs[-trial.answer - 1 :] for log_probs, _ in stream_logits(subject, ids, chunk)])
        predicted, code = tail[-trial.answer - 1 : -1], ids[0, -trial.answer :]
        nll -= float(predicted.gather(1, code[:, None]).double().sum())
        exact += int((predicted.argmax(-1) == code).all())
    return Retrieval(nll / len(trials), exact / len(trials))
