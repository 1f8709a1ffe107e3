"""The recipe: everything that decides a conversion, as one validated document."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from clla import usage
from clla.errors import UsageError
from clla.hub.commits import COMMIT
from clla.modeling.sizes_clla import WORD_BITS
from clla.recipes import builtin_recipes

RECIPE_VERSION = 1
SHORTEST = 32  # tokens of a sequence that a model is fitted on
LARGEST = 2**53  # whole number: more is a slip, and neither JSON nor torch would hold it
BREAKS = "\x85\u2028\u2029"  # YAML takes them for ends of lines, and reads spaces for them


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic or Python would take for something else, or what nothing later can hold."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, bool) and wanted is not bool:
                raise ValueError("yes and no are neither numbers nor words")
            if isinstance(part, int) and abs(part) > LARGEST:
                raise ValueError(f"expected at most {LARGEST}")
            if isinstance(part, str) and not part.isascii():
                part.encode()  # a ValueError for half a surrogate pair
        return value


class CalibrationConfig(_Section):
    """Text from which moments and the Fisher metric are taken."""

    dataset: str = Field(
        "bundled",
        description="'bundled', 'self', a .txt/.jsonl/.parquet file, or a Hub data set (user/name/config:split)",
    )
    tokens: int | None = Field(None, gt=0, description="tokens to read; by default 16384 on CPU, 262144 on GPU")
    sequence_length: int | None = Field(
        None, ge=SHORTEST, description="tokens per sequence; by default 2048, or as many as the model takes"
    )
    batch_size: int | None = Field(None, ge=1, description="sequences per forward pass; by default 1 on CPU, 4 on GPU")
    skip_positions: int = Field(8, ge=0, description="first positions of each sequence left out (sinks are outliers)")
    basis: int = Field(
        2048,
        ge=16,
        description="most coordinates in which the moments of one layer are kept, to bound memory",
    )
    seed: int = Field(0, description="seed of shuffling and of sampled labels")


class BudgetConfig(_Section):
    """The one dial, and at which context length it is read."""

    kv_budget: str = Field("6.25%", description="share of the source's KV bytes ('6.25%', '0.0625') or bytes ('1440B')")
    budget_context: int | None = Field(
        None,
        ge=0,
        description="context at which the budget holds (0: latents only); default: the model's, at most 32768",
    )
    exact_window: int | None = Field(
        None, ge=0, description="newest tokens kept exact; default: derived from the budget"
    )
    num_sinks: int = Field(4, ge=0, description="first tokens kept exact")

    @field_validator("kv_budget", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) else value

    @field_validator("kv_budget")
    @classmethod
    def _readable(cls, value: str) -> str:
        try:
            parse_budget(value, source_bytes=math.inf, option="kv_budget")
        except UsageError as error:
            raise ValueError(str(error)) from error
        return value


class PlanConfig(_Section):
    """How layers are grouped and bits given out."""

    planner: Literal["dynamic", "uniform", "cluster", "pyramid", "kvsharer"] = Field(
        "dynamic", description="dynamic programming, or one of the simpler planners for comparison"
    )
    sharing_order: Literal["similar", "dissimilar"] = Field(
        "similar", description="which neighbours 'kvsharer' tries to merge first; its paper's order is 'dissimilar'"
    )
    latent_input: Literal["all_layers", "first_layer"] = Field(
        "all_layers",
        description="what a latent is made from: keys and values of all layers of its group, or the attention input of "
        "the first one (CLLA as published)",
    )
    key: Literal["reconstruct", "decoupled"] = Field(
        "reconstruct",
        description="keys decoded whole and then rotated, or in two parts: a short rotary key cached beside the "
        "latent, and a position-free rest (needs latent_input 'first_layer', exact_window 0, num_sinks 0, and healing)",
    )
    qk_rope_head_dim: int | None = Field(
        None, ge=8, description="values of a layer group's rotary key, a multiple of 8; default: the head dim"
    )
    rope_bits: int = Field(6, description="bit width of the rotary key's components")
    layout: Literal["free", "deepseek"] = Field(
        "free", description="'deepseek' keeps decoupled keys within what DeepseekV3 can express (clla export)"
    )
    max_layers_per_group: int | None = Field(
        None,
        ge=1,
        le=64,
        description="most layers that share a latent; by default 6, below 6.25 % up to 16, so that a layer reads "
        "about as many components, but at least 6 and no more than have 12288 values per token",
    )
    bits: tuple[int, ...] = Field((1, 2, 3, 4, 5, 6, 8), description="bit widths a component may take")
    tier_size: int = Field(8, description="neighbouring components that share a bit width")
    metric: Literal["fisher", "pca", "weights", "asvd"] = Field(
        "fisher", description="what makes a direction worth keeping; all but 'fisher' are baselines"
    )
    metric_power: float = Field(0.75, ge=0, le=1, description="exponent of the Fisher metric")
    flush_block: int = Field(16, ge=1, description="tokens that leave the exact window at once")
    reading_price: float = Field(
        0,
        ge=0,
        le=16,
        description="bits that each layer which reads a component adds to its price: the higher, the "
        "fewer components are read, for some loss at equal bytes",
    )

    @property
    def group_size(self) -> int:
        """`max_layers_per_group` of a resolved recipe."""
        assert self.max_layers_per_group is not None, "the recipe is not resolved"
        return self.max_layers_per_group

    @property
    def source(self) -> Literal["group", "first"]:
        """`latent_input` as plans and configs of checkpoints write it."""
        return "group" if self.latent_input == "all_layers" else "first"

    @field_validator("bits", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("bits")
    @classmethod
    def _known_widths(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or any(bits not in WORD_BITS for bits in value):
            raise ValueError(f"expected some of {sorted(WORD_BITS)}")
        return tuple(sorted(set(value)))

    @field_validator("rope_bits")
    @classmethod
    def _known_width(cls, value: int) -> int:
        if value not in WORD_BITS:
            raise ValueError(f"expected one of {sorted(WORD_BITS)}")
        return value

    @field_validator("tier_size", "qk_rope_head_dim")
    @classmethod
    def _packable(cls, value: int | None) -> int | None:
        if value is not None and (value <= 0 or value % 8):
            raise ValueError("expected a multiple of 8")
        return value


class RuntimeConfig(_Section):
    """How the model computes."""

    prefill_chunk: int = Field(2048, ge=1, description="most tokens of one forward pass; they see each other exactly")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the calibration pass; 'auto' keeps a 16-bit checkpoint's dtype where that is fast"
    )
    placement: Literal["auto", "device", "spread", "stream"] = Field(
        "auto",
        description="where the source is while it is calibrated: on one device, spread over several GPUs, or with its "
        "layers read from disk one at a time; 'auto' takes the first that has room",
    )
    gradient_checkpointing: Literal["auto", "always", "never"] = Field(
        "auto",
        description="run layers again in the backward pass of calibration, for the time of one more forward pass; "
        "'auto' does so where what they leave in memory would not fit",
    )


class HealConfig(_Section):
    """Brief distillation of the converted model against its source, on its quantized latents."""

    tokens: int | None = Field(None, gt=0, description="tokens to train on; by default chosen by budget and device")
    train: Literal["codec", "attention", "all"] | None = Field(
        None, description="what learns beside the codec; default: nothing from 10 % of the cache on, all weights below"
    )
    codec_lr: float | None = Field(
        None,
        gt=0,
        description="highest learning rate of the codec; default 1e-3 for 65536 tokens per step, by square root",
    )
    weight_lr: float | None = Field(
        None, gt=0, description="highest learning rate of the weights; default a tenth of the codec's"
    )
    sequence_length: int | None = Field(
        None, ge=SHORTEST, description="tokens per sequence; by default 2048, or as many as the model takes"
    )
    batch_tokens: int | None = Field(None, gt=0, description="tokens per step; by default 2048 on CPU, 65536 on GPU")
    codec_share: float = Field(
        0.0, ge=0, lt=1, description="share of the tokens that first trains codecs alone, against attention outputs"
    )
    cache_share: float = Field(
        0.1, ge=0, le=1, description="last share of the steps that runs chunk by chunk on the model's own cache"
    )
    evaluations: int = Field(10, ge=1, description="how often held-out KL is measured and the state is saved")
    dataset: str | None = Field(
        None, description="text to train on, named as calibration.dataset, which is the default"
    )
    gradient_checkpointing: bool = Field(False, description="compute layers twice to save memory")
    seed: int = Field(0, description="seed of the order of the text")


class Provenance(_Section):
    """Where a resolved recipe was run; written by clla, not read."""

    model: str
    revision: str
    versions: dict[str, str]

    @property
    def source(self) -> str:
        """The model as it can be opened again, of the Hub at the commit that was read."""
        return f"{self.model}@{self.revision}" if self.on_hub else self.model

    @property
    def on_hub(self) -> bool:
        """Whether the model is a Hub id: only there a revision is a commit."""
        return COMMIT.fullmatch(self.revision) is not None


class _Dumper(yaml.SafeDumper):
    """Writes text so that it is read again as it was: breaks that are no newlines are escaped."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if set(text) & set(BREAKS) else None)


