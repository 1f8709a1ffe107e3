"""What `clla doctor MODEL` finds: what would work with a model, from its config alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from clla.checkpoint.load import read_plan
from clla.convert.stages import moment_bytes, resolve
from clla.doctor.environment import Finding, plugin_registered
from clla.errors import CllaError
from clla.heal.run import STATE_BYTES
from clla.modeling.configuration_clla import CLLA_SCHEMA_VERSION
from clla.modeling.triton_clla import triton
from clla.recipe import Recipe
from clla.source.device import pick_device
from clla.source.families import FAMILIES
from clla.source.model import Source, open_source
from clla.source.placement import choose_placement
from clla.storage.filenames import CONFIG, TOKENIZER_CONFIG
from clla.storage.files import read_json

PASSES = 3  # forward passes that calibration costs, about (docs/lab-notes.md)
TRAINED_BYTES = 16  # memory of a trained weight: itself, its gradient, Adam's two moments
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", TOKENIZER_CONFIG, "spiece.model", "vocab.txt")
Status = Literal["ok", "warning", "problem"]


def examine(name: str) -> list[Finding]:
    """Findings about a model or a converted checkpoint.

    Args:
        name: Hub id, directory, .gguf file or `demo`.
    """
    folder = Path(name).expanduser()
    try:
        if (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") == "clla":
            return _converted(folder)
        source = open_source(name)
    except CllaError as error:
        return [Finding("model", "problem", error.got, error.remedy or error.expected)]
    return [*_cache(source), *_conversion(source), *_running(source.config)]


def _cache(source: Source) -> list[Finding]:
    kind = source.config.model_type
    known = kind in FAMILIES
    text = f"{kind}: {FAMILIES[kind]}" if known else f"{kind}: not among the tested families, but of ordinary form"
    found = [Finding("family", "ok", text, "" if known else "convert checks it on a few tokens before it calibrates")]
    kept = len(source.kept_layers)
    left = f", {kept} keep their own cache" + (f" of {source.kept_window} tokens" if source.kept_window else "")
    found.append(Finding("layers", "ok", f"{len(source.layers)} would be converted{left if kept else ''}"))
    kv, nbytes = source.kv, source.bytes_per_token
    found.append(
        Finding(
            "cache",
            "ok",
            f"{kv.num_key_value_heads} key-value heads of {kv.head_dim}, {source.dtype}: "
            f"{nbytes:,} bytes per token, {nbytes / 16:,.0f} at 6.25 %".replace("torch.", ""),
        )
    )
    folder = Path(source.path)
    if folder.is_dir() and not source.gguf_file and not any((folder / name).is_file() for name in TOKENIZERS):
        remedy = "copy tokenizer.json and tokenizer_config.json into the model's directory"
        found.append(Finding("tokenizer", "problem", f"none in {folder}", remedy))
    return found


def _conversion(source: Source) -> list[Finding]:
    device = pick_device("auto")
    try:
        recipe = resolve(Recipe(), source, device)
    except CllaError as error:
        return [Finding("budget", "warning", f"the default recipe does not fit: {error.got}", error.remedy)]
    parameters, dtype = source.parameters, getattr(torch, recipe.runtime.compute_dtype)
    weights, free = parameters * dtype.itemsize, psutil.virtual_memory().available
    placement = choose_placement("auto", weights, device)
    how = {"device": f"all on {device}", "spread": "over several GPUs", "stream": "layers read from disk one at a time"}
    text = f"{how[placement]}: {parameters / 1e6:,.0f} M weights, {weights / 2**30:.1f} GB in {dtype}"
    impossible = placement == "stream" and source.gguf_file is not None
    remedy = "convert the model that the file was made from, in safetensors" if impossible else ""
    found = [Finding("placement", "problem" if impossible else "ok", text.replace("torch.", ""), remedy)]
    wide = source.kv.values > recipe.calibration.basis
    whole, streamed = (moment_bytes(source, recipe, streamed=s) for s in (False, True))
    layered = placement == "stream" or wide or whole > free
    needed = streamed if layered else whole
    status: Status = "problem" if needed > free else "ok"
    text = f"{needed / 2**30:.1f} GB for moments{', layer by layer' if layered else ''}, {free / 2**30:.1f} GB free"
    found.append(Finding("memory", status, text, "lower --max-layers-per-group" if status == "problem" else ""))
    seconds = 2 * parameters * PASSES * (recipe.calibration.tokens or 0) / _speed(device, dtype)
    found.append(
        Finding(
            "calibration",
            "ok",
            f"{recipe.calibration.tokens:,} tokens, {max(1, round(seconds / 60))} min or more "
            f"(by the speed of a matrix product here, {PASSES} forward passes)",
        )
    )
    return [*found, _healing(placement, parameters, free)]


def _healing(placement: str, parameters: int, free: int) -> Finding:
    if placement == "stream":
        remedy = "convert here, and run clla heal on a machine that holds the model"
        return Finding("healing", "warning", "refused where layers are read from disk", remedy)
    needed = parameters * TRAINED_BYTES
    text = f"{needed / 2**30:.1f} GB to train all weights, {parameters * STATE_BYTES / 2**30:.1f} GB of disk"
    if needed > free and not torch.cuda.is_available():
        return Finding("healing", "warning", f"{text}; {free / 2**30:.1f} GB are free", "--heal-train codec needs less")
    return Finding("healing", "ok", text)


def _running(config: Any) -> list[Finding]:
    """What reading latents needs of the model's attention and of this machine."""
    text = config.get_text_config()
    gpu, own = torch.cuda.is_available(), _own_attention(text)
    found = []
    if own:
        found.append(Finding("kernels", "warning", f"attention with {own}: keys and values are decoded for it"))
    elif not gpu or triton is None:
        found.append(
            Finding(
                "kernels", "ok", f"latents are read as they are, without kernels: no {'Triton' if gpu else 'GPU'} here"
            )
        )
    else:
        found.append(Finding("kernels", "ok", "latents are read as they are, if attention is a plain softmax"))
    where = "generate compiles it by itself" if gpu else "works; compiling it pays on GPUs"
    found.append(Finding("static cache", "ok", where))
    serving = "vLLM plugin is registered" if plugin_registered() else "with transformers; no vLLM plugin is registered"
    return [*found, Finding("serving", "ok", serving)]


