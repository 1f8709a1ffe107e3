"""Sharded training (FSDP2): every process keeps a part of each weight, gradient and moment of the optimizer.

Each decoder layer of teacher and student is one unit of torch's `fully_shard`: gathered when it runs, and once more in
the backward pass. The rest (embeddings, heads, codecs) is one unit with the distiller, since heads and codecs are read
as tensors; it is whole within its forward pass and within `gathered`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator, PartialState
from accelerate.utils import disable_fsdp_ram_efficient_loading, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from clla.errors import UsageError
from clla.heal.student import Distiller, make_student, trainable_copy
from clla.modeling.modeling_clla import CllaForCausalLM
from clla.source.placement import decoder_layers


def launched_sharded() -> bool:
    """Whether `accelerate launch --use_fsdp` started these processes (asked of it, as accelerators know GPUs only).

    Raises:
        UsageError: FSDP 1, or an option of accelerate that would have no effect.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        remedy = "accelerate launch --use_fsdp --fsdp_version 2, or fsdp_version: 2 in its config file"
        raise UsageError(f"FSDP version {version}", expected="version 2", remedy=remedy)
    for variable in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
        if parse_flag_from_env(variable):
            remedy = "leave it out; clla's own --gradient-checkpointing saves memory as well"
            raise UsageError(f"--{variable.lower()} true", expected="sharding without it", remedy=remedy)
    disable_fsdp_ram_efficient_loading()  # it would leave all processes but one without weights
    return torch.distributed.is_initialized()  # not in a single process that was told so


def is_sharded(module: nn.Module) -> bool:
    """Whether it is from `sharded_distiller`."""
    return isinstance(module, FSDPModule)


def sharded_distiller(
    teacher: PreTrainedModel, converted: CllaForCausalLM, train: str, accelerator: Accelerator
) -> Distiller:
    """Teacher and student of which each process holds a part, on the accelerator's device.

    Args:
        teacher: the source; it and the conversion go to the CPU and are not changed otherwise.
        converted: where training starts.
        train: as in `trainable_copy`.
        accelerator: for device, processes and precision.

    Raises:
        UnsupportedModelError: the model has no plain list of layers.
    """
    nn.Module.to(teacher, "cpu")
    nn.Module.to(converted, "cpu")
    converted.release_source()  # its hooks would be copied with the modules; `make_student` puts them back
    distiller = Distiller(trainable_copy(teacher, "codec"), make_student(converted, train))
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Layers compute in bf16 as under autocast. Gathering them so halves what is sent; and what autocast makes of fp32
    # weights would stay until the backward pass, whole. Only gains of norms are rounded that would not be otherwise.
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    rounded = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for model in (distiller.teacher, distiller.student.source):
        own_parameters(model)
        _, layers = decoder_layers(model)
        for layer in layers:
            trained = any(p.requires_grad for p in layer.parameters())
            fully_shard(layer, mesh=mesh, mp_policy=rounded if trained else MixedPrecisionPolicy())
    # By default the root stays whole after a forward pass: steps and states would then meet whole tensors.
    fully_shard(distiller, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(distiller, "gathered")
    return distiller


def own_parameters(model: nn.Module) -> None:
    """Make a model's parameters its own objects, over the same storage until they are sharded; ties stay.

    A parameter is gathered and freed by the one unit that it belongs to, so teacher, student and the conversion must
    not share those that are not trained. Their parts are small: two copies, divided by the number of processes.
    """
    own: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(old) not in own:
                own[id(old)] = nn.Parameter(old.detach(), requires_grad=old.requires_grad)
            setattr(module, name, own[id(old)])


def prepare(accelerator: Accelerator, distiller: Distiller, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    """What the training loop calls and steps with; states contain the optimizer's.

    `accelerator.prepare` would save the whole of a sharded distiller with every state, the teacher included.
    """
    if is_sharded(distiller):
        accelerator.register_for_checkpointing(WholeState(optimizer))
        return distiller, optimizer
    return accelerator.prepare(distiller, optimizer)


class WholeState:
    """An optimizer whose state is saved whole by the main process. All processes have to call both methods."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return tree_map(lambda v: to_main(v) if isinstance(v, Tensor) else v, self.optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, tensors in state["state"].items():
            tensors.update({k: cut_like(v, parameters[i]) for k, v in tensors.items() if v.dim()})
        self.optimizer.load_state_dict(state)


def whole(tensor: Tensor) -> Tensor:
    """All parts of a sharded tensor, if it is one; all processes have to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_main(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU of the main process, an empty one elsewhere; all processes have to call it."""
    found = whole(tensor.detach())
    return found.cpu().contiguous() if PartialState().is_main_process else torch.empty(0)


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's part of a whole tensor, or one that broadcasts, if the other is sharded; all have to call it."""
    if not isinstance(other, DTensor):
        return tensor
    placements = other.placements if tensor.shape[0] == other.shape[0] else [Replicate()]
    return distribute_tensor(tensor.to(other.device), other.device_mesh, placements)
