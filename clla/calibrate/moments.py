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
    """Mean and second moments E[w a_l b_(l+j)ᵀ] for all layers l and offsets 0 <= j < `band`, weights w of mean 1.

    Products are formed and summed in fp32 on the data's device, one for each layer with all of its neighbours, and
    folded into fp64 every `FOLD` batches, around a shift (the first batch's mean), so that centring afterwards does
    not cancel. Rows carry √w as one more value: its products are the sums that centring needs. Of a layer with itself
    only blocks on and above the diagonal are formed.

    Args:
        num_layers: L.
        left_dim: width of the left factor; the right factor's width is `right_dim` (default the same).
        band: K, how many following layers each layer is paired with (itself included).
    """

    def __init__(self, num_layers: int, left_dim: int, *, band: int, right_dim: int | None = None) -> None:
        self.band, self.count = band, 0
        self._shift: tuple[Tensor, Tensor] | None = None  # [L, n_left] and [L, n_right]
        self._products = torch.zeros(num_layers, band, left_dim + 1, (right_dim or left_dim) + 1, dtype=torch.float64)
        self._fresh: Tensor | None = None  # [L, n_left + 1, K·(n_right + 1)] in fp32, not folded yet
        self._waiting = 0  # batches in it
        self._square = True  # left and right are the same

    def add(
        self, left: Sequence[Tensor], right: Sequence[Tensor] | None = None, *, weights: Tensor | None = None
    ) -> None:
        """Fold in one batch.

        Args:
            left: [N, n_left] of each layer.
            right: [N, n_right]; by default `left`.
            weights: w [N] of the rows, in any unit; by default 1.
        """
        self._square = right is None
        if self._shift is None:
            means = [
                torch.stack([x.float().mean(0) for x in rows]) for rows in (left, left if right is None else right)
            ]
            self._shift = (means[0], means[1])
        roots = None if weights is None else weights.to(self._shift[0]).sqrt()
        rows = around(left, self._shift[0], roots)  # [N, L·(n + 1)]
        others = rows if right is None else around(right, self._shift[1], roots)
        self.count += len(rows)
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
        layers, _, n, m = self._products.shape
        own = self._shift or (torch.zeros(layers, n - 1), torch.zeros(layers, m - 1))
        common = tuple(broadcast(shift.to(device, torch.float32).contiguous()).cpu() for shift in own)
        left, right = (a.double().cpu() - b.double() for a, b in zip(own, common, strict=True))
        for j in range(self.band):
            self._products[: max(layers - j, 0), j] = self._moved(j, left, right)
        self._shift = (common[0], common[1])
        self.count = int(_sum(torch.tensor(self.count), device))
        for total in self._products:
            total.copy_(_sum(total, device))

    def _moved(self, j: int, left: Tensor, right: Tensor) -> Tensor:
        """Products of layers l and l + j, had `left` [L, n_left] and `right` [L, n_right] been added to the rows."""
        count = max(len(left) - j, 0)
        out = self._products[:count, j].clone()
        out[:, :-1] += left[:count, :, None] * out[:, -1:]
        out[:, :, :-1] += out[:, :, -1:] * right[j:, None, :]
        return out

    @property
    def total(self) -> float:
        """Sum of the weights."""
        self._fold()
        return float(self._products[0, 0, -1, -1])

    def _means(self) -> tuple[Tensor, Tensor]:
        """Weighted means of left [L, n_left] and right [L, n_right], less the shifts."""
        return self._products[:, 0, :-1, -1] / self.total, self._products[:, 0, -1, :-1] / self.total

    def mean(self) -> Tensor:
        """Weighted mean of the left factor, [L, n_left], fp32."""
        assert self._shift is not None, "no data was added"
        self._fold()
        return (self._means()[0] + self._shift[0].double().cpu()).float()

    def covariance(self) -> Tensor:
        """Centred moments, weights of mean 1, [L, K, n_left, n_right], fp32; pairs beyond the last layer are zero."""
        self._fold()
        left, right = self._means()
        return self._scaled(-left, -right)

    def second_moment(self) -> Tensor:
        """Moments around zero, weights of mean 1, [L, K, n_left, n_right], fp32."""
        assert self._shift is not None, "no data was added"
        self._fold()
        left, right = (shift.double().cpu() for shift in self._shift)
        return self._scaled(left, right)

    def _scaled(self, left: Tensor, right: Tensor) -> Tensor:
        """Moments of rows to which `left` and `right` were added, of weights of mean 1."""
        layers, band, n, m = self._products.shape
        out = torch.zeros(layers, band, n - 1, m - 1)
        for j in range(min(band, layers)):
            out[: layers - j, j] = (self._moved(j, left, right)[:, :-1, :-1] / self.total).float()
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


def around(layers: Sequence[Tensor], shift: Tensor, roots: Tensor | None = None) -> Tensor:
    """Rows √w·[y - shift, 1] of all layers side by side, [N, L·(n + 1)], in fp32, on the shift's device.

    Args:
        layers: y [N, n] of each.
        shift: [L, n].
        roots: √w [N]; None for ones.
    """
    count, n = shift.shape
    out = torch.empty(len(layers[0]), count, n + 1, device=shift.device)
    for number, rows in enumerate(layers):
        torch.sub(rows.to(shift.device), shift[number], out=out[:, number, :n])
    out[..., n] = 1
    if roots is not None:
        out *= roots[:, None, None]
    return out.flatten(1)


def _strips(n: int) -> list[tuple[int, int]]:
    """First and last row of strips of a square product."""
    size = -(-n // STRIPS)
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def _sum(value: Tensor, device: torch.device) -> Tensor:
    return reduce(value.to(device), reduction="sum").cpu()
