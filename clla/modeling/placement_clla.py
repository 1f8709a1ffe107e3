"""Where the parts of a converted model go on several devices: the codec of each layer group beside its first layer."""

from typing import Any

import torch

from .hooks_clla import attention_modules

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
OFFLOADED = ("cpu", "disk")


def device_map_of(model: Any, strategy: str, max_memory: Any, dtype: Any) -> "dict[str, Any]":
    """A device map in which every codec lies on the device of its group's first layer.

    A codec is never offloaded, since every token reads it: where its layer is, it lies on the device that computes it.

    Args:
        model: converted, on the meta device; its codecs are moved into its layers, so that it is of no use afterwards.
        strategy: one of `STRATEGIES`, as transformers knows them.
        max_memory: bytes by device, as accelerate takes it; None for what is free.
        dtype: that the weights will have.
    """
    try:  # else transformers would ask for it where this file is only loaded
        import accelerate
    except ImportError as error:
        raise ValueError("device maps by name need accelerate: pip install accelerate") from error
    names = {module: name for name, module in model.named_modules()}
    attention = attention_modules(model.source)
    max_memory = None if max_memory is None else dict(max_memory)  # accelerate writes into it
    layers, sizes = {}, {}
    for i, (group, codec) in enumerate(zip(model.config.spec.groups, model.codec.groups, strict=True)):
        first = attention[group.layers[0]]
        layers[f"codec.groups.{i}"] = names[first]
        sizes[f"codec.groups.{i}"] = sum(p.numel() for p in codec.parameters()) * dtype.itemsize
        first.add_module("clla_codec", codec)
    model.codec.groups = torch.nn.ModuleList()

    common = {"no_split_module_classes": model._no_split_modules, "dtype": dtype}
    if strategy == "sequential":
        memory = accelerate.utils.get_max_memory(max_memory)
    else:
        memory = accelerate.utils.get_balanced_memory(
            model, max_memory, low_zero=strategy == "balanced_low_0", **common
        )
    main = next((device for device in memory if device not in OFFLOADED), "cpu")
    reserved = 0  # on the main device, for codecs of offloaded layers
    while True:
        left = {device: size - reserved * (device == main) for device, size in memory.items()}
        found = accelerate.infer_auto_device_map(model, max_memory={k: max(0, v) for k, v in left.items()}, **common)
        homes = {codec: _device_in(found, layer) for codec, layer in layers.items()}
        strays = [codec for codec, device in homes.items() if device in OFFLOADED and device != main]
        needed = sum(sizes[codec] for codec in strays)
        if needed <= reserved:
            break
        reserved = needed
    if "" in found:
        return found
    homes.update(dict.fromkeys(strays, main))
    rest = {name: device for name, device in found.items() if "codec" not in name}
    return rest | homes


def of_source(device_map: "dict[str, Any]") -> "dict[str, Any]":
    """The source's part of a converted model's device map; one that names nothing of that model is the source's."""
    parts = {name: device for name, device in device_map.items() if name.split(".")[0] == "source"}
    return {name[len("source.") :]: device for name, device in parts.items()} or device_map


def beside_layers(model: Any, device_map: "dict[str, Any]") -> "dict[str, Any]":
    """The device map of a converted model whose source has this one: every codec where its first layer is computed."""
    names = {module: name for name, module in model.source.named_modules()}
    attention = attention_modules(model.source)
    main = next((device for device in device_map.values() if device not in OFFLOADED), "cpu")  # as accelerate has it
    found = {f"source.{name}".rstrip("."): device for name, device in device_map.items()}
    for i, group in enumerate(model.config.spec.groups):
        device = _device_in(device_map, names[attention[group.layers[0]]])
        found[f"codec.groups.{i}"] = main if device in OFFLOADED else device
    return found


def _device_in(device_map: "dict[str, Any]", name: str) -> Any:
    """The device of a module: that of the longest name in the map which it begins with."""
    parts = name.split(".")
    return next(device_map[key] for i in range(len(parts), -1, -1) if (key := ".".join(parts[:i])) in device_map)
