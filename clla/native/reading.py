"""Compile `reading.c`, and read latents with it, and pack them (`packing.h`).

It is compiled once for each processor, in seconds, when latents are first read on a CPU, and kept in the user's cache
directory. Where there is no compiler, PyTorch reads them, which takes longer and gives the same. `CLLA_NATIVE=0` in
the environment leaves it to PyTorch, too.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clla.modeling import attention_clla, pack_triton_clla
from clla.modeling.attention_clla import LatentRows
from clla.modeling.quantize_clla import JoinedLayout, RowLayout, class_steps, scale_table
from clla.modeling.triton_clla import flat_layout

SOURCE, *INCLUDED = (Path(__file__).with_name(name) for name in ("reading.c", "tiles.h", "packing.h"))
OFF = "CLLA_NATIVE"  # in the environment: "0" for PyTorch alone
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
NATIVE = ("-march=native", "-mcpu=native")  # what compilers call the processor at hand; not every one knows either
PATIENCE = 120  # seconds that compiling may take
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MANY_ROWS = 64  # from here on several threads pack
LEAST_BUCKET = 8  # of shorter ones, single rows above all, products are too small to be worth this code
_log = logging.getLogger("clla")

_NUMBERS = (
    *("sequences", "heads", "queries", "dim", "rotary", "rows", "rank", "judged", "most", "exact", "tokens", "bucket"),
    *("classes", "row_stride", "sequence_stride", "data_bytes", "turned", "interleaved", "turns_stride"),
    *("means_stride", "codec_kind", "exact_kind", "bias_stride", "used", "threads"),
)
_PLACES = (
    *("layout", "steps", "scales", "data", "query", "decoder", "mean", "turns", "means", "exact_tokens", "bias"),
    *("hidden", "fronts", "memory", "out"),
)


class _Reading(ctypes.Structure):
    """`Reading` of reading.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("exact_strides", ctypes.c_int64 * 2),
        ("scaling", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _PLACES),
    ]


class _Packing(ctypes.Structure):
    """`Packing` of packing.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "rank", "row_bytes", "classes", "kind", "stride", "threads")),
        *((name, ctypes.c_void_p) for name in ("layout", "steps", "scales", "latents", "out")),
    ]


def read_by_native_code() -> None:
    """Let latents be read, and packed, by the compiled code from now on, where there is a compiler."""
    attention_clla.COMPILED = attended
    pack_triton_clla.COMPILED = packed


def compiler() -> str | None:
    """Path of the C compiler that is used; None where there is none."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), *COMPILERS)))), None)


