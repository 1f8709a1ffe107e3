"""Everything that a GPU is needed for, in a few minutes: what is right, what is fast, and what healing buys.

    python benchmarks/on_gpu.py [--minutes 8] [--output scratch/on-gpu] [--steps kernels,eager,…]
        [--weights MODEL --dataset TEXT --text TEXT]

Each step is a process with a time limit of its own, so that one that hangs or fails costs no other. What it has found
so far is in OUTPUT/STEP.json, its log in OUTPUT/STEP.log. A step that has ended is not run again: the same command goes
on where one was cut off. The table of all comes last. The last steps convert and heal a real model, if its weights are
given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
KERNEL_TESTS = [f"tests/modeling/test_{name}_kernel.py" for name in ("unpack", "absorbed", "pack")]
# Tests of a GPU's absence, of the interpreter, or of what needs no GPU.
NOT_FOR_GPUS = "not compiled_ and not imported_without and not real_compiler"
# Steps in their order, with the seconds that each may take. The first one ends where kernels are wrong.
LIMITS = {"kernels": 90, "eager": 90, "static": 110, "flex": 60, "planning": 120, "batch": 120, "correct": 240,
          "convert": 100, "heal": 260}  # fmt: skip
NEEDS_WEIGHTS = {"convert", "heal"}


def main() -> None:
    """Run one step, or all in turn, and show the table."""
    args = _arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.only:
        start = time.perf_counter()
        for found in STEPS[args.only](args):
            _path(args.output, args.only).write_text(json.dumps(found, indent=1))
        done = {**found, "seconds": round(time.perf_counter() - start, 1)}
        _path(args.output, args.only).write_text(json.dumps(done, indent=1))
        return
    names = [name for name in args.steps.split(",") if args.weights or name not in NEEDS_WEIGHTS]
    end = time.monotonic() + 60 * args.minutes
    for name in names:
        if "seconds" not in _found(args.output, name) and (left := end - time.monotonic()) > 15:
            _run(name, args, min(left, LIMITS[name]))
    print(table(args.output, names))


# Steps, each of which gives what it has found so far


def kernels(args: argparse.Namespace) -> Found:
    """One layer's reading of latents against the twin in fp32, the floor and flash attention."""
    cases = ["--shapes", "llama-3-8b,smollm2-135m", "--contexts", "32768", "--batch-sizes", "1,16"]
    yield _json_of("reading.py", "--json", *(["--dry-run"] if args.dry_run else cases))


def eager(args: argparse.Namespace) -> Found:
    """`generate` of the source and the converted model, and what one step launches."""
    found: dict[str, Any] = {}
    pair, device = _pair(args)
    for context in (300,) if args.dry_run else (4096, 32768):
        ids = pair.ids(1, context, 0)
        for name, model in (("source", pair.converted.source), ("converted", pair.converted)):
            found[f"{name} {context}"] = _generate(model, ids, args)
            yield found
        if device.type == "cuda":
            found[f"step {context}"] = _profile(pair.converted, ids)
            yield found


def static(args: argparse.Namespace) -> Found:
    """`generate` with a static cache, which transformers compiles where there is a GPU."""
    import torch._dynamo

    found: dict[str, Any] = {}
    pair, device = _pair(args)
    options = {} if device.type == "cpu" else {"cache_implementation": "static"}
    for name, model in (("converted", pair.converted), ("source", pair.converted.source)):
        found[name] = _generate(model, pair.ids(1, 300 if args.dry_run else 4096, 0), args, **options)
        found["graph breaks"] = dict(torch._dynamo.utils.counters["graph_break"])
        yield found


def flex(args: argparse.Namespace) -> Found:
    """Steps of healing through flex attention: speed and memory."""
    from clla.heal.attention import view_of
    from clla.heal.student import Distiller, make_student

    pair, device = _pair(args)
    distiller = Distiller(pair.converted.source, make_student(pair.converted, "all"))
    count, length = (2, 256) if args.dry_run else (16, 2048)
    rates: list[int] = []
    for number in range(4 if args.dry_run else 10):
        view = view_of(length, window=128, flush_block=16, sinks=4, chunk=(1, 128)[number % 2])
        ids, start = pair.ids(count, length, number), time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = distiller(ids, view=view)
        loss.backward()
        rates.append(round(count * length / (_synchronize() - start)))
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        yield {"tokens per s": rates, "loss": float(loss.detach()), "peak GB": round(peak / 1e9, 2)}


