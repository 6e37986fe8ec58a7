"""Check that the built documentation loads nothing from a network and that its pages find what they load.

    python tools/check_site.py FOLDER               check, exit status 1 with a line per fault

Links that a reader follows may lead anywhere; what a browser loads by itself (scripts, styles, images) may not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that make a browser load something; of <link>, if its rel is one of these.
_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
_RELATIONS = frozenset(("stylesheet", "icon", "preload", "preconnect", "dns-prefetch", "modulepreload", "manifest"))
_STYLE_LOADS = re.compile(r"""(?:url\(|@import\s+)\s*["']?((?:https?:)?//[^"')\s]+)""")


class _Loads(HTMLParser):
    """Collects what a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the address that a tag loads."""
        values = dict(attrs)
        address = values.get(_LOADS.get(tag, ""))
        if tag == "link" and not _RELATIONS & set((values.get("rel") or "").split()):
            return
        if address:
            self.found.append(address)


def faults(site: Path) -> Iterator[str]:
    """Yield a line for each thing that is wrong."""
    pages = sorted(site.rglob("*.html"))
    if not pages:
        yield f"{site} has no pages"
    for page in pages:
        loads = _Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        for address in loads.found:
            parts = urlsplit(address)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                yield f"{page.relative_to(site)} loads {address}"
                continue
            path = unquote(parts.path)
            target = site / path.lstrip("/") if path.startswith("/") else page.parent / path
            if not target.is_file():
                yield f"{page.relative_to(site)} loads {address}, which is not there"
    for style in sorted(site.rglob("*.css")):
        for address in _STYLE_LOADS.findall(style.read_text(encoding="utf-8")):
            yield f"{style.relative_to(site)} loads {address}"


def main() -> int:
    """Print the faults; return 1 if there are any."""
    found = list(faults(Path(sys.argv[1])))
    print("\n".join(found) or "the pages load nothing from a network")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
