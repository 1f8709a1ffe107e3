"""Long inputs in chunks: the decoder of a model runs once per chunk, everything around it once.

What a model makes of its decoder's outputs (logits, losses, those of routers included) is thus its own doing, as
over one forward pass. Hooks on the decoder do it: before the call that has all tokens the earlier chunks run, that
call gets the last chunk, and afterwards the outputs of all chunks are joined.

Shape legend: B sequences, T tokens, t tokens of a chunk, H heads, S keys, h hidden size, E experts.
"""

import inspect
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional

import torch
from torch import Tensor

from .hooks_clla import CACHE


class Chunks:
    """One call of a model, cut into chunks.

    Args:
        cache: that the call goes through.
        spans: first and last token of each chunk, the last one not included.
        begin: announces a chunk to the cache; returns the keywords of the decoder that belong to the chunk.
        end: called after each chunk but the last.
        keep: number of the first token whose final hidden state is wanted.
    """

    def __init__(
        self,
        cache: Any,
        spans: "list[tuple[int, int]]",
        begin: "Callable[[int, int], dict[str, Any]]",
        end: "Callable[[], None]",
        keep: int,
    ) -> None:
        self.cache, self.spans, self._begin, self._end, self._keep = cache, spans, begin, end, keep
        self._parts: "list[dict[str, Any]]" = []
        self._running = self._finished = False

    @contextmanager
    def running(self) -> "Iterator[None]":
        """Within it the hooks `cut` and `joined` of a decoder cut its call into these chunks.

        Raises:
            ValueError: the model did not call its decoder, so that nothing was cut.
        """
        self.cache.chunks = self
        try:
            yield
        finally:
            self.cache.chunks = None
        if not self._finished:
            raise ValueError(
                f"this model does not run its decoder as others do: pass at most {self.spans[0][1]} tokens at once"
            )

    def before(self, module: Any, named: "dict[str, Any]") -> "Optional[dict[str, Any]]":
        """Run all chunks but the last; keywords of the last. None within, where a call is one of a chunk."""
        if self._parts or self._running:
            return None
        self._running = True
        for span in self.spans[:-1]:
            self._keep_part(module(**self._part(named, span)), span)
            self._end()
        self._running = False
        return self._part(named, self.spans[-1])

    def after(self, output: Any) -> Any:
        """The outputs of all chunks joined, those of the last one given. None within."""
        if self._running or self._finished:
            return None
        self._keep_part(output, self.spans[-1])
        self._finished = True
        return type(output)(**{name: self._joined(name) for name in self._parts[-1]})

    def _part(self, named: "dict[str, Any]", span: "tuple[int, int]") -> "dict[str, Any]":
        count = self.spans[-1][1]
        cut = {
            name: value[:, slice(*span)]
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == count
            else value
            for name, value in named.items()
        }
        return {**cut, **self._begin(*span)}

    def _keep_part(self, output: Any, span: "tuple[int, int]") -> None:
        part = dict(output.items())
        if span[1] <= self._keep:
            part["last_hidden_state"] = part["last_hidden_state"][:, :0]
        self._parts.append(part)

    def _joined(self, name: str) -> Any:
        values = [part[name] for part in self._parts]
        if values[-1] is None or name == CACHE:
            return values[-1]
        if name == "last_hidden_state":
            return torch.cat(values, dim=1)
        join = self._joined_attention if name == "attentions" else self._joined_tokens
        if isinstance(values[-1], Tensor):
            return join(name, values)
        return tuple(None if layer[-1] is None else join(name, layer) for layer in zip(*values, strict=True))

    def _joined_tokens(self, name: str, parts: Any) -> Tensor:
        """[…, t, x] or [B·t, E] of each chunk joined along the tokens."""
        sizes, batch = [stop - start for start, stop in self.spans], self._parts[-1]["last_hidden_state"].shape[0]
        shapes = list(zip(parts, sizes, strict=True))
        if all(part.dim() > 2 and part.shape[-2] == size for part, size in shapes):
            return torch.cat(parts, dim=-2)
        if all(part.dim() == 2 and part.shape[0] == batch * size for part, size in shapes):
            return torch.cat([part.unflatten(0, (batch, -1)) for part in parts], dim=1).flatten(0, 1)
        raise ValueError(f"{name} of this model cannot be joined over chunks: pass at most {sizes[0]} tokens at once")

    def _joined_attention(self, name: str, parts: Any) -> Tensor:
        """[B, H, T, S] of weights [B, H, t, …] per chunk: a token gives none to keys that its chunk did not see."""
        (_, first), (_, count) = self.spans[0], self.spans[-1]
        past = parts[0].shape[-1] - first  # keys from before this call; of sliding layers there are fewer
        rows = []
        for part, (_, stop) in zip(parts, self.spans, strict=True):
            rows.append(torch.nn.functional.pad(part, (past + stop - part.shape[-1], count - stop)))
        return torch.cat(rows, dim=-2)


def cut(module: Any, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> "Optional[tuple[Any, Any]]":
    """Forward pre-hook (with keywords) of a decoder."""
    chunks = getattr(kwargs.get(CACHE), "chunks", None)
    if chunks is None:
        return None
    signature = inspect.signature(module.forward)
    named: "dict[str, Any]" = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        named.update(value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    last = chunks.before(module, named)
    return None if last is None else ((), last)


def joined(module: Any, args: "tuple[Any, ...]", kwargs: "dict[str, Any]", output: Any) -> Any:
    """Forward hook (with keywords) of the same decoder."""
    chunks = getattr(kwargs.get(CACHE), "chunks", None)
    return None if chunks is None else chunks.after(output)
