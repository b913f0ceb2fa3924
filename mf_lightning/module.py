"""MeanFlowModule: glue between network, loss, optimizer and Lightning. No mathematics here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mf_lightning.checkpoints import CHECKPOINT_FORMAT, check_architecture, describe_net
from mf_lightning.checkpoints.weights import check_resumable, imported_name, load_initial
from mf_lightning.flow.jvp import choose_jvp
from mf_lightning.flow.meanflow import MeanFlowLoss
from mf_lightning.flow.passes import PLAIN, Passes, compiled_generator, prepare_compiler
from mf_lightning.flow.rows import Draw
from mf_lightning.metrics.by_time import ErrorByTime
from mf_lightning.optim import clip_gradients, compile_step, plain_states
from mf_lightning.sharding import is_sharded
from mf_lightning.types import AverageVelocity, LatentBatch, LatentSpec, LossTerms, UserError

PRECISIONS = ("32-true", "bf16-mixed", "64-true")


class MeanFlowModule(LightningModule):
    """A network in training with the MeanFlow loss.

    Args:
        net: makes the network of the data set's latent shape and class count; ``class_path`` and ``init_args`` of, for
            example, ``mf_lightning.nets.SiT``.
        loss: the MeanFlow loss; ``fm_fraction: 1`` is plain flow matching.
        optimizer: ``class_path`` and ``init_args`` of a torch optimizer.
        lr_schedule: ``class_path`` and ``init_args`` of a scheduler that steps with the optimizer; null keeps the rate.
        seed: of times, noise and label drop: with the optimizer step and the row it decides every draw.
        compile: run the training step's network passes, the optimizer with its EMA, and sampling under torch.compile. The first
            steps take minutes; validation losses stay plain.
        cuda_graphs: capture sampling in CUDA graphs, which spares a small network the launch of its kernels; with compile.
        tf32: let a GPU round float32 factors to 10 bits in training's matrix products and convolutions: faster, less exact.
            Samples, decoder and extractor stay in true float32.
        init_from: a checkpoint made by `python -m mf_lightning import`, whose weights a new run begins from; every average
            begins there too. A resumed run has its own. Null begins at random.
    """

    def __init__(
        self,
        net: Callable[[LatentSpec], nn.Module],
        loss: MeanFlowLoss,
        optimizer: Callable[[Any], Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler] | None = None,
        seed: int = 0,
        compile: bool = False,
        cuda_graphs: bool = False,
        tf32: bool = False,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self.make_net = net
        self.net: nn.Module | None = None
        self.loss = loss
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.seed = seed
        self.compiled = compile
        self.cuda_graphs = cuda_graphs
        self.tf32 = tf32
        self.init_from = init_from
        self.resumes = False
        """Whether a checkpoint is about to replace the weights: the command line says so, and ``init_from`` is not read."""
        self.passes = PLAIN
        """How the loss calls the network in training."""
        self.plain_passes = PLAIN
        """The same in validation, never compiled as a whole."""
        self._compiled_generator: AverageVelocity | None = None
        self._gradient_norm: Tensor | None = None
        self.before_saving: Callable[[], None] = lambda: None
        """Called before anything is saved; may raise. The guard puts itself here."""
        self.last_terms: LossTerms | None = None
        """Terms of the newest training batch, for guards and logs."""
        self.last_draw: Draw | None = None
        """Its times, noise and label drops."""
        self.imported: str | None = None
        """What the weights are, where they come from no training state and were loaded only to be scored."""
        self._loaded_steps = 0
        self._logged_steps = 0
        self._by_time = ErrorByTime()

    @property
    def trained_steps(self) -> int:
        """Optimizer steps behind the weights, also where a checkpoint was loaded only to be scored."""
        return max(self.global_step, self._loaded_steps)

    @property
    def generator(self) -> AverageVelocity:
        """The network as samplers call it, compiled if asked for."""
        return self._compiled_generator or self.net

    def configure_model(self) -> None:
        """Make the network once the data set's shape is known."""
        device, spec = self.trainer.strategy.root_device, self.trainer.datamodule.latent_spec
        shard = getattr(self.trainer.strategy, "shard_network", None)
        if shard is not None:
            with torch.device("meta"):  # shapes without memory
                self.net = self.make_net(spec)
        elif self.net is None:
            self.net = self.make_net(spec)
        self._check_arithmetic(device)
        if shard is not None and self.compiled and choose_jvp(self.loss.jvp, self.net) == "torch":
            raise UserError(
                "Got model.compile = true with torch.func.jvp under FSDP, expected the network's own tangents: blocks are "
                "compiled one by one, and torch.func.jvp cannot pass through them. Set model.compile to false, or jvp to null."
            )
        if shard is not None:
            float32_jvp = self.loss.jvp_precision == "32-true"
            shard(self.net, precision=str(self.trainer.precision), float32_jvp=float32_jvp, compile_blocks=self.compiled)
            if self.compiled:
                prepare_compiler(device)
            self.passes = self.plain_passes = Passes(least_rows=1, fixed_sizes=self.compiled)
        elif self.compiled:
            self.passes = Passes.compiled(device)
            mode = "reduce-overhead" if self.cuda_graphs else None
            self._compiled_generator = compiled_generator(self.net, mode=mode)
        if self.init_from is not None and self.trainer.state.fn == "fit" and not self.resumes:
            load_initial(self.net, self.init_from)

    def _check_arithmetic(self, device: torch.device) -> None:
        """Refuse what this device, or each other's company, does not allow."""
        if self.loss.jvp == "torch" and getattr(self.net, "jvp_attention", None) == "flash":
            raise UserError(
                "Got model.loss.init_args.jvp = torch with model.net.init_args.jvp_attention = flash, expected the network's "
                "own tangents under that kernel: torch.func.jvp uses math attention. Set jvp to null, or jvp_attention to math."
            )
        precision = str(self.trainer.precision)
        if precision not in PRECISIONS:
            raise UserError(
                f"Got trainer.precision = {precision}, expected one of {', '.join(PRECISIONS)}: others need their gradients "
                "scaled, or lose what the derivative needs. bf16-mixed is the fast one."
            )
        if self.tf32 and device.type != "cuda":
            raise UserError(f"Got model.tf32 = true on {device}, expected a GPU: TF32 is an Nvidia format. Set it to false.")
        if self.cuda_graphs and not (self.compiled and device.type == "cuda"):
            raise UserError(
                f"Got model.cuda_graphs = true on {device} with model.compile = {str(self.compiled).lower()}, expected a GPU "
                "and compilation. Set model.compile to true on a GPU, or model.cuda_graphs to false."
            )

    def configure_optimizers(self) -> Any:
        """Return the configured optimizer and, if there is one, its schedule by optimizer step."""
        optimizer = self.optimizer([p for p in self.net.parameters() if p.requires_grad])
        if self.compiled and not is_sharded(self.net):
            compile_step(optimizer)
        if self.lr_schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_schedule(optimizer), "interval": "step"}}

    def on_fit_start(self) -> None:
        """Let the network try what may not run on this device or in this precision; forget an earlier fit."""
        self._gradient_norm = None
        if hasattr(self.net, "check_device"):
            precision = self.loss.jvp_precision or str(self.trainer.precision)
            self.net.check_device(self.device, torch.bfloat16 if precision == "bf16-mixed" else self.dtype)

    def on_train_start(self) -> None:
        """Choose the products of training; what is scored is always computed in true float32."""
        set_tf32(self.tf32)

    def on_validation_start(self) -> None:
        """Score in true float32: samples, decoder and extractor; `validate` and `test` log at the step of the weights."""
        set_tf32(False)
        if self.trainer.state.fn != "fit":
            loop = self.trainer.fit_loop.epoch_loop  # Lightning's loggers count by it
            self._logged_steps, loop._batches_that_stepped = loop._batches_that_stepped, self.trained_steps

    def on_validation_end(self) -> None:
        """Go back to the products of training."""
        set_tf32(self.tf32 and self.trainer.state.fn == "fit")
        if self.trainer.state.fn != "fit":
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = self._logged_steps

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def on_predict_start(self) -> None:
        """Draw in true float32."""
        set_tf32(False)

    def on_train_end(self) -> None:
        """Leave the process in true float32."""
        set_tf32(False)

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """Return the weighted loss of this device's rows."""
        draw = self.loss.draw_training(
            batch.x,
            batch.row,
            seed=self.seed,
            step=self.global_step,
            global_batch_size=self.trainer.datamodule.batch_size,
        )
        how = {"y_null": self.net.y_null, "passes": self.passes, "step": self.global_step}
        self.last_draw = draw
        terms = self.last_terms = self.loss(self.net, batch.x, self._labels(batch), draw, **how)
        self._log_terms("train", terms, counted=batch.row >= 0, jumps=draw.r < draw.t)
        return terms.loss

    def validation_step(self, batch: LatentBatch, batch_idx: int, stage: str = "val") -> None:
        """Log the loss of the raw weights at times and noise fixed by (seed, sample)."""
        draw = self.loss.draw_validation(batch.x, batch.index, seed=self.seed)
        how = {"y_null": self.net.y_null, "passes": self.plain_passes, "step": self.trained_steps}
        terms = self.loss(self.net, batch.x, self._labels(batch), draw, **how)
        counted = batch.row >= 0
        self._log_terms(stage, terms, counted=counted, jumps=draw.r < draw.t)
        self._by_time.add(draw.t, counted, raw_error=terms.raw_error, velocity_error=terms.velocity_error)

    def on_validation_epoch_start(self) -> None:
        """Forget the errors of the validation before."""
        self._by_time = ErrorByTime()

    def on_validation_epoch_end(self, stage: str = "val") -> None:
        """Log errors by bin of t, over the rows of all processes."""
        means = self._by_time.means(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
        self.log_dict({f"{stage}/{name}": value for name, value in means.items()})

    on_test_epoch_start = on_validation_epoch_start

    def on_test_epoch_end(self) -> None:
        """As validation."""
        self.on_validation_epoch_end(stage="test")

    def test_step(self, batch: LatentBatch, batch_idx: int) -> None:
        """As validation; the images that `test` scores come from the evaluation callback."""
        self.validation_step(batch, batch_idx, stage="test")

    def predict_step(self, batch: int, batch_idx: int) -> None:
        """Nothing: the images that `predict` writes come from its callback."""

    def _labels(self, batch: LatentBatch) -> Tensor | None:
        return None if self.net.y_null is None else batch.y

    def _log_terms(self, stage: str, terms: LossTerms, *, counted: Tensor, jumps: Tensor) -> None:
        # a batch of filling has no rows, and weighs nothing; the mean over processes of counts is cut to a whole number
        rows, jumping, world = int(counted.sum()), int((counted & jumps).sum()), self.trainer.world_size
        how = {"batch_size": rows * world, "sync_dist": stage != "train"}
        self.log(f"{stage}/loss", terms.loss.detach(), **how)
        self.log(f"{stage}/raw_error", terms.raw_error.mean(), **how)
        self.log(f"{stage}/velocity_error", terms.velocity_error.mean(), **how)
        if self.loss.fm_fraction < 1:  # mean over r < t rows; a process without any logs it with weight 0, or others wait
            value = terms.dudt_norm.sum() / max(jumping, 1)
            self.log(f"{stage}/dudt_norm", value, **{**how, "batch_size": jumping * world})

    def gradient_norm(self) -> Tensor:
        """Return the norm of this step's gradient before clipping, computed once a step, without waiting for the device."""
        if self._gradient_norm is None:
            norm = get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None])
            self._gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all shards
        return self._gradient_norm

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says and log the norm before clipping."""
        norm, self._gradient_norm = self.gradient_norm(), None
        if gradient_clip_val is not None and gradient_clip_algorithm == "value":
            if any(p.grad is not None for p in self.net.parameters()):  # torch raises at none, which a skipped step has
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val is not None:
            clip_gradients(self.net.parameters(), gradient_clip_val, norm)
        self.log("train/grad_norm", norm, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what one needs to sample from the file: its format, the network's class and settings, what its data is."""
        self.before_saving()
        checkpoint["format_version"] = CHECKPOINT_FORMAT
        checkpoint["net"] = describe_net(self.net)
        checkpoint["data"] = self.trainer.datamodule.info.describe()
        checkpoint["fm_fraction"] = self.loss.fm_fraction
        checkpoint["init_from"] = self.init_from
        plain_states(checkpoint, self.trainer.optimizers)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another format or architecture, and note its step."""
        self.check_checkpoint(checkpoint)
        self._loaded_steps = checkpoint["global_step"]
        self.imported = imported_name(checkpoint)
        if self.trainer.state.fn == "fit":
            check_resumable(checkpoint, self.init_from)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another format or architecture; its tensors' values are not looked at.

        Raises:
            UserError: naming what differs.
        """
        version = checkpoint.get("format_version")
        if version != CHECKPOINT_FORMAT:
            raise UserError(
                f"Got a checkpoint of format version {version}, expected {CHECKPOINT_FORMAT}: it was not written by this "
                "version of mf_lightning."
            )
        check_architecture(checkpoint["net"], describe_net(self.net))


def set_tf32(on: bool) -> None:
    """Switch TF32 for the whole process, both ways: torch alone would leave it on for convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
