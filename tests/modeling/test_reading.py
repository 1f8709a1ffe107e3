"""Attention that reads latents: the same as over decoded keys and values, in every use of the cache.

What is expected comes from the same model with reading forbidden, whose attention is the source's own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import pico, pico_config, pico_of
from conversions import full_rank, lossy, source_and_stats
from helpers import converted_of, kept_bytes, mostly_slow, plan_of, stats_of, tokens
from torch import Tensor
from transformers import CompileConfig

from clla.modeling import attention_clla, quantize_clla, rotary_clla, rows_clla, unpack_triton_clla
from clla.modeling.attention_clla import Buckets, LatentRows
from clla.modeling.cache_clla import CllaCache
from clla.modeling.group_clla import LatentGroup
from clla.modeling.hooks_clla import CACHE
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.modeling.quantize_clla import RowLayout
from clla.modeling.rotary_clla import Turns
from clla.native.reading import attended

CLOSE = {"atol": 2e-4, "rtol": 1e-3}
COMMON: dict[str, Any] = {"do_sample": False, "eos_token_id": 257, "pad_token_id": 258}
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "cohere", "phi3", "gpt_neox", "smollm3", "olmo2")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers that read latents, in order, as they do so."""
    found: list[int] = []
    attend = LatentGroup.attend

    def watched(self: LatentGroup, layer: int, *args: Any) -> Tensor:
        found.append(layer)
        return attend(self, layer, *args)

    monkeypatch.setattr(LatentGroup, "attend", watched)
    return found


@torch.no_grad()
def logits_of(
    model: CllaForCausalLM, ids: Tensor, sizes: list[int], mask: Tensor | None = None, *, reading: bool = True
) -> tuple[Tensor, CllaCache]:
    """Logits of a text that comes in parts of these sizes."""
    cache, parts, start = model.new_cache(), [], 0
    if not reading:
        cache._may_read_latents = lambda *_: False  # type: ignore[method-assign]
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    for size in sizes:
        stop = start + size
        part = {} if positions is None or mask is None else {"position_ids": positions[:, start:stop]}
        seen = None if mask is None else mask[:, :stop]
        output = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True, **part)
        parts.append(output.logits)
        start = stop
    return torch.cat(parts, 1), cache


def parts(length: int, step: int, first: int = 24) -> list[int]:
    steps, rest = divmod(length - first, step)
    return [first] + [step] * steps + [rest] * (rest > 0)


def same(model: CllaForCausalLM, ids: Tensor, sizes: list[int], mask: Tensor | None = None) -> None:
    found, cache = logits_of(model, ids, sizes, mask)
    expected, other = logits_of(model, ids, sizes, mask, reading=False)
    seen = slice(None) if mask is None else mask[:, : ids.shape[1]].bool()
    torch.testing.assert_close(found[seen], expected[seen], **CLOSE)
    assert cache.get_seq_length() == other.get_seq_length() == ids.shape[1] and cache.nbytes == other.nbytes
    for mine, theirs in zip(cache.groups, other.groups, strict=True):
        assert (mine.encoded, mine.filled) == (theirs.encoded, theirs.filled)


