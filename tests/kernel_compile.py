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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

# Bytes of shared memory a program may have: of 80, 86 and 89 the least, that of 90.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}


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


def compile_report(
    kernel: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any], arch: int, num_warps: int, num_stages: int
) -> dict[str, int]:
    """Bytes of shared memory a program, and registers and bytes of stack a thread, for compute capability `arch`.

    The stack holds what was spilled from registers: Triton keeps nothing else there.

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
    return {"shared": compiled.metadata.shared, "registers": found["REG"], "stack": stack}


def compile_all(cases: Sequence[Case], archs: Sequence[int] = tuple(SHARED_LIMIT)) -> list[dict[int, dict[str, int]]]:
    """`compile_report` by compute capability for each case, from one process without interpreter and GPU."""
    here = Path(__file__).parent
    paths = [str(here.parent), str(here), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
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


def check_fits(reports: Sequence[Mapping[int, Mapping[str, int]]]) -> None:
    """Nothing is spilled, and shared memory suffices."""
    for report in reports:
        for arch, used in report.items():
            assert used["stack"] == 0, f"sm_{arch} spills: {used}"
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
