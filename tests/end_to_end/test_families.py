"""Every family through the same checks; docs/models.md says what they find (`model_table.py`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILY_CONFIGS, OTHER_CONFIGS, byte_tokenizer, pico, pico_config, pico_of
from helpers import converted_of, mostly_slow, plan_of, stats_of, tokens
from model_table import TABLE
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clla.artifacts.plan import Plan
from clla.artifacts.stats import Stats
from clla.calibrate.collect import Collection, Collector, collect
from clla.calibrate.lossless import check_lossless
from clla.calibrate.rope_detection import rope_settings
from clla.checkpoint.write import write_checkpoint
from clla.errors import UnsupportedModelError
from clla.evaluate.measured_cache import with_kept_bytes
from clla.evaluate.plan_tables import plan_tables
from clla.evaluate.source_cache import SourceCache
from clla.modeling import pack_triton_clla, rows_clla, unpack_triton_clla
from clla.modeling.cache_clla import CllaCache
from clla.modeling.hooks_clla import CACHE, rope_of, rotary_module
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.modeling.rotary_clla import ROPE_FORMS, Rope
from clla.source.families import FAMILIES, REFUSED, check_family, kv_shape, split_layers
from clla.source.model import Source
from clla.source.recording import RecordingCache

NAMES = [*FAMILY_CONFIGS, *OTHER_CONFIGS]
CORE = ("llama", "qwen3", "mixtral", "gemma3_text", "gpt_neox", "falcon-alibi", "bamba")
TOLERANCE = {"atol": 5e-3, "rtol": 2e-3}  # 16-bit latents through four fp32 layers
ANSWER = 10  # tokens generated


@dataclass(frozen=True)
class Case:
    """A pico model and its full-rank conversion."""

    model: PreTrainedModel
    stats: Stats
    plan: Plan
    converted: CllaForCausalLM
    rope: dict[str, Any] | None


@cache
def case(name: str) -> Case:
    kind = {**FAMILY_CONFIGS, **OTHER_CONFIGS}[name][0]
    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    model = uneven(pico(name))
    stats = stats_of(model, band=2)
    groups = tuple(stats.layers[i : i + 2] for i in range(0, len(stats.layers), 2))
    plan = plan_of(stats, model, groups=groups)
    plan = with_kept_bytes(replace(plan, kept_window=source_of(model).kept_window), model, itemsize=4)
    converted = converted_of(model, plan, stats)
    return Case(model, stats, plan, converted, converted.config.clla["rope"])


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """Norms whose weights are not all the same, as in trained models: a norm between rotation and cache shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key and key.endswith("weight"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def source_of(model: PreTrainedModel) -> Source:
    layers, kept = split_layers(model.config)
    return Source("pico", ".", None, model.config, kv_shape(model.config), layers, kept, "0", torch.float32)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, **options).logits


def answer_of(model: Any, ids: Tensor) -> Tensor:
    """Greedy, as `generate` does it by itself."""
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=ANSWER, do_sample=False, eos_token_id=None, pad_token_id=258
    )


@pytest.mark.parametrize("name", mostly_slow(NAMES, *CORE))
def test_full_rank_reproduces_the_source(name: str) -> None:
    """Prompts of several chunks, more tokens than any sliding window."""
    found, ids = case(name), tokens(2, 90)
    TABLE.begin(name, {**FAMILY_CONFIGS, **OTHER_CONFIGS}[name][0], found.rope, source_of(found.model))
    torch.testing.assert_close(logits_of(found.converted, ids), logits_of(found.model, ids), **TOLERANCE)
    TABLE.passed(name, "full rank")


@pytest.mark.parametrize("name", mostly_slow(NAMES, *CORE))
def test_token_by_token_equals_one_forward(name: str) -> None:
    found, ids = case(name), tokens(1, 60)
    cache, parts = found.converted.new_cache(), []
    for start, stop in [(0, 21), *((i, i + 1) for i in range(21, 60))]:
        parts.append(logits_of(found.converted, ids[:, start:stop], past_key_values=cache, use_cache=True))
    torch.testing.assert_close(torch.cat(parts, 1), logits_of(found.model, ids), **TOLERANCE)
    TABLE.passed(name, "step by step")