@pytest.mark.usefixtures("usual_rotations")
@pytest.mark.parametrize("compiled", [False, True], ids=["PyTorch", "compiled code"])
def test_the_default_dtype_changes_nothing(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines set it to the model's while they make one, and check it there."""
    model, stats = source_and_stats("llama")
    converted, ids = converted_of(model, plan_of(stats, model, bits=5, rank=48), stats), tokens(2, 80)
    converted = copy.deepcopy(converted).bfloat16()
    monkeypatch.setattr(attention_clla, "COMPILED", attended if compiled else None)
    expected, _ = logits_of(converted, ids, parts(80, 1))
    monkeypatch.setattr(quantize_clla, "_STEPS", {})
    monkeypatch.setattr(quantize_clla, "_TABLES", {})
    torch.set_default_dtype(torch.bfloat16)
    try:
        found, _ = logits_of(converted, ids, parts(80, 1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("source", ["group", "first"])
@pytest.mark.parametrize("sinks", [0, 4])
def test_equals_the_sources_attention_over_decoded_tokens(step: int, source: str, sinks: int, reads: list[int]) -> None:
    model, stats = source_and_stats("llama")
    groups = tuple((layer,) for layer in stats.layers) if source == "first" else ()
    # 8 bits: the order of a sum may turn a code, which 4 bits would show as a difference of the logits.
    plan = plan_of(stats, model, bits=8, rank=48, groups=groups, source=source, sinks=sinks)
    same(converted_of(model, plan, stats), tokens(2, 80), parts(80, step))
    assert len(reads) >= 4 * (20 // step) and set(reads) == {0, 1, 2, 3}


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, *list(FAMILIES)[:2]))
def test_families_read_alike(family: str, reads: list[int]) -> None:
    """Whatever their rotation, norms and heads; those whose attention is not ordinary simply do not read."""
    model = pico(family)
    stats = stats_of(model)
    converted = converted_of(model, plan_of(stats, model, bits=5, rank=32), stats)
    same(converted, tokens(2, 60), parts(60, 1))
    assert reads, "none of these families needs anything else"


@pytest.mark.parametrize("padding", [3, 20, 37])
def test_padding_is_not_seen(padding: int, reads: list[int]) -> None:
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :padding] = 0
    same(lossy(sinks=4), tokens(2, 70), parts(70, 1, first=40), mask)
    assert reads


def test_holes_in_a_mask_are_left_to_the_model(reads: list[int]) -> None:
    converted, ids, mask = lossy(sinks=4), tokens(1, 60), torch.ones(1, 60, dtype=torch.long)
    mask[:, 30:33] = 0
    with torch.no_grad():
        logits = []
        for allowed in (True, False):
            cache = converted.new_cache()
            if not allowed:
                cache._may_read_latents = lambda *_: False  # type: ignore[method-assign]
            converted(ids[:, :59], attention_mask=mask[:, :59], past_key_values=cache)
            logits.append(converted(ids[:, 59:], attention_mask=mask, past_key_values=cache).logits)
    assert torch.equal(*logits) and not reads


def test_eager_attention_and_gradients_do_not_read(reads: list[int]) -> None:
    model, stats = source_and_stats("llama")
    converted = lossy()
    cache = converted.new_cache()
    for size in (40, 1):
        converted(tokens(1, size), past_key_values=cache)
    assert not reads  # gradients are on
    with torch.no_grad():
        converted(tokens(1, 1), past_key_values=cache)
    assert len(reads) == 4
    eager = pico("llama")
    eager.set_attn_implementation("eager")
    logits_of(converted_of(eager, plan_of(stats, model, bits=4, rank=48), stats), tokens(1, 40), [30, 1, 1])
    assert len(reads) == 4


def test_many_queries_take_decoded_tokens(reads: list[int]) -> None:
    """Four heads of queries against 2 x 16 channels of keys: up to eight tokens at once read, where there is room."""
    for step, reading in ((8, True), (9, False)):
        reads.clear()
        logits_of(lossy(window=8, flush_block=24), tokens(1, 40 + step), [40, step])
        assert bool(reads) == reading


def test_a_call_that_fails_leaves_the_cache_as_it_was() -> None:
    converted, ids = lossy(sinks=4), tokens(1, 61)
    _, cache = logits_of(converted, ids, parts(60, 1))
    _, twin = logits_of(converted, ids, parts(60, 1))
    layer = converted.source.model.layers[2]

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    hook = layer.register_forward_pre_hook(fail)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="no memory"):
            converted(ids[:, 60:], past_key_values=cache)
        hook.remove()
        found = converted(ids[:, 60:], past_key_values=cache).logits
        expected = converted(ids[:, 60:], past_key_values=twin).logits
    assert torch.equal(found, expected) and cache.get_seq_length() == 61


