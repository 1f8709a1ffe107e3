"""Calibration layer by layer, in a reduced basis, under a hard memory limit, and by several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILY_CONFIGS, OTHER_CONFIGS, SIZES, byte_tokenizer, pico
from helpers import clla, converted_of, finish, mostly_slow, plan_of, tokens, two_processes
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from clla.artifacts.stats import Stats
from clla.calibrate.basis import leading_directions
from clla.calibrate.collect import Collection, Collector, collect
from clla.calibrate.rope_detection import rope_settings
from clla.calibrate.stream import LayerStack, StreamedCollector
from clla.convert.factor import error_covariance, factor, lift, predicted_kl
from clla.errors import UnsupportedModelError, UsageError
from clla.plan.metrics import surrogate_stats
from clla.plan.planners import neighbour_distances
from clla.plan.spectra import Spectra
from clla.source.families import kv_shape, split_layers
from clla.source.placement import choose_placement, layers_on_disk

OF_THE_TOKENS = {"gemma3n_text", "gemma4_text"}  # every layer has embeddings of its own
STREAMED = sorted({**FAMILY_CONFIGS, **OTHER_CONFIGS}.keys() - OF_THE_TOKENS)

SMALL = ["--calibration-tokens", "1024", "--sequence-length", "128", "--budget-context", "0", "--kv-budget", "10%"]
SMALL += ["--exact-window", "16", "--no-eval", "--device", "cpu"]


def wanted_of(model: PreTrainedModel, band: int = 3, **options: Any) -> Collection:
    layers, _ = split_layers(model.config)
    rope = rope_settings(model, layers)
    return Collection(layers, kv_shape(model.config), band, rope, with_inputs=True, **options)


def batches() -> list[Tensor]:
    return [tokens(2, 48, seed) for seed in range(3)] + [tokens(1, 40, 9)]


def tensors(stats: Stats) -> dict[str, Tensor]:
    return {name: value for name, value in vars(stats).items() if isinstance(value, Tensor)}


# --- layer by layer ---


@pytest.mark.parametrize("name", mostly_slow(STREAMED, "llama", "gpt2", "qwen3_moe"))
def test_streamed_stats_are_the_ordinary_ones(name: str) -> None:
    model = pico(name)
    wanted = wanted_of(model)
    expected = collect(Collector(model, wanted), batches(), made_from="test")
    found = StreamedCollector(model, wanted).collect(batches(), made_from="test")
    assert (found.layers, found.tokens) == (expected.layers, expected.tokens)
    assert tensors(found).keys() == tensors(expected).keys()
    for key, value in tensors(expected).items():
        torch.testing.assert_close(getattr(found, key), value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("name", sorted(OF_THE_TOKENS))
def test_layers_that_get_embeddings_of_their_own_are_refused(name: str) -> None:
    model = pico(name)
    with pytest.raises(UnsupportedModelError, match="beside their hidden states"):
        StreamedCollector(model, wanted_of(model)).collect(batches(), made_from="test")


def test_hidden_states_can_be_spilled(tmp_path: Path) -> None:
    model = pico()
    wanted = wanted_of(model)
    expected = StreamedCollector(model, wanted).collect(batches(), made_from="test")
    most = 0

    def watch(_: int) -> None:
        nonlocal most
        most = max(most, sum(file.stat().st_size for file in (tmp_path / "spill").iterdir()))

    collector = StreamedCollector(model, wanted, folder=tmp_path / "spill")
    found = collector.collect(batches(), made_from="test", on_tokens=watch)
    for key, value in tensors(expected).items():
        assert torch.equal(getattr(found, key), value), key
    count = sum(ids.numel() for ids in batches())
    assert most >= count * 64 * 4 * len(collector.stack)  # all hidden states were there at once
    assert not list((tmp_path / "spill").iterdir())


def test_layers_on_disk_are_the_same_layers(tmp_path: Path) -> None:
    model = pico()
    model.save_pretrained(tmp_path / "model")
    on_disk = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=layers_on_disk(model.config, torch.device("cpu")),
        offload_folder=tmp_path / "off",
    ).requires_grad_(False)
    assert all(p.device.type == "meta" for p in on_disk.model.layers.parameters())
    wanted = wanted_of(model)
    expected = StreamedCollector(model, wanted).collect(batches(), made_from="test")
    found = StreamedCollector(on_disk, wanted).collect(batches(), made_from="test")
    for key, value in tensors(expected).items():
        assert torch.equal(getattr(found, key), value), key


def test_layers_that_get_something_of_the_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico()
    stack = LayerStack(model)
    stack.embed(tokens(2, 20))
    stack.embed(tokens(2, 20, seed=2))
    rotary = model.model.rotary_emb.forward

    def noisy(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(x + torch.rand(()) for x in rotary(*args, **kwargs))

    monkeypatch.setattr(model.model.rotary_emb, "forward", noisy)
    with pytest.raises(UnsupportedModelError, match="beside their hidden states"):
        stack.embed(tokens(2, 20, seed=3))


def test_the_model_is_left_as_it_was() -> None:
    model, ids = pico(), tokens(2, 30)
    expected = model(ids).logits
    StreamedCollector(model, wanted_of(model)).collect(batches(), made_from="test")
    assert torch.equal(model(ids).logits, expected)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


# --- a reduced basis ---


def positive(n: int, decay: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return (q * torch.logspace(0, -decay, n, dtype=torch.float64)) @ q.mT


@pytest.mark.parametrize("width", [3, 20, 45, 90, 120])
def test_the_basis_is_the_best_there_is(width: int) -> None:
    """The oracle: what is lost are the smallest eigenvalues of S·C·S with S the metric's square root."""
    covariance, fisher = positive(120, 5, 0), positive(120, 4, 1)
    basis = leading_directions(covariance, fisher, width)
    metric = fisher + 1e-3 * fisher.diagonal().mean() * torch.eye(120)
    values, vectors = torch.linalg.eigh(metric)
    root = (vectors * values.sqrt()) @ vectors.mT
    least = torch.linalg.eigvalsh(root @ covariance @ root)[: 120 - width].sum()
    rest = torch.eye(120, dtype=torch.float64) - basis.writing @ basis.reading
    error = rest @ covariance @ rest.mT
    torch.testing.assert_close((metric * error).sum(), least, rtol=1e-4, atol=1e-9)
    assert basis.dropped == pytest.approx(0.5 * float((fisher * error).sum()), rel=1e-4, abs=1e-9)
    eye = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(basis.reading @ basis.writing, eye, rtol=0, atol=1e-9)
    torch.testing.assert_close(basis.writing.mT @ basis.writing, eye, rtol=0, atol=1e-9)


