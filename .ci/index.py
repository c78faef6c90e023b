"""Package indexes for pip, one per CUDA version, that link to the wheels of GitHub's releases.

    python .ci/index.py releases.json site

`releases.json` is what GitHub's API says of the repository's releases (a list, or a list of pages).
Writes site/whl/cpu/snnlstm/index.html, and so for cu12 and cu13, by the wheels' local versions.
"""

from __future__ import annotations

import html
import json
import re
import sys
from pathlib import Path

WHEEL = re.compile(r"snnlstm-[^-+]+\+(cpu|cu\d+)-.*\.whl")


def links(releases: list) -> dict[str, list[str]]:
    """local version -> one link per wheel, with its checksum."""
    found: dict[str, list[str]] = {}
    for release in releases:
        if isinstance(release, list):  # a page
            for variant, more in links(release).items():
                found.setdefault(variant, []).extend(more)
            continue
        for asset in [] if release.get("draft") else release["assets"]:
            name = asset["name"]
            if not (match := WHEEL.fullmatch(name)):
                continue
            url = asset["browser_download_url"]
            if digest := asset.get("digest"):
                url += "#" + digest.replace(":", "=")
            found.setdefault(match[1], []).append(
                f'<a href="{html.escape(url)}">{html.escape(name)}</a><br>'
            )
    return found


def page(body: list[str]) -> str:
    return "\n".join(["<!DOCTYPE html>", *body, ""])


def write(releases: list, site: Path) -> list[str]:
    """Write the indexes; returns their names."""
    found = links(releases)
    for variant, lines in found.items():
        folder = site / "whl" / variant / "snnlstm"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.html").write_text(page(sorted(lines)))
        (folder.parent / "index.html").write_text(page(['<a href="snnlstm/">snnlstm</a>']))
    return sorted(found)


if __name__ == "__main__":
    print(*write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
