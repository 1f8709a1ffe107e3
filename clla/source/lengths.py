"""How long a text a model takes: learned positions end, others were trained up to some length."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from clla import console
from clla.errors import UnsupportedModelError, UsageError
from clla.modeling.hooks_clla import position_slots

# How configs call the length that a model was trained for.
NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True)
class Reach:
    """The tokens that a model takes, prompt and continuation together.

    Attributes:
        positions: that the model holds: one more is an error; None where any number can be computed.
        trained: that it was trained for: beyond it text is worse; None where its config says none, or with ALiBi.
    """

    positions: int | None = None
    trained: int | None = None

    @property
    def tokens(self) -> int | None:
        """The smaller of the two; None for no limit."""
        return min((limit for limit in (self.positions, self.trained) if limit is not None), default=None)

    def fit(self, length: int, *, new_tokens: int = 0) -> int:
        """A default length in tokens, shortened to what the model takes with `new_tokens` after it; at least 1."""
        return length if self.tokens is None else max(1, min(length, self.tokens - new_tokens))

    def fit_sequence(self, length: int, least: int) -> int:
        """`fit` of the sequences that a model is fitted on, which have at least `least` tokens.

        Raises:
            UnsupportedModelError: the model takes fewer.
        """
        if self.tokens is not None and self.tokens < least:
            raise UnsupportedModelError(
                f"the model takes {self.tokens} tokens, by its config",
                expected=f"at least {least}, the shortest sequence that it could be fitted on",
                remedy="correct the config, or use a model for longer texts",
            )
        return self.fit(length)

    def check_option(self, option: str, length: int | None) -> None:
        """`check` of a length that an option asks for; None asks for nothing."""
        if length is not None:
            self.check(f"{option} {length}", length, remedy=f"lower {option}")

    def check(self, got: str, tokens: int, *, remedy: str) -> None:
        """Refuse tokens that the model has no positions for, and say it where there are merely many.

        Args:
            got: what was asked for, and `remedy`, for the message.
            tokens: that the model would see, new ones included.

        Raises:
            UsageError: the model has fewer positions.
        """
        if self.positions is not None and tokens > self.positions:
            expected = f"at most {self.positions} tokens, for which the model has positions"
            raise UsageError(got, expected=expected, remedy=remedy)
        if self.trained is not None and tokens > self.trained:
            console.label(
                "Warning:",
                "yellow",
                f" {got}: beyond the {self.trained} positions that the model is made for; bytes and speed are what "
                "they are, text would not be",
            )


def reach_of(config: Any) -> Reach:
    """The tokens that a model takes, found from its config; weights are not read.

    Args:
        config: of a causal language model.
    """
    text = config.get_text_config()
    said = next((value for name in NAMES if isinstance(value := getattr(text, name, None), int) and value > 0), None)
    positions = None if getattr(text, "rope_parameters", None) else _slots(text)
    return Reach(positions, None if has_position_biases(text) else said)


def has_position_biases(text: Any) -> bool:
    """Whether a text config's model adds biases of positions to its attention logits (ALiBi)."""
    return bool(getattr(text, "alibi", False)) or text.model_type in ("bloom", "mpt")


def _slots(config: Any) -> int | None:
    """Positions that a model of this config holds; None where it computes them."""
    try:
        with torch.device("meta"):
            return position_slots(AutoModelForCausalLM.from_config(copy.deepcopy(config)))
    except Exception:  # classes of any model's code; loading the model says what is wrong with it
        return None