def _own_attention(text: Any) -> str:
    """What makes attention more than a softmax over products, as far as configs tell."""
    if getattr(text, "attn_logit_softcapping", None):
        return "soft-capped logits"
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        return "position biases (ALiBi)"
    return "sinks in its softmax" if text.model_type == "gpt_oss" else ""


def _converted(folder: Path) -> list[Finding]:
    config = read_json(folder / CONFIG)
    block = config.get("clla") or {}
    version = block.get("schema_version", config.get("schema_version"))
    if isinstance(version, int) and version > CLLA_SCHEMA_VERSION:
        text = f"written with schema {version}, this clla reads {CLLA_SCHEMA_VERSION} and older"
        return [Finding("checkpoint", "problem", text, "pip install -U clla")]
    plan = read_plan(folder)
    share = 100 * plan.row_bytes / plan.source_bytes_per_token
    found = [
        Finding("checkpoint", "ok", f"converted: {plan.num_layers} layers in {len(plan.groups)} groups"),
        Finding("cache", "ok", f"{plan.row_bytes:,} bytes of latents per token, {share:.2f} % of the source's"),
        Finding("healing", "ok", "clla heal trains it against its source"),
    ]
    base = config.get("base_model")
    if base and not Path(base["path"]).exists():
        text = f"holds the codec alone; its base model {base['path']!r} is no directory here"
        found.append(Finding("weights", "warning", text, "needs the Hub, or base_model.path in config.json"))
    elif not base and not list(folder.glob("*.safetensors")):
        found.append(Finding("weights", "problem", f"none in {folder}", "copy the checkpoint again"))
    else:
        found.append(Finding("weights", "ok", "present; clla eval checks every file"))
    return found


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product, about."""
    side = 1024 if device.type == "cpu" else 4096
    a = torch.ones(side, side, dtype=dtype, device=device)
    (a @ a)[0, 0].item()
    start = time.perf_counter()
    (a @ a)[0, 0].item()
    return 2 * side**3 / (time.perf_counter() - start)
