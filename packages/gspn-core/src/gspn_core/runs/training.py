"""What training loops are made of: device and precision, learning rate, averaged weights, what an update reports."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .errors import NonFiniteLossError, StoppedError
from .options import LRSchedule as LRSchedule

# What may differ between a run and its continuation. More steps extend it. Data may have been moved: their content is
# compared as a fact of the run. batch_size, accumulate, device and compile are what a change of
# machine needs: an update has the same items as before, but other roundings and, by other micro-batches, other random
# numbers. The rest leaves the weights as they are.
FREE_TO_CHANGE = frozenset(
    {"out", "resume", "workers", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard", "trackers"}
    | {"progress", "batch_size", "accumulate", "device", "compile", "tf32", "steps", "data", "unreadable"}
)


def use_cpu(device: str) -> bool:
    """Tell whether "auto" or "cpu" means the CPU, as accelerate has to be told: otherwise it takes each of several
    processes without an accelerator for the only one.
    """
    return device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def device_of(device: str) -> torch.device:
    """Return the device that "auto" or "cpu" means."""
    accelerator = None if use_cpu(device) else torch.accelerator.current_accelerator()
    return accelerator or torch.device("cpu")


def loader_workers(workers: int) -> int:
    """Return how many processes load data: those asked for, but no more than cores, beyond which torch warns."""
    return min(workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def leave_signals(_: int) -> None:
    """Let a process that loads data ignore Ctrl-C, and SIGTERM unless the main one sends it, as it does at its exit.

    They often go to all processes of a job. Otherwise each would print a traceback, and a loader that finds its process
    killed raises an error in the midst of an update, before the run could save. Where a process cannot learn who sent
    a signal (macOS), any SIGTERM ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_exit_at_sigterm_of, args=[os.getppid()], daemon=True).start()


def _exit_at_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)  # with any other status the loader would take it for a failure


def make_accelerator(device: str, precision: str = "fp32", accumulate: int = 1, *, tf32: bool = False) -> Accelerator:
    """Make the Accelerator of options `device`, `precision`, `accumulate` and `tf32`.

    Raises:
        ValueError: the device does not compute in this precision, or accelerate was told to shard the model.
    """
    on_cpu = use_cpu(device)
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if parse_flag_from_env(variable):
            raise ValueError(f"{variable} must not be set: several processes train with DistributedDataParallel alone")
    if precision == "fp16" and on_cpu:
        raise ValueError("precision must be fp32 or bf16 on the CPU, got fp16")
    if tf32:
        torch.set_float32_matmul_precision("high")
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=accumulate,
    )


def check_same_run(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = FREE_TO_CHANGE
) -> None:
    """Compare what a run depends on with what it was begun with.

    Args:
        folder: of the run.
        before: options and facts of the data, by name, as a checkpoint has them.
        now: the same of this call.
        free: what may differ.

    Raises:
        ValueError: one differs; the message names the first.
    """
    unknown = [key for key in before if key not in now and key not in free]
    if unknown:
        raise ValueError(
            f"{folder} holds a run of another command or version, which had {unknown[0]}; give another folder as `out`"
        )
    for key, value in before.items():
        if key not in free and now.get(key) != value:
            raise ValueError(
                f"{key} must be {value!r} to continue the run in {folder}, got {now.get(key)!r}; "
                "give another folder as `out` for a new run"
            )


def check_steps(folder: Path, done: int, steps: int, name: str = "steps") -> None:
    """Refuse to continue a run to fewer steps than it has done.

    Raises:
        ValueError: it has done more.
    """
    if steps < done:
        raise ValueError(f"{name} must be at least the {done} updates that the run in {folder} has done, got {steps}")


_ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Termination:
    """Takes note of Ctrl-C, and of SIGTERM, as of a cluster that needs the machine, so that a run can save and end.

    It handles the signals within its `with` block, in the main thread; the second one ends the process at once.

    Args:
        accelerator: of the run; all processes agree, at every tenth update where there are several.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._signal: signal.Signals | None = None

    def __enter__(self) -> Termination:
        self._handled = threading.current_thread() is threading.main_thread()
        if self._handled:
            self._before = {number: signal.signal(number, self._note) for number in _ENDINGS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items() if self._handled else ():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self._signal = signal.Signals(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGINT and self.accelerator.is_main_process:
            # Not by print: the signal may have come while it was printing.
            when = (
                "after this update, which is"
                if self.accelerator.num_processes == 1
                else "within ten updates, which are"
            )
            os.write(2, f"\nends {when} saved; Ctrl-C again ends at once\n".encode())

    def asked(self, step: int) -> bool:
        """Tell, after `step` updates, whether to save and end; every process calls it."""
        if self.accelerator.num_processes == 1:
            return self._signal is not None
        if step % 10:
            return False
        if self._signal is not None:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def error(self, step: int) -> StoppedError:
        """Return what to raise when the run has saved, after `step` updates."""
        number = self._signal or signal.SIGTERM  # another process was asked
        return StoppedError(f"{_ENDINGS[number]} after {step} updates, which are saved", 128 + number)


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of every update: linear warm-up, then from `lr` down to `min_lr`.

    Args:
        lr: at the end of the warm-up.
        min_lr: at the end.
        schedule: its course after the warm-up.
        steps: updates of the run.
        warmup_steps: updates of the warm-up, of which the first is at lr / warmup_steps.
        first: the update it begins at, of a run in stages.
    """

    lr: float
    min_lr: float
    schedule: LRSchedule
    steps: int
    warmup_steps: int
    first: int = 0

    def at(self, step: int) -> float:
        """Return the learning rate of the update after `step` others."""
        step -= self.first
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        share = {
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "linear": 1 - done,
            "constant": 1.0,
            "poly": math.sqrt(1 - done),  # as timm's, with its power of 0.5
            "tanh": (1 - math.tanh(10 * done - 7)) / 2,  # as timm's, from -7 to 3
        }[self.schedule]
        return self.min_lr + (self.lr - self.min_lr) * share

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Give it to an optimizer, times the `lr_scale` of each group that has one, as of timm's layer decay."""
        for group in optimizer.param_groups:
            group["lr"] = self.at(step) * group.get("lr_scale", 1.0)


def averaged(model: nn.Module, decay: float, *, warmup: bool) -> AveragedModel:
    """Make an exponential moving average of a model's parameters and buffers, in its `module`.

    average <- d average + (1 - d) weights; d is `decay`, and with a warm-up at most (1 + n) / (10 + n) after n updates,
    as diffusers has it, so that a short run is not averaged with the weights it began with.

    `update_parameters(model)` takes an update in; `n_averaged` counts them and has to be restored with the weights.
    """

    def average(means: Any, values: Any, count: Tensor | int) -> None:
        rate = min(decay, (1 + int(count)) / (10 + int(count))) if warmup else decay
        if means[0].is_floating_point():
            torch._foreach_lerp_(means, values, 1 - rate)
        else:  # counters of batches
            for mean, value in zip(means, values, strict=True):
                mean.copy_(value)

    mean = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    mean.n_averaged.fill_(1)  # the weights it begins with; at 0 the first update would replace them
    mean.requires_grad_(False).eval()
    return mean


class Meter:
    """What updates report, kept on the device until a row of the log is due, so that no update waits for the CPU.

    Args:
        accelerator: of the run.
        names: of what an update reports; the first is its loss.
        items_per_update: images, for the speed.
        pending: rows that a checkpoint kept, of updates that no row of the log has yet.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        names: Sequence[str],
        items_per_update: int,
        pending: Sequence[Sequence[float]] = (),
    ) -> None:
        self.accelerator, self.names, self.items_per_update = accelerator, list(names), items_per_update
        self._rows = [torch.tensor(row, device=accelerator.device) for row in pending]
        self.loss: float | None = None  # of the last update that was moved off the device
        self.restart()

    def restart(self) -> None:
        """Begin to measure the speed anew, as after validation."""
        self._count, self._since = 0, time.perf_counter()

    def add(self, row: Tensor) -> None:
        """Take in what an update reports, (len(names),), on the device."""
        self._rows.append(row.detach())
        self._count += 1

    @property
    def images_per_second(self) -> float:
        """Since the last restart."""
        return round(self._count * self.items_per_update / max(1e-9, time.perf_counter() - self._since), 1)

    def collect(self, step: int, lr: LearningRate, last_good: Path | None) -> list[list[float]]:
        """Return the rows, means over the processes, and refuse losses that are not finite; every process calls it.

        Args:
            step: updates so far.
            lr: for the message.
            last_good: the newest checkpoint, for the message.

        Raises:
            NonFiniteLossError: one is infinite or not a number.
        """
        if not self._rows:
            return []
        mean: Any = self.accelerator.reduce(torch.stack(self._rows), "mean")
        rows: list[list[float]] = mean.tolist()
        for number, row in enumerate(rows, step - len(rows) + 1):
            if not math.isfinite(row[0]):
                raise NonFiniteLossError(
                    f"the loss is {row[0]} at step {number} with learning rate {lr.at(number - 1):.3g}; "
                    f"last good checkpoint: {last_good or 'none'}"
                )
        self.loss = rows[-1][0]
        return rows

    def take(self, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """Return the means of collected rows by name, and forget the rows."""
        self._rows = []
        return {name: sum(column) / len(rows) for name, column in zip(self.names, zip(*rows, strict=True), strict=True)}
