"""What methods are built from, and what a builder gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from clla.artifacts.codec import Codec
from clla.artifacts.plan import Plan
from clla.artifacts.stats import Stats
from clla.checkpoint.assemble import attach, clla_block
from clla.convert.factor import make_codec
from clla.errors import UsageError
from clla.evaluate.perplexity import Subject
from clla.plan.budget import Budget
from clla.plan.make import make_plan
from clla.plan.metrics import weigh
from clla.plan.spectra import Spectra
from clla.recipe import Recipe
from clla.source.model import Source

SINKS = 4
BYTES_CHUNK = 2048  # tokens per call where only bytes are measured, which do not depend on it


@dataclass(frozen=True)
class Setting:
    """One setting of a method, or why there is none.

    Attributes:
        name: in the method's terms.
        subject: ready to run; None where the setting is left out.
        why_not: the reason, where it is left out.
    """

    name: str
    subject: Subject | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Bench:
    """What methods are built from.

    Attributes:
        source: the model's description.
        model: loaded.
        tokenizer: the source's.
        rope: how the model rotates its keys.
        stats: our own method's moments.
        plain: moments in which all tokens count alike, with those of inputs, for others.
        recipe: resolved; plan settings of our own method.
        sequences: calibration text in sequences [1, T] of a length T.
        context: tokens at which budgets hold and quality is measured.
        long_context: tokens at which bytes are measured too.
        chunk: tokens per forward pass.
        thorough: all variants of a method, not only its main ones.
    """

    source: Source
    model: PreTrainedModel
    tokenizer: Any
    rope: dict[str, Any] | None
    stats: Stats
    plain: Stats
    recipe: Recipe
    sequences: Callable[[int], Iterator[Tensor]]
    context: int
    long_context: int
    chunk: int
    thorough: bool = True

    @cached_property
    def _spectra(self) -> dict[tuple[str, float, str], Spectra]:
        return {}

    def spectra(self, recipe: Recipe) -> Spectra:
        """Weighted moments, the same for every budget and bit width."""
        key = (recipe.plan.metric, recipe.plan.metric_power, recipe.plan.source)
        if key not in self._spectra:
            self._spectra[key] = weigh(self.stats_for(recipe), recipe)
        return self._spectra[key]

    def stats_for(self, recipe: Recipe) -> Stats:
        """The moments that a recipe's method takes."""
        return self.stats if recipe.plan.metric == "fisher" else self.plain

    def converted(self, plan: Plan, codec: Codec) -> Subject:
        """The model running on a plan and codec."""
        plan = replace(plan, kept_layers=self.source.kept_layers, kept_window=self.source.kept_window)
        block = clla_block(
            plan,
            rope=self.rope,
            kv_dtype=self.source.dtype,
            prefill_chunk=max(self.chunk, BYTES_CHUNK),  # a call with fewer tokens is not cut
        )
        model = attach(self.model, codec, block)
        return Subject(model, model.new_cache)

    def planned(self, name: str, recipe: Recipe, budget: float, window: int) -> Setting:
        """A recipe's plan at a share of the source's bytes, running; left out where nothing remains for latents."""
        spectra, stats = self.spectra(recipe), self.stats_for(recipe)
        try:
            plan = make_plan(
                stats,
                recipe.plan,
                budget=Budget(budget * self.source.bytes_per_token, self.context, window, SINKS),
                kv_itemsize=self.source.dtype.itemsize,
                kept_layers=self.source.kept_layers,
                kept_window=self.source.kept_window,
                made_from="compare",
                spectra=spectra,
            )
        except UsageError as error:
            return Setting(name, why_not=error.got)
        return Setting(name, self.converted(plan, make_codec(spectra, plan, stats)))
