"""Check the documentation: relative links resolve, and every technique has a card in docs/methods.

Usage: python scripts/make_docs.py [ROOT]    (ROOT: the repository, by default the one that holds this script)

Prints one line a fault and exits 1 if there is any. A technique has its card when a file in docs/methods shows it as
``spfde.Name``, which is how a reader would find it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

_FENCE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(
    r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\s*\[[^\]]+\]:\s*(\S+)|<(?:img|a)\b[^>]*(?:src|href)=\"([^\"]+)\"", re.M
)
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*\s*$", re.MULTILINE)
_ELSEWHERE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//)", re.IGNORECASE)


def documents(root: Path) -> list[Path]:
    """README, CONTRIBUTING, CHANGELOG and everything in docs/ that is Markdown."""
    top = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [path for path in top if path.is_file()] + sorted((root / "docs").rglob("*.md"))


def anchors(text: str) -> set[str]:
    """The fragments that headings offer, by the usual rule: lower case, no punctuation, hyphens for spaces."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        name, repeats = slug, 0
        while name in found:  # the second heading of the same words is numbered
            repeats += 1
            name = f"{slug}-{repeats}"
        found.add(name)
    return found


def links(text: str) -> Iterator[str]:
    """Targets of links and pictures, code left out."""
    for match in _LINK.finditer(_CODE.sub("", _FENCE.sub("", text))):
        yield next(group for group in match.groups() if group)


def broken_links(path: Path, root: Path) -> Iterator[str]:
    """One sentence for each relative link of one document that leads nowhere."""
    for link in links(path.read_text(encoding="utf-8")):
        if _ELSEWHERE.match(link):
            continue
        name, _, fragment = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        where = f"{path.relative_to(root)}: link '{link}'"
        if not target.is_relative_to(root.resolve()) and target != path:
            yield f"{where} leaves the repository"
        elif not target.exists():
            yield f"{where} leads to no file"
        elif fragment and target.suffix == ".md" and fragment not in anchors(target.read_text(encoding="utf-8")):
            yield f"{where}: {target.name} has no such heading"


def without_card(techniques: Iterable[str], root: Path) -> list[str]:
    """The techniques that no file in docs/methods shows as ``spfde.Name``."""
    cards = "\n".join(path.read_text(encoding="utf-8") for path in sorted((root / "docs" / "methods").glob("*.md")))
    return [name for name in techniques if not re.search(rf"\bspfde\.{name}\b", cards)]


def technique_names() -> list[str]:
    """The techniques that ``import spfde`` offers."""
    import spfde
    from spfde.core.technique import Technique

    public = ((name, getattr(spfde, name)) for name in spfde.__all__)
    return [name for name, value in public if isinstance(value, type) and issubclass(value, Technique)]


def main(arguments: list[str]) -> int:
    root = Path(arguments[0] if arguments else Path(__file__).parent.parent).resolve()
    pages = documents(root)
    techniques = technique_names()
    faults = [fault for page in pages for fault in broken_links(page, root)]
    faults += [f"docs/methods: no card shows spfde.{name}" for name in without_card(techniques, root)]
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{len(pages)} documents, {len(techniques)} techniques: links resolve, every technique has its card.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