_Dumper.add_representer(str, _text)


def to_yaml(data: dict[str, Any]) -> str:
    """YAML of plain values, keys in their order; texts are read again as they were."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class Recipe(_Section):
    """A whole conversion."""

    schema_version: Literal[1] = Field(1, description="version of this document's format")
    description: str = Field("", description="one line for `clla recipes ls`")
    calibration: CalibrationConfig = Field(default_factory=lambda: CalibrationConfig())
    budget: BudgetConfig = Field(default_factory=lambda: BudgetConfig())
    plan: PlanConfig = Field(default_factory=lambda: PlanConfig())
    runtime: RuntimeConfig = Field(default_factory=lambda: RuntimeConfig())
    heal: HealConfig | None = Field(None, description="train after the conversion; left out: do not")
    provenance: Provenance | None = Field(None, description="written into resolved recipes")

    def override(self, changes: dict[str, dict[str, Any]]) -> Recipe:
        """A copy with fields of sections replaced; None leaves a field alone.

        Raises:
            UsageError: a value is not admissible.
        """
        data = self.model_dump(mode="json")
        for section, values in changes.items():
            data[section] = (data[section] or {}) | {k: v for k, v in values.items() if v is not None}
        return _validate(data, "the options", named)

    def to_yaml(self) -> str:
        return to_yaml(self.model_dump(mode="json", exclude_none=True))


# Options of functions and commands: the section and the field of a recipe that each stands for.
OPTIONS = {
    **{name: ("budget", name) for name in ("kv_budget", "budget_context", "exact_window", "num_sinks")},
    **{name: ("plan", name) for name in ("max_layers_per_group", "bits", "latent_input", "planner", "reading_price")},
    "dataset": ("calibration", "dataset"),
    "calibration_tokens": ("calibration", "tokens"),
    "sequence_length": ("calibration", "sequence_length"),
    "seed": ("calibration", "seed"),
    "heal_tokens": ("heal", "tokens"),
    "heal_train": ("heal", "train"),
    "dtype": ("runtime", "compute_dtype"),
    "placement": ("runtime", "placement"),
}
# The options of each command, and of the function of its name.
OPTIONS_OF = {
    "convert": OPTIONS,
    "plan": {name: field for name, field in OPTIONS.items() if field[0] in ("budget", "plan")},
    "heal": {name: ("heal", name) for name in HealConfig.model_fields},
}
SECTIONS: dict[str, type[_Section]] = {
    "calibration": CalibrationConfig,
    "budget": BudgetConfig,
    "plan": PlanConfig,
    "runtime": RuntimeConfig,
    "heal": HealConfig,
}


def changes_of(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What options (`OPTIONS`) change in a recipe, as `Recipe.override` takes it; None changes nothing."""
    changes: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if value is not None:
            section, field = OPTIONS[name]
            changes.setdefault(section, {})[field] = value
    return changes


