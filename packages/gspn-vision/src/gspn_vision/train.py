"""Training: one loop over updates that can be killed at any moment and continued to the same weights, bit for bit."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from . import checkpoint
from .config import FREE_TO_CHANGE, TrainConfig, to_dict, to_yaml
from .data import (
    Batch,
    Preprocessing,
    Samples,
    Unreadable,
    open_source,
    training_loader,
    validation_loader,
)
from .evaluate import Metrics, evaluate
from .logs import Logs
from .sampling import INIT, STEP, EpochBatches, seed_all
from .tuning import freeze, start_from


class NonFiniteLossError(ArithmeticError):
    """The loss became infinite or not a number."""


def model_arguments(config: TrainConfig, classes: int) -> dict[str, Any]:
    """Return the constructor arguments of a configuration's model."""
    return {
        "num_classes": classes,
        "in_chans": config.in_chans,
        "drop_rate": config.drop_rate,
        "drop_path_rate": config.drop_path_rate,
        **config.model_kwargs,
    }


def preprocessing_of(config: TrainConfig, model: nn.Module) -> Preprocessing:
    """Return the preprocessing of a configuration, with the model's own mean and deviation where it has none."""
    own = resolve_model_data_config(model)

    def fit(values: tuple[float, ...]) -> tuple[float, ...]:
        return values if len(values) == config.in_chans else (sum(values) / len(values),)

    return Preprocessing(
        in_chans=config.in_chans,
        size=config.size,
        mean=config.mean or fit(tuple(own["mean"])),
        std=config.std or fit(tuple(own["std"])),
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
    )


