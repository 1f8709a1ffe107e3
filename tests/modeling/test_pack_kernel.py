"""Rows written by the kernel: against `RowLayout.pack`, and against a naive reader and search of their own.

Where fp32 cannot tell two scales or two levels apart, `check_class` takes either; of the classes of a test at most one
in fifty may differ from the reference for that reason.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

import torch
from kernel_compile import Case, check_fits, compile_all
from packed_rows import check_class, classes_of, gaussian, naive_codes, naive_row
from torch import Tensor
from transformers.dynamic_module_utils import get_imports

from clla.modeling import pack_triton_clla, quantize_clla
from clla.modeling.pack_triton_clla import pack_rows
from clla.modeling.quantize_clla import SCALE_OFFSETS, JoinedLayout, RowLayout

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
MIXED = (16, *(8,) * 9, 7, 6, 5, 4, 4, 4, 3, 2, 1, 1)  # 8 bits: scales of 16, 32, 16 and 8 components
POISON = 0xAB

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's of zeros, in the interpreter


@pytest.fixture(params=[1, 4], ids="{}-a-program".format)
def per_program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens a program, however few there are."""
    monkeypatch.setattr(pack_triton_clla, "MANY_TOKENS", {1: 10**9, 4: 1}[request.param])
    return request.param


def packed(latents: Tensor, layout: RowLayout, *, first: int = 2, row: Tensor | None = None, rows: int = 2) -> Tensor:
    """Rows [B, T, N] that the kernel wrote to the middle of a larger buffer, whose other bytes are seen to stay."""
    batch, length, _ = latents.shape
    around = torch.full((batch, 1 + first + length + rows, 5 + layout.row_bytes), POISON, dtype=torch.uint8)
    around = around.to(latents.device)
    out = around[:, 1:, 3:-2]
    pack_rows(latents, layout, out, first if row is None else row)
    written = out[:, first : first + length].clone()
    out[:, first : first + length] = POISON
    assert bool((around == POISON).all())
    return written


def check_rows(rows: Tensor, latents: Tensor, layout: RowLayout) -> None:
    """Every class of every token holds the best codes, and nearly all those of the reference."""
    expected = layout.pack(latents).flatten(0, 1).tolist()
    values = latents.float().flatten(0, 1).cpu().numpy()
    classes, differing = classes_of(layout.tier_bits, layout.tier_size), 0
    for latent, row, reference in zip(values, rows.flatten(0, 1).tolist(), expected, strict=True):
        scales, codes = naive_codes(row, layout.tier_bits, layout.tier_size)
        assert naive_row(scales, codes, layout.tier_bits, layout.tier_size) == row
        other_scales, other_codes = naive_codes(reference, layout.tier_bits, layout.tier_size)
        for scale, other, (bits, part) in zip(scales, other_scales, classes, strict=True):
            check_class(latent[part], bits, scale, codes[part])
            differing += scale != other or codes[part] != other_codes[part]
    assert differing <= len(expected) * len(classes) / 50


def spread(batch: int, length: int, rank: int, device: str, seed: int = 0) -> Tensor:
    """Latents [B, T, r] of sizes from 1e-3 to 1e3."""
    sizes = torch.logspace(-3, 3, batch * length).view(batch, length, 1)
    return (gaussian(batch, length, rank, seed=seed) * sizes).to(device)


def test_parts_of_a_row_are_packed_side_by_side(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_triton_clla, "on_gpu", lambda x: True)
    layout = JoinedLayout(RowLayout((5, 3, 3), 16), RowLayout((6, 6), 8))
    latents = spread(2, 3, layout.rank, kernel_device)
    rows = pack_triton_clla.packed(latents, layout)
    for part, own, found in zip(
        layout.parts, latents.split((48, 16), dim=-1), rows.split((24, 13), dim=-1), strict=True
    ):
        check_rows(found, own, part)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_packs_as_the_reference_does(bits: int, per_program: int, kernel_device: str) -> None:
    layout = RowLayout((bits,) * 5, 8)  # 40 components, no power of two
    latents = spread(1, 3, layout.rank, kernel_device, seed=bits)
    check_rows(packed(latents, layout), latents, layout)


@pytest.mark.parametrize("shape", [(1, 1), (17, 1), (2, 3), (1, 17)], ids=str)
def test_any_number_of_tokens(shape: tuple[int, int], per_program: int, kernel_device: str) -> None:
    layout = RowLayout((6, 3), 8)
    latents = spread(*shape, layout.rank, kernel_device)
    check_rows(packed(latents, layout), latents, layout)


