"""Packed rows of one layer group as a forward pass reads them, and the memory that it computes in.

Shape legend: B sequences, H key-value heads, M query rows per key-value head, K rows, t rows of a block, r rank,
N bytes per row.
"""

import math
from typing import Any, Iterator, Optional

import torch
from torch import Tensor, __version__, nn

from .quantize_clla import Layout
from .triton_clla import on_gpu
from .unpack_triton_clla import unpacked

BLOCK = 4096  # rows unpacked at once
TILE = 16  # rows of a product that a CPU's matrix unit takes at once
HELD_BYTES = 1 << 26  # unpacked latents up to this size stay for the other layers of their group
HELD_ON_GPU = 1 << 29  # likewise
PARTS = 8  # into which a GPU cuts rows for sums, which have too few lines to keep it busy otherwise
# Weights are summed up times this, so that fp16 can hold those of long texts, too: to 1e-9 in full precision.
WEIGHT_SCALE = 2.0**14
RELEASE = tuple(int(part) for part in __version__.split(".")[:2])
FP32_RESULTS = RELEASE >= (2, 8) and torch.version.hip is None  # of products of 16-bit numbers


def reading_mode() -> Any:
    """The mode in which latents are read: inference mode, which is faster, but which no compiler takes."""
    return torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode()


def full_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of three dimensions, in fp32; on a GPU 16-bit operands are not rounded in between."""
    return torch.bmm(a, b, out_dtype=torch.float32) if _kept_whole(a) else torch.bmm(a, b).float()


def _kept_whole(x: Tensor) -> bool:
    return FP32_RESULTS and x.is_cuda and x.itemsize == 2


class Workspace:
    """Memory that every forward pass writes again: allocating it each time would cost as much as the computation in it.

    Nothing is read from it after its pass, at whose end it is released. It grows to unpacked latents of one group (at
    most `HELD_BYTES`, or `HELD_ON_GPU`).
    """

    def __init__(self) -> None:
        self._held: "dict[str, Tensor]" = {}
        self.owner: Any = None  # whose latents are in it, and how many components of them

    def take(self, name: str, shape: "tuple[int, ...]", dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor; what it holds is left from the last use."""
        size = math.prod(shape) * dtype.itemsize
        held = self._held.get(name)
        if held is None or len(held) < size or held.device != device:
            held = self._held[name] = torch.empty(size + size // 8, dtype=torch.uint8, device=device)
        return held[:size].view(dtype).view(shape)

    def release(self) -> None:
        """Let go of the rows that were unpacked; the memory stays."""
        self.owner = None


class PackedRows:
    """Rows of one layer group as the layers of one forward pass read them; new for each.

    Args:
        data: [B, K, N] uint8.
        layout: of a row.
        dtype: of what is computed, and of unpacked rows.
        hidden: [B], number of rows at the front that no query may see.
        used: [1], number of rows of `data` that hold a token; None for all.
        workspace: shared with other rows, if nobody else reads them at the same time.
    """

    def __init__(
        self,
        data: Tensor,
        layout: Layout,
        dtype: torch.dtype,
        hidden: Tensor,
        used: "Optional[Tensor]" = None,
        workspace: "Optional[Workspace]" = None,
    ) -> None:
        self.workspace = workspace or Workspace()
        self.parts = PARTS if on_gpu(data) else 1
        self.whole = self.parts  # unpacked rows are filled up to a multiple of it
        self.data, self.layout, self.dtype, self.hidden = data, layout, dtype, hidden.to(data.device)
        self.used = None if used is None else used.to(data.device)
        self.index: Optional[Tensor] = None
        self._unpacked: Optional[Tensor] = None

    @property
    def count(self) -> int:
        """Rows that are read."""
        return self.data.shape[1]

    def blocks(self, rank: "Optional[int]" = None) -> "Iterator[tuple[int, Tensor]]":
        """First row and what is in [B, t, r] of each block of rows; all at once where that is small enough to keep.

        With `rank` the first components alone, of rows that are always read so.
        """
        for start, latents in self.filled_blocks(rank):
            yield start, latents[:, : self.count - start]

    def filled_blocks(self, rank: "Optional[int]" = None) -> "Iterator[tuple[int, Tensor]]":
        """As `blocks`, zeros behind the last row up to a multiple of `whole`."""
        if (held := self._held(rank)) is not None:
            yield 0, held
            return
        most = BLOCK
        if on_gpu(self.data):  # of many sequences a block is as large as what may stay
            most = min(most, HELD_ON_GPU // (len(self.data) * (rank or self.layout.rank) * self.dtype.itemsize))
        size = max(most // self.whole, 1) * self.whole
        for start in range(0, self.count, size):
            yield start, self._opened(self.data[:, start : start + size], rank)

    def _held(self, rank: "Optional[int]" = None) -> "Optional[Tensor]":
        """All rows [B, K', r], unpacked once for all layers; None where they are too many to keep."""
        rank = rank or self.layout.rank
        shape = (len(self.data), self._filled(self.count), rank)
        most = HELD_ON_GPU if on_gpu(self.data) else HELD_BYTES
        if self._unpacked is not None or math.prod(shape) * self.dtype.itemsize > most:
            return self._unpacked
        if torch.compiler.is_compiling():
            self._unpacked = self._opened(self.data, rank)
            return self._unpacked
        latents = self.workspace.take("latents", shape, self.dtype, self.data.device)
        if self.workspace.owner != (self, rank):
            unpacked(self.data, self.layout, self.dtype, rank=rank, out=latents)
            self.workspace.owner = (self, rank)
        return latents

    def _filled(self, count: int) -> int:
        return -(-count // self.whole) * self.whole

    def _opened(self, data: Tensor, rank: "Optional[int]" = None) -> Tensor:
        """The first `rank` components, or all, of rows, zeros behind the last."""
        latents = data.new_empty(len(data), self._filled(data.shape[1]), rank or self.layout.rank, dtype=self.dtype)
        return unpacked(data, self.layout, self.dtype, rank=rank, out=latents)

    def _sums(self, weights: Tensor, rank: "Optional[int]" = None) -> Tensor:
        """Σ p·z [B, M, r] of weights [B, M, K]."""
        rows, scale, dtype, total = weights.shape[1], 1.0, self.dtype, None
        if dtype == torch.float16:  # the weights of a long text, and their products, would be too small for it
            if _kept_whole(self.data.new_empty(0, dtype=dtype)):
                scale = WEIGHT_SCALE
            else:
                dtype = torch.float32
        if rows < TILE:  # the matrix unit takes whole tiles; fewer rows go another way, which is slower
            weights = nn.functional.pad(weights, (0, 0, 0, TILE - rows))
        for start, latents in self.filled_blocks(rank):
            part = (weights[..., start : start + latents.shape[1]] * scale).to(dtype)
            part = nn.functional.pad(part, (0, latents.shape[1] - part.shape[-1]))
            part = part.unflatten(-1, (self.parts, -1)).transpose(1, 2).flatten(0, 1)  # [B·parts, M, t/parts]
            part = full_product(part, latents.to(dtype).unflatten(1, (self.parts, -1)).flatten(0, 1))
            part = part.unflatten(0, (-1, self.parts)).sum(1)
            total = part if total is None else total + part
        assert total is not None, "there are rows to read"
        return total[:, :rows] / scale
