"""`clla generate`."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any, Optional

import typer

from clla import console
from clla.commands.options import Device, Dtype, errors, start
from clla.errors import UsageError, blamed, generating
from clla.recipe import LARGEST

COLDEST = 1e-6  # temperature: divided by less, logits become infinite
NEW_TOKENS = 100  # by default, where the model takes as many after the prompt


def generate(
    checkpoint: Annotated[str, typer.Argument(help="Converted checkpoint: a directory or user/repo\\[@revision].")],
    prompt: Annotated[str, typer.Option(help="What to continue, or '-' for standard input.")],
    max_new_tokens: Annotated[
        Optional[int], typer.Option(min=1, max=LARGEST, help="Tokens to write; default: 100, or what the model takes.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Use the chat template where there is one.")] = True,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 decodes greedily.")] = 0.0,
    num_beams: Annotated[int, typer.Option(min=1, max=LARGEST, help="Number of beams.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Seed of sampling.")] = 0,
    attend_top_k: Annotated[
        Optional[int],
        typer.Option(
            min=0,
            max=LARGEST,
            help="Old tokens that each new one reads in full, 0 for all; default: all, from 8,192 on a CPU the best.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Generate text with the compressed cache."""
    with errors(interrupted="the rest of the text is lost; the checkpoint is as it was"):
        start()
        import torch

        from clla.checkpoint.load import load_checkpoint
        from clla.modeling.hooks_clla import CACHE
        from clla.source.device import pick_device
        from clla.source.lengths import reach_of
        from clla.text.vocabulary import check_tokens

        if not math.isfinite(temperature) or 0 < temperature < COLDEST:
            raise UsageError(
                f"--temperature {temperature}", expected=f"0, or a number from {COLDEST:g} on", remedy="correct it"
            )
        text = _prompt(prompt)
        loaded = load_checkpoint(checkpoint, device=pick_device(device), dtype=dtype)
        if chat and loaded.tokenizer.chat_template:
            turns = [{"role": "user", "content": text}]
            with blamed(
                f"the chat template of {checkpoint} fails",
                expected="a template that takes one turn of a user",
                remedy="pass --no-chat, or correct the checkpoint's chat_template.jinja",
            ):
                text = loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            inputs = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            inputs = loaded.tokenizer(text, return_tensors="pt")
        check_tokens(inputs["input_ids"], loaded.model.config.text_config.vocab_size, loaded.tokenizer)
        inputs = inputs.to(loaded.model.device)
        reach, length = reach_of(loaded.model.config.text_config), inputs["input_ids"].shape[1]
        new_tokens = max_new_tokens or reach.fit(length + NEW_TOKENS) - length
        new_tokens = new_tokens if new_tokens > 0 else NEW_TOKENS  # the prompt alone is too long
        got, remedy = f"a prompt of {length} tokens and {new_tokens} new ones", "shorten it, or lower --max-new-tokens"
        reach.check(got, length + new_tokens, remedy=remedy)
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        model: Any = loaded.model
        model.attend_top_k = attend_top_k
        with generating(checkpoint):
            output = model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                num_beams=num_beams,
                return_dict_in_generate=True,
                tokenizer=loaded.tokenizer,
                **sampling,
            )
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        print(loaded.tokenizer.decode(new, skip_special_tokens=True))
        cache, plan = output[CACHE], loaded.plan
        total = cache.get_seq_length()
        source = plan.source_bytes_per_token * total * num_beams
        smaller = "" if plan.break_even is None else f" (smaller from {plan.break_even:,} tokens on)"
        console.say(
            f"{total} tokens: cache {cache.nbytes:,} bytes, the source's would take {source:,}; each further token "
            f"{plan.row_bytes:,} against {plan.source_bytes_per_token:,}{smaller}"
        )


def _prompt(prompt: str) -> str:
    """What to continue, from standard input where it is '-'."""
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        raise UsageError(
            f"the prompt is no UTF-8: {error}", expected="text in UTF-8", remedy="convert it, e.g. with iconv"
        ) from error
    if not text.strip():
        raise UsageError("the prompt is empty", expected="some text", remedy='pass --prompt "…"')
    return text
