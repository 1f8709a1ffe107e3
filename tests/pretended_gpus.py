"""Whole models on GPUs that are only pretended, in a process of their own.

`python pretended_gpus.py` prints a line of JSON for each case.

A device that PyTorch keeps for others' backends stands for GPUs, two of them. `FakeTensorMode` computes shapes and
devices and nothing else, so what would wait for a GPU is answered here, and counted; kernels are stubs that look at
what they are given.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from test_cache import form
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from clla.modeling import (
    absorbed_triton_clla,
    decode_clla,
    decode_triton_clla,
    group_clla,
    pack_triton_clla,
)
from clla.modeling.modeling_clla import CllaForCausalLM

GPU = "pretended"
FORMS = ("group", "static", "selected", "strict", "first", "evict", "sliding")
DTYPES = ("bfloat16", "float16")
HOMES = ("one", "beside", "second")  # one GPU; two, each group's codec beside its first layer, or all on the second
B, PROMPT, STEPS = 2, 40, 12
KERNELS = (
    (decode_triton_clla, "logits_kernel"),
    (decode_triton_clla, "sums_kernel"),
    (absorbed_triton_clla, "absorbed_kernel"),
    (pack_triton_clla, "pack_kernel"),
)
QUESTIONS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "equal", "nonzero")


class Watch:
    """What happened since `clear`: syncs and copies between host and GPU by line of `clla/modeling`, and launches."""

    def __init__(self) -> None:
        self.total = 0  # tokens of the calls so far
        self.clear()

    def clear(self) -> None:
        self.syncs: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()


def line() -> str | None:
    """The line of the library that is at work; None in code of transformers or of this test."""
    for frame in reversed(traceback.extract_stack(limit=40)):
        if "/clla/modeling/" in frame.filename:
            return f"{frame.filename.rsplit('/', 1)[1]}:{frame.lineno}"
        if "/transformers/" in frame.filename:
            return None
    return None


class Answers(TorchFunctionMode):
    """Answers to what a GPU would have to be asked."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, asked = getattr(func, "__name__", ""), args[0] if args else None
        if func is torch.tensor and GPU in str((kwargs or {}).get("device")):
            assert kwargs is not None
            made, device = torch.tensor(asked, dtype=kwargs.get("dtype")), kwargs["device"]
            self.watch.copies[line() or "elsewhere"] += 1
            return torch.empty(made.shape, dtype=made.dtype, device=device)  # a constant would really be sent there
        if not isinstance(asked, FakeTensor) or name not in QUESTIONS:
            return func(*args, **(kwargs or {}))
        if asked.device.type == GPU and (where := line()):
            self.watch.syncs[where] += 1
        if name == "tolist":  # of the timeline: offsets, jumps of positions, tokens that are seen
            rows = [[0] * B for _ in range(asked.shape[0])]
            if asked.dim() == 2:  # a pass of several tokens also asks for jumps
                rows[1 if len(rows) == 2 else 2] = [self.watch.total] * B
            return rows
        return {"item": 0, "__int__": 0, "__index__": 0, "__float__": 0.0, "equal": True}.get(name, False)


