"""What caches are filled with where only their bytes are measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clla.evaluate.memory import measured_bytes
from clla.evaluate.perplexity import Subject


@pytest.mark.parametrize("text", [None, torch.tensor([7, 8, 9])])
def test_text_begins_again_where_it_ends(text: torch.Tensor | None) -> None:
    """Two contexts from one filling, in chunks; an entropy code must not be shown the same token all along."""
    seen: list[int] = []
    cache = SimpleNamespace(nbytes=0)

    def model(input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> None:
        assert position_ids[0].tolist() == list(range(len(seen), len(seen) + input_ids.shape[1]))
        seen.extend(input_ids[0].tolist())
        cache.nbytes += 10 * input_ids.shape[1]

    subject: Any = Subject(model, lambda: cache)  # type: ignore[arg-type]
    assert measured_bytes(subject, [8, 5], chunk=3, device=torch.device("cpu"), text=text) == {5: 50, 8: 80}
    assert seen == ([1] * 8 if text is None else [7, 8, 9, 7, 8, 9, 7, 8])
