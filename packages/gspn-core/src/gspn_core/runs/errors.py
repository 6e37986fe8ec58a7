"""Errors of work that failed although the call was right: exit status 1. What a user can mend is a ValueError: 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class NonFiniteLossError(ArithmeticError):
    """The loss, or a weight, became infinite or not a number."""


class StoppedError(KeyboardInterrupt):
    """The process was asked to end, by Ctrl-C or SIGTERM, and has saved its work.

    Args:
        message: what was done and saved.
        status: exit status: 128 and the number of the signal.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def reason(error: BaseException) -> str:
    """Return the first line of an error, or its type if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class WriteError(OSError):
    """A file cannot be written: the disk is full, or the folder is not writable."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory was not enough, on an accelerator or on the CPU."""
    # torch raises a RuntimeError on the CPU, and a class derived from it on accelerators.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (
            type(error).__name__ == "OutOfMemoryError"
            or any(text in str(error) for text in ("can't allocate memory", "DefaultCPUAllocator: not enough memory"))
        )
    )


def is_unreachable(error: BaseException) -> bool:
    """Tell whether an error is of an HTTP library, such as huggingface_hub's: most are derived from Exception alone."""
    library = type(error).__module__.partition(".")[0]
    return library in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


@contextmanager
def explaining_memory(savers: Mapping[str, bool], otherwise: str = "a smaller image_size") -> Iterator[None]:
    """Turn running out of memory into a MemoryError that says what saves some.

    Args:
        savers: options with values that save memory, such as "--batch-size 1", and whether each would change anything.
        otherwise: what is left to try when none would.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = ", ".join(name for name, useful in savers.items() if useful) or otherwise
        raise MemoryError(f"out of memory; what saves some: {advice} ({str(error).partition(chr(10))[0]})") from error
