"""Statistics of a model's keys and values, from which plans are made.

Shape legend: L convertible layers, K band (largest group size), n = 2·H_kv·d values per token and layer,
q coordinates in which their moments are kept (n, or fewer for wide models), h hidden size, r rank of a layer group's
latent, H_q query heads, F rotary pairs of a head, p components of a layer group's rotary key.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from clla.artifacts.plan import KVShape
from clla.storage.files import damaged, load_tensors, save_tensors, tensors_of


@dataclass(frozen=True)
class Stats:
    """Second moments and Fisher metric of keys (before RoPE) and values, per convertible layer.

    Attributes:
        layers: indices of the L convertible layers in the model.
        kv: what each of them caches.
        tokens: positions that went into the moments.
        mean: [L, n], E[w y], weights w of tokens of mean 1.
        covariance: [L, K, q, q], centred, of layers l and l + j, E[w y_l y_l+jᵀ].
        fisher: [L, q, q], E[g gᵀ/w] with g the gradient of the summed token loss as queries at least `window` tokens
            away read.
        input_mean: [L, h] of the attention's input; with the next two only for the `first` source.
        input_covariance: [L, h, h].
        input_cross: [L, K, h, q], centred, of layer l's input with layer l + j's keys and values.
        reading: [L, q, n]: the coordinates are reading·(y - mean). None where they are y itself.
        writing: [L, n, q]: y is mean + writing·coordinates, but for what the coordinates lack.
        dropped: [L] nats per token that this costs, by second order.
        query_power: [L, H_q, F], E|q|² of rotary pairs; with the next two only for the `decoupled` key.
        frequencies: [L, F], radians that a token further turns a pair by; 0 in layers that do not rotate.
        rotary_channels: [F, 2], channels of a head that make up a pair.
        made_from: hash of source, data and settings.
        window: W of `fisher`; 0 where all queries count. Collected without gradients, `fisher` is I and all weights 1.
    """

    layers: tuple[int, ...]
    kv: KVShape
    tokens: int
    mean: Tensor
    covariance: Tensor
    fisher: Tensor
    made_from: str
    window: int = 0
    input_mean: Tensor | None = None
    input_covariance: Tensor | None = None
    input_cross: Tensor | None = None
    reading: Tensor | None = None
    writing: Tensor | None = None
    dropped: Tensor | None = None
    query_power: Tensor | None = None
    frequencies: Tensor | None = None
    rotary_channels: Tensor | None = None

    @property
    def width(self) -> int:
        """q."""
        return self.fisher.shape[-1]

    @property
    def reduction(self) -> dict[str, float] | None:
        """In how many coordinates the moments are kept, of how many values, and nats per token lost; None if whole."""
        if self.dropped is None:
            return None
        return {"coordinates": self.width, "of": self.kv.values, "kl": float(self.dropped.sum())}

    def save(self, path: Path) -> None:
        meta = {"layers": self.layers, "kv": asdict(self.kv), "tokens": self.tokens, "made_from": self.made_from,
                "window": self.window}  # fmt: skip
        save_tensors(path, tensors_of(self), "stats", meta)

    @classmethod
    def load(cls, path: Path) -> Stats:
        tensors, meta = load_tensors(path, "stats")
        try:
            meta["layers"], meta["kv"] = tuple(meta["layers"]), KVShape(**meta["kv"])
            return cls(**{**meta, **tensors})
        except (KeyError, TypeError) as error:
            raise damaged(path, f"no valid stats: {error}") from error
