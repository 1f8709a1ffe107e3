"""Versions of vLLM."""

from __future__ import annotations

from importlib.metadata import version

SUPPORTED = ("0.32",)  # versions of vLLM whose interfaces this code was tested against


def is_supported(version: str) -> bool:
    """Whether this code was tested against a version of vLLM."""
    return version.startswith(tuple(f"{prefix}." for prefix in SUPPORTED))


def version_of_vllm() -> str:
    """Of the installed distribution: `vllm`, or its builds for other devices."""
    from vllm import __version__

    return __version__ if __version__[:1].isdigit() and not __version__.startswith("0.0") else version("vllm")