def named(*place: str | int) -> str:
    """A field of a recipe for a message, with the option for it of the command that runs, where it has one."""
    found = [name for name, field in OPTIONS_OF.get(usage.verb(), {}).items() if field == place[:2]]
    return _dotted(*place) + "".join(f" (--{name.replace('_', '-')})" for name in found)


def parse_budget(text: str, *, source_bytes: float | None, option: str = "--kv-budget") -> float:
    """Bytes per token from '6.25%', '0.0625' or '1440B' (also plain numbers above 100).

    Args:
        text: as the user wrote it.
        source_bytes: the source's KV bytes per token; infinite to check the syntax alone; None where shares alone are
            taken, and returned.
        option: that it was given to, for messages.

    Raises:
        UsageError: not readable, not positive, or above 100 % of the source.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(%|B|bytes|KB|KiB)?\s*", text)
    in_bytes = match is not None and match[2] not in (None, "%")
    if match is None or (in_bytes and source_bytes is None):
        forms = "'6.25%' or '0.0625'" if source_bytes is None else "'6.25%', '0.0625' or '1440B'"
        raise UsageError(f"{option} is {text!r}", expected=forms, remedy="write it so")
    number, unit = float(match[1]), match[2]
    if unit is None and 1 < number <= 100:
        in_percent = f"'{text}%' for percent"
        raise UsageError(
            f"{option} {text} has no unit",
            expected=in_percent if source_bytes is None else f"{in_percent} or '{text}B' for bytes per token",
            remedy="add the unit",
        )
    whole = 1.0 if source_bytes is None else source_bytes
    factor = {"%": whole / 100, "KB": 1000.0, "KiB": 1024.0}.get(unit or "", 1.0)
    amount = number * (whole if unit is None and number <= 1 else factor)
    if not 0 < number < math.inf or not amount <= whole or (unit == "%" and number > 100):
        known = f" ({whole:.0f})" if source_bytes is not None and math.isfinite(whole) else ""
        raise UsageError(
            f"{option} {text} is out of range",
            expected=f"more than 0 and at most 100 % of the source's bytes per token{known}",
            remedy="the built-in recipes use 12.5, 6.25, 3 and 2 %",
        )
    return amount


def load_recipe(name_or_path: str) -> Recipe:
    """A built-in recipe by name, or one from a YAML file.

    Raises:
        UsageError: no such recipe, not YAML, or keys and values that do not belong (all are listed).
    """
    builtin = builtin_recipes()
    path = builtin.get(name_or_path, Path(name_or_path).expanduser())
    if not path.is_file():
        raise UsageError(
            f"no recipe {name_or_path!r}",
            expected="a YAML file or one of " + ", ".join(builtin),
            remedy="see: clla recipes ls",
        )
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also undecodable, and dates that do not exist
        raise UsageError(f"{path} is not YAML: {error}", remedy="compare with: clla recipes show balanced") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds no mapping", remedy="compare with: clla recipes show balanced")
    version = data.get("schema_version", RECIPE_VERSION)
    if isinstance(version, int) and version > RECIPE_VERSION:
        raise UsageError(
            f"{path} has schema_version {version}",
            expected=f"{RECIPE_VERSION} or older",
            remedy="upgrade with: pip install -U clla",
        )
    return _validate(data, str(path))


class _Loader(yaml.SafeLoader):
    """As `yaml.safe_load`, but of two equal keys the first is not lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _dotted(*place: str | int) -> str:
    return ".".join(map(str, place))


def _validate(data: dict[str, Any], where: str, name: Callable[..., str] = _dotted) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [f"{name(*e['loc'])}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise UsageError(
            f"{where}: {len(lines)} mistake{'s' if len(lines) > 1 else ''}\n  " + "\n  ".join(lines),
            remedy="all fields with their meaning: clla recipes show --schema",
        ) from error
