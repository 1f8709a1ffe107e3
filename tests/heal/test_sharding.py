"""Sharded training: two processes on the CPU compute what one does, and what they write is whole."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import pico
from helpers import clla, finish, tokens, two_processes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from clla.heal.sharding import launched_sharded, own_parameters

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
WORKER = Path(__file__).parents[1] / "sharded_worker.py"
SMALL = ["--sequence-length", "128", "--batch-tokens", "512", "--tokens", "4096", "--device", "cpu"]
SMALL += ["--codec-lr", "5e-4", "--weight-lr", "5e-5"]  # held-out KL falls, so it is not the start that is saved


# --- the modules ---


def test_own_parameters_keep_ties_and_storage() -> None:
    model = pico()
    model.lm_head.weight = model.model.embed_tokens.weight
    before = dict(model.named_parameters())
    own_parameters(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in after.items():
        assert parameter is not before[name] and parameter.data_ptr() == before[name].data_ptr()
        assert parameter.requires_grad == before[name].requires_grad


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "cases"),
    [
        ("no", ["llama:group:codec", "llama:first:all", "mixtral:group:all", "gpt_neox:group:attention"]),
        ("bf16", ["llama:first:codec", "qwen3:group:all", "qwen2-sliding:group:attention"]),
    ],
)
def test_losses_and_gradients_are_those_of_a_whole_distiller(precision: str, cases: list[str]) -> None:
    finish(two_processes(WORKER, precision, *cases))


# --- the command line ---


@pytest.mark.slow
@pytest.mark.usefixtures("usual_rotations")
def test_sharded_training_equals_one_process(checkpoint: Path, tmp_path: Path) -> None:
    """Through accelerate's own launcher, with stage 1, checkpointed layers, steps on the cache, and once a report."""
    command = ["heal", checkpoint, *SMALL, "--train", "all", "--evaluations", "2"]
    command += ["--codec-share", "0.25", "--cache-share", "0.3", "--gradient-checkpointing"]
    one, two, work = tmp_path / "one", tmp_path / "two", tmp_path / "work"
    assert clla(*command, "-o", one).exit_code == 0
    launch = "-m accelerate.commands.launch --use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no --main_process_port 0 -m clla"
    arguments = [sys.executable, *launch.split(), *map(str, command), "-o", str(two), "--work-dir", str(work)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    state = next(work.glob("heal/step-*"))
    assert len(list(state.glob("random_states_*"))) == 2 and not (state / "optimizer.bin").exists()
    found, expected, start = (load_file(path / "model.safetensors") for path in (two, one, checkpoint))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert not torch.equal(value, start[name]) and not torch.equal(found[name], start[name]), name
    reports = [json.loads((path / "clla_report.json").read_text()) for path in (one, two)]
    for a, b in zip(*(report["healing"]["history"] for report in reports), strict=True):
        assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
        assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-3)
    measured = [report["measured"]["converted"]["kl"] for report in reports]
    assert measured[0] == pytest.approx(measured[1], rel=1e-2)
    refused = clla(*command, "-o", tmp_path / "no", "--work-dir", work, "--resume")
    assert refused.exit_code == 2 and "another sharding" in refused.stderr
    model = AutoModelForCausalLM.from_pretrained(two, trust_remote_code=True)
    assert model.generate(tokens(1, 40), max_new_tokens=5).shape == (1, 45)


@pytest.mark.slow
def test_a_killed_sharded_run_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of training, then --resume: the same weights and moments as without the kill."""
    command = ["-m", "clla", "heal", checkpoint, *SMALL, "--tokens", "2048", "--train", "all", "--no-eval"]
    command += ["--evaluations", "2"]
    whole, broken, work, kept = (tmp_path / name for name in ("whole", "broken", "work", "kept"))
    finish(two_processes(*command, "-o", whole, "--work-dir", kept, **SHARDED))
    arguments = [*command, "-o", broken, "--work-dir", work]
    processes = two_processes(*arguments, **SHARDED)
    deadline = time.monotonic() + 120
    while not list(work.glob("heal/step-0000000[2-3]")) and time.monotonic() < deadline:
        assert not processes[0].ended(), processes[0].output
        time.sleep(0.01)
    for process in processes:
        process.kill()
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2 and not broken.exists()
    finish(two_processes(*arguments, "--resume", **SHARDED))
    states = [next(folder.glob("heal/step-*")) for folder in (kept, work)]  # the checkpoint may be of an earlier step
    assert states[0].name == states[1].name == "step-00000004"
    trained = [state / "trained.safetensors" for state in states]
    for one, other in ((whole / "model.safetensors", broken / "model.safetensors"), trained):
        a, b = load_file(one), load_file(other)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    moments = [torch.load(state / "custom_checkpoint_0.pkl")["state"] for state in states]
    for i, tensors in moments[0].items():
        assert all(torch.equal(value, moments[1][i][name]) for name, value in tensors.items())


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient-checkpointing"),
    ],
)
def test_what_cannot_be_sharded_so_is_refused(
    variables: dict[str, str], word: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    done = clla("heal", checkpoint, "-o", tmp_path / "out", *SMALL, "--no-eval")
    assert done.exit_code == 2 and word in done.stderr and not (tmp_path / "out").exists()


def test_a_single_process_does_not_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launched_sharded()
    for name, value in SHARDED.items():
        monkeypatch.setenv(name, value)
    assert not launched_sharded()
