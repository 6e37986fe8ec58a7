"""Files written so that a crash, or a full disk, never leaves half a one in the place of a whole one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import WriteError, reason


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _default_mode(folder: Path) -> int:
    """Return the permissions of new files by the umask; those that safetensors creates are their owner's alone."""
    probe = folder / f".mode.{os.getpid()}.tmp"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there replaces it, whole, if the block ends well.

    The temporary path ends in `suffix`, for writers that go by it.

    The file is on the disk then, with the permissions of the umask. If the block raises, the temporary file is gone and
    `path` is as it was.

    Raises:
        WriteError: the disk is full or not writable.
    """
    # Named by the process: several may write files into one folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{suffix}")
    try:
        mode = _default_mode(path.parent)
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {path}: {reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give a new folder beside `path`, which need not exist; as `replacing`, for folders without subfolders.

    Raises:
        WriteError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        mode = _default_mode(temporary)
        yield temporary
        for file in temporary.iterdir():
            file.chmod(mode)
            _sync(file)
        _sync(temporary)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"cannot write {path}: {reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(path: Path, names: Collection[str]) -> None:
    """Refuse a folder that is to be replaced and holds something else than what a command writes there.

    Args:
        path: the folder, which need not exist.
        names: of the files that are written there.

    Raises:
        ValueError: it is a file, or holds other files.
    """
    if not path.name or path.is_file():
        raise ValueError(f"out must name a folder, got {str(path)!r}")
    others = sorted({entry.name for entry in path.iterdir()} - set(names)) if path.is_dir() else []
    if others:
        raise ValueError(f"out must not lose files: {str(path)!r} would be replaced and holds {others[0]}")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        WriteError: the disk is full or not writable.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, whole or not at all, creating its folder if there is none.

    Raises:
        WriteError: the disk is full or not writable.
    """
    make_folder(path.parent)
    write_text(path, json.dumps(values, indent=1) + "\n")


def make_folder(path: Path) -> None:
    """Create a folder with its parents; it may exist.

    Raises:
        WriteError: it cannot be created.
        ValueError: something else has its name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"out must name a folder, got the file {str(path)!r}") from None
    except OSError as error:
        raise WriteError(f"cannot create the folder {path}: {reason(error)}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder while the main process writes there, so that no other run does; create it if there is none.

    The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        ValueError: another process holds it; the message names it.
        WriteError: the folder cannot be created.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    make_folder(folder)
    owner = folder / ".owner"
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        name = owner.read_text(encoding="utf-8").strip() if owner.is_file() else "another process"
        raise ValueError(f"{folder} is being written by {name}; wait for it, or give another folder as `out`") from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        write_text(owner, f"process {os.getpid()} on {platform.node()}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; marked as torch's, which diffusers asks for.

    Raises:
        WriteError: the disk is full or not writable.
    """
    with replacing(path) as temporary:
        store_tensors(temporary, tensors, metadata)


def store_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in a folder that is replaced as a whole; as `write_tensors`."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, {"format": "pt", **(metadata or {})})


def _way_on(path: Path) -> str:
    """Return what to do about a file of a run that is damaged or missing (see `checkpoints`); "" of other files."""
    folder = path.parent
    if re.fullmatch(r"step-\d{8,}", folder.name):
        if any(other.name < folder.name for other in folder.parent.glob("step-*")):
            return f"; to go on from an older checkpoint, name it in {folder.parent / 'index.json'}"
        return f"; there is no older checkpoint: remove {folder.parent} to begin again"
    if path.name == "index.json" and any(folder.glob("step-*")):
        return "; remove it, and the newest checkpoint beside it counts"
    return ""


def damaged(path: Path, why: str) -> ValueError:
    """Return what to raise of a file that does not hold what it should; of a run's file with the way on."""
    return ValueError(f"{path} is damaged: {why}{_way_on(path)}")


def missing(path: Path) -> FileNotFoundError:
    """Return what to raise of a file that is not there; of a run's file with the way on."""
    return FileNotFoundError(f"no {path.name} in {str(path.parent)!r}{_way_on(path)}")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is none; ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, reason(error)) from None


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: there is none; ValueError: it is damaged.
    """
    if not path.is_file():
        raise missing(path)
    try:
        return load_file(path, device=device)
    except SafetensorError as error:
        raise damaged(path, reason(error)) from None


def check_record(path: Path, settings: Mapping[str, Any], free: Collection[str] = (), option: str = "out") -> None:
    """Compare the settings that a folder's results were made with, as its record has them, with those of now.

    Args:
        path: the record, a JSON file; a folder without one holds nothing yet.
        settings: plain JSON values that the results depend on.
        free: settings that may differ.
        option: that names the folder.

    Raises:
        ValueError: one differs; the message names the first.
    """
    if not path.is_file():
        return
    before = read_json(path)
    if not isinstance(before, dict):
        raise damaged(path, "it holds no settings")
    for key, value in settings.items():
        if key not in free and before.get(key) != value:
            raise ValueError(
                f"{path.parent} holds results of other settings: {key} was {before.get(key)!r}, is {value!r}; "
                f"give another folder as `{option}`"
            )
