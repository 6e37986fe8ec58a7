"""`distill`: mixers learn to replace a UNet's self-attentions, in a run that can be killed and continued.

OUT/config.yaml      the options
OUT/train.csv        the log, also in OUT/tensorboard, and OUT/validation.csv
OUT/samples/         grids of what the averaged mixers draw
OUT/checkpoints/     each an adapter, with the averaged mixers as its variant "ema"
OUT/adapter/         the averaged mixers at the end
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from gspn_core.runs import checkpoints
from gspn_core.runs.cards import CARD, Figure, model_card, short
from gspn_core.runs.errors import explaining_memory
from gspn_core.runs.files import (
    check_replaceable,
    locked,
    make_folder,
    read_tensors,
    replacing_folder,
    store_tensors,
    write_text,
)
from gspn_core.runs.logs import Log, last_value
from gspn_core.runs.options import to_dict, to_yaml, warmup_of
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

from . import __version__
from .batches import Batches, open_data, open_validation
from .conditions import Batch, Frozen
from .config import DistillConfig
from .objective import TERMS, Objective, Taps, training_schedule
from .pipelines import hash_parts, save_png
from .samples import draw_grid, exchanged
from .student import (
    AVERAGED,
    CONFIG,
    WEIGHTS,
    build_adapter,
    load_teacher,
    make_optimizer,
    predict,
    student_of,
    with_start,
)

FORMAT = "gspn-t2i 3"
# Samples and validation leave the weights as they are; pipeline and data are compared by their content.
_FREE = FREE_TO_CHANGE | {"sample_every", "sample_prompts", "sampler_steps", "guidance"}
_FREE |= {"validate_every", "val_data", "val_split", "pipeline", "variant", "revision", "pipeline_config"}
_FREE |= {"cache", "split", "image_column", "text_column"}


class Distiller:
    """A run: built from its configuration, continued from its newest checkpoint if there is one.

    Raises:
        ValueError, FileNotFoundError: an option, the data or a checkpoint does not fit.
    """

    def __init__(self, config: DistillConfig) -> None:
        config = with_start(config)
        self.config, self.folder = config, Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        check_replaceable(self.folder / "adapter", (WEIGHTS, CONFIG, CARD))
        self.accelerator = make_accelerator(config.device, config.precision, config.accumulate, tf32=config.tf32)
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
        check_steps(self.folder, state.get("step", 0), config.steps)
        self.pipeline = load_teacher(config, device)
        self.teacher: Any = self.pipeline.unet
        parts = ("unet", "vae", "text_encoder", "text_encoder_2")
        self.facts["pipeline"] = {
            "the pipeline (SHA-256)": hash_parts({name: getattr(self.pipeline, name, None) for name in parts})
        }
        self._check_facts(state)
        self.objective = Objective(
            training_schedule(self.pipeline.scheduler.config),
            config.noise_weight,
            config.teacher_weight,
            config.feature_weight,
            config.snr_gamma,
        )
        frozen = Frozen(self.pipeline, device)
        main = self.accelerator.is_main_process
        source = open_data(config, frozen, progress=config.progress and main)
        self.facts["data"] = {"the number of images": len(source), "the data (SHA-256)": source.fingerprint}
        self._check_facts(state)
        self.validation = open_validation(config) if config.validate_every else None
        training_times = self.objective.schedule.config.num_train_timesteps
        rank = self.accelerator.process_index
        self.batches = Batches(config, source, frozen, training_times, rank=rank, world_size=world)
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
        warmup = int(warmup_of(config.warmup_steps, config.steps))
        self.lr = LearningRate(config.lr, config.min_lr, config.lr_schedule, config.steps, warmup)
        self.optimizer = make_optimizer(config, self.adapter.parameters())
        self.model, self.stepper = self.accelerator.prepare(self.student, self.optimizer)
        self.step = 0
        self.loss: float | None = None  # the main process reports it
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

    def _rows(self) -> list[list[float]]:
        return self.meter.collect(self.step, self.lr, checkpoints.latest(self.checkpoints))

    def _save(self) -> None:
        """Write a checkpoint of this moment; every process calls it."""
        pending = self._rows()
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

    def _terms(self, model: Any, batch: Batch, noise: Tensor, times: Tensor) -> dict[str, Tensor]:
        """Return the loss and its terms of a student on a batch."""
        noisy = self.objective.schedule.add_noise(batch.latents, noise, times).to(self.teacher.dtype)
        target = self.objective.target(batch.latents, noise, times)
        with torch.no_grad():
            teacher = predict(self.teacher, noisy, times, batch)
        student = predict(model, noisy, times, batch)
        return self.objective(student, teacher, target, times, self.student_taps.take(), self.teacher_taps.take())

    def _update(self, loaded: Iterator[Any]) -> Tensor:
        """Take one optimizer step; return this process's mean terms and the gradient's norm, on the device."""
        config = self.config
        report = torch.zeros(len(TERMS) + 1, device=self.accelerator.device)
        self.lr.set(self.optimizer, self.step)
        for micro in range(config.accumulate):
            batch, noise, times = self.batches.draw(next(loaded), self.step, micro)
            with self.accelerator.accumulate(self.model):
                terms = self._terms(self.model, batch, noise, times)
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
        config, show = self.config, self.config.progress and self.accelerator.is_main_process
        loaded = self.batches.load(self.step)
        self.meter.restart()
        if show:
            print(self._introduction(), file=sys.stderr)
        with (
            Termination(self.accelerator) as termination,
            tqdm(total=config.steps, initial=self.step, unit="update", disable=not show) as bar,
        ):
            while self.step < config.steps:
                self.meter.add(self._update(loaded))
                bar.update()
                last = self.step == config.steps
                intervals = (config.log_every, config.checkpoint_every, config.sample_every, config.validate_every)
                log, save, sample, validate = (
                    every is not None and (last or self.step % every == 0) for every in intervals
                )
                stop = termination.asked(self.step) and not last
                if not (log or save or sample or validate or stop):
                    continue
                rows = self._rows()
                bar.set_postfix_str(f"loss {self.meter.loss:.4f}, {self.meter.images_per_second} images/s")
                if log:
                    means, speed = self.meter.take(rows), self.meter.images_per_second
                    self._write_row("train", **means, lr=self.lr.at(self.step - 1), images_per_second=speed)
                if stop:
                    self._save()
                    raise termination.error(self.step)
                if save:
                    self._save()
                if sample:
                    self._draw_samples()
                if validate:
                    self._validate()
                self.meter.restart()

    def _introduction(self) -> str:
        parameters = sum(p.numel() for p in self.adapter.parameters())
        go_on = f", from update {self.step} on" if self.step else ""
        return (
            f"{len(self.adapter.config.layers)} mixers ({self.adapter.config.mixer}), {parameters:,} parameters, on "
            f"{self.accelerator.device}; {len(self.batches.source):,} images from {self.config.data}; "
            f"{self.config.steps:,} updates of {self.images_per_update} images{go_on}; to {self.folder}"
        )

    def _write_row(self, table: str, **values: float) -> None:
        if self.accelerator.is_main_process:
            self.log.add(table, self.step, **values)

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

    @torch.no_grad()
    def _validate(self) -> None:
        """Log the terms of the averaged mixers, means over the images of validation; every process calls it."""
        assert self.validation is not None
        total = torch.zeros(len(TERMS) + 1, device=self.accelerator.device)
        with (
            exchanged(self.pipeline, self.student, self.adapter, self._averaged_weights()),
            self.accelerator.autocast(),
        ):
            for batch, noise, times in self.batches.validation(self.validation):
                terms = self._terms(self.student, batch, noise, times)
                total += len(times) * torch.stack([*(terms[name] for name in TERMS), torch.ones_like(terms["loss"])])
        *sums, count = self.accelerator.reduce(total, "sum").tolist()
        self._write_row("validation", **{name: value / count for name, value in zip(TERMS, sums, strict=True)})

    def _card(self) -> str:
        config, data = self.config, str(short(self.config.data))
        tables = (("train", "training loss"), ("validation", "validation loss"))
        found = [(name, last_value(self.folder / f"{table}.csv", "loss")) for table, name in tables]
        return model_card(
            f"GSPN adapter of {short(config.pipeline)}",
            f"{len(self.adapter.config.layers)} mixers ({self.adapter.config.mixer}) in the place of self-attention in "
            f"the UNet of {short(config.pipeline)}, after {self.step:,} updates.",
            made_by="gspn-t2i distill",
            config=config,
            usage=(
                "from gspn_t2i import GSPNAdapter\n\n"
                'GSPNAdapter.from_pretrained("FOLDER").mount(pipeline.unet)  # of the same Stable Diffusion'
            ),
            library="diffusers",
            task="text-to-image",
            figures=[Figure(name, data, "loss", float(value)) for name, value in found if value is not None],
            versions={"diffusers": diffusers.__version__, "gspn-t2i": __version__},
        )

    def run(self) -> dict[str, Any]:
        """Train to the end, and write the adapter.

        Returns:
            The run's `folder`, its `adapter`, `steps`, `parameters`, the log's last `loss`, and `seconds` of this call.

        Raises:
            ValueError: another process writes to the folder.
            NonFiniteLossError: the loss became infinite or not a number.
            MemoryError: the device's memory is not enough; the message says what saves some.
            WriteError: the disk is full or not writable.
            StoppedError: the process was asked to end, and has saved a checkpoint.
        """
        began, adapter = time.perf_counter(), self.folder / "adapter"
        with locked(self.folder):
            self._run()
            if self.accelerator.is_main_process:
                with replacing_folder(adapter) as temporary:
                    store_tensors(temporary / WEIGHTS, self._averaged_weights())
                    write_text(temporary / CONFIG, self.adapter.to_json_string())
                    write_text(temporary / CARD, self._card())
            self.accelerator.wait_for_everyone()
        return {
            "folder": str(self.folder),
            "adapter": str(adapter),
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.adapter.parameters()),
            "loss": self.loss,
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _run(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        if main:
            write_text(self.folder / "config.yaml", to_yaml(config))
            tables = {"train": [*TERMS, "gradient_norm", "lr", "images_per_second"]}
            if self.validation is not None:
                tables["validation"] = [*TERMS]
            self.log = Log(
                self.folder,
                tables,
                self.step,
                tensorboard=config.tensorboard,
                trackers=config.trackers,
                options=to_dict(config),
            )
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
                self.loss = last_value(self.folder / "train.csv", "loss")
                self.log.close()


def distill(config: DistillConfig) -> dict[str, Any]:
    """Distil as configured; see `Distiller.run`."""
    return Distiller(config).run()
