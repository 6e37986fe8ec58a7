"""Training: one loop over updates that can be killed at any moment and continued to the same weights, bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from . import checkpoint
from .config import FREE_TO_CHANGE, TrainConfig, to_dict, to_yaml, use_cpu
from .data import INIT, STEP, Order, derive_seed, draw, loader, open_data
from .files import write_text
from .logs import Log
from .losses import make_loss
from .models import GSPNDiTTransformer2DModel
from .sample import SAMPLERS, generate, grid, save_png, to_pixels
from .vae import decode, fingerprint, load_vae


class NonFiniteLossError(ArithmeticError):
    """The loss became infinite or not a number."""


class Trainer:
    """A run: built from its configuration, continued from its newest checkpoint if there is one.

    Raises:
        ValueError, FileNotFoundError: an option, the data or a checkpoint does not fit; nothing has been written then.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        self.accelerator = Accelerator(
            cpu=use_cpu(config.device),
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulate,
        )
        self.vae = load_vae(config.vae).eval() if config.vae else None
        self.source = open_data(
            config.data,
            split=config.split,
            image_size=config.image_size,
            vae_fingerprint=fingerprint(self.vae) if self.vae else None,
        )
        self.class_names = self.source.class_names
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.images_per_update = config.batch_size * config.accumulate * self.world
        self.order = Order(
            len(self.source),
            config.batch_size,
            config.accumulate,
            config.steps,
            seed=config.seed,
            rank=self.rank,
            world_size=self.world,
        )
        self.objective = make_loss(config.objective).to(self.accelerator.device)
        torch.manual_seed(derive_seed(INIT, config.seed))
        self.bare_model = self._build()
        self.step = 0
        self._pending: list[Tensor] = []  # the terms of updates that no row of the log has yet
        self._restore_or_start()

    def _build(self) -> GSPNDiTTransformer2DModel:
        channels, *size = self.source.shape
        options: dict[str, Any] = {
            "in_channels": channels,
            "out_channels": channels * (2 if self.objective.learned_variance else 1),
            "sample_size": max(size),
            "num_classes": len(self.class_names),
        } | self.config.model
        try:
            model = GSPNDiTTransformer2DModel.from_preset(self.config.preset, **options)
        except TypeError as error:
            raise ValueError(f"model does not suit {self.config.preset}: {error}") from None
        patch = model.config.patch_size
        if any(side % patch for side in size):
            raise ValueError(f"the patch of {self.config.preset} must divide {size[0]} x {size[1]}, got {patch}")
        if self.config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def _restore_or_start(self) -> None:
        """Load the newest checkpoint, if any, and set up all that depends on the weights."""
        config = self.config
        newest = checkpoint.latest(self.checkpoints)
        if newest and config.resume == "never":
            raise ValueError(f"resume is 'never' but {self.folder} already holds a run; give another folder as `out`")
        state = checkpoint.read_state(newest) if newest else {}
        if newest:
            self._check_same_run(state)
            weights = checkpoint.read_tensors(newest / checkpoint.WEIGHTS["model"])
            checkpoint.load_weights(self.bare_model, weights, str(newest))
        elif config.start_from is not None:
            started, _ = checkpoint.load_model(config.start_from)
            checkpoint.load_weights(self.bare_model, started.state_dict(), config.start_from)

        self.bare_model.to(self.accelerator.device).train()
        self.ema = ModelEmaV3(self.bare_model, decay=config.ema_decay, use_warmup=config.ema_warmup)
        self.optimizer = torch.optim.AdamW(self.bare_model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=config.steps,
            lr_min=config.min_lr,
            warmup_t=config.warmup_steps,
            warmup_lr_init=config.lr / max(1, config.warmup_steps),
            t_in_epochs=False,
        )
        if config.compile:
            self.bare_model.compile_repeated_blocks()
        self.model, self.stepper = self.accelerator.prepare(self.bare_model, self.optimizer)
        if newest:
            tensors = checkpoint.read_tensors(newest / "optimizer.safetensors")
            checkpoint.unpack_optimizer(self.bare_model, self.optimizer, tensors)
            averaged = checkpoint.read_tensors(newest / checkpoint.WEIGHTS["ema"])
            checkpoint.load_weights(self.ema.module, averaged, str(newest))
            self.step = state["step"]
            self._pending = list(torch.tensor(state["pending"], device=self.accelerator.device))

    def _check_same_run(self, state: dict[str, Any]) -> None:
        now = to_dict(self.config)
        for key, before in state["config"].items():
            if key not in FREE_TO_CHANGE and now.get(key) != before:
                raise ValueError(
                    f"{key} must be {before!r} to continue the run in {self.folder}, got {now.get(key)!r}; "
                    "give another folder as `out` for a new run"
                )
        now = {
            "images per update (batch_size * accumulate * processes)": self.images_per_update,
            "the classes": self.class_names,
            "the number of images": len(self.source),
        }
        before = dict(zip(now, (state["images_per_update"], state["class_names"], state["images"]), strict=True))
        for key, value in now.items():
            if before[key] != value:
                raise ValueError(f"{key} must be {before[key]} to continue the run in {self.folder}, got {value}")

    def _save(self) -> None:
        """Write a checkpoint of this moment; every process calls it."""
        pending = self._reduced(self._pending)
        if self.accelerator.is_main_process:
            self.log.sync()
            size = list(self.source.shape[1:])
            state = {
                "format": checkpoint.FORMAT,
                "step": self.step,
                "objective": self.config.objective,
                "class_names": self.class_names,
                "latent_size": size,
                "vae_fingerprint": getattr(getattr(self.source, "features", None), "vae_fingerprint", None),
                "images": len(self.source),
                "images_per_update": self.images_per_update,
                "processes": self.world,
                "pending": pending,
                "config": to_dict(self.config),
            }
            tensors = {
                checkpoint.WEIGHTS["model"]: self.bare_model.state_dict(),
                checkpoint.WEIGHTS["ema"]: self.ema.module.state_dict(),
                "optimizer.safetensors": checkpoint.pack_optimizer(self.bare_model, self.optimizer),
            }
            keep = self.config.keep_checkpoints
            checkpoint.save(self.checkpoints, self.step, self.bare_model, tensors, state, keep=keep)
        self.accelerator.wait_for_everyone()

    @property
    def _columns(self) -> list[str]:
        terms = ["loss", "mse", "vlb"] if self.objective.learned_variance else ["loss"]
        return [*terms, "gradient_norm"]

    def _update(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Take one optimizer step; return this process's mean terms and the gradient's norm, on the device."""
        config, device = self.config, self.accelerator.device
        part = slice(self.rank * config.batch_size, (self.rank + 1) * config.batch_size)
        total = torch.zeros(len(self._columns), device=device)
        self.scheduler.step_update(self.step)
        for micro in range(config.accumulate):
            items, labels = next(batches)
            draws = draw(
                self.objective,
                self.source.shape,
                config.batch_size * self.world,
                mirror=config.mirror,
                dropout=config.label_dropout,
                seed=derive_seed(STEP, config.seed, self.step, micro),
                part=part,
            )
            # For what the model itself draws, such as DropPath.
            torch.manual_seed(derive_seed(STEP, config.seed, self.step, micro, self.rank))
            x0 = self.source.clean(items.to(device), draws.mirrored.to(device), draws.posterior.to(device))
            noise, times = draws.noise.to(device), draws.times.to(device)
            labels = torch.where(draws.dropped, len(self.class_names), labels).to(device)
            with self.accelerator.accumulate(self.model):
                corrupted = self.objective.corrupt(x0, noise, times)
                output = self.model(corrupted, self.objective.timestep(times), labels, return_dict=False)[0]
                terms = {name: term.mean() for name, term in self.objective(output, x0, noise, times).items()}
                self.accelerator.backward(terms["loss"])
                if self.accelerator.sync_gradients:
                    limit = math.inf if config.clip_grad is None else config.clip_grad
                    total[-1] = self.accelerator.clip_grad_norm_(self.bare_model.parameters(), limit)
                self.stepper.step()
                self.stepper.zero_grad()
            total[:-1] += torch.stack(list(terms.values())).detach() / config.accumulate
        self.step += 1
        # Given a step, timm copies the weights at the first one, with or without warm-up.
        self.ema.update(self.bare_model, step=self.step if config.ema_warmup else None)
        return total

    def _reduced(self, rows: list[Tensor]) -> list[list[float]]:
        """Average rows over the processes."""
        if not rows:
            return []
        mean: Any = self.accelerator.reduce(torch.stack(rows), "mean")
        values: list[list[float]] = mean.tolist()
        return values

    def _write_rows(self, speed: float) -> float:
        """Move the terms of the last updates off the device, write the row that is due, and return the last loss.

        Raises:
            NonFiniteLossError: a loss is infinite or not a number.
        """
        rows = self._reduced(self._pending)
        first = self.step - len(rows) + 1
        for step, row in enumerate(rows, first):
            if not math.isfinite(row[0]):
                good = checkpoint.latest(self.checkpoints) or "none"
                raise NonFiniteLossError(
                    f"the loss is {row[0]} at step {step} with learning rate {self._lr(step):.3g}; "
                    f"last good checkpoint: {good}"
                )
        if self.step % self.config.log_every == 0 or self.step == self.config.steps:
            means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            if self.accelerator.is_main_process:
                values = dict(zip(self._columns, means, strict=True))
                self.log.add(self.step, **values, lr=self._lr(self.step), images_per_second=round(speed, 1))
            self._pending = []
        return rows[-1][0]

    def _lr(self, step: int) -> float:
        """Return the learning rate of an update, counted from 1."""
        value: float = self.scheduler._get_lr(step - 1)[0]
        return value

    def _draw_samples(self) -> None:
        """Write a grid of samples of the averaged weights."""
        config = self.config
        if not self.accelerator.is_main_process or (self.vae is None and self.source.shape[0] not in (1, 3)):
            return
        labels = [number % len(self.class_names) for number in range(config.sample_count)]
        model = self.ema.module
        was_training = model.training
        x = generate(
            model.eval(),
            labels,
            range(len(labels)),
            sampler=SAMPLERS[config.objective][0],
            steps=config.sample_steps,
            seed=config.seed,
            guidance=config.sample_guidance,
            size=self.source.shape[1:],  # type: ignore[arg-type]
            autocast=self.accelerator.autocast,
        )
        model.train(was_training)
        if self.vae is not None:
            self.vae.to(x.device)
            x = decode(self.vae, x)
        page = grid(to_pixels(x))
        (self.folder / "samples").mkdir(exist_ok=True)
        save_png(page, self.folder / "samples" / f"step-{self.step:08d}.png")
        self.log.add_image(self.step, page)

    def run(self) -> dict[str, Any]:
        """Train to the end.

        Returns:
            The run's `folder`, `steps`, `parameters`, last `loss` of the log, and `seconds` of this call.

        Raises:
            NonFiniteLossError: the loss became infinite or not a number.
            OSError: a checkpoint cannot be written.
        """
        began = time.perf_counter()
        main = self.accelerator.is_main_process
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "config.yaml", to_yaml(self.config))
            columns = [*self._columns, "lr", "images_per_second"]
            self.log = Log(self.folder, columns, self.step, tensorboard=self.config.tensorboard)
        loss = math.nan
        try:
            loss = self._train()
        finally:
            if main:
                self.log.close()
        return {
            "folder": str(self.folder),
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.bare_model.parameters()),
            "loss": loss,
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _train(self) -> float:
        config = self.config
        self.order.start = self.step
        batches = iter(loader(self.source, self.order, config.workers))
        loss, done, since = math.nan, 0, time.perf_counter()
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            unit="update",
            disable=not (config.progress and self.accelerator.is_main_process),
        )
        with bar:
            while self.step < config.steps:
                self._pending.append(self._update(batches))
                done += 1
                bar.update()
                last = self.step == config.steps
                save = last or self.step % config.checkpoint_every == 0
                draw_samples = config.sample_every > 0 and (last or self.step % config.sample_every == 0)
                if save or draw_samples or self.step % config.log_every == 0:
                    speed = done * self.images_per_update / (time.perf_counter() - since)
                    loss = self._write_rows(speed)
                    bar.set_postfix_str(f"loss {loss:.4f}, lr {self._lr(self.step):.2e}, {speed:.0f} images/s")
                    if save:
                        self._save()
                    if draw_samples:
                        self._draw_samples()
                    done, since = 0, time.perf_counter()
        return loss


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model as configured and return a summary; see `Trainer.run`."""
    return Trainer(config).run()
