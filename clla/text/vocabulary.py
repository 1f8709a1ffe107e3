"""Whether a model has an embedding for every token that its tokenizer makes of a text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clla.errors import CllaError


def check_tokens(ids: Tensor, vocab_size: int, tokenizer: Any) -> None:
    """Refuse a text with tokens that the model does not know; an unused one, such as added padding, does no harm.

    Args:
        ids: of the text.
        vocab_size: rows of the embedding.
        tokenizer: that made them.

    Raises:
        CllaError: an id is `vocab_size` or above.
    """
    if not ids.numel() or (largest := int(ids.max())) < vocab_size:
        return
    raise CllaError(
        f"the tokenizer makes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) of the text, the model's "
        f"embedding has {vocab_size} rows",
        expected="the tokenizer that the model was trained with",
        remedy="remove the added tokens from the tokenizer's files, or save the model after "
        "model.resize_token_embeddings(len(tokenizer))",
    )