def test_a_covariance_without_full_rank_has_a_basis() -> None:
    """Fewer tokens than values, in fp32: rounding makes some eigenvalues negative."""
    rows = torch.randn(40, 120, generator=torch.Generator().manual_seed(0)) * torch.logspace(3, -3, 120)
    basis = leading_directions(rows.mT @ rows / 40, torch.eye(120), 50)
    error = rows - rows @ basis.reading.mT @ basis.writing.mT
    assert basis.dropped >= 0 and float(error.norm() / rows.norm()) < 1e-3


@pytest.fixture(scope="module")
def wide() -> tuple[PreTrainedModel, Stats, Stats]:
    """A model with as many key-value as query heads, its moments, and those in three quarters of the coordinates."""
    model = pico("llama-mha")
    wanted, text = wanted_of(model), [tokens(4, 64, seed) for seed in range(8)]
    whole = collect(Collector(model, wanted), text, made_from="test")
    return model, whole, StreamedCollector(model, wanted, basis=96).collect(text, made_from="test")


def test_reduced_moments_are_those_of_the_coordinates(wide: tuple[PreTrainedModel, Stats, Stats]) -> None:
    _, whole, reduced = wide
    assert reduced.reading is not None and reduced.writing is not None and reduced.input_cross is not None
    assert reduced.width == 96 and reduced.covariance.shape == (4, 3, 96, 96)
    for j in range(3):
        stop = 4 - j
        expected = reduced.reading[:stop] @ whole.covariance[:stop, j] @ reduced.reading[j:].mT
        torch.testing.assert_close(reduced.covariance[:stop, j], expected, rtol=1e-3, atol=1e-4)
    expected = reduced.writing.mT @ whole.fisher @ reduced.writing
    torch.testing.assert_close(reduced.fisher, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    torch.testing.assert_close(reduced.mean, whole.mean, rtol=1e-4, atol=1e-5)
    assert whole.input_cross is not None
    crossed = whole.input_cross[:, 0] @ reduced.reading.mT
    torch.testing.assert_close(reduced.input_cross[:, 0], crossed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("source", ["group", "first"])
def test_a_lifted_codec_costs_what_is_predicted(wide: tuple[PreTrainedModel, Stats, Stats], source: str) -> None:
    _, whole, reduced = wide
    assert reduced.dropped is not None
    spectra = Spectra(reduced, source=source)
    small = factor(spectra, 0, 3, 48)
    inside = predicted_kl(error_covariance(small, reduced, 0, 3, source=source), reduced.fisher[:3])
    lifted = lift(small, reduced, 0, 3, source=source)
    measured = predicted_kl(error_covariance(lifted, whole, 0, 3, source=source), whole.fisher[:3])
    assert measured == pytest.approx(inside + float(reduced.dropped[:3].sum()), rel=0.05)
    best = factor(Spectra(whole, source=source), 0, 3, 48)
    least = predicted_kl(error_covariance(best, whole, 0, 3, source=source), whole.fisher[:3])
    assert least <= measured * 1.02 and measured < 1.3 * least  # and little is lost by reducing first


def test_a_reduced_model_runs(wide: tuple[PreTrainedModel, Stats, Stats]) -> None:
    """All 96 coordinates at 16 bits: what is lost is what the basis dropped, and it is little."""
    model, whole, reduced = wide
    ids = tokens(2, 90)
    groups = tuple((layer,) for layer in whole.layers)
    found = converted_of(model, plan_of(reduced, model, groups=groups, rank=96), reduced)
    crude = converted_of(model, plan_of(reduced, model, groups=groups, rank=16), reduced)
    with torch.no_grad():
        expected = model(ids).logits
        error, crude_error = ((m(ids).logits - expected).square().mean().sqrt() for m in (found, crude))
    assert error < 0.1 * crude_error and error < 0.05 * expected.std()


def test_baselines_want_whole_moments(wide: tuple[PreTrainedModel, Stats, Stats]) -> None:
    _, whole, reduced = wide
    for metric in ("pca", "weights", "asvd"):
        with pytest.raises(UsageError, match=r"calibration\.basis"):
            surrogate_stats(reduced, metric)
    for a, b in zip(neighbour_distances(whole), neighbour_distances(reduced), strict=True):
        assert b == pytest.approx(a, rel=0.1)


# --- placement ---


def test_placement_follows_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(1000))
    cpu = torch.device("cpu")
    assert choose_placement("auto", 600, cpu) == "device" and choose_placement("auto", 800, cpu) == "stream"
    assert choose_placement("device", 5000, cpu) == "device"
    with pytest.raises(UsageError, match="GPUs"):
        choose_placement("spread", 1, cpu)


@pytest.mark.slow
def test_streaming_from_the_command_line(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """The same weights bit for bit and as good a codec; no shard holds more than a layer."""
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    assert clla("convert", pico_dir, "-o", whole, "--dataset", text_file, *SMALL).exit_code == 0
    done = clla("convert", pico_dir, "-o", streamed, "--dataset", text_file, *SMALL, "--placement", "stream")
    assert done.exit_code == 0, done.output + done.stderr
    parts = [load_file(path) for path in sorted(streamed.glob("*.safetensors"))]
    assert len(parts) > 1
    found = {name: value for part in parts for name, value in part.items()}
    for name, value in load_file(whole / "model.safetensors").items():
        assert not name.startswith("source.") or torch.equal(found[name], value), name
    costs = [json.loads((path / "clla_report.json").read_text())["predicted_kl"] for path in (whole, streamed)]
    assert costs[1] == pytest.approx(costs[0], rel=0.02)
    assert clla("eval", streamed, "--text", text_file, "--num-samples", "1", "--no-retrieval").exit_code == 0


def test_a_wide_model_from_the_command_line(text_file: Path, tmp_path: Path) -> None:
    """`calibration.basis` below the 128 values per layer: said, reported, and nearly as good as with whole moments."""
    pico("llama-mha").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    costs = {}
    for basis in (64, 2048):
        recipe, out = tmp_path / f"{basis}.yaml", tmp_path / f"out-{basis}"
        recipe.write_text(f"calibration: {{basis: {basis}}}\n")
        done = clla("convert", tmp_path / "model", "-o", out, "--recipe", recipe, "--dataset", text_file, *SMALL)
        assert done.exit_code == 0, done.output + done.stderr
        report = json.loads((out / "clla_report.json").read_text())
        costs[basis] = report["predicted_kl"]
        if basis == 64:
            assert "64 of 128 coordinates" in " ".join(done.stderr.split())
            assert report["reduction"]["coordinates"] == 64 and 0 < report["reduction"]["kl"] < report["predicted_kl"]
        else:
            assert report["reduction"] is None
    assert costs[64] == pytest.approx(costs[2048], rel=0.3)


def test_what_cannot_be_streamed_is_refused(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    common = ["convert", pico_dir, "-o", tmp_path / "out", "--dataset", text_file, *SMALL, "--placement"]
    refused = clla(*common, "stream", "--heal")
    assert refused.exit_code == 2 and "clla heal" in refused.stderr
    refused = clla(*common, "spread")
    assert refused.exit_code == 2 and "GPUs" in refused.stderr
    refused = clla(*common, "somewhere")
    assert refused.exit_code == 2 and "runtime.placement" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_shards_have_the_size_asked_for(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["convert", pico_dir, "-o", out, "--dataset", text_file, *SMALL, "--max-shard-size", "100KB"]
    assert clla(*command).exit_code == 0
    shards = {path: load_file(path) for path in out.glob("model-*.safetensors")}
    assert len(shards) > 4
    assert all(path.stat().st_size < 110_000 or len(held) == 1 for path, held in shards.items())


LIMITED = """
import re, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
import matplotlib.pyplot
from clla.convert.pipeline import Options, convert
from clla.recipe import Recipe
model, text, out, placement, room = sys.argv[1:]
size = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, (size + int(room), size + int(room)))
changes = {"calibration": {"dataset": text, "tokens": 256, "sequence_length": 128, "batch_size": 1},
           "budget": {"budget_context": 0, "kv_budget": "20%", "exact_window": 16}, "plan": {"max_layers_per_group": 2},
           "runtime": {"placement": placement, "compute_dtype": "float32"}}
convert(model, Recipe().override(changes), Options(Path(out), device="cpu", report=False))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on address space")
def test_a_model_larger_than_memory_is_converted(text_file: Path, tmp_path: Path) -> None:
    """A hard limit: besides the files mapped, which takes no memory, little more than a third of the weights fits.

    Every tensor has a file of its own, since a file is mapped anew for each tensor that is read from it.
    """
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
        for buffer in model.buffers():
            buffer.fill_(0.1)
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(tmp_path / "model", max_shard_size="9MB")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    weights = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    room = 200_000_000
    assert weights > 2.7 * room
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # arenas reserve address space

    def run(placement: str) -> Any:
        arguments = [str(a) for a in (tmp_path / "model", text_file, tmp_path / placement, placement, weights + room)]
        return subprocess.run(
            [sys.executable, "-c", LIMITED, *arguments], env=environment, capture_output=True, text=True, check=False
        )

    streamed = run("stream")
    assert streamed.returncode == 0, streamed.stderr[-3000:]
    assert sum(file.stat().st_size for file in (tmp_path / "stream").glob("*.safetensors")) > weights
    assert run("device").returncode != 0  # the limit is one that matters


# --- several processes ---


@pytest.mark.slow
def test_two_processes_calibrate_as_one(pico_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """Each reads half of the batches; the sums are those of all, and so are plan, codec and checkpoint."""
    command = ["convert", pico_dir, "--dataset", text_file, *SMALL, "--json"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert clla(*command, "-o", one, "--work-dir", tmp_path / "a").exit_code == 0
    processes = two_processes("-m", "clla", *command, "-o", two, "--work-dir", tmp_path / "b")
    finish(processes)
    refused = two_processes("-m", "clla", *command, "-o", tmp_path / "no", "--placement", "stream")
    assert [process.wait() for process in refused] == [2, 2] and not (tmp_path / "no").exists()
    assert "one process" in refused[0].output + refused[1].output
    a, b = (Stats.load(next((tmp_path / name).glob("stats-*"))) for name in "ab")
    assert a.tokens == b.tokens
    for key, value in tensors(a).items():
        torch.testing.assert_close(getattr(b, key), value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))
    weights = [load_file(path / "model.safetensors") for path in (one, two)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items() if "source." in name)
    costs = [json.loads((path / "clla_report.json").read_text())["predicted_kl"] for path in (one, two)]
    assert costs[1] == pytest.approx(costs[0], rel=0.02)