@pytest.mark.parametrize("name", mostly_slow(NAMES, *CORE))
def test_left_padding_and_batch_change_nothing(name: str) -> None:
    """Against the source alone, so that the padding of neither is trusted."""
    found, long, short = case(name), tokens(1, 70), tokens(1, 41, seed=5)
    padded = torch.cat((torch.full((1, 29), 258), short), 1)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :29] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    both = logits_of(found.converted, torch.cat((long, padded)), attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(both[:1], logits_of(found.model, long), **TOLERANCE)
    torch.testing.assert_close(both[1:, 29:], logits_of(found.model, short), **TOLERANCE)
    TABLE.passed(name, "padding")


@pytest.mark.parametrize("name", mostly_slow(NAMES, *CORE))
def test_planned_bytes_are_the_measured_bytes(name: str) -> None:
    """Of the latents and the exact tokens, and of what other layers keep as in the source: a window, or states."""
    found, (layers, kept) = case(name), split_layers(case(name).model.config)
    cache = found.converted.new_cache()
    logits_of(found.converted, tokens(1, 77), past_key_values=cache)
    assert sorted(cache.kept) == list(kept) and sorted(cache.group_of_layer) == list(layers)
    latent = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for g in cache.groups for t in g.tensors()}
    assert sum(latent.values()) == found.plan.bytes_at(77)
    bookkeeping = sum(tensor.nbytes for tensor in cache.timeline.tensors())
    assert cache.nbytes == found.plan.bytes_at(77) + found.plan.kept_bytes_at(77) + bookkeeping
    source = SourceCache(found.model.config, torch.float32)
    found.model(tokens(1, 77), use_cache=True, **{CACHE: source})
    assert source.nbytes == 77 * found.plan.source_bytes_per_token + found.plan.kept_bytes_at(77)
    text = str([table.rows for table in plan_tables(found.plan, 0.0)])
    assert ("left alone" in text) == bool(kept)
    if kept:
        bounded = [found.model.config.layer_types[i] in ("sliding_attention", "chunked_attention") for i in kept]
        window = source_of(found.model).kept_window
        assert (f"a window of {window} tokens" in text) == any(bounded) == bool(window)
        assert (f"a state of {found.plan.kept_state_bytes:,} bytes" in text) == (not all(bounded))
    TABLE.passed(name, "bytes")


def turned_back(model: PreTrainedModel, rope: Rope, layers: tuple[int, ...]) -> dict[int, float]:
    """How much the keys of single tokens differ between positions once the rotation is undone, by layer."""
    ids = tokens(6, 1)
    by_position: list[dict[int, Tensor]] = []
    for position in (2, 61, 700):
        cache, at = RecordingCache(model.config, set(layers)), torch.full_like(ids, position)
        logits_of(model, ids, position_ids=at, use_cache=True, **{CACHE: cache})
        rotation = rope(at)
        by_position.append({i: rotation.unrotate(cache.kv[i][0], i) for i in layers})
    first, *others = by_position
    return {i: max(float((o[i] - first[i]).norm() / first[i].norm()) for o in others) for i in layers}


@pytest.mark.parametrize("name", mostly_slow(NAMES, *CORE))
def test_keys_before_their_rotation_know_no_position(name: str) -> None:
    """With the settings found; with those of any other form, or with a layer misjudged, they do."""
    found = case(name)
    layers, model = found.stats.layers, found.model
    if found.rope is None:
        return
    right = rope_of(model, found.rope)
    assert right is not None and max(turned_back(model, right, layers).values()) < 1e-3
    others = [form for form in ROPE_FORMS if form != found.rope["form"]]
    for form in others:
        try:
            differences = turned_back(model, Rope(right.angles, form, tuple(right.plain_layers)), layers)
        except RuntimeError:
            continue  # twice as many angles as channels
        assert max(differences.values()) > 0.1, form
    for layer in layers:
        misjudged = turned_back(model, Rope(right.angles, right.form, tuple(right.plain_layers ^ {layer})), layers)
        assert misjudged[layer] > 0.1


def narrow(name: str, rope: dict[str, Any] | None = None, **options: Any) -> tuple[PreTrainedModel, CllaForCausalLM]:
    """A model whose first layer sees 12 different tokens, so that latents of rank 16 hold all its keys before RoPE."""
    kind, extra = FAMILY_CONFIGS[name]
    model = pico_of(pico_config(kind, **{**extra, **options}))
    layers, _ = split_layers(model.config)
    rope = rope or rope_settings(model, layers)
    groups = tuple((layer,) for layer in layers)
    many = stats_of(model)
    collector = Collector(model, Collection(layers, kv_shape(model.config), 2, rope))
    few = collect(collector, [tokens(4, 64, seed) % 12 for seed in range(8)], made_from="test")
    plan = plan_of(many, model, groups=groups)
    plan = replace(plan, groups=(replace(plan.groups[0], tier_bits=(16,)), *plan.groups[1:]))
    converted, first = converted_of(model, plan, many), converted_of(model, plan, few)
    converted.codec.groups[0] = first.codec.groups[0]
    converted.config.clla["rope"] = rope
    return model, converted


