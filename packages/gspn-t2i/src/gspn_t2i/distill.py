"""`distill`: mixers learn to replace a UNet's self-attentions, in a run that can be killed and continued.

OUT/config.yaml      the options
OUT/train.csv        the log, also in OUT/tensorboard
OUT/samples/         grids of what the averaged mixers draw
OUT/checkpoints/     each an adapter, with the averaged mixers as its variant "ema"
OUT/adapter/         the averaged mixers at the end
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from gspn_core.runs import checkpoints
from gspn_core.runs.errors import explaining_memory
from gspn_core.runs.files import make_folder, read_tensors, replacing_folder, store_tensors, write_text
from gspn_core.runs.logs import Log
from gspn_core.runs.options import to_dict, to_yaml
from gspn_core.runs.training import FREE_TO_CHANGE, LearningRate, Meter, averaged, check_same_run, make_accelerator

from .batches import Batches, open_data
from .conditions import Frozen
from .config import DistillConfig
from .objective import TERMS, Objective, Taps, training_schedule
from .pipelines import save_png
from .samples import draw_grid, exchanged
from .student import AVERAGED, CONFIG, WEIGHTS, build_adapter, load_teacher, predict, student_of, with_start

FORMAT = "gspn-t2i 2"
# Samples leave the weights as they are; a run that stopped at an unreadable image has skipped none before.
_FREE = FREE_TO_CHANGE | {"sample_every", "sample_prompts", "sampler_steps", "guidance", "unreadable"}


class Distiller:
    """A run: built from its configuration, continued from its newest checkpoint if there is one.

    Raises:
        ValueError, FileNotFoundError: an option, the data or a checkpoint does not fit.
    """

    def __init__(self, config: DistillConfig) -> None:
        config = with_start(config)
        self.config, self.folder = config, Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        self.accelerator = make_accelerator(config.device, config.precision, config.accumulate)
        world, device = self.accelerator.num_processes, self.accelerator.device
        self.images_per_update = config.batch_size * config.accumulate * world
        self.facts: dict[str, Any] = {
            "options": to_dict(config),
            "processes": {"images per update (batch_size * accumulate * processes)": self.images_per_update},
        }
        newest = checkpoints.latest(self.checkpoints)
        if newest and config.resume == "never":
            raise ValueError(f"resume is 'never' but {self.folder} already holds a run; give another folder as `out`")
        state = checkpoints.read_state(newest, FORMAT) if newest else {}
        self._check_facts(state)
        self.pipeline = load_teacher(config, device)
        self.teacher: Any = self.pipeline.unet
        self.objective = Objective(
            training_schedule(self.pipeline.scheduler.config),
            config.noise_weight,
            config.teacher_weight,
            config.feature_weight,
            config.snr_gamma,
        )
        frozen = Frozen(self.pipeline, device)
        source = open_data(config, frozen)
        self.facts["data"] = {"the number of images": len(source)}
        self._check_facts(state)
        height, width = (side // self.pipeline.vae_scale_factor for side in config.image_size)
        self.batches = Batches(
            config,
            source,
            frozen,
            (self.teacher.config.in_channels, height, width),
            self.objective.schedule.config.num_train_timesteps,
            rank=self.accelerator.process_index,
            world_size=world,
        )
        self._set_up(newest, state)

    def _check_facts(self, state: dict[str, Any]) -> None:
        """Refuse to continue a run of other options or data, as far as they are known already."""
        for kind, facts in self.facts.items():
            check_same_run(self.folder, state.get(kind, {}), facts, _FREE)

    def _set_up(self, newest: Path | None, state: dict[str, Any]) -> None:
        """Build the student and all that is trained, from the newest checkpoint if there is one."""
        config = self.config
        self.adapter = build_adapter(config, self.teacher)
        if newest:
            checkpoints.load_weights(self.adapter, read_tensors(newest / WEIGHTS), newest)
        # Copied before it is mounted, as the copy has no UNet.
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            self.average = averaged(self.adapter, config.ema_decay, warmup=config.ema_warmup)
        self.student = student_of(self.teacher)
        self.adapter.mount(self.student, cast=False)
        self.adapter.mixers.train()
        layers = list(self.adapter.config.layers) if config.feature_weight else []
        self.student_taps, self.teacher_taps = Taps(self.student, layers), Taps(self.teacher, layers)
        if config.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()  # type: ignore[operator]
        self.lr = LearningRate(config.lr, config.min_lr, config.lr_schedule, config.steps, config.warmup_steps)
        parameters = self.adapter.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        self.model, self.stepper = self.accelerator.prepare(self.student, self.optimizer)
        self.step = 0
        if newest:
            self.step, scaler = state["step"], self.accelerator.scaler
            checkpoints.unpack(newest, state, self.adapter, self.optimizer, self.average, AVERAGED, scaler)
        names = [*TERMS, "gradient_norm"]
        self.meter = Meter(self.accelerator, names, self.images_per_update, state.get("pending", ()))

    def _averaged_weights(self) -> dict[str, Tensor]:
        """Return the averaged weights, or the plain ones where no average is kept."""
        model: Any = self.adapter if self.average is None else self.average.module
        weights: dict[str, Tensor] = model.state_dict()
        return weights

    def _save(self, pending: Sequence[Sequence[float]]) -> None:
        """Write a checkpoint of this moment; every process calls it."""
        if self.accelerator.is_main_process:
            self.log.sync()
            scaler, average = self.accelerator.scaler, self.average
            moments, values = checkpoints.pack(self.adapter, self.optimizer, average, scaler)
            state = {"format": FORMAT, "step": self.step, **self.facts, "pending": pending, **values}
            tensors = {WEIGHTS: self.adapter.state_dict(), checkpoints.OPTIMIZER: moments}
            if average is not None:
                tensors[AVERAGED] = self._averaged_weights()
            texts, keep = {CONFIG: self.adapter.to_json_string()}, self.config.keep_checkpoints
            checkpoints.save(self.checkpoints, self.step, tensors, texts, state, keep=keep)
        self.accelerator.wait_for_everyone()

    def _update(self, loaded: Iterator[Any]) -> Tensor:
        """Take one optimizer step; return this process's mean terms and the gradient's norm, on the device."""
        config = self.config
        report = torch.zeros(len(TERMS) + 1, device=self.accelerator.device)
        self.lr.set(self.optimizer, self.step)
        for micro in range(config.accumulate):
            batch, noise, times = self.batches.draw(next(loaded), self.step, micro)
            noisy = self.objective.schedule.add_noise(batch.latents, noise, times).to(self.teacher.dtype)
            target = self.objective.target(batch.latents, noise, times)
            with torch.no_grad():
                teacher = predict(self.teacher, noisy, times, batch)
            with self.accelerator.accumulate(self.model):
                student = predict(self.model, noisy, times, batch)
                features = self.student_taps.take(), self.teacher_taps.take()
                terms = self.objective(student, teacher, target, times, *features)
                self.accelerator.backward(terms["loss"])
                self.student_taps.take()  # what recomputing left there
                if self.accelerator.sync_gradients:
                    limit = math.inf if config.clip_grad is None else config.clip_grad
                    report[-1] = self.accelerator.clip_grad_norm_(self.adapter.parameters(), limit)
                self.stepper.step()
                self.stepper.zero_grad()
            report[:-1] += torch.stack([terms[name] for name in TERMS]).detach() / config.accumulate
        self.step += 1
        if self.average is not None:
            self.average.update_parameters(self.adapter)
        return report

    def _train(self) -> None:
        config = self.config
        loaded = self.batches.load(self.step)
        hidden = not (config.progress and self.accelerator.is_main_process)
        with tqdm(total=config.steps, initial=self.step, unit="update", disable=hidden) as bar:
            while self.step < config.steps:
                self.meter.add(self._update(loaded))
                bar.update()
                log, save, sample = (
                    every is not None and (self.step == config.steps or self.step % every == 0)
                    for every in (config.log_every, config.checkpoint_every, config.sample_every)
                )
                if log or save or sample:
                    rows = self.meter.collect(self.step, self.lr, checkpoints.latest(self.checkpoints))
                    bar.set_postfix_str(f"loss {rows[-1][0]:.4f}, {self.meter.images_per_second} images/s")
                    if log:
                        self._write_row(rows)
                    if save:
                        self._save([] if log else rows)
                    if sample:
                        self._draw_samples()
                    self.meter.restart()

    def _write_row(self, rows: Sequence[Sequence[float]]) -> None:
        means = self.meter.take(rows)
        if self.accelerator.is_main_process:
            lr, speed = self.lr.at(self.step - 1), self.meter.images_per_second
            self.log.add("train", self.step, **means, lr=lr, images_per_second=speed)

    def _draw_samples(self) -> None:
        """Write a grid of what the averaged mixers draw."""
        if not self.accelerator.is_main_process or not self.config.sample_prompts:
            return
        weights = self._averaged_weights()
        with exchanged(self.pipeline, self.student, self.adapter, weights), self.accelerator.autocast():
            grid = draw_grid(self.pipeline, self.config)
        self.student_taps.take()
        make_folder(self.folder / "samples")
        save_png(grid, self.folder / "samples" / f"{checkpoints.name_of(self.step)}.png")
        self.log.add_image("samples", self.step, np.asarray(grid))

    def run(self) -> dict[str, Any]:
        """Train to the end, and write the adapter.

        Returns:
            The run's `folder`, its `adapter`, `steps`, `parameters`, last `loss` (None: there was nothing to do), and
            `seconds` of this call.

        Raises:
            NonFiniteLossError: the loss became infinite or not a number.
            MemoryError: the device's memory is not enough; the message says what saves some.
            WriteError: the disk is full or not writable.
        """
        began, config, main = time.perf_counter(), self.config, self.accelerator.is_main_process
        if main:
            make_folder(self.folder)
            write_text(self.folder / "config.yaml", to_yaml(config))
            columns = [*TERMS, "gradient_norm", "lr", "images_per_second"]
            self.log = Log(self.folder, {"train": columns}, self.step, tensorboard=config.tensorboard)
        savers = {
            "--gradient-checkpointing": not config.gradient_checkpointing,
            "--precision bf16": config.precision == "fp32",
            "a smaller --batch-size with more --accumulate": config.batch_size > 1,
        }
        try:
            with explaining_memory(savers):
                self._train()
        finally:
            if main:
                self.log.close()
        adapter = self.folder / "adapter"
        if main:
            with replacing_folder(adapter) as temporary:
                store_tensors(temporary / WEIGHTS, self._averaged_weights())
                write_text(temporary / CONFIG, self.adapter.to_json_string())
        self.accelerator.wait_for_everyone()
        return {
            "folder": str(self.folder),
            "adapter": str(adapter),
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.adapter.parameters()),
            "loss": self.meter.loss,
            "seconds": round(time.perf_counter() - began, 1),
        }


def distill(config: DistillConfig) -> dict[str, Any]:
    """Distil as configured; see `Distiller.run`."""
    return Distiller(config).run()