def test_nothing_of_a_step_is_kept() -> None:
    converted = lossy(sinks=4)
    _, cache = logits_of(converted, tokens(2, 61), parts(61, 1))
    assert kept_bytes([cache.groups, cache.timeline]) == cache.nbytes
    assert cache._workspace._held and cache._workspace.owner is None  # memory for the next step, but no rows


def test_rows_are_unpacked_in_blocks_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    converted, ids = lossy(sinks=4), tokens(2, 80)
    expected, _ = logits_of(converted, ids, parts(80, 1))
    monkeypatch.setattr(rows_clla, "HELD_BYTES", 0)
    monkeypatch.setattr(rows_clla, "BLOCK", 7)
    for reading in (True, False):
        found, _ = logits_of(converted, ids, parts(80, 1), reading=reading)
        torch.testing.assert_close(found, expected, **CLOSE)


# Selection of tokens


def test_selecting_as_many_as_there_are_changes_nothing() -> None:
    converted, ids = lossy(), tokens(1, 80)
    expected, _ = logits_of(converted, ids, parts(80, 1))
    converted.attend_top_k = 80
    found, _ = logits_of(converted, ids, parts(80, 1))
    assert torch.equal(found, expected)


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, Tensor]]]:
    """Rows there were, and the indices chosen of them."""
    found: list[tuple[int, Tensor]] = []
    chosen = LatentRows.chosen

    def watched(self: LatentRows, index: Tensor) -> LatentRows:
        found.append((self.count, index))
        return chosen(self, index)

    monkeypatch.setattr(LatentRows, "chosen", watched)
    yield found


