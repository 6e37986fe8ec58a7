"""Training: one loop over updates that can be killed at any moment and continued to the same weights, bit for bit."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from gspn_core.runs import checkpoints
from gspn_core.runs.cards import Figure, short
from gspn_core.runs.errors import reason
from gspn_core.runs.files import check_replaceable, locked, write_text
from gspn_core.runs.logs import Log
from gspn_core.runs.options import to_dict, to_yaml, warmup_of
from gspn_core.runs.order import INIT, STEP, Order, seed_all
from gspn_core.runs.training import (
    FREE_TO_CHANGE,
    LearningRate,
    Meter,
    Termination,
    averaged,
    check_same_run,
    check_steps,
    make_accelerator,
)

from .arguments import model_arguments, preprocessing_of
from .checkpoint import CONFIG, FORMAT, MODEL_FILES, WEIGHTS, card_of, read_weights, timm_config, write_model
from .config import TrainConfig
from .data import Batch, Samples, Unreadable, batch_loader, validation_loader
from .finetune import freeze, start_from, training_mode
from .models import build_model, check_classifier
from .sources import open_source
from .validate import evaluate

FREE = FREE_TO_CHANGE | {"data_root", "download", "epochs", "validate_every"}
TABLES = {
    "train": ["epoch", "loss", "gradient_norm", "lr", "images_per_second"],
    "validation": ["epoch", "loss", "top1", "top5", "best_top1"],
}


class Trainer:
    """A run: built from its configuration, continued from its newest checkpoint if there is one.

    Raises:
        ValueError, FileNotFoundError: an option, the data or a checkpoint does not fit; nothing has been written then.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = config.folder
        self.checkpoints = self.folder / "checkpoints"
        check_replaceable(self.folder / "model", MODEL_FILES)
        self.accelerator = make_accelerator(config.device, config.precision, config.accumulate, tf32=config.tf32)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if config.deterministic:
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
        self._open_data()
        seed_all(INIT, config.seed)
        self.model_kwargs = model_arguments(config, len(self.class_names))
        self.bare_model = build_model(config.model, self.model_kwargs)
        size = config.image_size
        check_classifier(self.bare_model, (config.in_chans, size.height, size.width), len(self.class_names))
        self.preprocessing = preprocessing_of(config, self.bare_model)
        self.timm_config = timm_config(self.bare_model, self.model_kwargs, self.class_names, self.preprocessing)
        if config.gradient_checkpointing:
            self.bare_model.set_grad_checkpointing()  # type: ignore[operator]
        self._make_loaders()
        self.step = 0
        self.best: dict[str, Any] = {"top1": -1.0, "checkpoint": None}
        self.metrics: dict[str, float] | None = None
        self._restore_or_start()

    def _open_data(self) -> None:
        config = self.config
        options: dict[str, Any] = {"root": config.data_root, "download": config.download}
        self.train_source = open_source(config.data, config.train_split, **options)
        self.class_names = self.train_source.class_names
        self.val_source = open_source(config.data, config.val_split, class_names=self.class_names, **options)
        self.images_per_update = config.batch_size * config.accumulate * self.world
        # Permutations of the data follow each other without a gap: what does not fill an epoch's last update comes
        # first in the next epoch.
        self.updates_per_epoch = max(1, len(self.train_source) // self.images_per_update)
        self.steps = config.epochs * self.updates_per_epoch
        self.order = Order(
            len(self.train_source),
            config.batch_size,
            config.accumulate,
            self.steps,
            seed=config.seed,
            rank=self.rank,
            world_size=self.world,
            with_epoch=True,
        )

    def _make_loaders(self) -> None:
        config, prep = self.config, self.preprocessing
        pin = self.accelerator.device.type == "cuda"
        samples = Samples(self.train_source, prep.training_transform(config), prep.mode, seed=config.seed)
        self.train_loader = batch_loader(samples, self.order, config.workers, pin)
        validated = Samples(self.val_source, prep.transform(), prep.mode)
        share = {"rank": self.rank, "world_size": self.world}
        self.val_loader = validation_loader(validated, config.batch_size, config.workers, pin, **share)
        self.unreadable = Unreadable(config.unreadable)
        self.bce = BinaryCrossEntropy(config.label_smoothing)
        self.mixup = None
        if config.mixup > 0 or config.cutmix > 0:
            self.mixup = Mixup(
                config.mixup,
                config.cutmix,
                prob=config.mix_probability,
                label_smoothing=config.label_smoothing,
                num_classes=len(self.class_names),
            )

    @property
    def _facts(self) -> dict[str, Any]:
        """What a run depends on beside its options."""
        return {
            "images per update (batch_size * accumulate * processes)": self.images_per_update,
            "the classes": self.class_names,
            "the number of training images": len(self.train_source),
            "the training images (SHA-256)": self.train_source.fingerprint,
        }

    def _restore_or_start(self) -> None:
        """Load the newest checkpoint, if any, and set up all that depends on the weights."""
        config = self.config
        newest = checkpoints.latest(self.checkpoints)
        if newest and config.resume == "never":
            raise ValueError(f"resume is 'never' but {self.folder} already holds a run; give another folder as `out`")
        state = checkpoints.read_state(newest, FORMAT) if newest else {}
        if newest:
            check_same_run(self.folder, state["config"] | state["facts"], to_dict(config) | self._facts, FREE)
            check_steps(self.folder, state["step"], self.steps, "epochs * updates per epoch")
            checkpoints.load_weights(self.bare_model, read_weights(newest, "model"), newest)
        elif config.start_from is not None:
            start_from(self.bare_model, config.start_from)
        elif config.pretrained:
            self.bare_model.load_state_dict(build_model(config.model, self.model_kwargs, pretrained=True).state_dict())
        freeze(self.bare_model, config.freeze)

        self.order_of_memory = torch.channels_last if config.channels_last else torch.contiguous_format
        self.bare_model.to(self.accelerator.device, memory_format=self.order_of_memory)  # type: ignore[call-overload]
        training_mode(self.bare_model, config.freeze)
        self.ema: AveragedModel | None = None
        if config.ema_decay is not None:
            self.ema = averaged(self.bare_model, config.ema_decay, warmup=config.ema_warmup)
        lr = config.lr * (1 if config.lr_batch is None else self.images_per_update / config.lr_batch)
        warmup = round(warmup_of(config.warmup_epochs, config.epochs) * self.updates_per_epoch)
        self.lr = LearningRate(lr, config.min_lr, config.lr_schedule, self.steps, warmup)
        own = sorted({"lr", "weight_decay", "layer_decay"} & config.optimizer_kwargs.keys())
        if own:
            raise ValueError(f"optimizer_kwargs must not have {own[0]}: give the option {own[0]} instead")
        try:
            self.optimizer = create_optimizer_v2(
                self.bare_model,
                config.optimizer,
                lr=lr,
                weight_decay=config.weight_decay,
                layer_decay=config.layer_decay,
                **config.optimizer_kwargs,
            )
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"optimizer {config.optimizer!r} cannot be made: {reason(error)}") from None
        if config.compile:
            self.bare_model.compile()
        self.model, self.stepper = self.accelerator.prepare(self.bare_model, self.optimizer)
        if newest:
            scaler = self.accelerator.scaler
            checkpoints.unpack(newest, state, self.bare_model, self.optimizer, self.ema, WEIGHTS["ema"], scaler)
            self.step, self.best, self.metrics = state["step"], state["best"], state["metrics"]
        names = ["loss", "gradient_norm"]
        self.meter = Meter(self.accelerator, names, self.images_per_update, state.get("pending", ()))

    def _save(self) -> None:
        """Write a checkpoint of this moment; every process calls it."""
        pending = self._rows()
        if self.accelerator.is_main_process:
            self.log.sync()
            tensors = {WEIGHTS["model"]: self.bare_model.state_dict()}
            if self.ema is not None:
                tensors[WEIGHTS["ema"]] = self.ema.module.state_dict()
            tensors[checkpoints.OPTIMIZER], values = checkpoints.pack(
                self.bare_model, self.optimizer, self.ema, self.accelerator.scaler
            )
            config = self.config
            state = {
                "format": FORMAT,
                "data": {"name": config.data, "root": config.data_root, "val_split": config.val_split},
                "step": self.step,
                "best": self.best,
                "metrics": self.metrics,
                "processes": self.world,
                "pending": pending,
                "facts": self._facts,
                "config": to_dict(config),
                **values,
            }
            best = self.best["checkpoint"]
            keep = config.keep_checkpoints
            checkpoints.save(
                self.checkpoints, self.step, tensors, {CONFIG: self.timm_config}, state, keep=keep, best=best
            )
        self.accelerator.wait_for_everyone()

    def _update(self, batches: Iterator[Batch]) -> Tensor:
        """Take one optimizer step; return this process's mean loss and the gradient's norm, on the device."""
        config, device = self.config, self.accelerator.device
        total = torch.zeros(2, device=device)
        self.lr.set(self.optimizer, self.step)
        for micro in range(config.accumulate):
            batch = next(batches)
            self.unreadable.note(batch.unreadable)
            seed_all(STEP, config.seed, self.step, micro, self.rank)
            images = batch.images.to(device, non_blocking=True, memory_format=self.order_of_memory)
            targets = batch.targets.to(device, non_blocking=True)
            smoothing = config.label_smoothing
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
                smoothing = 0.0  # mixup has smoothed the labels itself
            with self.accelerator.accumulate(self.model):
                logits = self.model(images)
                if config.bce_loss:
                    loss = self.bce(logits.float(), targets)
                else:
                    loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                if config.mesa > 0 and self.step >= config.mesa_start * self.steps:
                    loss = loss + config.mesa * self._sharpness(images, logits)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    total[1] = self._clip_gradients()
                self.stepper.step()
                self.stepper.zero_grad()
            total[0] += loss.detach() / config.accumulate
        self.step += 1
        if self.ema is not None:
            self.ema.update_parameters(self.bare_model)
        return total

    def _clip_gradients(self) -> Any:
        """Clip the gradients as configured; return their norm before."""
        limit, mode = self.config.clip_grad, self.config.clip_mode
        by_norm = limit if limit is not None and mode == "norm" else math.inf
        norm = self.accelerator.clip_grad_norm_(self.bare_model.parameters(), by_norm)
        if limit is not None and mode != "norm":
            dispatch_clip_grad(model_parameters(self.bare_model, exclude_head=mode == "agc"), value=limit, mode=mode)
        return norm

    def _sharpness(self, images: Tensor, logits: Tensor) -> Tensor:
        """Return MESA's penalty, KL(softmax(averaged model's logits) || softmax(logits)), a mean over the batch.

        Source: Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
        """
        assert self.ema is not None
        with torch.no_grad(), self.accelerator.autocast():
            means = self.ema.module(images).float()
        return F.kl_div(logits.float().log_softmax(-1), means.log_softmax(-1), log_target=True, reduction="batchmean")

    def _rows(self) -> list[list[float]]:
        return self.meter.collect(self.step, self.lr, checkpoints.latest(self.checkpoints))

    @property
    def _epoch(self) -> int:
        """The epoch of the last update, counted from 1."""
        return (self.step - 1) // self.updates_per_epoch + 1

    def _validate(self) -> None:
        """Measure the averaged weights, or the plain ones where none are kept, and keep a model that is the best."""
        config, main = self.config, self.accelerator.is_main_process
        model: Any = self.bare_model if self.ema is None else self.ema.module
        show = config.progress and main
        classes = len(self.class_names)
        metrics = evaluate(model, self.val_loader, self.accelerator, classes, self.unreadable, progress=show)
        training_mode(self.bare_model, config.freeze)
        self.metrics = {"loss": metrics.loss, "top1": metrics.top1, "top5": metrics.top5}
        improved = metrics.top1 > self.best["top1"]
        if improved:
            self.best = {"top1": metrics.top1, "checkpoint": checkpoints.name_of(self.step)}
        if not main:
            return
        if improved:
            write_model(self.folder / "model", self.timm_config, model.state_dict(), self._card())
        self.log.add("validation", self.step, epoch=self._epoch, **self.metrics, best_top1=self.best["top1"])
        if config.progress:
            tqdm.write(
                f"epoch {self._epoch}: loss {self.meter.loss:.4f}, validation loss {metrics.loss:.4f}, "
                f"top-1 {metrics.top1:.2f}%, top-5 {metrics.top5:.2f}%",
                file=sys.stderr,
            )

    def _card(self) -> str:
        assert self.metrics is not None
        config, data = self.config, f"{short(self.config.data)}, {self.config.val_split}"
        figures = [Figure(f"top-{k} (%)", data, "accuracy", self.metrics[f"top{k}"]) for k in (1, 5)]
        kept = "plain" if self.ema is None else "averaged"
        about = (
            f"It holds the {kept} weights of epoch {self._epoch} of {config.epochs}, the best on these images so far."
        )
        return card_of(self.bare_model, config.model, "train", config, about, figures)

    def run(self) -> dict[str, Any]:
        """Train to the end.

        Returns:
            The run's `folder`, its `model` (a timm folder of the best weights), `steps`, `parameters`, last `top1`,
            `best_top1`, and `seconds` of this call.

        Raises:
            NonFiniteLossError: the loss became infinite or not a number.
            UnreadableImageError: an image cannot be read and `unreadable` is "stop".
            WriteError: a checkpoint cannot be written.
        """
        began = time.perf_counter()
        with locked(self.folder):
            self._run()
        return {
            "folder": str(self.folder),
            "model": str(self.folder / "model"),
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.bare_model.parameters()),
            "top1": self.metrics["top1"] if self.metrics else None,
            "best_top1": self.best["top1"],
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _run(self) -> None:
        main = self.accelerator.is_main_process
        if main:
            write_text(self.folder / "config.yaml", to_yaml(self.config))
            self.log = Log(
                self.folder,
                TABLES,
                self.step,
                tensorboard=self.config.tensorboard,
                trackers=self.config.trackers,
                options=to_dict(self.config),
            )
        try:
            self._train()
        finally:
            if main:
                self.log.close()
        if main:
            self.unreadable.report()

    def _train(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        self.order.start = self.step
        batches = iter(self.train_loader)
        self.meter.restart()
        show = config.progress and main
        if show:
            print(self._introduction(), file=sys.stderr)
        with (
            Termination(self.accelerator) as termination,
            tqdm(total=self.steps, initial=self.step, unit="update", disable=not show) as bar,
        ):
            while self.step < self.steps:
                self.meter.add(self._update(batches))
                bar.update()
                last, epoch_ends = self.step == self.steps, self.step % self.updates_per_epoch == 0
                save = epoch_ends or self.step % config.checkpoint_every == 0
                log = last or self.step % config.log_every == 0
                stop = termination.asked(self.step) and not (last or save)
                if not (save or log or stop):
                    continue
                rows, lr, speed = self._rows(), self.lr.at(self.step - 1), self.meter.images_per_second
                bar.set_description_str(f"epoch {self._epoch}/{config.epochs}")
                bar.set_postfix_str(f"loss {self.meter.loss:.4f}, lr {lr:.2e}, {speed:.0f} images/s")
                if log:
                    means = self.meter.take(rows)
                    if main:
                        row = {"epoch": self._epoch, **means, "lr": lr, "images_per_second": speed}
                        self.log.add("train", self.step, **row)
                if stop:
                    self._save()
                    raise termination.error(self.step)
                if last or (epoch_ends and self._epoch % config.validate_every == 0):
                    self._validate()
                if save:
                    self._save()
                self.meter.restart()

    def _introduction(self) -> str:
        parameters = sum(p.numel() for p in self.bare_model.parameters())
        go_on = f", from update {self.step} on" if self.step else ""
        return (
            f"{self.config.model}, {parameters:,} parameters, on {self.accelerator.device}; "
            f"{len(self.train_source):,} images of {len(self.class_names)} classes from {self.config.data}; "
            f"{self.config.epochs} epochs, {self.steps:,} updates of {self.images_per_update} images{go_on}; "
            f"to {self.folder}"
        )


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model as configured and return a summary; see `Trainer.run`."""
    return Trainer(config).run()
