"""Compile Triton kernels ahead of time for GPUs that are not there, and say what they take.

Under TRITON_INTERPRET kernels are not compiled at all, so it is done in a process of its own.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

# Bytes of shared memory a program may have: of 80, 86 and 89 the least, that of 90.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
         torch.int32: "i32", torch.int64: "i64"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kernel with the types of its arguments.

    Attributes:
        kernel: "module:name".
        signature: type by argument, "*fp32", "i32", …; ":16" at the end if a multiple of 16 bytes, or of 16.
        constexprs: value by argument.
    """

    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3


class _Noted(Exception):
    """A launch that was noted instead of done."""


def launched(module: Any, name: str, call: Callable[[], object], *, not_specialized: Sequence[str] = ()) -> Case:
    """The case that `call` launches first, types and alignments as Triton would take them from its arguments.

    Tensors may be on the meta device.

    Args:
        module: whose kernel it is, under the name by which it is launched.
        name: of the kernel.
        call: launches it.
        not_specialized: `do_not_specialize` of the kernel.
    """
    kernel, given = getattr(module, name), {}

    class Noting:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            def note(*arguments: object, **others: object) -> None:
                given.update(zip(kernel.arg_names, arguments, strict=False))
                given.update(others)
                raise _Noted

            return note

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Noted):
        patch.setattr(module, name, Noting())
        call()
    options = {key: given.pop(key) for key in ("num_warps", "num_stages") if key in given}
    signature, constexprs = {}, {}
    for key, value in given.items():
        if isinstance(value, torch.Tensor):
            aligned = value.storage_offset() * value.itemsize % 16 == 0
            signature[key] = "*" + TYPES[value.dtype] + (":16" if aligned else "")
        elif isinstance(value, float):
            signature[key] = "fp32"
        elif key.isupper() or (value == 1 and key not in not_specialized):
            constexprs[key] = value
        else:
            signature[key] = "i32" + (":16" if value % 16 == 0 and key not in not_specialized else "")
    return Case(f"{module.__name__}:{name}", signature, constexprs, **options)


def compile_report(
    kernel: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any], arch: int, num_warps: int, num_stages: int
) -> dict[str, int]:
    """What a kernel takes and uses, for compute capability `arch`.

    Bytes of `shared` memory a program, `registers` and bytes of `stack` a thread, which holds what was spilled from
    registers: Triton keeps nothing else there. Then how often its code asks for a copy of 16 bytes to shared memory
    that it need not wait for (`async_copies`), and for a product of Hopper's matrix units (`wgmma`).

    Args:
        kernel: function under `triton.jit`.
        signature: see `Case`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(constexprs, "constexpr") | {name: kind.split(":")[0] for name, kind in signature.items()}
    aligned = [kernel.arg_names.index(name) for name, kind in signature.items() if kind.endswith(":16")]
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=dict(constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage = _cuobjdump("--dump-resource-usage", binary.name)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    stack = found["STACK"] + found["LOCAL"]
    return {
        "shared": compiled.metadata.shared,
        "registers": found["REG"],
        "stack": stack,
        "async_copies": compiled.asm["ptx"].count("cp.async.cg."),  # others are of 4 or 8 bytes
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
    }


def compile_all(cases: Sequence[Case], archs: Sequence[int] = tuple(SHARED_LIMIT)) -> list[dict[int, dict[str, int]]]:
    """`compile_report` by compute capability for each case, from one process without interpreter and GPU."""
    here = Path(__file__).parent
    paths = [str(here.parent), str(here), str(here / "modeling"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": cache,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        # Objects are made by the module under its own name, not by __main__.
        command = [sys.executable, "-c", "import kernel_compile; kernel_compile._answer()"]
        done = subprocess.run(command, input=pickle.dumps((cases, archs)), capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)


def check_fits(reports: Sequence[Mapping[int, Mapping[str, int]]], *, spilled: int = 0) -> None:
    """At most so many bytes a thread are spilled, and shared memory suffices."""
    for report in reports:
        for arch, used in report.items():
            assert used["stack"] <= spilled, f"sm_{arch} spills: {used}"
            assert used["shared"] <= SHARED_LIMIT[arch], f"sm_{arch} has less shared memory: {used}"


def _answer() -> None:
    cases, archs = pickle.load(sys.stdin.buffer)
    reports = []
    for case in cases:
        module, name = case.kernel.split(":")
        kernel = getattr(import_module(module), name)
        known = (kernel, case.signature, case.constexprs)
        reports.append({arch: compile_report(*known, arch, case.num_warps, case.num_stages) for arch in archs})
    sys.stdout.buffer.write(pickle.dumps(reports))


def _cuobjdump(*arguments: str) -> str:
    """Run the one in Triton's wheel."""
    from triton.backends import nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout
