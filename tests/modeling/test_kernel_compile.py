"""What is reported of compiled kernels, by kernels whose needs are known."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")
tl = pytest.importorskip("triton.language")

import torch  # noqa: E402
from kernel_compile import Case, check_fits, compile_all  # noqa: E402


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def product(x, y, z, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    square = at[:, None] * BLOCK + at
    tl.store(z + square, tl.dot(tl.load(x + square), tl.load(y + square)))


POINTERS = {"x": "*fp16:16", "y": "*fp16:16"}


def test_kernels_run_in_the_interpreter_or_on_a_gpu(kernel_device: str) -> None:
    x = torch.arange(100.0, device=kernel_device)
    y = torch.full_like(x, -1)
    double[(4,)](x, y, 90, BLOCK=32)
    assert torch.equal(y[:90], 2 * x[:90]) and bool((y[90:] == -1).all())


@pytest.mark.slow
def test_reports_hold_registers_and_shared_memory_and_see_what_is_spilled() -> None:
    plain = Case(f"{__name__}:double", {**POINTERS, "n": "i32"}, {"BLOCK": 128})
    small, large, spilling = (
        Case(f"{__name__}:product", {**POINTERS, "z": "*fp32:16"}, {"BLOCK": n}, num_warps=warps)
        for n, warps in ((32, 4), (64, 4), (128, 2))
    )
    reports = compile_all([plain, small, large, spilling])
    check_fits(reports[:3])
    for report in reports:
        assert set(report) == {80, 90} and all(8 < used["registers"] <= 255 for used in report.values())
    assert all(reports[0][arch]["shared"] == 0 for arch in (80, 90))
    assert all(reports[2][arch]["shared"] >= 2 * 64 * 64 * 2 for arch in (80, 90))  # both factors
    with pytest.raises(AssertionError, match="spills"):
        check_fits(reports[3:])
    with pytest.raises(AssertionError, match="less shared memory"):
        check_fits([{80: {"shared": 100 * 1024, "registers": 32, "stack": 0}}])
