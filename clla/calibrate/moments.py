"""Streaming second moments of neighbouring layers.

Shape legend: N tokens, L layers, n values a token and layer (keys and values), K band width.
"""

from __future__ import annotations

import torch
from accelerate.utils import broadcast, reduce
from torch import Tensor


class BandedMoments:
    """Mean and second moments E[a_l b_(l+j)ᵀ] for all layers l and offsets 0 <= j < `band`.

    Products are formed in fp32 on the data's device and folded into fp64, around a shift (the first
    batch's mean), so that centring afterwards does not cancel.

    Args:
        num_layers: L.
        left_dim: width of the left factor; the right factor's width is `right_dim` (default the same).
        band: K, how many following layers each layer is paired with (itself included).
    """

    def __init__(self, num_layers: int, left_dim: int, *, band: int, right_dim: int | None = None) -> None:
        right_dim = right_dim or left_dim
        self.band = band
        self.count = 0
        self._shift: tuple[Tensor, Tensor] | None = None
        self._sum_left = torch.zeros(num_layers, left_dim, dtype=torch.float64)
        self._sum_right = torch.zeros(num_layers, right_dim, dtype=torch.float64)
        self._products = torch.zeros(num_layers, band, left_dim, right_dim, dtype=torch.float64)

    def add(self, left: Tensor, right: Tensor | None = None) -> None:
        """Fold in one batch: `left` [L, N, n_left], `right` [L, N, n_right] (default: `left`)."""
        left = left.float()
        right = left if right is None else right.float()
        if self._shift is None:
            self._shift = (left.mean(1, keepdim=True), right.mean(1, keepdim=True))
        left, right = left - self._shift[0], right - self._shift[1]
        self.count += left.shape[1]
        self._sum_left += left.sum(1).double().cpu()
        self._sum_right += right.sum(1).double().cpu()
        for j in range(min(self.band, len(left))):
            stop = len(left) - j
            self._products[:stop, j] += torch.bmm(left[:stop].mT, right[j:]).cpu()  # [L-j, n, n]

    def join(self, device: torch.device) -> None:
        """Add up the sums of all processes of `torch.distributed`, brought to the first one's shift; exact in fp64.

        Args:
            device: that the processes talk through.
        """
        left_dim, right_dim = self._products.shape[2:]
        layers = len(self._products)
        shapes = ((layers, 1, left_dim), (layers, 1, right_dim))
        own = self._shift or tuple(torch.zeros(shape) for shape in shapes)
        common = tuple(broadcast(shift.to(device, torch.float32).contiguous()).cpu() for shift in own)
        left, right = ((a.double().cpu() - b.double())[:, 0] for a, b in zip(own, common, strict=True))
        for j in range(self.band):
            stop = max(layers - j, 0)
            a, b = left[:stop, :, None], right[j:, None, :]
            self._products[:stop, j] += (
                self._sum_left[:stop, :, None] * b + a * self._sum_right[j:, None, :] + self.count * a * b
            )
        self._sum_left += self.count * left
        self._sum_right += self.count * right
        self._shift = (common[0], common[1])
        self.count = int(_sum(torch.tensor(self.count), device))
        for total in (self._sum_left, self._sum_right, *self._products):
            total.copy_(_sum(total, device))

    def mean(self) -> Tensor:
        """Mean of the left factor, [L, n_left], fp32."""
        assert self._shift is not None, "no data was added"
        return (self._sum_left / self.count + self._shift[0][:, 0].double().cpu()).float()

    def covariance(self) -> Tensor:
        """Centred moments, [L, K, n_left, n_right], fp32; pairs beyond the last layer are zero."""
        left, right = self._sum_left / self.count, self._sum_right / self.count
        out = torch.empty(self._products.shape, dtype=torch.float32)
        for j in range(self.band):
            stop = max(len(left) - j, 0)
            out[:stop, j] = (self._products[:stop, j] / self.count - left[:stop, :, None] * right[j:, None, :]).float()
            out[stop:, j] = 0
        return out

    def second_moment(self) -> Tensor:
        """Moments around zero, [L, K, n_left, n_right], fp32."""
        assert self._shift is not None, "no data was added"
        left = self.mean()
        right = (self._sum_right / self.count + self._shift[1][:, 0].double().cpu()).float()
        out = self.covariance()
        for j in range(self.band):
            stop = max(len(left) - j, 0)
            out[:stop, j] += left[:stop, :, None] * right[j:, None, :]
        return out


def _sum(value: Tensor, device: torch.device) -> Tensor:
    return reduce(value.to(device), reduction="sum").cpu()
