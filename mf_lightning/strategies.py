"""FSDP: every process keeps a share of weights, gradients, optimizer state and averages (torch's FSDP2 under Lightning)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from mf_lightning import sharding
from mf_lightning.checkpoints import is_sharded_checkpoint, read_checkpoint, read_header, sharded
from mf_lightning.checkpoints.files import not_written, verify_together
from mf_lightning.launchers import is_lost
from mf_lightning.types import UserError


class FSDPStrategy(ModelParallelStrategy):
    """Fully sharded data parallel (FSDP2): the network is built in shards, block by block, and is never whole anywhere.

    Results equal those of one process and of DDP; what differs is memory, and what processes send each other.

    Args:
        replicas: groups of processes that each hold the whole network in shards (HSDP); 1 shards over all processes. With one
            group per node, weights are gathered within nodes only. It divides the number of processes.
        cpu_offload: keep shards, gradients, optimizer state and averages in main memory; slower.
        gather_dtype: dtype in which blocks' weights are sent; null is bfloat16 where trainer.precision is bf16-mixed, which
            rounds them to it anyway, else the weights' own. Gradients are summed in float32.
        sharded_checkpoints: each process writes its part into a directory; false collects them in one file.
        process_group_backend: null is nccl on GPUs and gloo on CPUs.
        timeout_minutes: how long a process waits for the others before it gives up.
    """

    def __init__(
        self,
        replicas: int = 1,
        cpu_offload: bool = False,
        gather_dtype: Literal["bfloat16", "float32"] | None = None,
        sharded_checkpoints: bool = True,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        sharding.check_torch()
        super().__init__(
            save_distributed_checkpoint=sharded_checkpoints,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.replicas = replicas
        self.cpu_offload = cpu_offload
        self.gather_dtype = gather_dtype
        self.sharded_checkpoints = sharded_checkpoints
        self._group: Any = None
        self._saving: Any = None
        self._saving_to: Path | None = None

    def _get_process_group_backend(self) -> str:
        """Offloaded shards are summed in main memory (the gradient's norm): gloo beside nccl."""
        backend = super()._get_process_group_backend()
        return "cpu:gloo,cuda:nccl" if self.cpu_offload and backend == "nccl" else backend

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every process has rows of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizer states are loaded as in every other strategy, only in shards."""
        return True

    def setup_environment(self) -> None:
        """Meet the other processes and lay them out as (replicas, shards)."""
        self._setup_distributed()
        if self.replicas < 1 or self.world_size % self.replicas:
            raise UserError(
                f"Got trainer.strategy.init_args.replicas = {self.replicas} for {self.world_size} process(es), expected a "
                "divisor of their number. One group per node is the usual choice."
            )
        shape = (self.replicas, self.world_size // self.replicas)
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicas", "shards"))
        if self.sharded_checkpoints:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def shard_network(self, net: nn.Module, *, precision: str, float32_jvp: bool, compile_blocks: bool) -> None:
        """Shard a network that was built on the device "meta" and give it its first values.

        Args:
            net: as :func:`mf_lightning.sharding.shard` wants it.
            precision: of the trainer.
            float32_jvp: whether the derivative is taken in float32 under bf16-mixed, and so needs the weights unrounded.
            compile_blocks: run each block under torch.compile.
        """
        qk_norm = bool(getattr(net, "config", {}).get("qk_norm"))  # autocast leaves its weights in float32
        rounded = precision == "bf16-mixed" and not float32_jvp and not qk_norm
        bfloat16 = rounded if self.gather_dtype is None else self.gather_dtype == "bfloat16"
        if bfloat16 and not rounded:
            raise UserError(
                f"Got trainer.strategy.init_args.gather_dtype = bfloat16 with trainer.precision = {precision}"
                f"{' and jvp_precision = 32-true' if float32_jvp else ''}{' and qk_norm' if qk_norm else ''}, expected "
                "bf16-mixed alone: the weights would "
                "be rounded where they are used in full. Leave gather_dtype out, or set it to float32."
            )
        mesh = self.device_mesh if self.replicas > 1 else self.device_mesh["shards"]
        how = {"gather_dtype": torch.bfloat16 if bfloat16 else None, "cpu_offload": self.cpu_offload}
        sharding.shard(net, mesh, **how, compile_blocks=compile_blocks)
        sharding.materialise(net, torch.device("cpu") if self.cpu_offload else self.root_device, self.root_device)

    def model_to_device(self) -> None:
        """Leave the shards where they were made."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's own state, parameters in shards."""
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's own state, in shards, by number of the parameter."""
        return (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a directory of shards, or collect one file; every process calls it.

        Raises:
            UserError: the disk is full or not writable, now or in an earlier save in the background.
        """
        self.wait_for_checkpoint()
        path = Path(self.broadcast(filepath))
        if not self.sharded_checkpoints:
            whole = sharding.gathered(checkpoint, keep=self.is_global_zero)
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(whole, path)
            return
        background = bool(getattr(self.checkpoint_io, "background", False))
        try:
            aside = self._prepared(path, checkpoint["global_step"])
            self._saving_to = path
            self._saving = sharded.write(checkpoint, aside, path, group=self._group, background=background)
        except (OSError, RuntimeError, dist.checkpoint.CheckpointException) as error:
            raise _not_written(path, error) from error

    def _prepared(self, path: Path, step: int) -> Path:
        """Return the directory to write into, made by the first process; its error is everyone's."""
        aside: Path | OSError | None = None
        if self.is_global_zero:
            try:
                aside = sharded.prepare(path, step)
            except OSError as error:
                aside = error
        aside = self.broadcast(aside)
        if isinstance(aside, OSError):
            raise aside
        return aside

    def wait_for_checkpoint(self) -> None:
        """Wait until what is written in the background is whole.

        Raises:
            UserError: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            try:
                saving.result()
            except (OSError, RuntimeError, dist.checkpoint.CheckpointException) as error:
                raise _not_written(self._saving_to, error) from error

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any strategy, each tensor as this run shards it; every process calls it."""
        path = Path(self.broadcast(checkpoint_path))
        if path.exists():
            self.lightning_module.check_checkpoint(read_header(path))  # before tensors of other shapes are placed
        place = self._place()
        if is_sharded_checkpoint(path):
            verify_together(path, self._group)
            return read_checkpoint(path, place=place, checked=True)
        skeleton, tensors = sharded.split(read_checkpoint(path, mmap=True))

        def put(keys: tuple[Any, ...], name: str) -> Tensor:
            like = place(keys, tensors[name].shape)
            return tensors[name] if like is None else sharding.placed(tensors[name], like)

        return sharded.join(skeleton, put)

    def _place(self) -> Any:
        """Return what tells, from the keys of a tensor in a checkpoint, which parameter it is laid out like."""
        module: LightningModule = self.lightning_module
        by_name = dict(module.named_parameters())
        by_number = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in self.optimizers]

        def place(keys: tuple[Any, ...], shape: torch.Size) -> Tensor | None:
            like = None
            if keys[0] == "state_dict":
                like = by_name.get(keys[1])
            elif keys[0] in ("ema", "phema") and keys[1] == "weights":
                like = by_name.get(f"net.{keys[3]}")
            elif keys[0] == "optimizer_states" and keys[2] == "state" and by_number:
                like = by_number[keys[1]][keys[3]]
            return like if like is not None and like.shape == shape else None

        return place

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take the weights."""
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the optimizer states; with cpu_offload they stay in main memory."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a file or directory, on the first process."""
        Strategy.remove_checkpoint(self, filepath)

    def teardown(self) -> None:
        """Finish writing, then leave."""
        self.wait_for_checkpoint()
        self.checkpoint_io.teardown()
        super().teardown()


def _not_written(path: Path, error: BaseException) -> Exception:
    """Return what to raise: the loss of another process is not one of the disk."""
    if isinstance(error, dist.checkpoint.CheckpointException):
        error = next((what[0] for what in error.failures.values()), error)
    return error if isinstance(error, RuntimeError) and is_lost(error) else not_written(path, error)
