"""A worker process that answers requests, is ended when it takes too long, and started anew when it was lost.

Requests and replies are JSON, one object a line. A CUDA error stays with its process: every later call there fails too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = dict[str, Any]


class WorkerLostError(Exception):
    """The worker ended, or was ended because it took too long; `late` tells which."""

    def __init__(self, message: str, *, late: bool) -> None:
        super().__init__(message)
        self.late = late


class Worker:
    """A process of `command`, started by the first request, and by the next one after it was lost."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        self.command, self.env, self.starts = list(command), env, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    @property
    def running(self) -> bool:
        """Tell whether the next request finds a process that has started."""
        return self._process is not None

    def ask(self, request: Message, seconds: float, heard: Callable[[Message], None] = lambda _: None) -> Message:
        """Send a request, pass replies on to `heard`, and return the last one, which has `done`.

        Raises WorkerLostError if there is none within `seconds`, or the worker ends before.
        """
        deadline = time.monotonic() + seconds
        if self._process is None:
            self._buffer, self.starts = b"", self.starts + 1
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, env=self.env, start_new_session=True
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, as the reply will tell
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        while True:
            reply = json.loads(self._line(deadline, seconds))
            if "done" in reply:
                if reply.get("broken"):
                    self.close()
                return dict(reply)
            heard(reply)

    def _line(self, deadline: float, seconds: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    raise WorkerLostError(f"took more than {seconds:.0f} s, and its process was ended", late=True)
                part = os.read(self._process.stdout.fileno(), 65536)
                if not part:
                    status = self.close()
                    how = (
                        f"by signal {-status} ({signal.Signals(-status).name})"
                        if status < 0
                        else f"with status {status}"
                    )
                    raise WorkerLostError(f"its process ended {how}", late=False)
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def close(self) -> int:
        """End the process and those it has started; return its exit status, 0 if there is none."""
        process, self._process = self._process, None
        return 0 if process is None else end(process)


def end(process: subprocess.Popen[bytes], *, first: signal.Signals = signal.SIGTERM, grace: float = 1.0) -> int:
    """End a process and its group, unless it ends by itself: by `first`, then after `grace` seconds by SIGKILL.

    Waits for 2 s more at most, since a driver may hang. Returns the exit status.
    """
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    for sent, patience in ((None, 0.5), (first, grace), (signal.SIGKILL, 2.0)):
        if sent is not None:
            _signal_group(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    _signal_group(process.pid, signal.SIGKILL)  # those it has started
    return -signal.SIGKILL if process.returncode is None else process.returncode


def _signal_group(group: int, sent: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, sent)


def serve(answer: Callable[[Message, Callable[[Message], None]], Message]) -> int:
    """Answer requests of the parent until it ends: `answer` gets a request and what sends replies before the last."""
    with contextlib.suppress(OSError, AttributeError):  # Linux: end with the parent, even in the middle of a kernel
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends this process
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply

    def send(message: Message) -> None:
        print(json.dumps(message), file=channel, flush=True)

    for line in sys.stdin:
        reply = answer(json.loads(line), send) | {"done": True}
        send(reply)
        if reply.get("broken"):
            break
    return 0
