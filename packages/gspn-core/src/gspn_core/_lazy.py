"""Packages that import torch, timm or diffusers on first use, so that `--help` of a command answers at once."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def lazy_attributes(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package whose names are imported on first use (PEP 562).

    Args:
        package: its name.
        homes: the submodule of each name; a name may be a submodule itself.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{homes[name]}")
        value = module if homes[name] == name else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    return load


def when_imported(library: str, module: str) -> None:
    """Import `module`, which registers something with `library`, as soon as the latter has been imported.

    That is now if it has been, and otherwise right after: so what is registered does not depend on whether a program
    imports our package before the library or after it.
    """
    if library in sys.modules:
        importlib.import_module(module)
    else:
        sys.meta_path.insert(0, _Finder(library, module))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, library: str, module: str) -> None:
        self.library, self.module, self._searching = library, module, False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != self.library or self._searching:
            return None
        self._searching = True  # the other finders look for it
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        importlib.import_module(self.finder.module)
