"""`gspn-vision distill`: a converted model learns from the model with attention, in a run that can be continued.

OUT/config.yaml      the options
OUT/train.csv        the log of both stages, also in OUT/tensorboard
OUT/checkpoints/     each a timm model too, with averaged weights
OUT/model/           the averaged weights at the end, a timm folder
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gspn_core.runs import checkpoints
from gspn_core.runs.cards import Figure, short
from gspn_core.runs.files import (
    check_record,
    check_replaceable,
    damaged,
    locked,
    make_folder,
    read_tensors,
    replacing_folder,
    write_json,
    write_text,
)
from gspn_core.runs.logs import Log, last_value
from gspn_core.runs.options import ImageSize, to_dict, to_yaml, warmup_of
from gspn_core.runs.order import INIT, Order, seed_all
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

from ..checkpoint import (
    CONFIG,
    CURRICULUM,
    FORMAT,
    MODEL_FILES,
    WEIGHTS,
    card_of,
    hash_weights,
    read_weights,
    write_model,
)
from ..config import DistillConfig, TrainConfig
from ..data import Batch, Samples, Unreadable, batch_loader
from .convert import mixers
from .objective import FEATURES, TERMS, Alignment, Distillation, Recorder
from .pair import check_sizes, grid_of, open_images, open_pair

FREE = FREE_TO_CHANGE | {"data_root", "teacher"}  # their content is compared
ADAPTERS = "adapters.safetensors"
TABLES = {"train": ["stage", *TERMS, "gradient_norm", "lr", "images_per_second"]}


class Distiller:
    """A run: built from its configuration, continued from its newest checkpoint if there is one.

    Raises:
        ValueError, FileNotFoundError: an option, a model, the data or a checkpoint does not fit; nothing has been
            written then.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.config, self.folder = config, Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        self.accelerator = make_accelerator(config.device, config.precision, config.accumulate, tf32=config.tf32)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        self.images_per_update = config.batch_size * config.accumulate * self.accelerator.num_processes
        self.source = open_images(config.data, config.split, config.data_root)
        seed_all(INIT, config.seed)
        self.teacher, self.student = open_pair(config)
        self.facts: dict[str, Any] = {
            "images per update (batch_size * accumulate * processes)": self.images_per_update,
            "the number of images": len(self.source),
            "the images (SHA-256)": self.source.fingerprint,
            "the teacher (SHA-256)": hash_weights(self.teacher.model),
        }
        self._make_loader()
        self._restore_or_start()

    def _make_loader(self) -> None:
        config, preprocessing = self.config, self.student.preprocessing
        self.order = Order(
            len(self.source),
            config.batch_size,
            config.accumulate,
            config.steps,
            seed=config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            with_epoch=True,
        )
        looks = TrainConfig(
            augment=config.augment,
            crop_scale=config.crop_scale,
            hflip=config.hflip,
            color_jitter=0,
        )
        samples = Samples(self.source, preprocessing.training_transform(looks), preprocessing.mode, seed=config.seed)
        self.loader = batch_loader(samples, self.order, config.workers, self.accelerator.device.type == "cuda")
        self.unreadable = Unreadable(config.unreadable)

    def _restore_or_start(self) -> None:
        """Load the newest checkpoint, if any, and set up all that depends on the weights."""
        config = self.config
        newest = checkpoints.latest(self.checkpoints)
        if newest and config.resume == "never":
            raise ValueError(f"resume is 'never' but {self.folder} already holds a run; give another folder as `out`")
        state = checkpoints.read_state(newest, FORMAT) if newest else {}
        if newest:
            if not {"config", "facts", "step"} <= state.keys():
                raise damaged(newest / checkpoints.STATE, "it is not of a run of distill")
            check_same_run(self.folder, state["config"] | state["facts"], to_dict(config) | self.facts, FREE)
            check_steps(self.folder, state["step"], config.steps)
            checkpoints.load_weights(self.student.model, read_weights(newest, "model"), newest)
        device = self.accelerator.device
        self.teacher.model.requires_grad_(False).eval().to(device)
        # Evaluation mode, which a student stays in: it learns what the teacher computes without dropout.
        self.student.model.eval().to(device)
        if config.gradient_checkpointing:
            self.student.model.set_grad_checkpointing()
        self.ema = None
        if config.ema_decay is not None:
            self.ema = averaged(self.student.model, config.ema_decay, warmup=config.ema_warmup)
        size = self.student.preprocessing.size
        self.teacher_size = self.teacher.preprocessing.size
        self.grids = grid_of(self.teacher.model, self.teacher_size), grid_of(self.student.model, size)
        self.recorder = Recorder(self.teacher.model)
        self.step, self.stage = state.get("step", 0), 0
        if newest:
            self._enter(self._stage_of(self.step - 1))
            if self.stage == 2 and self.trained.adapters.state_dict():
                checkpoints.load_weights(self.trained.adapters, read_tensors(newest / ADAPTERS), newest)
            scaler = self.accelerator.scaler
            checkpoints.unpack(newest, state, self.trained, self.optimizer, self.ema, WEIGHTS["ema"], scaler)
        names = [*TERMS, "gradient_norm"]
        self.meter = Meter(self.accelerator, names, self.images_per_update, state.get("pending", ()))

    def _stage_of(self, update: int) -> int:
        """Return the stage, 1 or 2, of an update, counted from 0."""
        return 1 if update < self.config.align_steps else 2

    def _enter(self, stage: int) -> None:
        """Make what a stage trains, with an optimizer of its own: moments of stage 1 do not fit the loss of stage 2."""
        config, student = self.config, self.student.model
        self.stage, first = stage, 0 if stage == 1 else config.align_steps
        steps = config.align_steps if stage == 1 else config.steps - config.align_steps
        lr = config.align_lr if stage == 1 else config.lr
        warmup = round(warmup_of(config.warmup_steps, steps))
        self.lr = LearningRate(lr, min(config.min_lr, lr), config.lr_schedule, steps, warmup, first)
        seed_all(INIT, config.seed, stage)
        self.trained: Any = Alignment(student, self.grids[0])
        self.recorder.kinds = ("inputs", "mixed")
        if stage == 2:
            self.recorder.kinds = FEATURES if config.loss == "taps" else ()
            self.trained = Distillation(
                student,
                self.grids,
                taps=config.loss == "taps",
                adapters=config.adapters,
                mixer_weight=config.mixer_weight,
                block_weight=config.block_weight,
                kl_weight=config.kl_weight,
            )
            self.trained.to(self.accelerator.device)
            self._freeze_unreached()
        self.optimizer = create_optimizer_v2(self.trained, "adamw", lr=lr, weight_decay=config.weight_decay)
        self.accelerator.free_memory()
        self.model, self.stepper = self.accelerator.prepare(self.trained, self.optimizer)

    def _freeze_unreached(self) -> None:
        """Train what the loss depends on: not the classifier, which stays the teacher's, and with taps no last norm.

        DistributedDataParallel would wait for the gradients of others. One image tells which they are.
        """
        preprocessing = self.student.preprocessing
        image = torch.zeros(1, preprocessing.in_chans, *preprocessing.size, device=self.accelerator.device)
        self.trained.requires_grad_(True)
        self._terms(self.trained, image)["loss"].backward()
        self._forget()
        for parameter in self.trained.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def _forget(self) -> None:
        """Drop what recomputing has recorded again."""
        if self.stage == 2 and self.trained.recorder is not None:
            self.trained.recorder.clear()

    def _terms(self, model: Any, images: Tensor) -> dict[str, Tensor]:
        """Return the loss and its terms on images."""
        theirs = images
        if self.teacher_size != self.student.preprocessing.size:
            theirs = F.interpolate(images, self.teacher_size, mode="bicubic", antialias=True, align_corners=False)
        with torch.no_grad(), self.accelerator.autocast():
            features = self.teacher.model.forward_features(theirs)
        terms: dict[str, Tensor] = model(images, self.recorder.take(), features)
        return terms

    def _rows(self) -> list[list[float]]:
        return self.meter.collect(self.step, self.lr, checkpoints.latest(self.checkpoints))

    def _weights(self) -> dict[str, Tensor]:
        """Return the averaged weights, or the plain ones where no average is kept."""
        model: Any = self.student.model if self.ema is None else self.ema.module
        weights: dict[str, Tensor] = model.state_dict()
        return weights

    def _save(self) -> None:
        """Write a checkpoint of this moment; every process calls it."""
        pending, config = self._rows(), self.config
        if self.accelerator.is_main_process:
            self.log.sync()
            scaler = self.accelerator.scaler
            moments, values = checkpoints.pack(self.trained, self.optimizer, self.ema, scaler)
            tensors = {WEIGHTS["model"]: self.student.model.state_dict(), checkpoints.OPTIMIZER: moments}
            if self.ema is not None:
                tensors[WEIGHTS["ema"]] = self._weights()
            adapters = self.trained.adapters.state_dict() if self.stage == 2 else {}
            if adapters:
                tensors[ADAPTERS] = adapters
            state = {"format": FORMAT, "step": self.step, "pending": pending, "facts": self.facts}
            state |= {"config": to_dict(config), "data": {"name": config.data, "root": config.data_root}, **values}
            texts, keep = {CONFIG: self.student.config()}, config.keep_checkpoints
            checkpoints.save(self.checkpoints, self.step, tensors, texts, state, keep=keep)
        self.accelerator.wait_for_everyone()

    def _update(self, batches: Iterator[Batch]) -> Tensor:
        """Take one optimizer step; return this process's mean terms and the gradient's norm, on the device."""
        if self._stage_of(self.step) != self.stage:
            self._enter(self._stage_of(self.step))
        config, device = self.config, self.accelerator.device
        report = torch.zeros(len(TERMS) + 1, device=device)
        self.lr.set(self.optimizer, self.step)
        for _ in range(config.accumulate):
            batch = next(batches)
            self.unreadable.note(batch.unreadable)
            with self.accelerator.accumulate(self.model):
                terms = self._terms(self.model, batch.images.to(device, non_blocking=True))
                self.accelerator.backward(terms["loss"])
                self._forget()
                if self.accelerator.sync_gradients:
                    limit = math.inf if config.clip_grad is None else config.clip_grad
                    report[-1] = self.accelerator.clip_grad_norm_(self.trained.parameters(), limit)
                self.stepper.step()
                self.stepper.zero_grad()
            report[:-1] += torch.stack([terms[name].detach() for name in TERMS]) / config.accumulate
        self.step += 1
        if self.ema is not None:
            self.ema.update_parameters(self.student.model)
        return report

    def _train(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        self.order.start = self.step
        batches = iter(self.loader)
        show = config.progress and main
        if show:
            print(self._introduction(), file=sys.stderr)
        bar = tqdm(total=config.steps, initial=self.step, unit="update", disable=not show)
        with Termination(self.accelerator) as termination, bar:
            self.meter.restart()
            while self.step < config.steps:
                self.meter.add(self._update(batches))
                bar.update()
                ends = self.step in (config.align_steps, config.steps)  # a row is of one stage
                log, save = (ends or self.step % n == 0 for n in (config.log_every, config.checkpoint_every))
                stop = termination.asked(self.step) and not save
                if not (log or save or stop):
                    continue
                rows, speed = self._rows(), self.meter.images_per_second
                bar.set_description_str(f"stage {self.stage}")
                bar.set_postfix_str(f"loss {self.meter.loss:.4f}, {speed:.0f} images/s")
                if log:
                    means, lr = self.meter.take(rows), self.lr.at(self.step - 1)
                    if main:
                        row = {"stage": self.stage, **means, "lr": lr, "images_per_second": speed}
                        self.log.add("train", self.step, **row)
                if save or stop:
                    self._save()
                if stop:
                    raise termination.error(self.step)
                self.meter.restart()

    def _introduction(self) -> str:
        parameters = sum(p.numel() for p in self.student.model.parameters())
        go_on = f", from update {self.step} on" if self.step else ""
        return (
            f"{self.config.teacher} as teacher; the student has {parameters:,} parameters, on "
            f"{self.accelerator.device}; {len(self.source):,} images from {self.config.data}; {self.config.steps:,} "
            f"updates of {self.images_per_update} images, the first {self.config.align_steps:,} of stage 1{go_on}; "
            f"to {self.folder}"
        )

    def _card(self) -> str:
        config, replaced = self.config, ", ".join(mixers(self.student.model))
        about = (
            f"C-GSPN's mixers stand in the place of attention in {replaced}; they learned from {short(config.teacher)} "
            f"on {len(self.source):,} images of {short(config.data)} without labels."
        )
        loss = last_value(self.folder / "train.csv", "loss")
        figures = [] if loss is None else [Figure("distillation loss", str(short(config.data)), "loss", float(loss))]
        return card_of(self.student.model, self.student.name, "distill", config, about, figures)

    def run(self) -> dict[str, Any]:
        """Distil to the end.

        Returns:
            The run's `folder`, its `model` (a timm folder of the averaged weights), `steps`, `parameters`, the log's
            last `loss`, and `seconds` of this call.

        Raises:
            NonFiniteLossError: the loss became infinite or not a number.
            UnreadableImageError: an image cannot be read and `unreadable` is "stop".
            WriteError: a checkpoint cannot be written.
            StoppedError: the process was asked to end, and has saved a checkpoint.
        """
        began, main = time.perf_counter(), self.accelerator.is_main_process
        with locked(self.folder):
            self._run()
            if main:
                write_model(self.folder / "model", self.student.config(), self._weights(), self._card())
            self.accelerator.wait_for_everyone()
        return {
            "folder": str(self.folder),
            "model": str(self.folder / "model"),
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.student.model.parameters()),
            "loss": last_value(self.folder / "train.csv", "loss") if main else None,
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _run(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        if main:
            write_text(self.folder / "config.yaml", to_yaml(config))
            log: dict[str, Any] = {
                "tensorboard": config.tensorboard,
                "trackers": config.trackers,
                "options": to_dict(config),
            }
            self.log = Log(self.folder, TABLES, self.step, **log)
        try:
            self._train()
        finally:
            if main:
                self.log.close()
        if main:
            self.unreadable.report()


def _sized(config: DistillConfig, sizes: list[ImageSize]) -> Iterator[DistillConfig]:
    """Yield a run's options for each size of a curriculum."""
    own: dict[str, Any] = {"curriculum": None}
    for number, size in enumerate(sizes):
        out = Path(config.out) / f"{size.height}x{size.width}"
        yield dataclasses.replace(config, **own, image_size=size, out=str(out))
        # The student of a size is the teacher of the next, and a copy of it is the next student's beginning.
        own |= {"teacher": str(out / "model"), "teacher_image_size": size, "align_steps": 0}
        own |= {"model_kwargs": {}, "pretrained": False, "start_from": None, "keep": [], "mixer_kwargs": {}}
        if number == 0:
            own |= {"steps": config.steps - config.align_steps}


def _check_folder(config: DistillConfig) -> None:
    """Refuse a folder that holds something else than such a run.

    Raises:
        ValueError: it is a model, as that of the teacher, or a run of the other kind.
    """
    out = Path(config.out)
    for name, origin in (("teacher", config.teacher), ("start_from", config.start_from)):
        if origin is not None and Path(origin).exists() and out.exists() and Path(origin).resolve() == out.resolve():
            raise ValueError(f"out must be another folder than {name}, got {config.out!r} for both")
    if (out / CONFIG).is_file():
        raise ValueError(f"out must be a folder of its own, {config.out!r} holds a model")
    check_replaceable(out / "model", MODEL_FILES)
    other = out / ("checkpoints" if config.curriculum is not None else CURRICULUM)
    if other.exists():
        kind = "without" if config.curriculum is not None else "with"
        raise ValueError(f"out must be another folder: {config.out!r} holds a run {kind} curriculum")


def _run_curriculum(config: DistillConfig, sizes: list[ImageSize]) -> dict[str, Any]:
    """Distil at one size after the other."""
    check_sizes(config, sizes)
    out = Path(config.out)
    settings = {"curriculum": [str(size) for size in sizes], "steps": config.steps, "align_steps": config.align_steps}
    check_record(out / CURRICULUM, settings)
    for number, sized in enumerate(_sized(config, sizes)):
        distiller = Distiller(sized)
        main = distiller.accelerator.is_main_process
        if number == 0 and main:  # all has been checked
            make_folder(out)
            write_json(out / CURRICULUM, settings)
        result = distiller.run()
    if main:
        with replacing_folder(out / "model") as temporary:
            shutil.copytree(result["model"], temporary, dirs_exist_ok=True)
    distiller.accelerator.wait_for_everyone()
    return {**result, "folder": str(out), "model": str(out / "model")}


def distill(config: DistillConfig) -> dict[str, Any]:
    """Distil as configured: a run, or one for each size of a curriculum in `OUT/HEIGHTxWIDTH`; see `Distiller.run`.

    Of a curriculum `OUT/model` is the model of the last size, as it is of a single run.
    """
    _check_folder(config)
    return Distiller(config).run() if config.curriculum is None else _run_curriculum(config, config.curriculum)
