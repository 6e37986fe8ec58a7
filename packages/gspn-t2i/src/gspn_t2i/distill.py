"""Distillation: mixers learn to stand in for a UNet's self-attentions, in a run that can be killed and continued."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import checkpoint
from .adapter import GSPNAdapter
from .captions import open_captioned
from .conditions import INDEX, SETTINGS, Batch, Embeddings, Encoded, Frozen, Pixels, collate, encode
from .config import FREE_TO_CHANGE, DistillConfig, to_dict, to_yaml
from .files import replacing_folder, save_png, write_text
from .generate import load_adapter, load_pipeline, use_cpu
from .logs import Log
from .objective import TERMS, Objective, Taps, training_schedule
from .order import INIT, STEP, Order, derive_seed


class NonFiniteLossError(ArithmeticError):
    """The loss became infinite or not a number."""


def student_of(unet: nn.Module) -> nn.Module:
    """Return a copy of a UNet whose parameters and buffers are those of the UNet itself, not copies."""
    shared = {id(tensor): tensor for tensors in (unet.parameters(), unet.buffers()) for tensor in tensors}
    return copy.deepcopy(unet, shared)


class Distiller:
    """A run: built from its configuration, continued from its newest checkpoint if there is one.

    Raises:
        ValueError, FileNotFoundError: an option, the data or a checkpoint does not fit.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        self.accelerator = Accelerator(
            cpu=use_cpu(config.device),
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulate,
        )
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.images_per_update = config.batch_size * config.accumulate * self.world
        newest = checkpoint.latest(self.checkpoints)
        if newest and config.resume == "never":
            raise ValueError(f"resume is 'never' but {self.folder} already holds a run; give another folder as `out`")
        state = checkpoint.read_state(newest) if newest else {}
        if newest:
            self._check_same_options(state)
        self._load_pipeline()
        self.source = self._open_data()
        if newest and state["images"] != len(self.source):
            raise ValueError(f"the number of images must be {state['images']} to continue, got {len(self.source)}")
        self.order = Order(
            len(self.source),
            config.batch_size,
            config.accumulate,
            config.steps,
            seed=config.seed,
            rank=self.rank,
            world_size=self.world,
        )
        self.adapter = self._build_adapter()
        self.step = 0
        self._pending: list[Tensor] = []  # the terms of updates that no row of the log has yet
        self._set_up(newest, state)

    def _load_pipeline(self) -> None:
        config = self.config
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.pipeline = load_pipeline(config.pipeline, None, dtype)
        for name in ("vae", "unet", "text_encoder", "text_encoder_2"):
            module: nn.Module | None = getattr(self.pipeline, name, None)
            if module is not None:
                module.requires_grad_(False).eval().to(self.device)
        if self.pipeline.vae.config.get("force_upcast"):
            self.pipeline.vae.float()  # of SDXL: half precision is too narrow for it
        self.pipeline.set_progress_bar_config(disable=True)
        self.teacher: Any = self.pipeline.unet
        self.frozen = Frozen(self.pipeline, self.device)
        self.empty = self.frozen.unconditional()
        self.objective = Objective(
            training_schedule(self.pipeline.scheduler.config),
            config.noise_weight,
            config.teacher_weight,
            config.feature_weight,
            config.snr_gamma,
        )

    def _open_data(self) -> Pixels | Encoded:
        config = self.config
        if all((Path(config.data) / name).is_file() for name in (SETTINGS, INDEX)):
            if config.cache is not None:
                raise ValueError(f"cache must be absent where data is one, got {config.cache!r}")
            stored = Encoded(config.data)
            needed = {"size": list(config.height_width), "encoders": self.frozen.fingerprint()}
            for key, value in (needed | ({"mirror": True} if config.mirror else {})).items():
                if stored.settings[key] != value:
                    raise ValueError(
                        f"{config.data} is a cache of other {key}: {stored.settings[key]!r}, not {value!r}"
                    )
            return stored
        columns = {"image_column": config.image_column, "text_column": config.text_column}
        pixels = Pixels(open_captioned(config.data, config.split, **columns), config.height_width)
        if config.cache is None:
            return pixels
        options = {"mirror": config.mirror, "batch_size": config.batch_size, "progress": config.progress}
        return encode(pixels, self.frozen, config.cache, **options)

    def _build_adapter(self) -> GSPNAdapter:
        config = self.config
        torch.manual_seed(derive_seed(INIT, config.seed))
        if config.adapter is not None:
            return load_adapter(config.adapter)
        return GSPNAdapter.for_unet(
            self.teacher,
            mixer=config.mixer,
            proxy=config.proxy,
            bottleneck=config.bottleneck,
            chunk_size=config.chunk_size,
            init=config.init,
            keep_attention=config.keep_attention,
        )

    def _set_up(self, newest: Path | None, state: dict[str, Any]) -> None:
        """Load the newest checkpoint, if any, mount the mixers on a student, and set up all that depends on them."""
        config, mixers = self.config, self.adapter.mixers
        if newest:
            tensors = checkpoint.read_tensors(newest / checkpoint.WEIGHTS["model"])
            checkpoint.load_weights(self.adapter, tensors, str(newest))
        mixers.to(device=self.device, dtype=torch.float32).requires_grad_(True)
        self.student = student_of(self.teacher)
        self.adapter.mount(self.student)
        mixers.train()
        names = list(self.adapter.config.layers) if config.feature_weight else []
        self.student_taps, self.teacher_taps = Taps(self.student, names), Taps(self.teacher, names)
        if config.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()  # type: ignore[operator]
        self.ema: EMAModel | None = None
        if config.ema_decay is not None:
            floor = 0.0 if config.ema_warmup else config.ema_decay
            self.ema = EMAModel(mixers.parameters(), decay=config.ema_decay, min_decay=floor)
        self.optimizer = torch.optim.AdamW(mixers.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        options = {"num_warmup_steps": config.warmup_steps, "num_training_steps": config.steps}
        # Asked for its factor of a step alone, so that there is no state of it to restore.
        self._factor = get_scheduler(
            config.lr_schedule + "_with_warmup" * (config.lr_schedule == "constant"),
            torch.optim.AdamW(nn.Linear(1, 1).parameters()),
            **options,
        ).lr_lambdas[0]
        self.model, self.stepper = self.accelerator.prepare(self.student, self.optimizer)
        if newest:
            tensors = checkpoint.read_tensors(newest / checkpoint.OPTIMIZER)
            checkpoint.unpack_optimizer(self.adapter, self.optimizer, tensors)
            if self.ema is not None:
                averaged = checkpoint.read_tensors(newest / checkpoint.WEIGHTS["ema"])
                for (name, _), shadow in zip(self.adapter.named_parameters(), self.ema.shadow_params, strict=True):
                    shadow.copy_(averaged[name])
                self.ema.optimization_step = state["step"]
            self.step = state["step"]
            self._pending = list(torch.tensor(state["pending"], device=self.device))

    def _check_same_options(self, state: dict[str, Any]) -> None:
        now = to_dict(self.config)
        for key, before in state["config"].items():
            if key not in FREE_TO_CHANGE and now.get(key) != before:
                raise ValueError(
                    f"{key} must be {before!r} to continue the run in {self.folder}, got {now.get(key)!r}; "
                    "give another folder as `out` for a new run"
                )
        if state["images_per_update"] != self.images_per_update:
            raise ValueError(
                f"images per update (batch_size * accumulate * processes) must be {state['images_per_update']} "
                f"to continue the run in {self.folder}, got {self.images_per_update}"
            )

    def _averaged(self) -> dict[str, Tensor]:
        """Return the averaged weights, or the plain ones where none are kept."""
        if self.ema is None:
            return self.adapter.state_dict()
        names = [name for name, _ in self.adapter.named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))

    def _save(self) -> None:
        """Write a checkpoint of this moment; every process calls it."""
        pending = self._reduced(self._pending)
        if self.accelerator.is_main_process:
            self.log.sync()
            state = {
                "step": self.step,
                "images": len(self.source),
                "images_per_update": self.images_per_update,
                "processes": self.world,
                "pending": pending,
                "config": to_dict(self.config),
            }
            tensors = {
                checkpoint.WEIGHTS["model"]: self.adapter.state_dict(),
                checkpoint.OPTIMIZER: checkpoint.pack_optimizer(self.adapter, self.optimizer),
            }
            if self.ema is not None:
                tensors[checkpoint.WEIGHTS["ema"]] = self._averaged()
            keep = self.config.keep_checkpoints
            checkpoint.save(self.checkpoints, self.step, self.adapter, tensors, state, keep=keep)
        self.accelerator.wait_for_everyone()

    def _batch(self, loaded: Any, micro: int) -> tuple[Batch, Tensor, Tensor]:
        """Return what the UNet is trained on, noise and times.

        Every process draws for all, on the CPU: so the numbers depend neither on the processes nor on the device.
        """
        config, device = self.config, self.device
        count = config.batch_size * self.world
        part = slice(self.rank * config.batch_size, (self.rank + 1) * config.batch_size)
        generator = torch.Generator().manual_seed(derive_seed(STEP, config.seed, self.step, micro))
        factor = self.pipeline.vae_scale_factor
        shape = (self.teacher.config.in_channels, *(side // factor for side in config.height_width))
        mirrored = (torch.rand(count, generator=generator) < (0.5 if config.mirror else 0.0))[part]
        dropped = (torch.rand(count, generator=generator) < config.caption_dropout)[part].to(device)
        times = torch.randint(self.objective.schedule.config.num_train_timesteps, (count,), generator=generator)[part]
        posterior, noise = (torch.randn(count, *shape, generator=generator)[part].to(device) for _ in range(2))
        batch = self.source.encode(loaded, self.frozen, mirrored, posterior)
        states, pooled = batch.embeddings
        states = torch.where(dropped.view(-1, 1, 1), self.empty.states, states)
        if pooled is not None and self.empty.pooled is not None:
            pooled = torch.where(dropped.view(-1, 1), self.empty.pooled, pooled)
        return Batch(batch.latents, Embeddings(states, pooled), batch.sizes), noise, times.to(device)

    def _ask(self, unet: Any, noisy: Tensor, times: Tensor, batch: Batch) -> Tensor:
        added = None
        if batch.embeddings.pooled is not None:
            added = {"text_embeds": batch.embeddings.pooled, "time_ids": batch.sizes.to(batch.embeddings.pooled.dtype)}
        answer: Tensor = unet(
            noisy, times, encoder_hidden_states=batch.embeddings.states, added_cond_kwargs=added, return_dict=False
        )[0]
        return answer

    def _update(self, batches: Iterator[Any]) -> Tensor:
        """Take one optimizer step; return this process's mean terms and the gradient's norm, on the device."""
        config = self.config
        total = torch.zeros(len(TERMS) + 1, device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(self.step)
        for micro in range(config.accumulate):
            batch, noise, times = self._batch(next(batches), micro)
            noisy = self.objective.schedule.add_noise(batch.latents, noise, times).to(self.teacher.dtype)
            with torch.no_grad():
                teacher = self._ask(self.teacher, noisy, times, batch)
            with self.accelerator.accumulate(self.model):
                student = self._ask(self.model, noisy, times, batch)
                target = self.objective.target(batch.latents, noise, times)
                terms = self.objective(
                    student, teacher, target, times, self.student_taps.take(), self.teacher_taps.take()
                )
                self.accelerator.backward(terms["loss"])
                self.student_taps.take()  # what recomputing left there
                if self.accelerator.sync_gradients:
                    limit = math.inf if config.clip_grad is None else config.clip_grad
                    total[-1] = self.accelerator.clip_grad_norm_(self.adapter.mixers.parameters(), limit)
                self.stepper.step()
                self.stepper.zero_grad()
            total[:-1] += torch.stack([terms[name] for name in TERMS]).detach() / config.accumulate
        self.step += 1
        if self.ema is not None:
            self.ema.step(self.adapter.mixers.parameters())
        return total

    def _reduced(self, rows: Sequence[Tensor]) -> list[list[float]]:
        """Average rows over the processes."""
        if not rows:
            return []
        mean: Any = self.accelerator.reduce(torch.stack(list(rows)), "mean")
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
                    f"the loss is {row[0]} at step {step} with learning rate {self._lr(step - 1):.3g}; "
                    f"last good checkpoint: {good}"
                )
        if self.step % self.config.log_every == 0 or self.step == self.config.steps:
            means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            if self.accelerator.is_main_process:
                values = dict(zip([*TERMS, "gradient_norm"], means, strict=True))
                self.log.add(self.step, **values, lr=self._lr(self.step - 1), images_per_second=round(speed, 1))
            self._pending = []
        return rows[-1][0]

    def _lr(self, step: int) -> float:
        """Return the learning rate of the update after `step` others."""
        # The first of a warm-up is not spent at a rate of 0.
        return self.config.lr * float(self._factor(step + 1 if step < self.config.warmup_steps else step))

    @torch.no_grad()
    def _draw_samples(self) -> None:
        """Write a grid of what the averaged mixers draw."""
        config = self.config
        if not self.accelerator.is_main_process or not config.sample_prompts:
            return
        plain = {name: value.clone() for name, value in self.adapter.state_dict().items()}
        self.adapter.load_state_dict(self._averaged())
        self.pipeline.unet = self.student
        height, width = config.height_width
        try:
            with self.accelerator.autocast():
                images = [
                    self.pipeline(
                        prompt,
                        height=height,
                        width=width,
                        num_inference_steps=config.sample_steps,
                        guidance_scale=config.sample_guidance,
                        generator=torch.Generator().manual_seed(config.seed + number),
                    ).images[0]
                    for number, prompt in enumerate(config.sample_prompts)
                ]
        finally:
            self.pipeline.unet = self.teacher
            self.adapter.load_state_dict(plain)
            self.student_taps.take()
        columns = math.ceil(math.sqrt(len(images)))
        blank = images[0].copy()
        blank.paste((255, 255, 255), (0, 0, *blank.size))
        page = make_image_grid(images + [blank] * (-len(images) % columns), -(-len(images) // columns), columns)
        (self.folder / "samples").mkdir(exist_ok=True)
        save_png(page, self.folder / "samples" / f"step-{self.step:08d}.png")
        self.log.add_image(self.step, np.asarray(page))

    def run(self) -> dict[str, Any]:
        """Train to the end, and write the adapter.

        Returns:
            The run's `folder`, its `adapter`, `steps`, `parameters`, last `loss`, and `seconds` of this call.

        Raises:
            NonFiniteLossError: the loss became infinite or not a number.
            OSError: a checkpoint cannot be written.
        """
        began = time.perf_counter()
        main = self.accelerator.is_main_process
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "config.yaml", to_yaml(self.config))
            columns = [*TERMS, "gradient_norm", "lr", "images_per_second"]
            self.log = Log(self.folder, columns, self.step, tensorboard=self.config.tensorboard)
        try:
            loss = self._train()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise MemoryError(self._advice(error)) from error
        finally:
            if main:
                self.log.close()
        if main:
            with replacing_folder(self.folder / "adapter") as temporary:
                checkpoint.write_files(temporary, self.adapter, {checkpoint.WEIGHTS["model"]: self._averaged()})
        self.accelerator.wait_for_everyone()
        return {
            "folder": str(self.folder),
            "adapter": str(self.folder / "adapter"),
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.adapter.parameters()),
            "loss": loss,
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _advice(self, error: BaseException) -> str:
        """Say what saves memory."""
        config = self.config
        savers = {
            "gradient_checkpointing true": not config.gradient_checkpointing,
            "precision bf16": config.precision == "no",
            "a smaller batch_size with more accumulate": config.batch_size > 1,
        }
        advice = ", ".join(name for name, useful in savers.items() if useful) or "a smaller size"
        good = checkpoint.latest(self.checkpoints) or "none"
        return f"out of memory; what saves some: {advice}; last checkpoint: {good} ({str(error).splitlines()[0]})"

    def _train(self) -> float:
        config = self.config
        self.order.start = self.step
        loader = DataLoader(
            self.source,
            batch_sampler=self.order,
            collate_fn=collate,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
        )
        batches = iter(loader)
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
                    bar.set_postfix_str(f"loss {loss:.4f}, lr {self._lr(self.step - 1):.2e}, {speed:.1f} images/s")
                    if save:
                        self._save()
                    if draw_samples:
                        self._draw_samples()
                    done, since = 0, time.perf_counter()
        return loss


def distill(config: DistillConfig) -> dict[str, Any]:
    """Distil as configured and return a summary; see `Distiller.run`."""
    return Distiller(config).run()
