"""The size of an image, as options, files and records write it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class ImageSize:
    """Height and width in pixels, written 224 (a square) or 512x768 (height x width)."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    @classmethod
    def parse(cls, value: Any) -> ImageSize:
        """Read 224, "224", "512x768" or [512, 768].

        Raises:
            ValueError: it is something else.
        """
        sides = value
        if isinstance(value, str):
            sides = value.lower().split("x")
        elif isinstance(value, int):
            sides = (value,)
        try:
            numbers = [int(str(side)) for side in sides]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) not in (1, 2) or min(numbers) < 1 or isinstance(value, bool):
            raise ValueError(f"expected a side in pixels or HEIGHTxWIDTH, such as 224 or 512x768, got {value!r}")
        return cls(numbers[0], numbers[-1])

    def __iter__(self) -> Iterator[int]:
        return iter((self.height, self.width))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageSize) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"{self.height}x{self.width}"