class Copies(TorchDispatchMode):
    """Counts copies between host and GPU."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_to_copy", "copy_", "lift_fresh_copy") and isinstance(out, Tensor):
            devices = {x.device.type for x in (*args, out) if isinstance(x, Tensor)}
            if len(devices) > 1 and (where := line()):
                self.watch.copies[where] += 1
        return out


class Stub:
    """A kernel that looks at what it is given."""

    def __init__(self, kernel: Any, name: str, watch: Watch) -> None:
        self.names, self.name, self.watch = kernel.arg_names, name, watch

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = {name: x for name, x in {**dict(zip(self.names, args, strict=False)), **kwargs}.items()
                     if isinstance(x, Tensor)}  # fmt: skip
            assert len({x.device for x in given.values()}) == 1, (self.name, {n: x.device for n, x in given.items()})
            assert all(x.device.type == GPU for x in given.values()), self.name
            # A latent that is packed comes as it lies in its tensor, with all its strides.
            flat = {n: x for n, x in given.items() if x.dim() and x.shape[-1] > 1 and self.name != "pack_kernel"}
            assert all(x.stride(-1) == 1 for x in flat.values()), (self.name, {n: x.stride() for n, x in flat.items()})
            self.watch.launches[self.name] += 1

        return launch


def move(module: nn.Module, device: str) -> None:
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, torch.empty_like(buffer, device=device))


def sent_to(device: str) -> Callable[..., Any]:
    """A hook that brings a layer's input to its device, as accelerate's do."""

    def there(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else tuple(map(there, x)) if isinstance(x, tuple) else x

    return lambda module, args, kwargs: (there(args), {name: there(x) for name, x in kwargs.items()})


def pretended(config: Any, dtype: torch.dtype, homes: str) -> CllaForCausalLM:
    """The model on one GPU or two; `homes` names the device of the codec of each group."""
    torch.set_default_dtype(dtype)
    try:
        model = CllaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    move(model, f"{GPU}:0")
    if homes == "one":
        return model
    layers, half = model.source.model.layers, len(model.source.model.layers) // 2
    for i, layer in enumerate(layers):
        device = f"{GPU}:0" if i < half else f"{GPU}:1"
        move(layer, device)
        layer.register_forward_pre_hook(sent_to(device), with_kwargs=True)
    model.source.model.norm.register_forward_pre_hook(sent_to(f"{GPU}:0"), with_kwargs=True)
    for group, spec in zip(model.codec.groups, model.config.clla["groups"], strict=True):
        move(group, f"{GPU}:0" if homes == "beside" and spec["layers"][0] < half else f"{GPU}:1")
    return model


def run(name: str, dtype: str, homes: str, watch: Watch, mode: FakeTensorMode) -> list[dict[str, Any]]:
    """What happened in each call: a prompt in two chunks, then tokens one by one."""
    found = []
    config = form("group" if name in ("static", "selected") else name).config
    with mode, torch.no_grad(), Answers(watch), Copies(watch):
        model = pretended(config, getattr(torch, dtype), homes)
        model.select_tokens = 8 if name == "selected" else None
        cache = model.new_cache(PROMPT + STEPS if name == "static" else None)
        ids = torch.zeros(B, PROMPT + STEPS, dtype=torch.long, device=f"{GPU}:0")
        for start, stop in ((0, 20), (20, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + STEPS))):
            watch.clear()
            watch.total = stop
            model(
                ids[:, start:stop],
                attention_mask=torch.ones(B, stop, dtype=torch.long, device=f"{GPU}:0"),
                position_ids=torch.arange(start, stop, device=f"{GPU}:0").expand(B, -1),
                past_key_values=cache,
                logits_to_keep=1,
            )
            found.append(
                {"tokens": stop - start, "syncs": watch.syncs, "copies": watch.copies, "launches": watch.launches}
            )
        assert {x.device.type for group in cache.groups for x in group.tensors()} == {GPU}
    return found


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(GPU)
    torch._C._set_only_lift_cpu_tensors(True)  # a tensor made of numbers is pretended before it goes to the device
    watch = Watch()
    for module, name in KERNELS:
        setattr(module, name, Stub(getattr(module, name), name, watch))
    for module in (decode_clla, group_clla, pack_triton_clla):
        module.on_gpu = lambda x: x.device.type == GPU  # type: ignore[attr-defined]
    torch.cuda.device_of = lambda _: nullcontext()  # type: ignore[assignment,misc]
    decode_triton_clla._processors = lambda _: 132  # type: ignore[assignment]
    mode = FakeTensorMode()  # one for all: tables that are made once are pretended, too
    for case in product(FORMS, DTYPES, HOMES):
        try:
            found: Any = {"calls": run(*case, watch, mode)}
        except Exception as error:
            places = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            found = {"error": f"{str(error)[:300]} at {places[-12:]}"}
        print(json.dumps({"case": case, **found}), flush=True)


if __name__ == "__main__":
    main()
