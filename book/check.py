"""Check the built site: links arrive, pictures are described, and nothing is loaded from elsewhere."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
SHARED = ("_static", "_sources")  # loaded once for the whole site, so not counted as a page's weight
HEAVIEST_PAGE = 1_500_000  # bytes of a page and its own pictures and scripts

LOADING = {"src", "srcset", "poster"}  # attributes by which an element makes the browser load something
RELATED = {"author", "canonical", "index", "license", "next", "prev", "search"}  # links to pages, not to assets
CSS_ADDRESS = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")


class Page(HTMLParser):
    """What one page offers (ids), what it leads to (links) and what it loads (assets)."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.undescribed: list[str] = []
        self.css = ""
        self.size = path.stat().st_size
        self.in_style = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.ids.update(given[name] for name in ("id", "name") if name in given)
        self.css += given.get("style", "")
        self.in_style = tag == "style"
        if tag in ("a", "area") and "href" in given:
            self.links.append(given["href"])
        elif tag == "meta" and given.get("http-equiv", "").lower() == "refresh":
            self.links.append(given["content"].partition("url=")[2])
        elif tag == "link" and not RELATED & set(given.get("rel", "").split()):
            self.assets.append(given["href"])
        for name in LOADING & set(given):
            candidates = given[name].split(", ") if name == "srcset" else [given[name]]
            self.assets += [candidate.split()[0] for candidate in candidates if candidate.strip()]
        if tag == "img" and not given.get("alt", "").strip():
            self.undescribed.append(given.get("src", "")[:80])

    def handle_endtag(self, tag: str) -> None:
        self.in_style = False

    def handle_data(self, data: str) -> None:
        if self.in_style:
            self.css += data


def faults(site: Path, contents: list[str]) -> Iterator[str]:
    """One line a fault; `contents` are the documents that must have a page."""
    files = {path.relative_to(site).as_posix(): path for path in site.rglob("*") if path.is_file()}
    pages = {name: Page(path) for name, path in files.items() if name.endswith(".html") and not name.startswith(SHARED)}
    for document in contents:
        if f"{document}.html" not in pages:
            yield f"{document}: in the table of contents, but it has no page"
    for name, page in pages.items():
        for link in page.links:
            yield from link_faults(name, link, pages, files)
        for source in page.undescribed:
            yield f"{name}: picture without alt text: {source}"
        weight = page.size
        for address in {*page.assets, *addresses_in(page.css)}:
            if is_elsewhere(address):
                yield f"{name}: loads {address} from elsewhere"
            elif target := local_target(name, address):
                if target not in files:
                    yield f"{name}: loads {address}, which does not exist"
                elif not target.startswith(SHARED):
                    weight += files[target].stat().st_size
        if weight > HEAVIEST_PAGE:
            yield f"{name}: weighs {weight / 1e6:.2f} MB, more than {HEAVIEST_PAGE / 1e6} MB"
    for name, path in files.items():
        if name.endswith(".css"):
            for address in addresses_in(path.read_text(encoding="utf-8")):
                if is_elsewhere(address):
                    yield f"{name}: loads {address} from elsewhere"


def link_faults(name: str, link: str, pages: dict[str, Page], files: dict[str, Path]) -> Iterator[str]:
    if is_elsewhere(link) or urlsplit(link).scheme:
        return
    target = local_target(name, link) or name
    anchor = unquote(urlsplit(link).fragment)
    if target not in files:
        yield f"{name}: link to {link}, which does not exist"
    elif "=" in anchor:
        return  # settings that a page's own script reads (the explorer's), not a place in it
    elif anchor and target in pages and anchor not in pages[target].ids:
        yield f"{name}: link to {link}, but {target} has no such anchor"


def addresses_in(css: str) -> list[str]:
    return [address or imported for address, imported in CSS_ADDRESS.findall(css)]


def is_elsewhere(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def local_target(name: str, address: str) -> str:
    """The file meant by an address on page `name`; empty for the page itself and for data in the address."""
    parts = urlsplit(address)
    if parts.scheme or not parts.path:
        return ""
    target = os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path)))
    return target if not parts.path.endswith("/") else f"{target}/index.html"


def table_of_contents(path: Path) -> list[str]:
    """The documents named in _toc.yml, at any depth."""

    def documents(node: object) -> Iterator[str]:
        if isinstance(node, list):
            for entry in node:
                yield from documents(entry)
        elif isinstance(node, dict):
            yield from (node[key] for key in ("root", "file") if key in node)
            for value in node.values():
                yield from documents(value)

    return list(documents(yaml.safe_load(path.read_text(encoding="utf-8"))))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", nargs="?", type=Path, default=SITE)
    parser.add_argument("--contents", type=Path, default=ROOT / "_toc.yml")
    arguments = parser.parse_args(argv)
    found = list(faults(arguments.site, table_of_contents(arguments.contents)))
    for fault in found:
        print(f"check: {fault}", file=sys.stderr)
    print(f"check: {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