@lru_cache(maxsize=1)
def library() -> Any:
    """The compiled code, compiled if that was not done before; None where it cannot be had."""
    if os.environ.get(OFF) == "0" or sys.byteorder != "little":
        return None
    program = compiler()
    if program is None:
        _log.info("latents are read by PyTorch: there is no C compiler")
        return None
    try:
        found = ctypes.CDLL(str(_compiled(program)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # no compiler that works, no home, no room
        said = getattr(error, "stderr", None) or error
        _log.warning("latents are read by PyTorch, which takes longer: %s does not compile: %s", SOURCE.name, said)
        return None
    for function, kind in ((found.clla_attend, None), (found.clla_numbers, ctypes.c_int64)):
        function.argtypes, function.restype = [ctypes.POINTER(_Reading)], kind
    found.clla_pack.argtypes, found.clla_pack.restype = [ctypes.POINTER(_Packing), ctypes.c_void_p], None
    return found


def _compiled(program: str) -> Path:
    """The library in the user's cache directory, for this code, compiler and processor."""
    version = _run([program, "--version"]).stdout
    texts = (path.read_text(encoding="utf-8") for path in (SOURCE, *INCLUDED))
    known = (*texts, version, *FLAGS, platform.machine(), _processor(), torch.__version__)
    name = hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clla"
    path = folder / f"reading-{name}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch, "reading.o"), Path(scratch, "reading.so")
        ways = [[processor, "-fopenmp"] for processor in NATIVE]  # not every compiler has OpenMP
        ways += [[processor] for processor in NATIVE] + [[]]
        for way in ways:
            done = _run([program, *FLAGS, *way, "-c", str(SOURCE), "-o", str(compiled)], check=way == ways[-1])
            if not done.returncode:
                break
        # Without OpenMP's library, so that its threads are those that PyTorch has loaded: others would be in their way.
        _run([program, "-shared", str(compiled), "-o", str(linked), "-lm"])
        linked.replace(path)
    return path


def _run(command: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=check, timeout=PATIENCE)


def _processor() -> str:
    """What distinguishes processors that run different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part"))})
    )


def attended(
    rows: LatentRows,
    query: Tensor,
    exact: Tensor,
    bias: Tensor,
    layer: int,
    *,
    scaling: float,
    turned: bool,
    most: int | None,
) -> Tensor | None:
    """As `LatentRows.attended`; None where this code cannot read them."""
    codec, data, layout = rows.codec, rows.data, rows.layout
    kinds = KINDS.get(codec.decoder.dtype), KINDS.get(exact.dtype)
    if (
        not isinstance(layout, RowLayout)
        or data.device.type != "cpu"
        or None in kinds
        or not rows.count
        or rows.index is not None
        or rows.buckets is None
        or rows.buckets.size < LEAST_BUCKET
        or (code := library()) is None
    ):
        return None
    call = rows.native
    if call is None:
        call = rows.native = _prepared(rows)
    sequences, heads, queries, dim = query.shape
    query, bias = query.float().contiguous(), bias.float().contiguous()
    exact = exact if exact[0, 0].is_contiguous() else exact.contiguous()
    fields, decoder, mean = call.fields, codec.decoder[layer].contiguous(), codec.mean[layer].contiguous()
    out = torch.empty_like(query)
    fields.sequences, fields.heads, fields.queries, fields.dim = sequences, heads, queries, dim
    fields.exact, fields.tokens = exact.shape[2], bias.shape[-2]
    fields.exact_strides[0], fields.exact_strides[1] = exact.stride(0), exact.stride(1)
    fields.bias_stride = 0 if len(bias) == 1 else bias.stride(0)
    fields.codec_kind, fields.exact_kind = kinds
    fields.scaling, fields.turned = scaling, turned
    fields.most = rows.count if most is None else most
    fields.judged = layout.rank if most is None or most >= rows.count else attention_clla.judging_rank(layout)
    fields.threads = torch.get_num_threads()
    fields.query, fields.exact_tokens, fields.out = query.data_ptr(), exact.data_ptr(), out.data_ptr()
    fields.decoder, fields.mean, fields.bias = decoder.data_ptr(), mean.data_ptr(), bias.data_ptr()
    size = code.clla_numbers(fields)
    fields.memory = rows.workspace.take("native", (size,), torch.float32, data.device).data_ptr()
    code.clla_attend(fields)
    return out


def packed(latents: Tensor, layout: RowLayout | JoinedLayout) -> Tensor | None:
    """As `RowLayout.pack`; None where this code cannot. Sums in another order may choose a neighbour of a scale."""
    kind = KINDS.get(latents.dtype)
    if not isinstance(layout, (RowLayout, JoinedLayout)) or latents.device.type != "cpu" or kind is None:
        return None
    every = tuple(one for part in layout.parts for one in part.classes)
    if not every or (code := library()) is None:
        return None
    rows = latents.detach().flatten(0, -2)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    classes, threads = _classes(layout), torch.get_num_threads() if len(rows) >= MANY_ROWS else 1
    steps, scales = class_steps(every, rows.device), scale_table(rows.device)
    out = torch.empty(*latents.shape[:-1], layout.row_bytes, dtype=torch.uint8)
    memory = torch.empty(threads, layout.rank, dtype=torch.float32)
    fields = _Packing(
        rows=len(rows),
        rank=layout.rank,
        row_bytes=layout.row_bytes,
        classes=len(every),
        kind=kind,
        stride=rows.stride(0),
        threads=threads,
        layout=ctypes.addressof(classes),
        steps=steps.data_ptr(),
        scales=scales.data_ptr(),
        latents=rows.data_ptr(),
        out=out.data_ptr(),
    )
    code.clla_pack(fields, memory.data_ptr())
    return out


class _Call:
    """What is the same for all layers of a group in one forward pass."""

    def __init__(self, fields: _Reading, kept: tuple[Any, ...]) -> None:
        self.fields, self.kept = fields, kept  # what the pointers point to must stay


def _prepared(rows: LatentRows) -> _Call:
    layout: Any = rows.layout
    data = rows.data
    if data.stride(2) != 1:
        data = data.contiguous()
    classes = _classes(layout)
    steps = class_steps(tuple(layout.classes), torch.device("cpu"))
    scales = scale_table(torch.device("cpu"))
    hidden = rows.hidden.to(torch.int32).expand(len(data)).contiguous()
    assert rows.buckets is not None
    fronts = torch.tensor(rows.buckets.fronts, dtype=torch.int32)
    fields = _Reading(
        rows=rows.count,
        rank=layout.rank,
        bucket=rows.buckets.size,
        classes=len(layout.classes),
        row_stride=data.stride(1),
        sequence_stride=data.stride(0),
        data_bytes=(len(data) - 1) * data.stride(0) + (data.shape[1] - 1) * data.stride(1) + data.shape[2],
        used=-1 if rows.used is None else int(rows.used),
        layout=ctypes.addressof(classes),
        steps=steps.data_ptr(),
        scales=scales.data_ptr(),
        data=data.data_ptr(),
        hidden=hidden.data_ptr(),
        fronts=fronts.data_ptr(),
    )
    kept: tuple[Any, ...] = (data, classes, steps, scales, hidden, fronts)
    if rows.turns is not None:
        assert rows.buckets.means is not None
        turns, means = rows.turns.factors.contiguous(), rows.buckets.means.factors.contiguous()
        fields.rotary, fields.interleaved = 2 * turns.shape[2], rows.turns.interleaved
        fields.turns, fields.means = turns.data_ptr(), means.data_ptr()
        fields.turns_stride = 0 if len(turns) == 1 else 2 * turns.stride(0)
        fields.means_stride = 0 if len(means) == 1 else 2 * means.stride(0)
        kept += (turns, means)
    return _Call(fields, kept)


@lru_cache(maxsize=64)
def _classes(layout: RowLayout | JoinedLayout) -> Any:
    numbers = flat_layout(layout)
    return (ctypes.c_int64 * len(numbers))(*numbers)