@torch.no_grad()
def lost(model: PreTrainedModel, converted: CllaForCausalLM, cache: CllaCache | None = None) -> float:
    ids = tokens(2, 90) % 12
    return float((converted(ids, past_key_values=cache).logits - model(ids).logits).abs().max())


def test_layer_without_rotation_is_not_rotated() -> None:
    """SmolLM3 with its first layer plain: taken for rotated, its few keys are too many for the latent."""
    options = {"no_rope_layers": [0, 1, 0, 1]}
    assert lost(*narrow("smollm3", **options)) < 2e-3
    assert lost(*narrow("smollm3", {"form": "halves", "plain_layers": [2]}, **options)) > 2e-2


def test_global_layers_have_the_global_rotation() -> None:
    """Gemma 3 with its first layer global: the local rotation in its place loses much."""
    model, converted = narrow("gemma3_text", layer_types=["full_attention", "sliding_attention"] * 2)
    assert lost(model, converted) < 2e-3
    rotary: Any = rotary_module(model)
    like = next(model.parameters())[:1]
    local = Rope(lambda positions: rotary(like, positions, layer_type="sliding_attention"), "halves")
    assert lost(model, converted, CllaCache(converted.config, converted.codec, local)) > 0.1


# Their keys are normed after the projection, so not linear in the attention input.
QK_NORM = {
    "apertus", "exaone4", "gemma3_text", "gemma3n_text", "gemma4_text", "lfm2", "olmo2", "olmo3",
    "olmo_hybrid", "olmoe", "persimmon", "qwen3", "qwen3_5_text", "qwen3_moe", "qwen3_next",
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(NAMES, *CORE))
def test_first_source_reproduces_the_source(name: str) -> None:
    """With a latent as wide as the input and one layer a group, where keys and values are linear in that input."""
    found, ids = case(name), tokens(1, 60)
    groups = tuple((layer,) for layer in found.stats.layers)
    plan = plan_of(found.stats, found.model, groups=groups, source="first", rank=min(64, found.stats.kv.values))
    converted = converted_of(found.model, plan, found.stats)
    expected, got = logits_of(found.model, ids), logits_of(converted, ids)
    if name in QK_NORM:
        torch.testing.assert_close(got[:, :24], expected[:, :24], **TOLERANCE)  # as long as all is exact
        assert (got - expected).abs().max() > 2e-2  # what the norm does is lost, or the name is in the wrong set
        TABLE.passed(name, "first source", "approximate: QK-norm")
        return
    torch.testing.assert_close(got, expected, **TOLERANCE)
    TABLE.passed(name, "first source")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def saved(name: str, folder: Path) -> Path:
    """The checkpoints `whole` and `adapter` of a family, and what they must give, in a directory."""
    path = folder / name
    if path.exists():
        return path
    found = case(name)
    for part in ("source", "whole", "adapter"):
        (path / part).mkdir(parents=True)
    found.model.save_pretrained(path / "source")
    base = {"path": str(path / "source"), "gguf_file": None, "hub_revision": None}
    write_checkpoint(path / "adapter", found.converted, byte_tokenizer(), base_model=base)
    write_checkpoint(path / "whole", found.converted, byte_tokenizer(), base_model=None)
    expected = {"logits": logits_of(found.converted, tokens(2, 50)), "answer": answer_of(found.model, tokens(2, 32))}
    torch.save(expected, path / "expected.pt")
    return path


@pytest.mark.parametrize("name", mostly_slow(NAMES, *CORE))
def test_saved_and_loaded_again(name: str, folder: Path) -> None:
    """Weights bit for bit, with all of them and with the codec alone; greedy decoding gives the source's tokens."""
    found = case(name)
    path = saved(name, folder)
    expected = torch.load(path / "expected.pt")
    for part in ("whole", "adapter"):
        loaded = CllaForCausalLM.from_pretrained(path / part)
        assert not loaded.training and loaded.dtype == torch.float32
        weights = dict(found.converted.named_parameters())
        assert all(torch.equal(value, weights.pop(key)) for key, value in loaded.named_parameters()) and not weights
        torch.testing.assert_close(logits_of(loaded, tokens(2, 50)), expected["logits"], rtol=1e-3, atol=1e-3, msg=part)
        TABLE.passed(name, "save and load")
        if part == "whole":
            assert torch.equal(answer_of(loaded, tokens(2, 32)), expected["answer"])
            TABLE.passed(name, "generate")


