"""The same prompts continued by source and converted model, greedily, and where the two part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clla.artifacts.plan import Plan
from clla.errors import generating
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.source.lengths import Reach

PASSAGE = "{passage}"  # is replaced by text that calibration leaves out
PASSAGE_TOKENS = 512
PROMPTS = (
    PASSAGE + "\n\nSummarise the text above in three sentences.",
    "The gate opens with the number 71493.\n\n" + PASSAGE + "\n\nWith which number does the gate open?",
    "Explain step by step how a compass works, and why it can be wrong.",
    PASSAGE + "\n\nList five words from the text above and say what each of them means.",
    "Write a short story about a lighthouse keeper who finds a letter.",
)


@dataclass(frozen=True)
class Continuation:
    """What one model wrote. Attributes: first: the token at which the two part, empty at an end of text; rest."""

    first: str
    rest: str
    tokens: int


@dataclass(frozen=True)
class Sample:
    """One prompt and what both models made of it.

    Attributes:
        prompt: as given.
        title: its last line.
        prompt_tokens: with the chat template.
        shared: text that both wrote.
        same: its tokens.
        source, converted: what each wrote after it; None where they wrote the same.
        coded_from: tokens chosen before any was read from its latent; None where none was.
    """

    prompt: str
    title: str
    prompt_tokens: int
    shared: str
    same: int
    source: Continuation | None
    converted: Continuation | None
    coded_from: int | None


def built_in(tokenizer: Any, passage: Tensor, count: int, reach: Reach) -> list[str]:
    """The first `count` prompts, as far as the model takes them, with a passage of text [T] in them.

    The passage has at most half of the tokens that the model takes.
    """
    most = reach.fit(2 * PASSAGE_TOKENS) // 2
    text = tokenizer.decode(passage[:most].tolist(), skip_special_tokens=True).strip()
    prompts = [prompt.replace(PASSAGE, text) for prompt in PROMPTS[:count]]
    lengths = [encoded(tokenizer, prompt)["input_ids"].shape[1] for prompt in prompts]
    return [prompt for prompt, length in zip(prompts, lengths, strict=True) if reach.fit(length + 1) > length]


def encoded(tokenizer: Any, prompt: str) -> Any:
    """Token ids and mask [1, T] of a prompt, in the chat template where there is one."""
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)


@torch.no_grad()
def make_samples(
    source: PreTrainedModel,
    converted: CllaForCausalLM,
    tokenizer: Any,
    plan: Plan,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    reach: Reach,
    on_sample: Callable[[int], None] = lambda _: None,
) -> tuple[Sample, ...]:
    """Let both models continue prompts, greedily.

    Args:
        source: its weights before they were trained.
        converted: the model.
        tokenizer: of both; its chat template is used where it has one.
        plan: for the exact window.
        prompts: text.
        new_tokens: to write, at most.
        reach: what the models take, prompt and text together.
        on_sample: called with 1 after each prompt.

    Raises:
        UsageError: the models have no positions for a prompt and a token after it.
    """
    found = []
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for prompt in prompts:
        inputs = encoded(tokenizer, prompt).to(converted.device)
        length = inputs["input_ids"].shape[1]
        room = reach.fit(length + new_tokens) - length
        if room < 1:
            room = new_tokens
            got = f"the prompt {prompt[:40]!r} of {length:,} tokens, and {room} new ones"
            reach.check(got, length + room, remedy="shorten it, or lower --max-new-tokens")
        written = []
        for model in (source, converted):
            torch.manual_seed(0)
            generate: Any = model.generate
            with generating(model.config.name_or_path):
                output = generate(**inputs, max_new_tokens=room, do_sample=False, num_beams=1, pad_token_id=padding)
            written.append(output[0, length:].tolist())
        exact = _exact_tokens(length, plan, converted.prefill_chunk)
        found.append(_sample(prompt, length, written, tokenizer, exact))
        on_sample(1)
    return tuple(found)


def _exact_tokens(length: int, plan: Plan, chunk: int) -> int:
    """New tokens that are chosen before any token is read from its latent."""
    full = plan.window + plan.flush_block
    before_last = (length - 1) // chunk * chunk  # prompts are read in chunks
    if not plan.window or before_last >= full:
        return 0
    return max(1, full - length + 1)


def _sample(prompt: str, length: int, written: list[list[int]], tokenizer: Any, exact: int) -> Sample:
    same = same_start(*written)
    texts = [_decoded(tokenizer, ids) for ids in written]
    # A token may hold part of a character: what both wrote ends where their texts do not yet differ.
    shared = texts[0][: same_start(*texts, *(_decoded(tokenizer, ids[:same]) for ids in written))]
    alike = written[0] == written[1]
    parts = [_continuation(tokenizer, ids, text, len(shared), same) for ids, text in zip(written, texts, strict=True)]
    longest = max(map(len, written))
    lines = [line for line in prompt.strip().splitlines() if line.strip()]
    return Sample(
        prompt=prompt,
        title=lines[-1].strip() if lines else "",
        prompt_tokens=length,
        shared=shared,
        same=same,
        source=None if alike else parts[0],
        converted=None if alike else parts[1],
        coded_from=exact if exact < longest else None,
    )


def _continuation(tokenizer: Any, ids: list[int], text: str, shared: int, same: int) -> Continuation:
    upto = max(shared, same_start(text, _decoded(tokenizer, ids[: same + 1])))
    return Continuation(text[shared:upto], text[upto:], len(ids))


def same_start(*parts: Sequence[Any]) -> int:
    """At how many first places all parts are the same."""
    for i, items in enumerate(zip(*parts, strict=False)):
        if any(item != items[0] for item in items):
            return i
    return min(map(len, parts))


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