def test_widths_and_scales_of_one_row_do_not_touch_each_other(per_program: int, kernel_device: str) -> None:
    layout = RowLayout(MIXED, 8)
    assert [stop - first for bits, first, stop in layout.classes if bits == 8] == [16, 32, 24]
    latents = spread(1, 3, layout.rank, kernel_device) * torch.logspace(1, -1, layout.rank).to(kernel_device)
    check_rows(packed(latents, layout), latents, layout)


@pytest.mark.parametrize("bits", (3, 8, 16))
def test_classes_larger_than_what_is_read_at_once(bits: int, per_program: int, kernel_device: str) -> None:
    layout = RowLayout((bits,) * (2 if bits == 8 else 1), 264)
    latents = spread(1, 3, layout.rank, kernel_device)
    latents[..., 263] *= 5  # the last part counts
    check_rows(packed(latents, layout), latents, layout)


@pytest.mark.parametrize("row", (torch.tensor(3), torch.tensor([3]), torch.tensor([3], dtype=torch.int32)), ids=str)
def test_the_first_row_may_be_a_tensor(row: Tensor, kernel_device: str) -> None:
    layout = RowLayout((5,), 16)
    latents = spread(2, 2, layout.rank, kernel_device)
    assert torch.equal(packed(latents, layout, first=3, row=row.to(kernel_device)), packed(latents, layout))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_other_dtypes_pack_as_their_fp32_values(dtype: torch.dtype, per_program: int, kernel_device: str) -> None:
    layout = RowLayout((8, 3), 16)
    latents = spread(1, 3, layout.rank, kernel_device).to(dtype)
    rows = packed(latents, layout)
    assert torch.equal(rows, packed(latents.float(), layout))
    check_rows(rows, latents, layout)


def test_strides_of_the_latents_do_not_matter(kernel_device: str) -> None:
    layout = RowLayout((7, 4), 16)
    latents = spread(2, 3, layout.rank, kernel_device)
    rows = packed(latents, layout)
    around = torch.full((2, 3, 3 * layout.rank), torch.nan, device=kernel_device)
    around[..., ::3] = latents
    views = [latents.permute(2, 1, 0).contiguous().permute(2, 1, 0), around[..., ::3]]
    assert all(torch.equal(packed(view, layout), rows) for view in views)
    same = latents[:, :1].expand(2, 3, -1)  # stride 0
    assert torch.equal(packed(same, layout), rows[:, :1].expand(2, 3, -1))


@pytest.mark.parametrize("bits", (1, 4, 8, 16))
def test_zeros_extremes_and_what_is_no_number_pack_as_the_reference_does(bits: int, kernel_device: str) -> None:
    layout = RowLayout((bits,), 16)
    latents = gaussian(1, 9, layout.rank)
    latents[0, :6] *= torch.tensor([0.0, 1e-38, 1e-12, 1e6, 1e20, 3e37])[:, None]
    latents[0, 6, 3], latents[0, 7, 5], latents[0, 8, 7] = torch.inf, -torch.inf, torch.nan
    latents = latents.to(kernel_device)
    rows = packed(latents, layout)
    assert torch.equal(rows, layout.pack(latents))
    assert rows[0, :, 0].tolist()[3:] == [255] * 5 + [0] and int(rows[0, 0, 0]) == 0


