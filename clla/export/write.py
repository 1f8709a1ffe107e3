"""Write a converted checkpoint in the form of another model class, checked against the converted model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clla.calibrate.lossless import RawLayout
from clla.checkpoint.load import checkpoint_folder, load_checkpoint
from clla.checkpoint.write import check_disk, check_output, finished_directory, tidy
from clla.errors import CllaError
from clla.export.deepseek import as_deepseek, check_expressible
from clla.heal.losses import kl_of_logits
from clla.modeling.hooks_clla import CACHE
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.storage.filenames import EXPORT_REPORT
from clla.storage.files import write_text
from clla.storage.places import expanded, holding

CHECK_TOKENS = 64
WRONG = 0.05  # nats per token: 16-bit weights, rounded in another order, differ by far less


@dataclass(frozen=True)
class Export:
    """Attributes: config of the written model; kl: to the converted model with latents not quantized; healed."""

    config: dict[str, Any]
    kl: float
    healed: bool


def export_checkpoint(
    path: str, output: Path, *, device: torch.device, dtype: str = "auto", overwrite: bool = False
) -> Export:
    """Write a checkpoint as DeepseekV3.

    Args:
        path: a converted checkpoint, directory or Hub id.
        output: directory to write.
        device: to compute on.
        dtype: of the weights: `auto` keeps the checkpoint's, or what this device computes fast in.
        overwrite: replace an earlier export.

    Raises:
        CllaError: the checkpoint has something that DeepseekV3 cannot express, or the result is not the same model.
    """
    with holding(output):
        tidy(output)
        check_output(output, expanded(path), overwrite=overwrite)
        return _export(path, output, device, dtype)


def _export(path: str, output: Path, device: torch.device, dtype: str) -> Export:
    folder = checkpoint_folder(path)
    loaded = load_checkpoint(str(folder), device=device, dtype="float32")
    model = loaded.model
    check_expressible(model, loaded.plan)
    stored = getattr(torch, model.config.spec.kv_dtype) if dtype == "auto" else getattr(torch, dtype)
    stored = torch.bfloat16 if stored == torch.float16 else stored  # which the scale of latents would underflow
    exported = as_deepseek(model, stored)
    needed = sum(p.nbytes for p in exported.parameters())
    check_disk(output, needed, instead="choose a smaller dtype")
    kl = difference(model, as_deepseek(model, torch.float32).to(device))  # type: ignore[arg-type]
    if not kl < WRONG:
        raise CllaError(
            f"the exported model differs from the checkpoint by {kl:.3g} nats per token",
            expected="the same predictions but for rounding",
            remedy="open an issue naming the source model",
        )
    healed = bool(model.config.spec.healed)
    with finished_directory(output, needed=needed) as partial:
        exported.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        report = {"format": "deepseek", "exported_from": Path(path).name, "kl_to_checkpoint": kl, "healed": healed}
        write_text(partial / EXPORT_REPORT, json.dumps(report, indent=1))
    return Export(exported.config.to_dict(), kl, healed)


@torch.no_grad()
def difference(model: CllaForCausalLM, exported: PreTrainedModel) -> float:
    """KL of an exported model to the converted one on latents as they are, nats per token, over random tokens."""
    cache = model.new_cache()
    for group in cache.groups:
        group.layout = RawLayout(*(part.rank for part in group.layout.parts))
    generator = torch.Generator().manual_seed(0)
    ids: Tensor = torch.randint(0, model.config.text_config.vocab_size, (1, CHECK_TOKENS), generator=generator)
    ids = ids.to(model.device)
    own = model(ids, **{CACHE: cache}).logits
    return float(kl_of_logits(exported(ids).logits, own)) / CHECK_TOKENS
