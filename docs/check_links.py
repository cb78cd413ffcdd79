"""Looks up every inside link of a built site, anchors and pictures too: ``python docs/check_links.py build/docs``.

It reads the HTML that visitors get, so it also sees what no builder has checked: the theme's links, links within
included files, and pictures. Links to other sites are left alone.
"""

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Page(HTMLParser):
    """What one page offers as a target and what it links to."""

    targets: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Starts the parser."""
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser for each element."""
        values = {name: value for name, value in attrs if value is not None}
        self.targets |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for name in ("href", "src") if name in values]


def read(path: Path) -> Page:
    """The targets and links of an HTML file."""
    page = Page()
    page.feed(path.read_text())
    return page


def broken_links(site: Path) -> list[str]:
    """One line for each link of the site that leads to no file, or to an anchor that its file does not have.

    Raises:
        FileNotFoundError: there is no page.
    """
    pages = {path: read(path) for path in sorted(site.resolve().rglob("*.html"))}
    if not pages:
        raise FileNotFoundError(f"found no page in {site}, expected a built site: run `make docs`")
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.exists():
                broken.append(f"{path.relative_to(site.resolve())}: {link}: no such file")
            elif anchor and target in pages and anchor not in pages[target].targets:
                broken.append(f"{path.relative_to(site.resolve())}: {link}: no such anchor")
    return broken


if __name__ == "__main__":
    found = broken_links(Path(sys.argv[1]))
    sys.exit("\n".join([*found, f"{len(found)} broken links"]) if found else 0)
