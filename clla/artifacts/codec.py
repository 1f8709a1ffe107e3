"""A codec: the encoders and decoders of a plan's layer groups.

Shape legend: L convertible layers, K band (largest group size), n = 2·H_kv·d values per token and layer,
q coordinates in which their moments are kept (n, or fewer for wide models), h hidden size, r rank of a layer group's
latent, H_q query heads, F rotary pairs of a head, p components of a layer group's rotary key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clla.storage.files import damaged, load_tensors, save_tensors, tensors_of


@dataclass(frozen=True)
class GroupCodec:
    """Linear encoder and decoder of one layer group, latents of unit variance, sorted by importance.

    Attributes:
        encoder: [r, n·|G|] from the group's keys and values, or [r, h] from the attention's input.
        offset: [n·|G|] or [h], subtracted before encoding.
        decoder: [|G|, n, r].
        mean: [|G|, n], added after decoding.
        rope_encoder: [p, h], the rotary key from the attention's input; this and the next two only where keys are
            decoupled. The decoder's keys are then the position-free parts.
        rope_mean: [p], added to it.
        rope_query: [|G|, H, p/2, 2], complex factors by which a query's pair answers each pair of the rotary key.
    """

    encoder: Tensor
    offset: Tensor
    decoder: Tensor
    mean: Tensor
    rope_encoder: Tensor | None = None
    rope_mean: Tensor | None = None
    rope_query: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return tensors_of(self)


@dataclass(frozen=True)
class Codec:
    """Encoders and decoders of all layer groups, in the plan's order.

    Attributes:
        groups: of the plan.
        made_from: hash of the stats and settings.
        predicted_kl: nats per token, by second order; what is measured was six to fourteen times that.
        outlook: spectra and the loss at other budgets (`clla.plan.frontier`), for reports; empty if not computed.
    """

    groups: tuple[GroupCodec, ...]
    made_from: str
    predicted_kl: float = 0.0
    outlook: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Flat names as in the converted model's state dict: `groups.I.encoder` and so on."""
        return {f"groups.{i}.{k}": v for i, group in enumerate(self.groups) for k, v in group.tensors().items()}

    def save(self, path: Path) -> None:
        meta = {
            "made_from": self.made_from,
            "predicted_kl": self.predicted_kl,
            "outlook": self.outlook,
            "groups": len(self.groups),
        }
        save_tensors(path, self.tensors(), "codec", meta)

    @classmethod
    def load(cls, path: Path) -> Codec:
        tensors, meta = load_tensors(path, "codec")
        try:
            groups = tuple(
                GroupCodec(**{k.split(".", 2)[2]: v for k, v in tensors.items() if k.startswith(f"groups.{i}.")})
                for i in range(meta.pop("groups"))
            )
        except (KeyError, TypeError) as error:
            raise damaged(path, f"no whole codec: {error}") from error
        return cls(groups=groups, **meta)
