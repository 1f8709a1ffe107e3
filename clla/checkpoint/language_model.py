"""Take the language model out of a model for images or sound, as a checkpoint of its own that can be converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, PreTrainedModel

from clla.arguments import Place, checked
from clla.checkpoint.write import check_output, finished_directory
from clla.errors import CorruptArtifactError, UnsupportedModelError, UsageError, blamed
from clla.source.families import text_only
from clla.source.model import check_complete

TOKENS, SAME = 16, 0.01  # that are run through both, and the relative difference of logits that rounding may leave
POSITIONS_OF_IMAGES = ("mrope_section", "mrope_interleaved")  # of rotations in time, height and width: one for text


@checked
@torch.no_grad()
def extract_language_model(model: Place, output: Place, *, overwrite: bool = False) -> Path:
    """Save the language model of a checkpoint for images or sound, with the tokenizer, as a checkpoint of its own.

    The weights are the same, in the same dtype; the logits of some tokens are compared before anything is written.

    Args:
        model: directory or Hub id of the whole model.
        output: directory to write.
        overwrite: replace what is in `output`.

    Returns:
        The directory, for `clla.convert_model`.

    Raises:
        CllaError: it is no such model or cannot be read, transformers has no class for its language model alone, or
            that class computes something else.

    Example:
        >>> folder = clla.extract_language_model("VISION-MODEL", "text-model")
        >>> done = clla.convert_model(folder, kv_budget="25%", calibration_tokens=4096, evaluate=False)
    """
    name, folder = str(model), Path(output).resolve()
    with blamed(
        f"{name!r} is no model that can be opened",
        expected="a directory or Hub id",
        remedy="check the name",
        kind=CorruptArtifactError,
    ):
        config = AutoConfig.from_pretrained(name)
        text = config.get_text_config()
    if text is config:
        raise UsageError(
            f"{name} is a language model already", expected="a model for images or sound", remedy=f"clla convert {name}"
        )
    target = text_only(config)
    if target is None:
        raise UnsupportedModelError(
            f"transformers has no class for the language model of {config.model_type!r} alone ({text.model_type!r})",
            expected="a language model that is also published without images",
            remedy="convert another model",
        )
    check_output(folder, Path(name), overwrite=overwrite)
    whole = _whole(name, config)
    alone = _alone(whole, text, *target)
    ids = torch.arange(TOKENS, device=whole.device)[None] * 7919 % min(text.vocab_size, 1000)
    found, expected = (m(input_ids=ids).logits.float() for m in (alone, whole))
    moved = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if not moved < SAME:
        raise UnsupportedModelError(
            f"the language model of {config.model_type!r} as a {target[0]!r} model gives logits that differ by "
            f"{100 * moved:.1f} %",
            expected="the same logits",
            remedy="convert another model",
        )
    tokenizer = AutoTokenizer.from_pretrained(name)
    with finished_directory(folder) as unfinished:
        alone.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return folder


def _whole(name: str, config: Any) -> PreTrainedModel:
    """The model for images or sound, by the class that its config names."""
    classes = [getattr(transformers, each, None) for each in config.architectures or ()]
    if not classes or classes[0] is None:
        raise UnsupportedModelError(
            f"{name} names no class of transformers in `architectures`",
            expected="a checkpoint such as Gemma3ForConditionalGeneration",
            remedy="add it to its config.json",
        )
    with blamed(
        f"the weights of {name} cannot be read",
        expected="a complete checkpoint",
        remedy="download it again",
        kind=CorruptArtifactError,
    ):
        model, info = classes[0].from_pretrained(name, dtype="auto", output_loading_info=True)
    check_complete(info, name)
    return model.eval()


def _alone(whole: PreTrainedModel, text: Any, kind: str, told: dict[str, Any]) -> PreTrainedModel:
    """The language model as one of a kind of its own, with the weights of the whole."""
    decoder, head, embedding = whole.get_decoder(), whole.get_output_embeddings(), whole.get_input_embeddings()
    settings = text.to_dict()
    rope = {k: v for k, v in (settings.get("rope_parameters") or {}).items() if k not in POSITIONS_OF_IMAGES}
    tied = head is None or head.weight is embedding.weight
    own = {**told, "model_type": kind, "tie_word_embeddings": tied, "architectures": None, "dtype": whole.dtype}
    config = AutoConfig.for_model(**{**settings, **own, **({"rope_parameters": rope} if rope else {})})
    known = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    cls: Any = known[0] if isinstance(known, tuple) else known
    weights = {f"{cls.base_model_prefix}.{key}": value for key, value in decoder.state_dict().items()}
    if not tied:
        weights["lm_head.weight"] = head.weight
    model, info = cls.from_pretrained(
        None, config=config, state_dict=weights, dtype=whole.dtype, output_loading_info=True
    )
    check_complete(info, f"the language model of {whole.config.model_type!r}")
    return model.eval()
