"""Training: one loop over updates that can be killed at any moment and continued to the same weights, bit for bit."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from gspn_core.runs import checkpoints
from gspn_core.runs.cards import CARD, Figure, model_card, short
from gspn_core.runs.errors import reason
from gspn_core.runs.files import locked, make_folder, read_tensors, write_text
from gspn_core.runs.logs import Log, last_value
from gspn_core.runs.options import to_dict, to_yaml, warmup_of
from gspn_core.runs.order import INIT, STEP, Order, derive_seed
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
from .averages import PowerAverages
from .checkpoint import CONFIG, FORMAT, WEIGHTS, load_model
from .config import TrainConfig
from .data import draw, loader, open_data
from .losses import make_loss
from .models import GSPNDiTTransformer2DModel
from .monitor import Monitor
from .sample import save_png
from .vae import fingerprint, load_vae

FREE = FREE_TO_CHANGE | {"vae", "sample_every", "sample_count", "sampler_steps", "guidance"}
FREE |= {"average_every", "fid_every", "fid_count", "reference", "extractor", "extractor_weights", "extractor_kwargs"}


class Trainer:
    """A run: built from its configuration, continued from its newest checkpoint if there is one.

    Raises:
        ValueError, FileNotFoundError: an option, the data or a checkpoint does not fit; nothing has been written then.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        self.accelerator = make_accelerator(config.device, config.precision, config.accumulate, tf32=config.tf32)
        self.vae = load_vae(config.vae).eval() if config.vae else None
        self.source = open_data(
            config.data,
            split=config.split,
            image_size=config.image_size,
            unreadable=config.unreadable,
            vae_fingerprint=fingerprint(self.vae) if self.vae else None,
        )
        self.class_names = self.source.class_names
        self.monitor = Monitor(config, self.accelerator, self.source.shape, len(self.class_names), self.vae)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.order = Order(
            len(self.source),
            config.batch_size,
            config.accumulate,
            config.steps,
            seed=config.seed,
            rank=self.rank,
            world_size=self.world,
        )
        flow = {"times": config.times, "shift": config.time_shift} if config.objective == "flow" else {}
        self.objective = make_loss(config.objective, **flow).to(self.accelerator.device)
        torch.manual_seed(derive_seed(INIT, config.seed))
        self.bare_model = self._build()
        self.step = 0
        self.loss: float | None = None  # the main process reports it
        self._restore_or_start()

    def _build(self) -> GSPNDiTTransformer2DModel:
        config = self.config
        channels, *size = self.source.shape
        options: dict[str, Any] = {
            "in_channels": channels,
            "out_channels": channels * (2 if self.objective.learned_variance else 1),
            "sample_size": max(size),
            "num_classes": len(self.class_names),
        } | config.model_kwargs
        try:
            model = GSPNDiTTransformer2DModel.from_preset(config.model, **options)
        except TypeError as error:
            raise ValueError(
                f"model_kwargs {config.model_kwargs} do not suit {config.model}: {reason(error)}"
            ) from None
        if model.config.in_channels != channels:
            raise ValueError(f"in_channels must be the {channels} of the data, got {model.config.in_channels}")
        if model.config.num_classes < len(self.class_names):
            classes = len(self.class_names)
            raise ValueError(f"num_classes must be at least the {classes} of the data, got {model.config.num_classes}")
        patch = model.config.patch_size
        if any(side % patch for side in size):
            raise ValueError(f"the patch of {config.model} must divide {size[0]} x {size[1]}, got {patch}")
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    @property
    def _facts(self) -> dict[str, Any]:
        """What a run depends on beside its options."""
        batch = self.config.batch_size * self.config.accumulate * self.world
        return {
            "images per update (batch_size * accumulate * processes)": batch,
            "the classes": self.class_names,
            "the number of images": len(self.source),
            "the data (SHA-256)": self.source.fingerprint,
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
            before = state["config"]["average_every"]
            if (before is None) != (config.average_every is None):
                raise ValueError(
                    f"average_every must be {'null' if before is None else 'a number'} to continue the run in "
                    f"{self.folder}, got {config.average_every}: its averages are of all updates or of none"
                )
            check_steps(self.folder, state["step"], config.steps)
            checkpoints.load_weights(self.bare_model, read_tensors(newest / WEIGHTS["model"]), newest)
        elif config.start_from is not None:
            self._start_from(config.start_from)

        self.bare_model.to(self.accelerator.device).train()
        self.ema: AveragedModel | None = None
        if config.ema_decay is not None:
            self.ema = averaged(self.bare_model, config.ema_decay, warmup=config.ema_warmup)
        warmup = int(warmup_of(config.warmup_steps, config.steps))
        self.lr = LearningRate(config.lr, config.min_lr, config.lr_schedule, config.steps, warmup)
        self.averages = None if config.average_every is None else PowerAverages(self.bare_model)
        options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.AdamW(self.bare_model.parameters(), **options)
        if config.compile:
            self.bare_model.compile_repeated_blocks()
        self.model, self.stepper = self.accelerator.prepare(self.bare_model, self.optimizer)
        if newest:
            self.step = state["step"]
            if self.averages is not None:
                self.averages.restore(newest, self.step)
            checkpoints.unpack(
                newest, state, self.bare_model, self.optimizer, self.ema, WEIGHTS["ema"], self.accelerator.scaler
            )
        images_per_update = next(iter(self._facts.values()))
        self.meter = Meter(self.accelerator, self._columns, images_per_update, state.get("pending", ()))

    def _start_from(self, path: str) -> None:
        """Take the weights of another model; of the classes those that it knows by name, and the null class."""
        started, origin = load_model(path)
        weights = started.state_dict()
        names = origin.get("class_names") or [str(number) for number in range(started.config.num_classes)]
        before, table = weights["class_embed.weight"], self.bare_model.class_embed.weight.detach().clone()
        if before.shape[1:] == table.shape[1:]:
            for row, name in enumerate(self.class_names):
                if name in names:
                    table[row] = before[names.index(name)]
            table[-1] = before[-1]
            weights["class_embed.weight"] = table
        checkpoints.load_weights(self.bare_model, weights, path)

    def _save(self) -> None:
        """Write a checkpoint of this moment; every process calls it."""
        pending = self._rows()
        if self.accelerator.is_main_process:
            self.log.sync()
            moments, values = checkpoints.pack(self.bare_model, self.optimizer, self.ema, self.accelerator.scaler)
            tensors = {WEIGHTS["model"]: self.bare_model.state_dict(), checkpoints.OPTIMIZER: moments}
            if self.ema is not None:
                tensors[WEIGHTS["ema"]] = self.ema.module.state_dict()
            if self.averages is not None:
                tensors |= self.averages.tensors
            state = {
                "format": FORMAT,
                "step": self.step,
                "objective": self.config.objective,
                "time_shift": self.config.time_shift,
                "class_names": self.class_names,
                "latent_size": list(self.source.shape[1:]),
                "vae_fingerprint": getattr(getattr(self.source, "features", None), "vae_fingerprint", None),
                "processes": self.world,
                "pending": pending,
                "facts": self._facts,
                "config": to_dict(self.config),
                **values,
            }
            texts = {CONFIG: self.bare_model.to_json_string(), CARD: self._card()}
            checkpoints.save(self.checkpoints, self.step, tensors, texts, state, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _card(self) -> str:
        config, data = self.config, str(short(self.config.data))
        found = (
            ("training loss", "loss", last_value(self.folder / "train.csv", "loss")),
            (f"FID of {config.fid_count:,} images", "fid", last_value(self.folder / "validation.csv", "fid")),
        )
        variant = "" if self.ema is None else ', variant="ema"'
        usage = (
            "from gspn_dit import GSPNDiTTransformer2DModel\n\n"
            f'model = GSPNDiTTransformer2DModel.from_pretrained("FOLDER"{variant})'
        )
        return model_card(
            config.model,
            f"A class-conditional diffusion model ({config.objective}), {len(self.class_names):,} classes, after "
            f"{self.step:,} updates; a model of diffusers.",
            made_by="gspn-dit train",
            config=config,
            usage=usage,
            library="diffusers",
            task="unconditional-image-generation",
            figures=[Figure(name, data, metric, value) for name, metric, value in found if value is not None],
            versions={"diffusers": diffusers.__version__, "gspn-dit": __version__},
        )

    @property
    def _columns(self) -> list[str]:
        terms = ["loss", "mse", "vlb"] if self.objective.learned_variance else ["loss"]
        return [*terms, "gradient_norm"]

    def _update(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Take one optimizer step; return this process's mean terms and the gradient's norm, on the device."""
        config, device = self.config, self.accelerator.device
        total = torch.zeros(len(self._columns), device=device)
        self.lr.set(self.optimizer, self.step)
        for micro in range(config.accumulate):
            items, labels = next(batches)
            first = (micro * self.world + self.rank) * config.batch_size
            draws = draw(
                self.objective,
                self.source.shape,
                range(first, first + config.batch_size),
                hflip=config.hflip,
                dropout=config.label_dropout,
                seeds=(STEP, config.seed, self.step),
            )
            # For what the model itself draws, such as DropPath.
            torch.manual_seed(derive_seed(STEP, config.seed, self.step, micro, self.rank))
            x0 = self.source.clean(items.to(device), draws.mirrored.to(device), draws.posterior.to(device))
            noise, times = draws.noise.to(device), draws.times.to(device)
            labels = torch.where(draws.dropped, self.bare_model.config.num_classes, labels).to(device)
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
        if self.ema is not None:
            self.ema.update_parameters(self.bare_model)
        if self.averages is not None:
            self.averages.update(self.bare_model)
        return total

    def _rows(self) -> list[list[float]]:
        return self.meter.collect(self.step, self.lr, checkpoints.latest(self.checkpoints))

    def _sampled(self) -> Any:
        """Return the model to sample from, in evaluation mode: the averaged weights, or the plain ones without."""
        model: Any = self.bare_model if self.ema is None else self.ema.module
        return model.eval()

    def _draw_samples(self) -> None:
        """Write a grid of samples."""
        if not self.accelerator.is_main_process or not self.monitor.visible:
            return
        page = self.monitor.grid(self._sampled())
        self.bare_model.train()
        make_folder(self.folder / "samples")
        save_png(page, self.folder / "samples" / f"step-{self.step:08d}.png")
        self.log.add_image("samples", self.step, page)

    def _measure(self) -> None:
        """Log the FID of samples; every process calls it."""
        fid = self.monitor.fid(self._sampled())
        self.bare_model.train()
        if fid is not None:
            self.log.add("validation", self.step, fid=fid)

    def run(self) -> dict[str, Any]:
        """Train to the end.

        Returns:
            The run's `folder`, `steps`, `parameters`, last `loss`, and `seconds` of this call.

        Raises:
            NonFiniteLossError: the loss became infinite or not a number.
            WriteError: a checkpoint cannot be written.
        """
        began = time.perf_counter()
        with locked(self.folder):
            self._run()
        return {
            "folder": str(self.folder),
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.bare_model.parameters()),
            "loss": self.loss,
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _run(self) -> None:
        main = self.accelerator.is_main_process
        if main:
            write_text(self.folder / "config.yaml", to_yaml(self.config))
            tables = {"train": [*self._columns, "lr", "images_per_second"]}
            if self.config.fid_every is not None:
                tables["validation"] = ["fid"]
            self.log = Log(
                self.folder,
                tables,
                self.step,
                tensorboard=self.config.tensorboard,
                trackers=self.config.trackers,
                options=to_dict(self.config),
            )
        try:
            self._train()
        finally:
            if main:
                self.loss = last_value(self.folder / "train.csv", "loss")
                self.log.close()

    def _train(self) -> None:
        config, main = self.config, self.accelerator.is_main_process
        self.order.start = self.step
        batches = iter(loader(self.source, self.order, config.workers))
        self.meter.restart()
        show = config.progress and main
        if show:
            print(self._introduction(), file=sys.stderr)
        with (
            Termination(self.accelerator) as termination,
            tqdm(total=config.steps, initial=self.step, unit="update", disable=not show) as bar,
        ):
            while self.step < config.steps:
                self.meter.add(self._update(batches))
                bar.update()
                last = self.step == config.steps
                log, save, grid_due, fid_due, snapshot = (
                    every is not None and (last or self.step % every == 0)
                    for every in (
                        *(config.log_every, config.checkpoint_every),
                        *(config.sample_every, config.fid_every, config.average_every),
                    )
                )
                if snapshot and main and self.averages is not None:
                    self.averages.store(self.folder, self.step)
                stop = termination.asked(self.step) and not last
                if not (log or save or grid_due or fid_due or stop):
                    continue
                rows, speed = self._rows(), self.meter.images_per_second
                if log:
                    means = self.meter.take(rows)
                    if main:
                        self.log.add("train", self.step, **means, lr=self.lr.at(self.step - 1), images_per_second=speed)
                bar.set_postfix_str(
                    f"loss {self.meter.loss:.4f}, lr {self.lr.at(self.step - 1):.2e}, {speed:.1f} images/s"
                )
                if stop:
                    self._save()
                    raise termination.error(self.step)
                if save:
                    self._save()
                if grid_due:
                    self._draw_samples()
                if fid_due:
                    self._measure()
                self.meter.restart()

    def _introduction(self) -> str:
        parameters = sum(p.numel() for p in self.bare_model.parameters())
        go_on = f", from update {self.step} on" if self.step else ""
        return (
            f"{self.config.model}, {parameters:,} parameters, on {self.accelerator.device}; "
            f"{len(self.source):,} images of {len(self.class_names)} classes from {self.config.data}; "
            f"{self.config.steps:,} updates of {next(iter(self._facts.values()))} images{go_on}; to {self.folder}"
        )


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model as configured and return a summary; see `Trainer.run`."""
    return Trainer(config).run()
