"""Looks for dead links in built pages: `python tools/dead_links.py out/docs`, part of `make docs`.

A link is dead if its file is missing, or if its page has no such anchor. Links to other sites are
not followed. Sphinx checks the links of the sources, but not those that it writes itself, such as
the links of `_modules`.
"""

import html
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit


def dead_links(folder: Path) -> list[str]:
    """Returns a line for each dead link of the pages in the folder, with the page."""
    texts = {page: page.read_text() for page in sorted(folder.resolve().rglob("*.html"))}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in texts.items()}
    dead = []
    for page, text in texts.items():
        for link in dict.fromkeys(re.findall(r'\b(?:href|src)="([^"]+)"', text)):
            to = urlsplit(html.unescape(link))
            if to.scheme or to.netloc:
                continue
            file = (page.parent / unquote(to.path)).resolve() if to.path else page
            anchor = unquote(to.fragment)
            if not file.exists() or (anchor and anchor not in anchors.get(file, {anchor})):
                dead.append(f"{page.relative_to(folder.resolve())}: {link}")
    return dead


if __name__ == "__main__":
    dead = dead_links(Path(sys.argv[1]))
    sys.exit("\n".join(["Dead links:", *dead]) if dead else 0)
