"""A network in shards: each process keeps a part of every parameter and sees a whole block only while it runs (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from mf_lightning.types import UserError

LEAST_TORCH = (2, 13)
"""``torch.func.jvp`` through FSDP2 fails before it."""


def check_torch(version: str = torch.__version__) -> None:
    """Refuse a torch whose FSDP2 forward derivatives do not pass through.

    Raises:
        UserError: torch is too old.
    """
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < LEAST_TORCH:
        raise UserError(
            f"Got torch {version} for FSDP, expected at least {'.'.join(map(str, LEAST_TORCH))}: before it, a forward "
            "derivative (JVP) through FSDP2 fails. Upgrade torch, or train with --trainer=configs/trainer/ddp.yaml."
        )


def shard(
    net: nn.Module,
    mesh: DeviceMesh,
    *,
    gather_dtype: torch.dtype | None = None,
    cpu_offload: bool = False,
    compile_blocks: bool = False,
) -> nn.Module:
    """Shard a network without memory (device "meta") over the last dimension of a mesh, block by block, in place.

    Args:
        net: has ``blocks``, a ModuleList, and ``initial_weights``, as :class:`mf_lightning.nets.SiT` has them.
        mesh: (replicas, shards), or (shards,).
        gather_dtype: dtype in which blocks are gathered; None is that of the parameters. Gradients are summed in float32 or the
            parameters' own; embeddings and the last layer are gathered as they are: times need float32.
        cpu_offload: keep shards, gradients and optimizer state in main memory.
        compile_blocks: run each block under torch.compile; the gathering between them stays plain.

    Raises:
        UserError: the network does not say what its blocks and first values are.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    if not (isinstance(getattr(net, "blocks", None), nn.ModuleList) and hasattr(net, "initial_weights")):
        raise UserError(
            f"Got {type(net).__name__} for FSDP, expected a network with `blocks` (a ModuleList) and `initial_weights` (see "
            "mf_lightning.nets.SiT): it is built in shards and never whole. Add them, or train with "
            "--trainer=configs/trainer/ddp.yaml."
        )
    # shards again after every forward, the outermost too: averages are swapped in, and saved, between two passes
    if cpu_offload and mesh.device_type == "cpu":
        raise UserError(
            "Got trainer.strategy.init_args.cpu_offload = true on a CPU, expected a GPU: on a CPU everything is in main memory "
            "already. Set it to false."
        )
    how = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    mixed = {} if gather_dtype is None else {"param_dtype": gather_dtype, "reduce_dtype": torch.float32}
    for block in net.blocks:
        if compile_blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        fully_shard(block, mp_policy=MixedPrecisionPolicy(**mixed, cast_forward_inputs=False), **how)
    fully_shard(net, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **how)
    return net


@torch.no_grad()
def materialise(net: nn.Module, device: torch.device, compute_device: torch.device) -> None:
    """Give a sharded network memory and its first values: no process ever holds more than one whole tensor.

    Args:
        net: sharded, on the device "meta".
        device: of parameters.
        compute_device: of buffers, which FSDP does not move.
    """
    net.to_empty(device=device)
    for module in net.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=compute_device))
    waiting = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for name, value in net.initial_weights():
        target = waiting.pop(name)
        local(target).copy_(local(placed(value, target)))
    assert not waiting, f"initial_weights of {type(net).__name__} leaves out {sorted(waiting)}"


def is_sharded(net: nn.Module) -> bool:
    """Tell whether a network's parameters are shards."""
    return any(isinstance(parameter, DTensor) for parameter in net.parameters())


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this process, sharing its memory; an ordinary tensor is itself."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, laid out as ``like``, without talking to others."""
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.dtype)
    shard = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return shard.to(like.device)  # offloaded ones lie in main memory, though their mesh is of GPUs


def gathered(tree: Any, *, keep: bool) -> Any:
    """Return a tree with every sharded tensor whole, on the CPU; all processes call it, those that do not keep get None.

    One tensor at a time is whole on a device.
    """
    if isinstance(tree, DTensor):
        whole = tree.detach().full_tensor()
        return whole.cpu() if keep else None
    if isinstance(tree, dict):
        return {key: gathered(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value, keep=keep) for value in tree)
    return tree
