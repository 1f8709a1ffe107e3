"""Streaming second moments of neighbouring layers.

Shape legend: N tokens, L layers, n values per token and layer (keys and values), K band width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate.utils import broadcast, reduce
from torch import Tensor

FOLD = 16  # batches whose products are summed in fp32: the sum rounds no more than the products themselves do
STRIPS = 4  # in which products of a layer with itself are cut, so that most of their lower half is not formed


class BandedMoments:
    """Mean and second moments E[a_l b_(l+j)ᵀ] for all layers l and offsets 0 <= j < `band`.

    Products are formed and summed in fp32 on the data's device, one for each layer with all of its neighbours, and
    folded into fp64 every `FOLD` batches, around a shift (the first batch's mean), so that centring afterwards does
    not cancel. Of a layer with itself only blocks on and above the diagonal are formed.

    Args:
        num_layers: L.
        left_dim: width of the left factor; the right factor's width is `right_dim` (default the same).
        band: K, how many following layers each layer is paired with (itself included).
    """

    def __init__(self, num_layers: int, left_dim: int, *, band: int, right_dim: int | None = None) -> None:
        right_dim = right_dim or left_dim
        self.band = band
        self.count = 0
        self._shift: tuple[Tensor, Tensor] | None = None  # [L, n_left] and [L, n_right]
        self._sum_left = torch.zeros(num_layers, left_dim, dtype=torch.float64)
        self._sum_right = torch.zeros(num_layers, right_dim, dtype=torch.float64)
        self._products = torch.zeros(num_layers, band, left_dim, right_dim, dtype=torch.float64)
        self._fresh: Tensor | None = None  # [L, n_left, K·n_right] in fp32, not folded yet
        self._waiting = 0  # batches in it
        self._square = True  # left and right are the same

    def add(self, left: Sequence[Tensor], right: Sequence[Tensor] | None = None) -> None:
        """Fold in one batch: for each layer `left` [N, n_left] and `right` [N, n_right] (default: `left`)."""
        self._square = right is None
        if self._shift is None:
            means = [
                torch.stack([x.float().mean(0) for x in rows]) for rows in (left, left if right is None else right)
            ]
            self._shift = (means[0], means[1])
        rows = around(left, self._shift[0])  # [N, L·n]
        others = rows if right is None else around(right, self._shift[1])
        self.count += len(rows)
        self._sum_left += _layer_sums(rows, self._sum_left)
        self._sum_right += _layer_sums(others, self._sum_right)
        self._multiply(rows, others)
        self._waiting += 1
        if self._waiting == FOLD:
            self._fold()

    def _multiply(self, rows: Tensor, others: Tensor) -> None:
        layers, band, n, m = self._products.shape
        if self._fresh is None:
            self._fresh = torch.zeros(layers, n, band * m, device=rows.device)
        for layer in range(layers):
            reach = m * min(band, layers - layer)
            for start, stop in _strips(n) if self._square else [(0, n)]:
                skipped = start if self._square else 0
                self._fresh[layer, start:stop, skipped:reach].addmm_(
                    rows[:, layer * n + start : layer * n + stop].mT, others[:, layer * m + skipped : layer * m + reach]
                )

    def _fold(self) -> None:
        """Bring what was summed in fp32 into the sums in fp64."""
        if self._fresh is None or not self._waiting:
            return
        layers, band, n, m = self._products.shape
        if self._square:
            for start, stop in _strips(n):
                self._fresh[:, stop:, start:stop] = self._fresh[:, start:stop, stop:n].mT
        for layer in range(layers):
            self._products[layer] += self._fresh[layer].unflatten(1, (band, m)).transpose(0, 1).cpu()
        self._fresh.zero_()
        self._waiting = 0

    def join(self, device: torch.device) -> None:
        """Add up the sums of all processes of `torch.distributed`, brought to the first one's shift; exact in fp64.

        Args:
            device: that the processes talk through.
        """
        self._fold()
        layers = len(self._products)
        own = self._shift or tuple(torch.zeros(total.shape) for total in (self._sum_left, self._sum_right))
        common = tuple(broadcast(shift.to(device, torch.float32).contiguous()).cpu() for shift in own)
        left, right = (a.double().cpu() - b.double() for a, b in zip(own, common, strict=True))
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
        return (self._sum_left / self.count + self._shift[0].double().cpu()).float()

    def covariance(self) -> Tensor:
        """Centred moments, [L, K, n_left, n_right], fp32; pairs beyond the last layer are zero."""
        self._fold()
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
        right = (self._sum_right / self.count + self._shift[1].double().cpu()).float()
        out = self.covariance()
        for j in range(self.band):
            stop = max(len(left) - j, 0)
            out[:stop, j] += left[:stop, :, None] * right[j:, None, :]
        return out


def folded_product(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum over batches of aᵀb [n, m] in fp64, from pairs a [N, n], b [N, m]; formed as in `BandedMoments`."""
    total, fresh = None, None
    for number, (a, b) in enumerate(pairs):
        fresh = a.mT @ b if fresh is None else fresh.addmm_(a.mT, b)
        if number % FOLD == FOLD - 1:
            total, fresh = fresh.double() if total is None else total.add_(fresh), None
    if fresh is not None:
        total = fresh.double() if total is None else total.add_(fresh)
    assert total is not None, "there is no batch"
    return total


def around(layers: Sequence[Tensor], shift: Tensor) -> Tensor:
    """Rows of all layers side by side, [N, L·n], in fp32, less `shift` [L, n]; on the shift's device."""
    out = torch.empty(len(layers[0]), *shift.shape, device=shift.device)
    for number, rows in enumerate(layers):
        torch.sub(rows.to(shift.device), shift[number], out=out[:, number])
    return out.flatten(1)


def _layer_sums(rows: Tensor, like: Tensor) -> Tensor:
    return rows.sum(0).double().cpu().view(like.shape)


def _strips(n: int) -> list[tuple[int, int]]:
    """First and last row of strips of a square product."""
    size = -(-n // STRIPS)
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def _sum(value: Tensor, device: torch.device) -> Tensor:
    return reduce(value.to(device), reduction="sum").cpu()
