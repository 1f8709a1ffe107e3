"""On which device a model runs, in which dtype, and in how many processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState

from clla.errors import CllaError, UsageError, reason


def pick_device(name: str) -> torch.device:
    """`auto` means the GPU where there is one.

    Raises:
        CllaError: the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"--device {name}: there is no such kind", expected="auto, cpu, cuda or cuda:N", remedy="use one of them"
        ) from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise CllaError(
            f"device {name!r} is not available: {reason(error)}", expected="a device here", remedy="use --device cpu"
        ) from error
    return device


def start_processes(device: torch.device) -> tuple[PartialState, torch.device]:
    """The processes of `accelerate launch`, or this one alone, and the device that this one uses.

    Args:
        device: that the user asked for.
    """
    processes = PartialState(cpu=device.type == "cpu")
    if processes.num_processes > 1:
        return processes, processes.device
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return processes, device


def pick_dtype(wanted: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` keeps the checkpoint's dtype `stored`, except on CPUs that are slow in 16 bits.

    Raises:
        UsageError: no such dtype.
    """
    if wanted != "auto":
        if wanted not in ("float32", "bfloat16", "float16"):
            raise UsageError(
                f"--dtype {wanted}", expected="auto, float32, bfloat16 or float16", remedy="use one of them"
            )
        return getattr(torch, wanted)
    if device.type == "cpu" and stored != torch.float32 and not _fast_in_16_bits():
        return torch.float32
    return stored


def _fast_in_16_bits() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware; without, fp32 is several times faster."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
