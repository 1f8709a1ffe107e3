"""Pipeline parallelism: which layer groups a rank has.

The layers of a group share latents, so a cut between two ranks must not go through a group. Each rank keeps the latents
of its own groups in a store of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clla.errors import CllaError, UnsupportedModelError, UsageError
from clla.modeling.quantize_clla import layout_of

VARIABLE = "VLLM_PP_LAYER_PARTITION"


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank has of a model.

    Attributes:
        rank: its number.
        groups: numbers of its layer groups.
        config: the checkpoint's `CllaConfig`, with these groups alone.
        layers: how many layers on latents each rank has.
        row_bytes: of a token's latents in the pages of every rank: the most that one rank has.
    """

    rank: int
    groups: list[int]
    config: Any
    layers: list[int]
    row_bytes: int

    @staticmethod
    def of(config: Any, rank: int, ranks: int) -> Stage:
        """Stage of a rank.

        Rows are as long on each rank as on the one with most. It costs no block: the engine gives all ranks as many as
        fit where they are largest. Of stores that differ it would take each layer's exact pages for a kind of its own.
        """
        specs = config.spec.groups
        partition = engine_partition(config.text_config.num_hidden_layers, ranks)
        owned = groups_of_ranks([spec.layers for spec in specs], partition)
        layers = [sum(len(specs[i].layers) for i in own) for own in owned]
        rows = [sum(layout_of(specs[i]).row_bytes for i in own) for own in owned]
        part = copy.copy(config)
        part.clla = {**config.clla, "groups": [config.clla["groups"][i] for i in owned[rank]]}
        return Stage(rank, owned[rank], part, layers, max(rows))

    def own_weight(self, name: str) -> str | None:
        """Name in the codec of this rank of a weight `groups.N.…` of the checkpoint's; None where it has no use."""
        prefix, number, rest = name.split(".", 2)
        return f"{prefix}.{self.groups.index(int(number))}.{rest}" if int(number) in self.groups else None


def engine_partition(layers: int, ranks: int) -> list[int]:
    """Layers of each rank, as the engine divides them.

    Raises:
        ValueError: the engine cannot make sense of `VLLM_PP_LAYER_PARTITION`.
    """
    from vllm.distributed.utils import get_pp_indices

    bounds = [get_pp_indices(layers, rank, ranks) for rank in range(ranks)]
    return [stop - start for start, stop in bounds]


def groups_of_ranks(groups: Sequence[Sequence[int]], partition: Sequence[int]) -> list[list[int]]:
    """Numbers of the groups that lie wholly in each rank's layers."""
    found, start = [], 0
    for count in partition:
        own = range(start, start + count)
        found.append([i for i, layers in enumerate(groups) if all(layer in own for layer in layers)])
        start += count
    return found


def even_partition(groups: Sequence[Sequence[int]], ranks: int) -> list[int] | None:
    """Layers of each rank, as even as they can be without splitting a group; None with fewer groups than ranks.

    Least sum of squares; of equal ones, that with fewer layers for the last ranks, which compute the logits.

    Args:
        groups: layers of each; together 0 to L - 1.
        ranks: of the pipeline.
    """
    count = sum(len(layers) for layers in groups)
    bounds = [0, *(c for c in range(1, count) if all(max(g) < c or min(g) >= c for g in groups)), count]
    # best[i]: cost, and where the ranks so far end, of the layers before bounds[i].
    best: dict[int, tuple[int, list[int]]] = {0: (0, [0])}
    for _ in range(ranks):
        best = {
            stop: min(
                ((best[i][0] + (bounds[stop] - bounds[i]) ** 2, [*best[i][1], bounds[stop]]) for i in best if i < stop),
                key=lambda found: (found[0], [-end for end in found[1]]),
            )
            for stop in range(1, len(bounds))
            if any(i < stop for i in best)
        }
    last = best.get(len(bounds) - 1)
    return None if last is None else [stop - start for start, stop in pairwise(last[1])]


def check_stages(config: Any) -> None:
    """Refuse pipeline ranks that the cache cannot live with.

    Args:
        config: the engine's `VllmConfig`.

    Raises:
        CllaError: with a partition that works where there is one.
    """
    model, ranks = config.model_config, config.parallel_config.pipeline_parallel_size
    if ranks == 1:
        return
    text, groups = model.hf_config.text_config, [group.layers for group in model.hf_config.spec.groups]
    _check_engine_stages(config, text)
    problem = _problem(groups, text.num_hidden_layers, ranks)
    if problem is None:
        return
    even = even_partition(groups, ranks)
    if even is None:
        raise UsageError(
            f"--pipeline-parallel-size {ranks} does not fit the checkpoint's {len(groups)} layer groups",
            expected="at least one whole layer group for each rank",
            remedy="use fewer ranks, or --tensor-parallel-size",
        )
    raise UsageError(
        problem,
        expected="cuts between layer groups, whose layers share latents",
        remedy=f"set {VARIABLE}={','.join(map(str, even))}",
    )


def _problem(groups: Sequence[Sequence[int]], layers: int, ranks: int) -> str | None:
    """What is wrong with the layers that the engine gives to each rank."""
    try:
        partition = engine_partition(layers, ranks)
    except ValueError as error:
        return f"{VARIABLE}: {error}"
    given = ",".join(map(str, partition))
    if min(partition) < 1:
        return f"{VARIABLE}={given} leaves a rank without layers"
    owned = {i for own in groups_of_ranks(groups, partition) for i in own}
    cut = [f"{min(group)} to {max(group)}" for i, group in enumerate(groups) if i not in owned]
    return f"{ranks} pipeline ranks with {given} layers split a layer group (layers {', '.join(cut)})" if cut else None


def _check_engine_stages(config: Any, text: Any) -> None:
    """Refuse what the engine itself cannot do with several pipeline ranks."""
    from vllm import ModelRegistry
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    model = config.model_config
    names = text.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]  # as the engine chooses it
    if not ModelRegistry.is_pp_supported_model(names, model):
        raise UnsupportedModelError(
            f"vLLM: pipeline parallelism is not supported for {names[0]}",
            expected="a source whose class in vLLM implements the `SupportsPP` interface",
            remedy="leave --pipeline-parallel-size out, or use --tensor-parallel-size",
        )
    eager = model.enforce_eager or config.compilation_config.mode == CompilationMode.NONE
    if eager and current_platform.is_cpu() and not config.use_v2_model_runner:
        # Buffers of what comes from the rank before are made in a trial run, which is left out then (any model).
        raise CllaError(
            "on a CPU this version of vLLM computes nothing with --pipeline-parallel-size and without compilation",
            expected="compilation of some kind",
            remedy='replace --enforce-eager by --compilation-config \'{"backend": "eager"}\'',
        )