def planning(args: argparse.Namespace) -> Found:
    """A plan of a shape, and its codec."""
    shape = ["smollm2-135m", "--layers", "2"] if args.dry_run else ["llama-3-8b", "--device", "cuda"]
    yield _json_of("planning.py", "--json", "--shape", *shape)


def batch(args: argparse.Namespace) -> Found:
    """The largest batch of an 8B shape, and its speed."""
    shape, context = ("tiny", "64") if args.dry_run else ("llama-3-8b", "8192")
    limit = ["--memory-limit", "1MB"] if args.dry_run else []
    options = ["--shape", shape, "--contexts", context, "--largest-batch", "--repeats", "1", "--new-tokens", "16"]
    yield json.loads(_printed("-m", "clla", "bench", *options, *limit, "--json"))


def correct(args: argparse.Namespace) -> Found:
    """Kernels of all shapes against loops in fp64, and models that read by them."""
    workers = [] if args.dry_run else ["-n", "6"]
    tests = KERNEL_TESTS[-1:] if args.dry_run else [*KERNEL_TESTS, "tests/modeling/test_reading.py"]
    command = [sys.executable, "-m", "pytest", "-v", *workers, "-p", "no:cacheprovider", *tests, "-k", NOT_FOR_GPUS]
    with subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True) as running:
        found: dict[str, Any] = {"PASSED": 0, "SKIPPED": 0, "FAILED": []}
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            if said := re.search(r"(PASSED|SKIPPED|FAILED) (tests\S+)|(tests\S+) (PASSED|SKIPPED|FAILED)", line):
                result, test = said[1] or said[4], said[2] or said[3]
                found[result] += [test] if result == "FAILED" else 1
                yield found


def convert(args: argparse.Namespace) -> Found:
    """Conversion of the real model at two budgets, and its quality."""
    budgets = ["--budgets", "6.25,2", "--variants", "group W=128", "--num-samples", "24", "--dataset", args.dataset]
    output = args.output / "quality.json"
    _printed(str(HERE / "quality.py"), args.weights, "--text", args.text, *budgets, "--output", str(output))
    yield json.loads(output.read_text())


def heal(args: argparse.Namespace) -> Found:
    """Two minutes of healing at 2 %, measured before and after."""
    options = ["--budgets", "2", "--exact-window", "128", "--heal-tokens", "6000000", "--num-long-samples", "4"]
    texts, output = ["--text", args.text, "--dataset", args.dataset], args.output / "healing.json"
    _printed(str(HERE / "healing.py"), args.weights, *texts, *options, "--output", str(output))
    yield json.loads(output.read_text())


Found = Iterator[dict[str, Any]]
STEPS: dict[str, Callable[[argparse.Namespace], Found]] = {
    step.__name__: step for step in (kernels, eager, static, flex, planning, batch, correct, convert, heal)
}


# What steps are made of


def _pair(args: argparse.Namespace) -> Any:
    from clla.bench.pair import random_pair

    device = torch.device("cpu" if args.dry_run else "cuda")
    shape = "tiny" if args.dry_run else "smollm2-135m"
    options: Any = {"kv_budget": "6.25%", "max_layers_per_group": 6, "device": device, "dtype": "auto", "seed": 0}
    return random_pair(shape, **options), device


