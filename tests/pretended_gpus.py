"""Whole models on GPUs that are only pretended, in a process of their own.

`python pretended_gpus.py` prints a line of JSON for each case.

A device that PyTorch keeps for others' backends stands for GPUs. Their tensors wrap tensors on the CPU, where all that
is done to them is done, once it is certain that it would be done on one GPU: numbers are real, answers to the host
are, too. Kernels are stubs that look at what they are given, and write zeros.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise, product
from typing import Any

import torch
from conversions import form
from helpers import tokens
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from clla.modeling import (
    group_clla,
    pack_triton_clla,
    rows_clla,
    unpack_triton_clla,
)
from clla.modeling.modeling_clla import CllaForCausalLM

GPU = "pretended"
HOMES = ("one", "beside", "second")  # one GPU; two, each group's codec beside its first layer, or all on the second
CASES = [
    *product(("group", "static", "selected", "strict", "first"), ("bfloat16",), HOMES),
    ("group", "float16", "one"),
    ("sliding", "bfloat16", "beside"),
]
B, PADDING = 2, 5
CUTS = (0, 20, 44, 45, 46, 47, 48, 49)  # of the text; the last token but one fills a block that leaves the window
KERNELS = (
    (unpack_triton_clla, "unpack_kernel"),
    (pack_triton_clla, "pack_kernel"),
)
ASKING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "_unique2", "unique_dim")


class OnGpu(Tensor):
    """A tensor of a pretended GPU; `there` is where its numbers are."""

    there: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, there: Tensor, device: torch.device) -> OnGpu:
        like = {"strides": there.stride(), "storage_offset": there.storage_offset(), "dtype": there.dtype}
        with torch.inference_mode(False):  # a view of an ordinary tensor is one, too
            return Tensor._make_wrapper_subclass(cls, there.shape, device=device, **like)  # type: ignore[attr-defined]

    def __init__(self, there: Tensor, device: torch.device) -> None:
        self.there = there

    def data_ptr(self) -> int:
        return self.there.data_ptr()

    def untyped_storage(self) -> Any:
        return self.there.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of `Gpus`")


class Gpus(TorchDispatchMode):
    """Computes what pretended GPUs are told to, and counts since `clear`: launches, syncs and copies from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.syncs: Counter[str] = Counter()  # by line of code
        self.copies: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()  # by kernel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():  # where operations that are made of others come whole
            with self:
                made = func.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        given: list[Tensor] = []
        mapped([args, *kwargs.values()], given.append)
        homes = {x.device for x in given if isinstance(x, OnGpu)}
        home = kwargs.get("device") or (given[0].device if given else torch.device("cpu"))
        if name in ("_to_copy", "copy_"):
            if (source := given[-1].device).type != home.type:
                (self.syncs if source.type == GPU else self.copies)[line()] += 1
        elif homes:
            home = kwargs.get("device") or next(iter(homes))
            assert len(homes) == 1, f"{name} of tensors on {homes}"
            strangers = [x.shape for x in given if x.dim() and not isinstance(x, OnGpu)]
            assert not strangers, f"{name} of tensors on {homes} and {strangers} on the host"
            if name in ASKING:
                self.syncs[line()] += 1
        if home.type == GPU and "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        there = [mapped(x, lambda x: x.there if isinstance(x, OnGpu) else x) for x in (args, *kwargs.values())]
        made = func(*there[0], **dict(zip(kwargs, there[1:], strict=True)))
        if home.type != GPU:
            return made
        known, home = {id(x.there): x for x in given if isinstance(x, OnGpu)}, torch.device(GPU, home.index or 0)
        return mapped(made, lambda x: known[id(x)] if id(x) in known else OnGpu(x, home))


def mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same lists and tuples with their tensors changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    return type(tree)(mapped(x, change) for x in tree) if type(tree) in (list, tuple) else tree