WITHOUT_CLLA = """
import json, sys
sys.modules["clla"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
def tokens(batch, length):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))

for path in sys.argv[1:]:
    expected = torch.load(path + "/expected.pt")
    try:
        for part in ("whole", "adapter"):
            model = AutoModelForCausalLM.from_pretrained(f"{path}/{part}", trust_remote_code=True)
            model.rotation_bucket = 1  # as where what is expected comes from
            with torch.no_grad():
                found = model(tokens(2, 50)).logits  # sums are not rounded alike in every process
            torch.testing.assert_close(found, expected["logits"], rtol=1e-3, atol=1e-3)
            if part == "whole":
                ids = tokens(2, 32)
                answer = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=expected["answer"].shape[1] - 32,
                    do_sample=False, eos_token_id=None, pad_token_id=258,
                )
                assert torch.equal(answer, expected["answer"]), "tokens"
        print(json.dumps({path: "ok"}))
    except Exception as error:
        print(json.dumps({path: f"{type(error).__name__}: {error}"}))
"""


@pytest.mark.slow
def test_checkpoints_run_without_clla(folder: Path) -> None:
    """The shipped code alone, in one process for all families."""
    paths = {}
    for name in NAMES:
        try:
            paths[name] = str(saved(name, folder))
        except pytest.skip.Exception:
            continue
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CLLA, *paths.values()],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    said = {path: verdict for line in lines for path, verdict in json.loads(line).items()}
    assert said == dict.fromkeys(paths.values(), "ok"), done.stderr[-2000:]
    for name in paths:
        TABLE.passed(name, "without clla")


# What cannot be converted.


def refusal(config: Any) -> str:
    """How a config is refused before a model is made of it."""
    with pytest.raises(UnsupportedModelError) as caught:
        check_family(config)
        split_layers(config)
    return str(caught.value)


def test_tables_name_models_that_exist() -> None:
    """A name misspelt would neither be refused nor tested."""
    assert {kind for kind, _ in FAMILY_CONFIGS.values()} == set(FAMILIES)
    assert not set(FAMILIES) & set(REFUSED)
    for name in REFUSED.keys() & CONFIG_MAPPING_NAMES.keys():
        assert name == "clla" or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, name


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(name: str) -> None:
    """And rightly: the config says that it keeps a latent, a state, or both."""
    if name == "clla":
        config: Any = case("llama").converted.config
        assert "source model" in refusal(config)
        return
    if name not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {name}")
    config = AutoConfig.for_model(name)
    assert REFUSED[name] in refusal(config)
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if "latent" in REFUSED[name]:
        names = {*vars(text), *dir(type(text))}
        assert names & {"kv_lora_rank", "compress_rates", "kv_compression_rank"}, names
    elif "state" in REFUSED[name]:
        marks = {"state_size", "mamba_d_state", "attention_hidden_size", "lru_width", "mamba_expand", "qk_dim_factor"}
        assert kinds & {"hybrid", "linear_attention"} or any(hasattr(text, mark) for mark in marks)
    TABLE.refused[name] = REFUSED[name]


def several_models() -> Any:
    """A config that answers as those of models with several language models do."""

    def ambiguous(*args: Any, **options: Any) -> Any:
        raise ValueError("Multiple valid text configs were found")

    config = pico_config("llama")
    config.get_text_config = ambiguous
    return config


SCALED = {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)], **SCALED}
PHI3_LONG = {"sliding_window": None, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (lambda: AutoConfig.for_model("bart"), "encoder-decoder"),
        (several_models, "several models"),
        (lambda: AutoConfig.for_model("bert", architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (lambda: AutoConfig.for_model("vit"), "'vit'"),
        (lambda: AutoConfig.for_model("falcon", new_decoder_architecture=True), "repeats its keys"),
        (lambda: AutoConfig.for_model("llama", quantization_config={"quant_method": "gptq", "bits": 4}), "quantized"),
        (lambda: AutoConfig.for_model("mistral", sliding_window=4096), "bounded cache"),
        (lambda: AutoConfig.for_model("llama", kv_lora_rank=8), "latent already"),
        (
            lambda: pico_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, **SCALED}),
            "dynamic RoPE",
        ),
        (lambda: pico_config("phi3", **PHI3_LONG), "longrope RoPE"),
        (lambda: pico_config("qwen3_next", layer_types=["compressed_sparse_attention"] * 4), "compressed_sparse"),
    ],
)
def test_refused_by_config(config: Any, says: str) -> None:
    assert re.search(says, refusal(config()))


