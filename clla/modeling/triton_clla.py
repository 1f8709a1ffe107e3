"""What the Triton kernels share: when they run, and where the classes of a packed row lie."""

from __future__ import annotations  # kernels are defined where there is no Triton, too

import hashlib

from torch import Tensor

from .quantize_clla import SCALE_BIAS, SCALE_STEPS_PER_OCTAVE, Layout

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: PyTorch alone computes
    triton = tl = None

# A compiler sees each launch as one operation. Every checkpoint may bring its own copy of this module, named after its
# folder: the operations of each copy have names of their own, made of signs that any name can be made of.
NAMESPACE = "clla_" + hashlib.sha256(f"{__name__} {__file__}".encode()).hexdigest()[:16]


def constant(value):
    """A number that kernels may use as it is."""
    return tl.constexpr(value) if tl is not None else value


STEPS_PER_OCTAVE, BIAS = constant(SCALE_STEPS_PER_OCTAVE), constant(SCALE_BIAS)


def on_gpu(x: Tensor) -> bool:
    """Whether kernels can read this."""
    return x.is_cuda and triton is not None


def jit(**options):
    """`triton.jit`, or nothing where there is no Triton."""
    return triton.jit(**options) if triton is not None else lambda function: function


def flat_layout(layout: Layout) -> list[int]:
    """Byte of the scale, first byte of the codes, bits, first and last component + 1 of all classes in one list."""
    found, byte, component = [], 0, 0
    for part in layout.parts:
        codes = byte + len(part.classes)
        for number, (bits, first, stop) in enumerate(part.classes):
            found += [byte + number, codes, bits, component + first, component + stop]
            codes += (stop - first) * bits // 8
        byte, component = byte + part.row_bytes, component + part.rank
    return found
