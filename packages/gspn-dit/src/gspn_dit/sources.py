"""Where `evaluate` takes images from: folders, ADM's .npz files, and scikit-learn's digits."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy
from torch import Tensor

from gspn_core.runs.errors import reason
from gspn_core.runs.images import find_images, read_image

from .extractors import Batches
from .images import open_images
from .metrics import Moments

SUFFIXES = (".png", ".jpg", ".jpeg")
FEATURES = {"fid": 2048, "sfid": 2023}  # of Inception


class TensorImages:
    """Images in memory, uint8 (N, C, H, W)."""

    def __init__(self, images_NCHW: Tensor) -> None:
        self.images_NCHW = images_NCHW

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def chunks(self, start: int, stop: int, size: int) -> Iterator[Tensor]:
        """Yield images start to stop, at most `size` at a time, as uint8 (n, C, H, W)."""
        yield from self.images_NCHW[start:stop].split(size)


@contextmanager
def _open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an .npz; damage found on opening or reading is a ValueError that names the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: is no .npz, or a damaged one ({reason(error)})") from error


class NpzImages:
    """The member `arr_0` of an .npz, read piece by piece.

    Raises:
        ValueError: the file is damaged, has no such member, or it does not hold images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _open_npz(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise ValueError(f"{path}: must hold arr_0, got {_keys(archive)}")
            with archive.open("arr_0.npy") as member:
                version = npy.read_magic(member)
                read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, fortran, dtype = read_header(member)
                self._offset = member.tell()
        if dtype != np.uint8 or fortran or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)) or 0 in shape:
            raise ValueError(
                f"{path}: arr_0 must be uint8 (N, H, W, 1 or 3) or (N, H, W) in C order, "
                f"got {dtype} {shape} in {'Fortran' if fortran else 'C'} order"
            )
        self.shape_NHWC = shape if len(shape) == 4 else (*shape, 1)

    def __len__(self) -> int:
        return self.shape_NHWC[0]

    def chunks(self, start: int, stop: int, size: int) -> Iterator[Tensor]:
        """Yield images start to stop, at most `size` at a time, as uint8 (n, C, H, W)."""
        shape_HWC = self.shape_NHWC[1:]
        length = math.prod(shape_HWC)
        with _open_npz(self.path) as archive, archive.open("arr_0.npy") as member:
            member.seek(self._offset + start * length)
            for first in range(start, stop, size):
                count = min(size, stop - first)
                data = member.read(count * length)
                if len(data) < count * length:
                    raise ValueError(f"{self.path}: arr_0 ends before image {first + count} of {len(self)}")
                images_NHWC = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, *shape_HWC)
                yield images_NHWC.permute(0, 3, 1, 2).contiguous()


class FolderImages:
    """The PNG and JPEG files below a folder, sorted by path, in colour.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.files = find_images(folder, SUFFIXES)
        if not self.files:
            raise ValueError(f"{folder}: must hold PNG or JPEG files, got none")
        self._shape = self._read(self.files[0]).shape

    def __len__(self) -> int:
        return len(self.files)

    def chunks(self, start: int, stop: int, size: int) -> Iterator[Tensor]:
        """Yield images start to stop, at most `size` at a time, as uint8 (n, 3, H, W)."""
        with ThreadPoolExecutor() as pool:
            for first in range(start, stop, size):
                images_HWC = list(pool.map(self._read_one, self.files[first : min(first + size, stop)]))
                yield torch.from_numpy(np.stack(images_HWC)).permute(0, 3, 1, 2).contiguous()

    def _read_one(self, file: Path) -> npt.NDArray[np.uint8]:
        image_HWC = self._read(file)
        if image_HWC.shape != self._shape:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (self._shape, image_HWC.shape)]
            raise ValueError(f"{file}: must be {sizes[0]} pixels as {self.files[0].name}, got {sizes[1]}")
        return image_HWC

    @staticmethod
    def _read(file: Path) -> npt.NDArray[np.uint8]:
        return np.array(read_image(file).convert("RGB"))


def open_batches(source: str) -> Batches:
    """Open `digits`, `digits:FIRST:END`, an .npz with `arr_0` or a folder of PNG and JPEG files.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: it holds no images.
    """
    if source.partition(":")[0] == "digits":
        images = open_images("digits")
        first, end = 0, len(images)
        if source != "digits":
            try:
                first, end = map(int, source.split(":")[1:])
            except ValueError:
                first = end
            if not 0 <= first < end <= len(images):
                raise ValueError(f"digits:FIRST:END must be 0 <= FIRST < END <= {len(images)}, got {source}")
        pixels_NHW = np.stack([np.asarray(images[index][0]) for index in range(first, end)])
        return TensorImages(torch.from_numpy(pixels_NHW)[:, None])
    path = Path(source)
    if path.is_dir():
        return FolderImages(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {source}")
    return NpzImages(path)


def open_reference(source: str, *, inception: bool) -> tuple[Batches | None, dict[str, Moments]]:
    """Open references as `open_batches`, and for Inception the statistics that an .npz holds for `fid` and `sfid`.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: there are neither images nor statistics.
    """
    statistics: dict[str, Moments] = {}
    path = Path(source)
    if not inception or not path.is_file():
        return open_batches(source), statistics
    with _open_npz(path) as archive:
        keys = _keys(archive)
        for metric, names in {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}.items():
            if set(names) <= set(keys):
                statistics[metric] = Moments(*(npy.read_array(archive.open(f"{name}.npy")) for name in names))
                _check_statistics(path, statistics[metric], names, FEATURES[metric])
    if statistics and "arr_0" not in keys:
        return None, statistics
    return NpzImages(path), statistics


def _check_statistics(path: Path, found: Moments, names: Sequence[str], features: int) -> None:
    """Refuse statistics of another size or that are not finite, before any features are extracted."""
    for name, values, shape in zip(names, found, ((features,), (features, features)), strict=True):
        if values.shape != shape or not np.issubdtype(values.dtype, np.floating):
            raise ValueError(f"{path}: {name} must be floating-point {shape}, got {values.dtype} {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: {name} must be finite, got NaN or infinity")


def _keys(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist()]