class Trainer:
    """A run: built from its configuration, continued from its newest checkpoint if there is one.

    Raises:
        ValueError, FileNotFoundError: an option, the data or a checkpoint does not fit; nothing has been written then.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = config.folder
        self.checkpoints = self.folder / "checkpoints"
        self.accelerator = Accelerator(
            cpu=config.device == "cpu",
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulate,
        )
        if config.deterministic:
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
        world = {
            "rank": self.accelerator.process_index,
            "world_size": self.accelerator.num_processes,
        }
        options: dict[str, Any] = {"root": config.data_root, "download": config.download}
        train_source = open_source(config.data, config.train_split, **options)
        self.class_names = train_source.class_names
        val_source = open_source(config.data, config.val_split, class_names=self.class_names, **options)
        self.batches = EpochBatches(
            len(train_source),
            config.batch_size,
            accumulate=config.accumulate,
            seed=config.seed,
            **world,
        )
        self.updates = self.batches.updates_per_epoch
        self.images_per_update = config.batch_size * config.accumulate * world["world_size"]

        seed_all(INIT, config.seed)
        self.model_kwargs = model_arguments(config, len(self.class_names))
        self.bare_model = checkpoint.build_model(config.model, self.model_kwargs)
        self.preprocessing = preprocessing_of(config, self.bare_model)
        if config.grad_checkpointing:
            self.bare_model.set_grad_checkpointing()  # type: ignore[operator]

        pin = self.accelerator.device.type == "cuda"
        prep = self.preprocessing
        train_samples = Samples(train_source, prep.training_transform(config), prep.mode, seed=config.seed)
        self.train_loader = training_loader(train_samples, self.batches, config.workers, pin)
        self.val_loader = validation_loader(
            Samples(val_source, prep.transform(), prep.mode),
            config.batch_size,
            config.workers,
            pin,
            **world,
        )
        self.unreadable = Unreadable(config.unreadable)
        self.mixup = None
        if config.mixup > 0 or config.cutmix > 0:
            self.mixup = Mixup(
                config.mixup,
                config.cutmix,
                prob=config.mix_probability,
                label_smoothing=config.label_smoothing,
                num_classes=len(self.class_names),
            )

        self.step = 0
        self.epoch = 0
        self.update = 0  # within the epoch
        self.epoch_loss = 0.0  # sum over the epoch's updates so far
        self.row_losses: list[float] = []  # of the updates since the last row of the log
        self.best: dict[str, Any] = {"top1": -1.0, "checkpoint": None}
        self.metrics: dict[str, float] | None = None
        self._restore_or_start()

    def _restore_or_start(self) -> None:
        """Load the newest checkpoint, if any, and set up all that depends on the weights."""
        config = self.config
        latest = checkpoint.read_index(self.checkpoints).get("latest")
        if latest and config.resume == "never":
            raise ValueError(f"resume is 'never' but {self.folder} already holds a run; give another folder as `out`")
        state = checkpoint.read_state(self.checkpoints / latest) if latest else None
        if state:
            self._check_same_run(state)
            weights = checkpoint.read_tensors(self.checkpoints / str(latest), "model")
            checkpoint.load_weights(self.bare_model, weights, str(latest))
        elif config.start_from is not None:
            start_from(self.bare_model, config.start_from)
        freeze(self.bare_model, config.freeze)

        device = self.accelerator.device
        self.bare_model.to(device)
        self.ema = None
        if config.ema_decay > 0:
            self.ema = ModelEmaV3(self.bare_model, decay=config.ema_decay, use_warmup=config.ema_warmup)
        lr = config.lr
        if config.lr_batch is not None:
            lr *= self.images_per_update / config.lr_batch
        try:
            self.optimizer = create_optimizer_v2(
                self.bare_model,
                config.optimizer,
                lr=lr,
                weight_decay=config.weight_decay,
                layer_decay=config.layer_decay,
            )
        except (AssertionError, ValueError) as error:
            raise ValueError(f"optimizer {config.optimizer!r} cannot be made: {error}") from None
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            config.schedule,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.updates,
        )
        if config.compile:
            self.bare_model.compile()
        self.model, self.stepper = self.accelerator.prepare(self.bare_model, self.optimizer)
        if state:
            self._load_state(self.checkpoints / str(latest), state)

    def _check_same_run(self, state: dict[str, Any]) -> None:
        free = FREE_TO_CHANGE | {"batch_size", "accumulate"}
        if state["model"]["name"] != self.config.model:
            raise ValueError(
                f"{self.folder} holds a checkpoint of another model: {state['model']['name']}, not {self.config.model}"
            )
        now = to_dict(self.config)
        for key, before in state["config"].items():
            if key not in free and now.get(key) != before:
                raise ValueError(
                    f"{key} must be {before!r} to continue the run in {self.folder}, got {now.get(key)!r}; "
                    "give another folder as `out` for a new run"
                )
        if state["images_per_update"] != self.images_per_update:
            raise ValueError(
                f"images per update (batch_size * accumulate * processes) must be "
                f"{state['images_per_update']} to continue the run in {self.folder}, got {self.images_per_update}"
            )
        if state["class_names"] != self.class_names:
            raise ValueError(f"the classes of {self.config.data} are not those of the run in {self.folder}")

    def _load_state(self, path: Path, state: dict[str, Any]) -> None:
        tensors = checkpoint.read_tensors(path, "optimizer")
        checkpoint.unpack_optimizer(self.optimizer, tensors, state["optimizer"])
        if self.ema is not None:
            checkpoint.load_weights(self.ema.module, checkpoint.read_tensors(path, "ema"), str(path))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name in ("step", "epoch", "update", "epoch_loss", "row_losses", "best", "metrics"):
            setattr(self, name, state[name])

    def _save(self) -> None:
        """Write a checkpoint of this moment; every process calls it."""
        if self.accelerator.is_main_process:
            self.logs.sync()
            name = f"step-{self.step:08d}"
            tensors, packed = checkpoint.pack_optimizer(self.optimizer)
            files = {"model": self.bare_model.state_dict(), "optimizer": tensors}
            if self.ema is not None:
                files["ema"] = self.ema.module.state_dict()
            scaler = self.accelerator.scaler
            state = {
                "format": "gspn-vision 1",
                "model": {"name": self.config.model, "kwargs": self.model_kwargs},
                "class_names": self.class_names,
                "preprocessing": vars(self.preprocessing),
                "data": {
                    "name": self.config.data,
                    "root": self.config.data_root,
                    "val_split": self.config.val_split,
                },
                "step": self.step,
                "epoch": self.epoch,
                "update": self.update,
                "epoch_loss": self.epoch_loss,
                "row_losses": self.row_losses,
                "best": self.best,
                "metrics": self.metrics,
                "images_per_update": self.images_per_update,
                "processes": self.accelerator.num_processes,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "config": to_dict(self.config),
                "optimizer": packed,
            }
            checkpoint.save(
                self.checkpoints,
                name,
                files,
                state,
                best=self.best["checkpoint"],
                keep=self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _update_weights(self, batches: Iterator[Batch]) -> Tensor:
        """Take one optimizer step; return this process's mean loss, on the device."""
        config = self.config
        device = self.accelerator.device
        total = torch.zeros((), device=device)
        self.scheduler.step_update(self.step)
        for micro in range(config.accumulate):
            batch = next(batches)
            self.unreadable.note(batch.unreadable)
            seed_all(STEP, config.seed, self.step, micro, self.accelerator.process_index)
            images = batch.images.to(device, non_blocking=True)
            targets = batch.targets.to(device, non_blocking=True)
            smoothing = config.label_smoothing
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
                smoothing = 0.0  # mixup has smoothed the labels itself
            with self.accelerator.accumulate(self.model):
                logits = self.model(images)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                if config.mesa > 0 and self.epoch >= config.mesa_start * config.epochs:
                    loss = loss + config.mesa * self._sharpness(images, logits)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and config.clip_grad:
                    self.accelerator.clip_grad_norm_(self.bare_model.parameters(), config.clip_grad)
                self.stepper.step()
                self.stepper.zero_grad()
            total += loss.detach() / config.accumulate
        self.step += 1
        self.update += 1
        if self.ema is not None:
            self.ema.update(self.bare_model, step=self.step)
        return total

    def _sharpness(self, images: Tensor, logits: Tensor) -> Tensor:
        """Return MESA's penalty, KL(softmax(averaged model's logits) || softmax(logits)), a mean over the batch.

        Source: Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
        """
        assert self.ema is not None
        with torch.no_grad(), self.accelerator.autocast():
            averaged = self.ema.module(images).float()
        return F.kl_div(
            logits.float().log_softmax(-1), averaged.log_softmax(-1), log_target=True, reduction="batchmean"
        )

    @property
    def _lr(self) -> float:
        """The learning rate that layer decay and the like scale down."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _collect(self, losses: list[Tensor]) -> float | None:
        """Move the losses of the last updates off the device, add them up and write the rows that are due.

        Raises:
            NonFiniteLossError: one of them is infinite or not a number.
        """
        if not losses:
            return None
        values: Any = self.accelerator.reduce(torch.stack(losses), "mean")
        first = self.step - len(losses)
        losses.clear()
        value = 0.0
        for offset, value in enumerate(values.tolist()):
            step = first + offset + 1
            self.scheduler.step_update(step - 1)
            lr = self._lr
            if not math.isfinite(value):
                index = checkpoint.read_index(self.checkpoints)
                good = self.checkpoints / index["latest"] if index else "none"
                raise NonFiniteLossError(
                    f"the loss is {value} at step {step} with learning rate {lr:.3g}; last good checkpoint: {good}"
                )
            self.epoch_loss += value
            self.row_losses.append(value)
            if step % self.config.log_every == 0:
                mean = sum(self.row_losses) / len(self.row_losses)
                self.row_losses = []
                if self.accelerator.is_main_process:
                    epoch = (step - 1) // self.updates + 1
                    self.logs.add("steps", step, epoch=epoch, loss=mean, lr=lr, images_per_second=self.speed)
        return value

    def _train_epoch(self) -> None:
        config = self.config
        self.model.train()
        self.batches.set_position(self.epoch, self.update)
        losses: list[Tensor] = []
        self.speed = 0.0
        done, since = 0, time.perf_counter()
        bar = tqdm(
            total=self.updates,
            initial=self.update,
            desc=f"epoch {self.epoch + 1}/{config.epochs}",
            unit="update",
            disable=not (config.progress and self.accelerator.is_main_process),
        )
        with bar:
            batches = iter(self.train_loader)
            while self.update < self.updates:
                losses.append(self._update_weights(batches))
                done += 1
                bar.update()
                checkpoint_due = (
                    config.checkpoint_every > 0
                    and self.step % config.checkpoint_every == 0
                    and self.update < self.updates
                )
                if self.step % config.log_every and not checkpoint_due and self.update < self.updates:
                    continue
                elapsed = time.perf_counter() - since
                self.speed = round(done * self.images_per_update / elapsed, 1)
                loss = self._collect(losses)
                done, since = 0, time.perf_counter()
                lr = self._lr
                bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {self.speed:.0f} images/s")
                if checkpoint_due:
                    self._save()

    def _end_epoch(self) -> None:
        """Validate if it is time to, write the epoch's row and its checkpoint."""
        config = self.config
        self.epoch += 1
        last = self.epoch == config.epochs
        metrics: Metrics | None = None
        if last or self.epoch % config.validate_every == 0:
            metrics = evaluate(
                self.bare_model if self.ema is None else self.ema.module,
                self.val_loader,
                self.accelerator,
                len(self.class_names),
                self.unreadable,
                progress=config.progress and self.accelerator.is_main_process,
            )
            self.metrics = {"top1": metrics.top1, "top5": metrics.top5, "loss": metrics.loss}
            if metrics.top1 > self.best["top1"]:
                self.best = {"top1": metrics.top1, "checkpoint": f"step-{self.step:08d}"}
        train_loss = self.epoch_loss / self.updates
        self.update, self.epoch_loss = 0, 0.0
        if self.accelerator.is_main_process:
            shown: dict[str, float | None] = {"validation_loss": None, "top1": None, "top5": None, "best_top1": None}
            if metrics is not None:
                shown = {
                    "validation_loss": metrics.loss,
                    "top1": metrics.top1,
                    "top5": metrics.top5,
                    "best_top1": self.best["top1"],
                }
                tqdm.write(
                    f"epoch {self.epoch}: loss {train_loss:.4f}, validation loss {metrics.loss:.4f}, "
                    f"top-1 {metrics.top1:.2f}%, top-5 {metrics.top5:.2f}%",
                    file=sys.stderr,
                )
            self.logs.add("epochs", self.step, epoch=self.epoch, train_loss=train_loss, **shown)
        self._save()

    def run(self) -> dict[str, Any]:
        """Train to the end.

        Returns:
            The run's `folder`, `steps`, `parameters`, last `top1`, `best_top1`, and `seconds` of this call.

        Raises:
            NonFiniteLossError: the loss became infinite or not a number.
            UnreadableImageError: an image cannot be read and `unreadable` is "stop".
        """
        began = time.perf_counter()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomically(self.folder / "config.yaml", to_yaml(self.config))
            self.logs = Logs(self.folder, self.step, self.config.tensorboard)
        try:
            while self.epoch < self.config.epochs:
                self._train_epoch()
                self._end_epoch()
        finally:
            if self.accelerator.is_main_process:
                self.logs.close()
        if self.accelerator.is_main_process:
            self.unreadable.report()
        return {
            "folder": str(self.folder),
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.bare_model.parameters()),
            "top1": self.metrics["top1"] if self.metrics else None,
            "best_top1": self.best["top1"],
            "seconds": round(time.perf_counter() - began, 1),
        }


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model as configured and return a summary; see `Trainer.run`."""
    return Trainer(config).run()