@pytest.mark.parametrize(("nearer", "scale"), [(0.0, 128), (2.0**-10, 136)])
def test_the_rms_wins_ties(nearer: float, scale: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels 0.5 (scale 1) and 1.0 (scale 2) are equally far from these pairs, exactly so in fp32."""
    monkeypatch.setitem(quantize_clla.GAUSSIAN_STEP, 1, 1.0)
    monkeypatch.setattr(pack_triton_clla, "SCALE_OFFSETS", (0, 8, -3))
    pack_triton_clla._tables.cache_clear()
    latents = torch.tensor([1.40625, 0.09375 + nearer] * 4, device=kernel_device).view(1, 1, 8)
    rows = packed(latents, RowLayout((1,), 8))
    pack_triton_clla._tables.cache_clear()
    assert int(rows[0, 0, 0]) == scale


def test_offsets_beyond_32_bits(kernel_device: str) -> None:
    """A buffer that is mostly never touched."""
    layout = RowLayout((16,) * 4, 256)
    latents = spread(1, 1, layout.rank, kernel_device)
    out = torch.empty(1, 2**31 // layout.row_bytes + 3, layout.row_bytes, dtype=torch.uint8, device=kernel_device)
    pack_rows(latents, layout, out, out.shape[1] - 1)
    assert torch.equal(out[:, -1:], packed(latents, layout))


def test_nothing_to_write(kernel_device: str) -> None:
    assert packed(torch.zeros(2, 0, 16, device=kernel_device), RowLayout((4,), 16)).shape == (2, 0, 9)
    assert packed(torch.zeros(2, 3, 0, device=kernel_device), RowLayout((), 16)).shape == (2, 3, 0)


ROWS = torch.zeros(2, 4, 9, dtype=torch.uint8)
MISUSES = {
    "rank": (torch.zeros(2, 3, 8), ROWS, 0, "are expected"),
    "bytes": (torch.zeros(2, 3, 16), ROWS[..., 1:], 0, "are expected"),
    "batch": (torch.zeros(1, 3, 16), ROWS, 0, "are expected"),
    "rows of another dtype": (torch.zeros(2, 3, 16), ROWS.int(), 0, "uint8"),
    "bytes apart": (torch.zeros(2, 3, 16), ROWS.mT.contiguous().mT, 0, "side by side"),
    "latents of another dtype": (torch.zeros(2, 3, 16).double(), ROWS, 0, "float32"),
    "beyond the end": (torch.zeros(2, 3, 16), ROWS, 2, "do not fit into 4 rows"),
    "before the beginning": (torch.zeros(2, 3, 16), ROWS, -1, "do not fit into 4 rows"),
    "two first rows": (torch.zeros(2, 3, 16), ROWS, torch.tensor([0, 1]), "one int32 or int64"),
    "no whole row": (torch.zeros(2, 3, 16), ROWS, torch.tensor(0.0), "one int32 or int64"),
    "elsewhere": (torch.zeros(2, 3, 16), ROWS.to("meta"), 0, "one device"),
    "first row elsewhere": (torch.zeros(2, 3, 16), ROWS, torch.tensor(0, device="meta"), "one device"),
}


@pytest.mark.parametrize("case", MISUSES)
def test_what_does_not_fit_raises(case: str) -> None:
    latents, out, first_row, message = MISUSES[case]
    with pytest.raises(ValueError, match=message):
        pack_rows(latents, RowLayout((4,), 16), out, first_row)


def test_kernels_can_be_imported_without_triton() -> None:
    """Neither does transformers ask for it, which reads the imports of remote code."""
    modules = [path for path in Path(pack_triton_clla.__file__).parent.glob("*triton_clla.py")]
    names = ", ".join(f"clla.modeling.{path.stem}" for path in modules)
    script = f"import sys; sys.modules['triton'] = None; import {names}; assert {names.split(', ')[0]}.triton is None"
    assert len(modules) == 3
    subprocess.run([sys.executable, "-c", script], check=True)
    assert not [path for path in modules if "triton" in get_imports(path)]


@pytest.mark.slow
def test_compiled_kernels_spill_nothing() -> None:
    """Few tokens in a piece, rows from a number; many tokens spread in any way, rows from a tensor."""
    types = dict.fromkeys(("tokens", "length", "out_stride_batch", "out_stride_row"), "i32")
    types |= {"classes": "*i32:16", "steps": "*fp32:16", "offsets": "*i32:16", "out": "*u8"}
    strides = ("latents_stride_batch", "latents_stride_token", "latents_stride_component")
    whole = {**types, "latents": "*fp32:16", "first_row": "i32", **dict.fromkeys(strides[:2], "i32:16")}
    apart = {**types, "latents": "*bf16", "first_row": "*i64", **dict.fromkeys(strides, "i64")}
    constants = {"LAST_CODE": 255, "TRIES": len(SCALE_OFFSETS), "O": 8}
    few = {**constants, **pack_triton_clla.FEW._asdict(), "ROW_ON_DEVICE": False, strides[2]: 1}
    many = {**constants, **pack_triton_clla.MANY._asdict(), "ROW_ON_DEVICE": True}
    kernel = "clla.modeling.pack_triton_clla:pack_kernel"
    reports = compile_all([Case(kernel, whole, few), Case(kernel, apart, many)])
    check_fits(reports)
    # Then four programs of four warps fit on a multiprocessor, and wait for memory in turns.
    assert all(used["registers"] <= 128 for report in reports for used in report.values())