def _generate(model: Any, ids: torch.Tensor, args: argparse.Namespace, **options: Any) -> dict[str, float]:
    """Tokens per second of decoding, and seconds of the prompt; the second of two tries."""
    new, found = 6 if args.dry_run else 64, {}
    for attempt in range(2):
        seconds = []
        for count in (new, 1):
            common = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
            start = _synchronize()
            model.generate(ids, attention_mask=torch.ones_like(ids), **common, **options)
            seconds.append(_synchronize() - start)
        rate = (new - 1) / max(1e-9, seconds[0] - seconds[1])
        found = {"tokens_per_s": round(rate, 1), "prompt_s": round(seconds[1], 3), "all_s": round(seconds[0], 3)}
        print(ids.shape[1], attempt, found, flush=True)
    return found


def _profile(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Launches and GPU time of one decoding step."""
    from torch.profiler import ProfilerActivity, profile

    cache = model.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
        for _ in range(3):
            model(ids[:, :1], past_key_values=cache)
        start = _synchronize()
        model(ids[:, :1], past_key_values=cache)
        wall = _synchronize() - start
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            model(ids[:, :1], past_key_values=cache)
            _synchronize()
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    print(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=50))
    busy = sum(event.device_time for event in events)
    return {"launches": len(events), "gpu_ms": round(busy / 1e3, 3), "wall_ms": round(1e3 * wall, 3)}


def _synchronize() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _json_of(script: str, *options: str) -> Any:
    """What a benchmark prints as JSON."""
    return json.loads(_printed(str(HERE / script), *options))


def _printed(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout)
    return done.stdout


# Running them


def _run(name: str, args: argparse.Namespace, limit: float) -> None:
    """In a process of its own, until it has ended or its time is over."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    interpreted = "1" if args.dry_run and name == "correct" else "0"  # else a dry run computes in PyTorch
    own = {"TRITON_INTERPRET": interpreted, "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths}
    given = [f"--{key}={value}" for key in ("output", "weights", "dataset", "text") if (value := getattr(args, key))]
    command = [sys.executable, __file__, "--only", name, *given, *["--dry-run"] * args.dry_run]
    with (args.output / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own, start_new_session=True)
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = "out of time"
    print(f"{name}: {'done' if code == 0 else code}", flush=True)


def _path(output: Path, name: str) -> Path:
    return output / f"{name}.json"


def _found(output: Path, name: str) -> dict[str, Any]:
    """What a step has found so far."""
    path = _path(output, name)
    return dict(json.loads(path.read_text())) if path.exists() else {}


def table(output: Path, names: list[str]) -> str:
    """What was found, a line for each figure."""
    lines = ["| step | what | figure |", "|---|---|---|"]
    for name in names:
        found = {key: value for key, value in _found(output, name).items() if key not in ("machine", "arguments")}
        log = output / f"{name}.log"
        if "seconds" not in found:
            said = [x for x in log.read_text(errors="replace").splitlines() if x.strip()] if log.exists() else []
            found["not ended"] = said[-1] if said else "not run"
        lines += [f"| {name} | {key} | {value} |" for key, value in _flat(found)]
    return "\n".join(lines)


def _flat(found: Any, path: str = "") -> list[tuple[str, str]]:
    """Figures below their names, but for long lists."""
    if isinstance(found, dict):
        return [row for key, value in found.items() for row in _flat(value, f"{path} {key}".strip())]
    if isinstance(found, list) and found and isinstance(found[0], dict):
        return [row for n, value in enumerate(found[:8]) for row in _flat(value, f"{path} {n}")]
    text = f"{found:.6g}" if isinstance(found, float) else re.sub(r"\s+", " ", str(found))[:160]
    return [(path, text)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="for all steps together")
    parser.add_argument("--output", type=Path, default=Path("scratch/on-gpu"))
    parser.add_argument("--steps", default=",".join(STEPS), help="of " + ", ".join(STEPS))
    parser.add_argument("--weights", help="a model to convert and heal: Hub id, directory, .gguf file or 'demo'")
    parser.add_argument("--dataset", default="bundled", help="text to calibrate and heal on")
    parser.add_argument("--text", default="bundled", help="text to measure on")
    parser.add_argument("--only", choices=tuple(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)  # on a CPU: no figure is real
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no GPU: torch.cuda finds none; one with Triton is expected")
    return args


if __name__ == "__main__":
    main()