@pytest.mark.parametrize("in_blocks", [False, True])
def test_the_best_tokens_by_weight_are_selected(
    in_blocks: bool, selected: list[tuple[int, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by all components, the selected tokens are those with the most weight in the model's own attention."""
    monkeypatch.setattr(attention_clla, "JUDGING_RANK", 10_000)
    if in_blocks:
        monkeypatch.setattr(rows_clla, "HELD_BYTES", 0)
    converted, ids = lossy(sinks=0), tokens(2, 60)
    _, cache = logits_of(converted, ids, parts(59, 1))
    cache.attend_top_k = 9
    weights = weights_of_last_token(converted, ids)
    with torch.no_grad():
        converted(ids[:, 59:], past_key_values=cache)
    assert len(selected) == 4, "one choice a layer"
    for layer, (count, index) in enumerate(selected):
        if layer:  # what later layers see has gone through the selection of the first
            assert index.shape == (2, 9) and all(len(set(row.tolist())) == 9 for row in index)
            continue
        judged = weights[layer][:, :, -1, :count].sum(1)
        best = judged.topk(9).values.sum(1)
        torch.testing.assert_close(
            judged.gather(1, index).sum(1), best, rtol=5e-3, atol=0
        )  # the judge knows no exact tokens
        assert bool((best > 1.08 * 9 * judged.mean(1)).all()), "any choice would be as good"


def weights_of_last_token(converted: CllaForCausalLM, ids: Tensor) -> list[Tensor]:
    """Attention weights [B, H_q, T, S] of each layer over decoded tokens."""
    model, stats = source_and_stats("llama")
    eager = pico("llama")
    eager.set_attn_implementation("eager")
    twin = converted_of(eager, plan_of(stats, model, bits=4, rank=64, sinks=0), stats)
    cache = twin.new_cache()
    with torch.no_grad():
        twin(ids[:, :59], past_key_values=cache)
        return list(twin(ids[:, 59:], past_key_values=cache, output_attentions=True).attentions)


def test_of_what_is_not_selected_the_first_components_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other bytes of rows that were not chosen may hold anything; those of their first components count."""
    monkeypatch.setattr(attention_clla, "JUDGING_RANK", 8)
    monkeypatch.setattr(attention_clla, "JUDGING_SHARE", 8)
    converted, ids = lossy(sinks=4), tokens(1, 70)
    _, cache = logits_of(converted, ids, parts(69, 1))
    keep = torch.tensor([[4, 9, 17, 30, 31]])
    monkeypatch.setattr(Tensor, "topk", lambda self, k, **_: torch.return_types.topk((self[:, :5], keep)))
    cache.attend_top_k = 5
    layout = cache.groups[0].layout
    few = attention_clla.judging_rank(layout)
    assert few == 8 < layout.rank and len(layout.classes) == 1
    first = len(layout.classes) + few * layout.classes[0][0] // 8  # scales, and the first components' codes
    with torch.no_grad():
        found = converted(ids[:, 69:], past_key_values=cache).logits
        for start, alike in ((first, True), (1, False)):
            cache.crop(-1)
            for group in cache.groups:
                assert group.held is not None
                gone = torch.ones(group.held.rows.shape[1], dtype=torch.bool)
                gone[keep[0]] = False
                other = torch.randint(0, 256, group.held.rows[:, gone, start:].shape, dtype=torch.uint8)
                group.held.rows[:, gone, start:] = other
            assert torch.equal(converted(ids[:, 69:], past_key_values=cache).logits, found) == alike


def test_selection_never_chooses_padding_over_tokens(selected: list[tuple[int, Tensor]]) -> None:
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :20] = 0
    converted = lossy(sinks=4)
    converted.attend_top_k = 12
    logits, _ = logits_of(converted, tokens(2, 70), parts(70, 1, first=60), mask)
    assert bool(logits.isfinite().all())
    assert selected and all(bool((index[1] >= 24).all()) for _, index in selected)


# Rotations of buckets


def rows_of(count: int, size: int, *, bucket: int, interleaved: bool = False, batch: int = 2) -> tuple[LatentRows, Any]:
    """Rows of two layers with two key-value heads of 8 channels, of which `size` are rotated."""
    dice = torch.Generator().manual_seed(count)
    drawn = partial(torch.randn, generator=dice)
    layout = RowLayout((8, 4, 2), 8)
    codec = SimpleNamespace(decoder=drawn(2, 32, 24), mean=drawn(2, 32))
    more = count + bucket  # slots, so that the last bucket is a whole one
    angles = torch.rand(batch, more, size // 2, generator=dice) * 0.3 * torch.arange(more)[None, :, None]
    codec.turns = Turns(torch.polar(torch.ones_like(angles), angles), interleaved)
    fronts = [0, 2][:batch]
    buckets = Buckets(bucket, codec.turns.means(bucket, fronts), fronts) if bucket > 1 else None
    hidden, turns = torch.tensor([0, 3][:batch]), codec.turns.part(0, count)
    return LatentRows(layout.pack(drawn(batch, count, 24)), layout, codec, hidden, 3, turns, buckets=buckets), codec


def naive_logits(rows: LatentRows, codec: Any, query: Tensor, layer: int, *, bucket: int, rank: int) -> Tensor:
    """Each key [d] rotated by the mean rotation of its sequence's bucket, in fp64, [B, H, M, K]."""
    latents = rows.layout.unpack(rows.data).double()[..., :rank]
    keys = latents @ codec.decoder[layer, :16, :rank].double().mT + codec.mean[layer, :16].double()
    assert rows.turns is not None
    out = torch.empty(*query.shape[:3], rows.count, dtype=torch.float64)
    width = 2 * rows.turns.factors.shape[-1]
    for b, s in itertools.product(range(len(query)), range(rows.count)):
        if s < int(rows.hidden[b]):
            out[b, :, :, s] = float("-inf")
            continue
        front = rows.buckets.fronts[b] if rows.buckets else 0
        first = (s - front) // bucket * bucket + front
        mean = codec.turns.factors[b, first : first + bucket].to(torch.complex128).mean(0)
        for h in range(2):
            key = keys[b, s, 8 * h : 8 * h + 8].clone()
            a, c = (key[:width:2], key[1:width:2]) if rows.turns.interleaved else key[:width].chunk(2)
            turned = torch.complex(a, c) * mean
            if rows.turns.interleaved:
                key[:width] = torch.view_as_real(turned).flatten()
            else:
                key[:width] = torch.cat((turned.real, turned.imag))
            out[b, h, :, s] = query[b, h].double() @ key * 0.3
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("count", "bucket", "rank"), [(24, 8, 24), (29, 8, 16), (5, 8, 24), (21, 1, 8)])
@pytest.mark.parametrize("held", [1 << 26, 0])
def test_a_bucket_has_its_mean_rotation(
    count: int, bucket: int, rank: int, interleaved: bool, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_clla, "HELD_BYTES", held)
    monkeypatch.setattr(rows_clla, "BLOCK", 16)
    rows, codec = rows_of(count, 6, bucket=bucket, interleaved=interleaved)
    query = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    found = torch.empty(2, 2, 3, count)
    rows.estimated(query, 1, found, scaling=0.3, turned=True, rank=rank)
    expected = naive_logits(rows, codec, query, 1, bucket=bucket, rank=rank)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    rows.estimated(query, 1, found, scaling=0.3, turned=False, rank=rank)
    codec.turns = Turns(torch.ones_like(codec.turns.factors), interleaved)
    expected = naive_logits(rows, codec, query, 1, bucket=bucket, rank=rank)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("most", [4, 23, 24])
def test_the_best_rows_are_read_in_full_and_the_others_in_part(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64 from decoded latents: nothing is dropped, and all is one softmax."""
    monkeypatch.setattr(attention_clla, "JUDGING_RANK", 8)
    rows, codec = rows_of(24, 6, bucket=8)
    dice = torch.Generator().manual_seed(2)
    query, exact = torch.randn(2, 2, 3, 8, generator=dice), torch.randn(2, 4, 5, 8, generator=dice)
    bias = torch.tensor([0, 0, float("-inf"), 0, 0.5]).expand(1, 3, 5)
    found = rows.attended(query, exact, bias, 0, scaling=0.3, turned=True, most=most)
    keys, others = exact.double().chunk(2, dim=1)
    near = query.double() * 0.3 @ keys.mT + bias
    few = 8 if most < 24 else 24
    judged = torch.cat((naive_logits(rows, codec, query, 0, bucket=8, rank=few), near), dim=-1)
    full = naive_logits(rows, codec, query, 0, bucket=1, rank=24)
    chosen = torch.zeros(2, 24, dtype=torch.bool)
    if most < 24:
        best = judged.softmax(-1)[..., :24].sum((1, 2)).topk(most).indices
        chosen.scatter_(1, best, torch.ones_like(best, dtype=torch.bool))
    logits = torch.cat((torch.where(chosen[:, None, None], full, judged[..., :24]), near), dim=-1)
    latents = rows.layout.unpack(rows.data).double()
    latents[..., few:] *= chosen[..., None] if most < 24 else 1
    values = (latents @ codec.decoder[0, 16:].double().mT + codec.mean[0, 16:].double()).unflatten(-1, (2, 8))
    everything = torch.cat((values.transpose(1, 2), others), dim=2)
    torch.testing.assert_close(found.double(), logits.softmax(-1) @ everything, atol=1e-4, rtol=1e-4)


def test_padding_moves_no_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence beside a longer one is read as alone, although its neighbours share a rotation."""
    monkeypatch.setattr(rotary_clla, "LONGEST_BUCKET", 16)
    converted, ids = lossy(sinks=4), tokens(2, 114)
    mask = torch.ones(2, 114, dtype=torch.long)
    mask[1, :24] = 0  # whole blocks and chunks, which are cut by slots
    together, _ = logits_of(converted, ids, parts(114, 1, first=104), mask)
    alone, _ = logits_of(converted, ids[1:, 24:], parts(90, 1, first=80))
    torch.testing.assert_close(together[1:, -10:], alone[:, -10:], **CLOSE)
    exact, _ = logits_of(converted, ids, parts(114, 1, first=104), mask, reading=False)
    assert float((together - exact)[:, -10:].abs().max()) > 1e-3, "there are buckets"


# Static caches


def test_a_static_cache_is_allocated_as_planned() -> None:
    model, stats = source_and_stats("llama")
    plan = plan_of(stats, model, bits=4, rank=64)
    converted = converted_of(model, plan, stats)
    cache = converted.new_cache(max_cache_len=200)
    with torch.no_grad():
        converted(tokens(1, 30), past_key_values=cache)
        bookkeeping = sum(t.nbytes for t in cache.timeline.tensors())
        assert cache.nbytes - bookkeeping == plan.bytes_at(200)
        places = [[t.data_ptr() for t in (group.held.rows, group.held.exact)] for group in cache.groups]  # type: ignore[union-attr]
        for i in range(60):
            converted(tokens(1, 1, seed=i), past_key_values=cache)
        assert cache.nbytes - bookkeeping == plan.bytes_at(200)
    assert places == [[t.data_ptr() for t in (group.held.rows, group.held.exact)] for group in cache.groups]  # type: ignore[union-attr]


def test_a_static_cache_that_is_full_says_so() -> None:
    converted = lossy()
    cache = converted.new_cache(max_cache_len=60)
    with torch.no_grad(), pytest.raises(ValueError, match="larger max_cache_len"):
        converted(tokens(1, 100), past_key_values=cache)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_static_generation_gives_the_same_tokens(options: dict[str, int]) -> None:
    converted, ids, mask = lossy(sinks=4), tokens(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[1, :15] = 0
    common = {**COMMON, **options, "attention_mask": mask, "max_new_tokens": 30, "return_dict_in_generate": True}
    expected = converted.generate(ids, **common)
    found = converted.generate(ids, **common, cache_implementation="static")
    assert torch.equal(found.sequences, expected.sequences)
    assert found[CACHE].most_tokens == 80 and expected[CACHE].most_tokens is None


def compiling_with(backend: Any) -> CompileConfig:
    """Settings of `generate` that compile on a CPU, too, as transformers' own tests do."""
    settings = CompileConfig(backend=backend, mode=None, fullgraph=False)
    settings._compile_all_devices = True
    return settings


class Graphs:
    """A compiler that only counts what it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __deepcopy__(self, memo: Any) -> Graphs:
        return self  # settings are copied, and it is this one that is to count

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "select"), [(False, None), (False, 12), (True, 12)], ids=["torch", "torch, selected", "kernels"]
)
def test_one_graph_serves_all_steps(
    kernels: bool, select: int | None, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, over encoding what leaves the window, in several calls; also where kernels read the latents."""
    torch.compiler.reset()
    if kernels:
        pytest.importorskip("triton", reason="Triton has no wheel for this platform")
        for module in (rows_clla, unpack_triton_clla):
            monkeypatch.setattr(module, "on_gpu", lambda x: True)
    converted, graphs = full_rank(), Graphs()
    converted.attend_top_k = select
    ids, new = tokens(2, 40), 5 if kernels else 30
    if kernels:
        converted, ids = copy.deepcopy(converted).to(kernel_device), ids.to(kernel_device)
    expected = converted.generate(ids, max_new_tokens=new, **COMMON)
    settings = compiling_with(graphs)
    for _ in range(2):
        found = converted.generate(
            ids, max_new_tokens=new, cache_implementation="static", compile_config=settings, **COMMON
        )
        assert torch.equal(found, expected)
        assert graphs.count == 1


@pytest.mark.slow
def test_a_real_compiler_gives_the_same_tokens() -> None:
    """What `generate` uses by itself on a GPU; a block of tokens leaves the window meanwhile."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = pico_of(pico_config("llama", num_hidden_layers=2))
    stats, ids = stats_of(model, batches=2), tokens(2, 40)
    converted = converted_of(model, plan_of(stats, model, bits=4, rank=64), stats)
    expected = converted.generate(ids, max_new_tokens=8, **COMMON)
    found = converted.generate(
        ids, max_new_tokens=8, cache_implementation="static", compile_config=compiling_with("inductor"), **COMMON
    )
    assert torch.equal(found, expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