def line() -> str:
    """The line of the library, or of transformers, that is at work."""
    for frame in reversed(traceback.extract_stack(limit=40)):
        if "/clla/modeling/" in frame.filename or "/transformers/" in frame.filename:
            return f"{frame.filename.rsplit('/', 1)[1]}:{frame.lineno}"
    return "elsewhere"


class Stub:
    """A kernel that looks at what it is given."""

    def __init__(self, kernel: Any, name: str, gpus: Gpus) -> None:
        self.names, self.name, self.gpus = kernel.arg_names, name, gpus

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            given = {name: x for name, x in zip(self.names, args, strict=False) if isinstance(x, Tensor)}
            homes = {name: str(x.device) for name, x in given.items()}
            assert all(isinstance(x, OnGpu) for x in given.values()) and len(set(homes.values())) == 1, homes
            # A latent that is packed comes as it lies in its tensor, with all its strides.
            flat = {n: x for n, x in given.items() if x.dim() and x.shape[-1] > 1 and self.name != "pack_kernel"}
            assert all(x.stride(-1) == 1 for x in flat.values()), (self.name, {n: x.stride() for n, x in flat.items()})
            given["out"].zero_()
            self.gpus.launches[self.name] += 1

        return launch


def move(module: nn.Module, device: str) -> None:
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(parameter.detach().to(device), requires_grad=False))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, buffer.to(device))


def sent_to(device: str) -> Callable[..., Any]:
    """A hook that brings a layer's input to its device, as accelerate's do."""

    def there(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else tuple(map(there, x)) if isinstance(x, tuple) else x

    return lambda module, args, kwargs: (there(args), {name: there(x) for name, x in kwargs.items()})


def pretended(like: CllaForCausalLM, dtype: torch.dtype, homes: str) -> CllaForCausalLM:
    """The model on one GPU or two; `homes` names the device of the codec of each group."""
    torch.set_default_dtype(dtype)
    try:
        model = CllaForCausalLM(like.config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.load_state_dict(like.state_dict())
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


def run(name: str, dtype: str, homes: str, gpus: Gpus) -> list[dict[str, Any]]:
    """What happened in each call: a prompt in two chunks, the second sequence padded, then tokens one by one."""
    found = []
    like = form("group" if name in ("static", "selected") else name)
    with torch.no_grad(), gpus:
        model = pretended(like, getattr(torch, dtype), homes)
        model.attend_top_k = 8 if name == "selected" else None
        cache = model.new_cache(CUTS[-1] if name == "static" else None)
        mask = torch.ones(B, CUTS[-1], dtype=torch.long)
        mask[1, :PADDING] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        ids, mask, positions = (x.to(f"{GPU}:0") for x in (tokens(*mask.shape), mask, positions))
        for start, stop in pairwise(CUTS):
            gpus.clear()
            logits = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                logits_to_keep=1,
            ).logits
            assert logits.device == ids.device
            seen = {"syncs": gpus.syncs, "copies": gpus.copies, "launches": gpus.launches}
            found.append({"tokens": stop - start, "encoded": cache.groups[0].encoded, **seen})
        assert {x.device.type for group in cache.groups for x in group.tensors()} == {GPU}
    return found


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(GPU)
    torch._C._set_only_lift_cpu_tensors(True)  # so that a tensor made of a list is seen to be sent to its device
    gpus = Gpus()
    for module, name in KERNELS:
        setattr(module, name, Stub(getattr(module, name), name, gpus))
    for module in (rows_clla, group_clla, pack_triton_clla, unpack_triton_clla):
        module.on_gpu = lambda x: x.device.type == GPU  # type: ignore[attr-defined]
    torch.cuda.device_of = lambda _: nullcontext()  # type: ignore[assignment,misc]
    for case in CASES:
        try:
            found: Any = {"calls": run(*case, gpus)}
        except Exception as error:
            places = [f"{f.filename.rsplit('/', 1)[1]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            found = {"error": f"{str(error)[:300]} at {places[-12:]}"}
        print(json.dumps({"case": case, **found}), flush=True)


if __name__ == "__main__":
    main()
