"""`generate` in all its modes: the source's tokens at full rank, or refused before anything runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, pico, pico_of
from conversions import TOLERANCE, full_rank, lossy, source_and_stats
from helpers import converted_of, plan_of, stats_of, tokens
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel, WatermarkingConfig

import clla
from clla.checkpoint.write import write_checkpoint
from clla.modeling.cache_clla import CllaCache
from clla.modeling.hooks_clla import CACHE
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.modeling.observe_clla import PREFIX

COMMON: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"use_cache": False, "num_beams": 2},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 30},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"guidance_scale": 1.5},
        {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "max_cache_len": 200},
        {"cache_implementation": "hybrid"},
        {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(50))},
    ],
    ids=lambda options: " ".join(f"{k}={v if isinstance(v, (int, float, str)) else ''}" for k, v in options.items()),
)
def test_modes_give_the_sources_tokens(options: dict[str, Any]) -> None:
    model, _ = source_and_stats("llama")
    found = []
    for each in (full_rank(), model):
        torch.manual_seed(0)
        found.append(each.generate(tokens(2, 60), **{**COMMON, **options}))
    assert torch.equal(*found)


REFUSED: dict[str, tuple[Callable[[CllaForCausalLM], dict[str, Any]], str]] = {
    "quantized": (lambda _: {"cache_implementation": "quantized"}, "compressed cache is used by itself"),
    "offloaded": (lambda _: {"cache_implementation": "offloaded"}, "compressed cache is used by itself"),
    "offloaded_static": (lambda _: {"cache_implementation": "offloaded_static"}, "compressed cache is used by itself"),
    "sliding_window": (lambda _: {"cache_implementation": "sliding_window"}, "compressed cache is used by itself"),
    "paged": (lambda _: {"cache_implementation": "paged"}, "continuous batching"),
    "cache_config": (lambda _: {"cache_config": {"nbits": 4}}, "leave them out"),
    "another class": (lambda _: {CACHE: DynamicCache()}, "DynamicCache"),
    "another model": (lambda _: {CACHE: full_rank().new_cache()}, "made by another model"),
    "two ways": (lambda model: {CACHE: model.new_cache(), "cache_implementation": "static"}, "leave out either"),
    "early exit": (lambda _: {"assistant_early_exit": 2}, "leaves out layers"),
    "unknown": (lambda _: {"nonsense": 3}, "not used by the model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_anything_runs(name: str) -> None:
    converted, ran = full_rank(), []
    make, message = REFUSED[name]
    options = make(converted)
    hook = converted.source.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=message):
        converted.generate(tokens(1, 30), **COMMON, **options)
    hook.remove()
    assert not ran


def test_continuous_batching_is_refused() -> None:
    with pytest.raises(ValueError, match="continuous batching"):
        full_rank().generate_batch([[1, 2, 3]], generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=257))


def test_attention_with_a_cache_of_its_own_is_refused() -> None:
    _, stats = source_and_stats("llama")
    converted = converted_of(pico(), plan_of(stats, pico()), stats)
    with pytest.raises(ValueError, match="paged cache"):
        converted.set_attn_implementation("paged|sdpa")
    for name in ("eager", "sdpa"):  # in this order: the last one reads latents again
        converted.set_attn_implementation(name)
    assert converted.source.config._attn_implementation == f"{PREFIX}sdpa"
    converted.config._attn_implementation = "paged|eager"
    with pytest.raises(ValueError, match="paged cache"):
        CllaForCausalLM(converted.config)


def test_the_cache_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="made by another model"):
        full_rank()(tokens(1, 5), past_key_values=lossy().new_cache())


# What a source's settings, remainders of its training among them, do to a converted model: nothing.


def leftover_source() -> PreTrainedModel:
    model = pico()
    model.config.use_cache = False
    model.config.gradient_checkpointing = True
    model.config.attention_dropout = 0.5
    settings = {"use_cache": False, "cache_implementation": "quantized", "prefill_chunk_size": 5, "cache_config": {}}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model.train()


def works_as_ever(converted: CllaForCausalLM) -> None:
    model, _ = source_and_stats("llama")
    ids = tokens(1, 40)
    found = converted.generate(ids, **COMMON, return_dict_in_generate=True)
    assert isinstance(found[CACHE], CllaCache) and found[CACHE].get_seq_length() == 45
    assert torch.equal(found.sequences, model.generate(ids, **COMMON))
    with torch.no_grad():
        output = converted(ids)
        torch.testing.assert_close(output.logits, model(ids).logits, **TOLERANCE)
    assert isinstance(output[CACHE], CllaCache)


@pytest.mark.parametrize("saved", ["in memory", "whole", "codec alone"])
def test_training_settings_of_a_source_do_nothing(saved: str, tmp_path: Path) -> None:
    _, stats = source_and_stats("llama")
    source = leftover_source()
    own = source.generation_config.to_dict()
    converted = converted_of(source, plan_of(stats, source), stats)
    if saved == "in memory":
        works_as_ever(converted)
        assert source.generation_config.to_dict() == own, "the source's own settings were changed"
        return
    source.generation_config = GenerationConfig(use_cache=False, prefill_chunk_size=5)
    converted.generation_config = source.generation_config  # as a checkpoint of an earlier version has it
    source.save_pretrained(tmp_path / "source")
    base = {"path": str(tmp_path / "source")} if saved == "codec alone" else None
    write_checkpoint(tmp_path, converted, byte_tokenizer(), base_model=base)
    works_as_ever(CllaForCausalLM.from_pretrained(tmp_path))


def test_mpt_uses_its_cache() -> None:
    """Its config says use_cache false."""
    model, _ = source_and_stats("mpt")
    assert model.config.use_cache is False
    found = full_rank("mpt").generate(tokens(1, 40), **COMMON, return_dict_in_generate=True)
    assert found[CACHE].get_seq_length() == 45
    assert torch.equal(found.sequences, model.generate(tokens(1, 40), **COMMON, use_cache=True))


def test_a_user_may_turn_the_returned_cache_off() -> None:
    converted = lossy()
    converted.config.use_cache = False
    assert CACHE not in converted(tokens(1, 20)) and CACHE in converted(tokens(1, 20), use_cache=True)


@pytest.mark.parametrize("saved", ["whole", "codec alone"])
def test_settings_given_on_loading_are_followed(saved: str, tmp_path: Path) -> None:
    converted = lossy()
    clla.register()  # no test before this one need have done it
    converted.source.save_pretrained(tmp_path / "source")
    base = {"path": str(tmp_path / "source")} if saved == "codec alone" else None
    write_checkpoint(tmp_path, converted, byte_tokenizer(), base_model=base)
    options: dict[str, Any] = {"output_hidden_states": True, "use_cache": False, "torch_dtype": torch.bfloat16}
    for load in (CllaForCausalLM, AutoModelForCausalLM):
        model = load.from_pretrained(tmp_path, **options)
        with torch.no_grad():
            output = model(tokens(1, 50))
        assert len(output.hidden_states) == 5 and CACHE not in output
        assert output.logits.dtype == torch.bfloat16 == model.codec.groups[0].encoder.dtype


@pytest.mark.slow
def test_another_process_opens_a_pickled_model(tmp_path: Path) -> None:
    converted, ids = lossy(), tokens(1, 50)
    converted.rotation_bucket = 1  # there the default is another
    with torch.no_grad():
        torch.save((converted, ids, converted(ids).logits), tmp_path / "model.pt")
    code = "import sys, torch; torch.set_grad_enabled(False); torch.set_num_threads(1); "
    code += "m, ids, x = torch.load(sys.argv[1], weights_only=False); torch.testing.assert_close(m(ids).logits, x)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


# Embeddings


def resizable(tied: bool) -> CllaForCausalLM:
    config = pico().config
    config.tie_word_embeddings = tied
    model = pico_of(config)
    stats = stats_of(model, batches=2)
    return converted_of(model, plan_of(stats, model, rank=32), stats)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("how", ["in memory", "loaded", "codec alone"])
def test_resized_embeddings(tied: bool, how: str, tmp_path: Path) -> None:
    converted = resizable(tied)
    if how != "in memory":
        converted.source.save_pretrained(tmp_path / "source")
        base = {"path": str(tmp_path / "source")} if how == "codec alone" else None
        (tmp_path / "first").mkdir()
        write_checkpoint(tmp_path / "first", converted, byte_tokenizer(), base_model=base)
        converted = CllaForCausalLM.from_pretrained(tmp_path / "first")
    ids = torch.tensor([[1, 290, 3, 299, 5]])
    with torch.no_grad():
        before = converted(ids[:, :1]).logits
        embeddings = converted.resize_token_embeddings(300)
        assert embeddings is converted.get_input_embeddings() and embeddings.weight.shape[0] == 300
        found = converted(ids).logits
        torch.testing.assert_close(found[:, :1, :260], before, **TOLERANCE)
        assert found.shape[-1] == 300
        assert (converted.get_output_embeddings().weight is embeddings.weight) == tied
        assert converted.config.vocab_size == converted.source.config.vocab_size == 300
        assert converted(ids, labels=ids).loss.isfinite()
        converted.save_pretrained(tmp_path / "second")
        loaded = CllaForCausalLM.from_pretrained(tmp_path / "second")
        assert torch.equal(loaded(ids).logits, found) and loaded.config.vocab_size == 300
        assert loaded.resize_token_embeddings(280, pad_to_multiple_of=64).weight.shape[0] == 320
        assert loaded(ids).logits.shape[-1] == loaded.config.vocab_size == 320


def test_tokens_added_by_a_tokenizer() -> None:
    converted, tokenizer = resizable(True), byte_tokenizer()
    tokenizer.add_tokens(["<tool>", "<think>"])
    converted.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer("a<tool>b", return_tensors="pt").input_ids
    assert ids.max() >= 259 and converted.generate(ids, **COMMON).shape == (1, ids.shape[1] + 6)


def test_parts_can_be_set() -> None:
    converted, ids = resizable(False), tokens(1, 50)
    with torch.no_grad():
        expected = converted(ids).logits
        converted.set_input_embeddings(nn.Embedding.from_pretrained(converted.get_input_embeddings().weight.flip(0)))
        torch.testing.assert_close(converted(259 - ids).logits, expected)
        head = converted.get_output_embeddings()
        converted.set_output_embeddings(nn.Linear(64, 260, bias=False))
        converted.get_output_embeddings().weight.data = -head.weight.data
        torch.testing.assert_close(converted(259 - ids).logits, -expected)