def test_longrope_within_its_original_length_converts() -> None:
    """As the message says, and the weights then see the rotations they were trained with."""
    config = pico_config("phi3", **PHI3_LONG)
    remedy = refusal(config)
    factor = float(remedy.split('"attention_factor": ')[1].split()[0])
    whole = pico_of(config)
    settings = {**LONGROPE, "attention_factor": factor}
    short = pico_of(pico_config("phi3", **{**PHI3_LONG, "rope_parameters": settings}, max_position_embeddings=64))
    torch.testing.assert_close(logits_of(short, tokens(2, 64)), logits_of(whole, tokens(2, 64)), rtol=1e-4, atol=1e-5)
    check_family(short.config)
    stats = stats_of(short)
    converted = converted_of(short, plan_of(stats, short), stats)
    torch.testing.assert_close(logits_of(converted, tokens(2, 64)), logits_of(short, tokens(2, 64)), **TOLERANCE)


MULTI = {"num_key_value_heads": 4}
TRIED: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({**MULTI}, "it is an encoder unless `is_decoder` is set"),
    "codegen": ({**MULTI, "rotary_dim": 8, "n_inner": 96, "n_ctx": 1024}, "it keeps its rotations in its attention"),
    "cpmant": ({**MULTI, "dim_head": 16, "dim_ff": 96, "prompt_length": 4}, "it puts tokens before the text"),
    "gpt_neo": ({**MULTI, "attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 24,
                 "num_hidden_layers": None}, "its attention has no layer index"),
    "gpt_neox_japanese": ({**MULTI}, "it needs contiguous keys"),
    "gptj": ({**MULTI, "rotary_dim": 8, "n_inner": 96}, "it keeps its rotations in its attention"),
    "granite_swa": ({"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2},
                    "it has several rotary modules"),
    "hunyuan_v1_dense": ({"head_dim": 16}, "it norms its keys after their rotation"),
    "hrm_text": ({**MULTI}, "its layers run several times"),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 8,
               "use_mamba_kernels": False, "num_experts": 2}, "its states forget what came before the current call"),
    "mimo_v2_flash": ({"head_dim": 32, "v_head_dim": 16, "swa_head_dim": 32, "swa_v_head_dim": 16,
                       "num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 32,
                       "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2},
                      "keys and values differ in size"),
    "nanochat": ({}, "it rotates its keys the other way round"),
    "openai-gpt": ({**MULTI}, "it keeps no cache"),
    "roberta": ({**MULTI, "is_decoder": True}, "it counts positions from the padding token's id"),
    "trocr": ({**MULTI}, "its cross-attention shares the layer's index"),
    "xlm": ({**MULTI}, "it masks as if there were no cache"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(TRIED))
def test_refused_after_loading(kind: str) -> None:
    """The config looks ordinary, and what the model does is not."""
    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    extra, reason = TRIED[kind]
    sizes = {key: value for key, value in extra.items() if value is not None}
    config = pico_config(kind, without=[key for key in extra if extra[key] is None], **sizes)
    check_family(config)
    layers, _ = split_layers(config)
    with pytest.raises(UnsupportedModelError, match=kind):
        rope_settings(uneven(pico_of(config)), layers)
    TABLE.tried[kind] = reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lossless_check_tells_right_from_wrong(dtype: torch.dtype) -> None:
    """It passes in 16 bits too, where rounding moves the logits, and notices settings that are wrong."""
    found = case("cohere")
    model = pico("cohere").to(dtype)
    check_lossless(model, found.stats.layers, found.rope)
    forgetful = pico("llama").to(dtype)
    inner = forgetful.model.forward

    def from_zero_in_every_call(*args: Any, position_ids: Tensor | None = None, **options: Any) -> Any:
        return inner(
            *args, position_ids=None if position_ids is None else position_ids - position_ids[:, :1], **options
        )

    forgetful.model.forward = from_zero_in_every_call
    with pytest.raises(UnsupportedModelError, match="changes its logits"):
        check_lossless(forgetful, found.stats.layers, {"form": "halves", "plain_layers": []})


def test_lossless_check_needs_no_kernels(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, too: kernels do not know its rows."""
    for module in (rows_clla, pack_triton_clla, unpack_triton_clla):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    found = case("llama")
    check_lossless(pico("llama").to(kernel_device), found.stats.layers, found.rope)
