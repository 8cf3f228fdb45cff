"""What MkDocs needs beside mkdocs.yml: pages from outside docs/, the reference, and the checks of what is public.

MkDocs calls the functions named ``on_…``, and with ``--strict`` any warning of theirs ends the build. Links are written
as they work in the repository; a file that lies outside docs/ and is linked to becomes a page, and the link follows.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    import griffe
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("errors", "presets", "sparsity", "freezing", "sieving", "cost", "analysis", "export")
"""Modules with public names beside those of ``spfde`` itself."""
INTRODUCTION = """Made from the docstrings. Every name below is public; what is not here may change.

The examples run in the tests. They take for granted that `torch` and `spfde` are imported, and that there are a `model`
(an MLP of four linear layers), its `optimizer` (SGD with momentum) and a `loader` (20 samples, in batches of 8)."""

_CODE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\(\s*<?|^\s*\[[^\]]+\]:\s*|<(?:img|a)\b[^>]*(?:src|href)=\")([^)\s>\"]+)", re.MULTILINE)
_ELSEWHERE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//|#)", re.IGNORECASE)
_log = logging.getLogger("mkdocs.hooks.make_docs")


# --- links ------------------------------------------------------------------------------------------------------------


def site_path(path: str) -> str:
    """Where a file of the repository is in the site's sources: what is no page of its own becomes one."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith(".md") else f"{path}.md"


def repository_path(path: str) -> str:
    """The file of the repository that a page of the site is made from."""
    if path == "index.md":
        return "README.md"
    return f"docs/{path}" if (ROOT / "docs" / path).is_file() else path


def link_targets(text: str, page: str) -> Iterator[tuple[re.Match[str], str, str]]:
    """Each link of a document to a file of the repository: the match, the file's path, and the ``#`` part."""
    code = [match.span() for match in _CODE.finditer(text)]
    for match in _LINK.finditer(text):
        if _ELSEWHERE.match(match[2]) or any(start <= match.start(2) < end for start, end in code):
            continue
        name, sharp, fragment = unquote(match[2]).partition("#")
        yield match, posixpath.normpath(posixpath.join(posixpath.dirname(page), name)), sharp + fragment


def with_site_links(text: str, page: str) -> str:
    """A document of the repository with its links as they are in the site."""
    parts, done = [], 0
    for match, target, fragment in link_targets(text, page):
        here = posixpath.dirname(site_path(page))
        parts += [text[done : match.start(2)], posixpath.relpath(site_path(target), here or ".") + fragment]
        done = match.end(2)
    return "".join(parts) + text[done:]


def linked_files(pages: Iterable[str]) -> set[str]:
    """Files outside docs/ that these documents link to, and those that the linked documents link to in turn."""
    found: set[str] = set()
    waiting = list(pages)
    while waiting:
        page = waiting.pop()
        for _, target, _ in link_targets((ROOT / page).read_text(encoding="utf-8"), page):
            if target not in found and not target.startswith(("docs/", "../")) and (ROOT / target).is_file():
                found.add(target)
                waiting += [target] if target.endswith(".md") else []
    return found


def as_page(path: str) -> str:
    """A file of the repository as Markdown: what is none is shown as it is."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = {".py": "python", ".cff": "yaml"}.get(Path(path).suffix, "text")
    return f"# {Path(path).name}\n\n```{language}\n{text.rstrip()}\n```\n"


# --- the reference ----------------------------------------------------------------------------------------------------


@cache
def package() -> griffe.Module:
    """The package as its source says, with its docstrings."""
    import griffe

    extensions = griffe.load_extensions("griffe_pydantic", ROOT / "scripts" / "docs_griffe.py")
    loader = griffe.GriffeLoader(search_paths=[ROOT / "src"], extensions=extensions)
    loaded = loader.load("spfde")
    loader.resolve_aliases(implicit=True)
    assert isinstance(loaded, griffe.Module)
    return loaded


def public_names() -> dict[str, str]:
    """Each public name once, by the shortest path under which it is offered, and where it is defined."""
    import spfde

    rooms: dict[str, ModuleType] = {"spfde": spfde, **{f"spfde.{room}": getattr(spfde, room) for room in ROOMS}}
    found: dict[str, str] = {}
    defined: set[str] = set()
    for room, module in rooms.items():
        for name in module.__all__:
            if name in ROOMS or name.startswith("__") or isinstance(getattr(module, name), spfde.Recipe):
                continue  # a preset stands in PRESETS
            home = package()[f"{room}.{name}".removeprefix("spfde.")].canonical_path
            if home in defined:
                continue
            found[f"{room}.{name}"] = home
            defined.add(home)
    return found


def page_of(name: str, home: str) -> str:
    """The page of the reference on which a name stands: that of the room which it is from."""
    room, *rest = home.split(".")[1:]
    inside = name.split(".")[1]
    return inside if inside in ROOMS else rest[0] if room == "core" else room


def reference() -> dict[str, str]:
    """The pages of the reference, by their path in the site's sources."""
    pages: dict[str, list[str]] = {}
    for name, home in public_names().items():
        pages.setdefault(page_of(name, home), []).append(name)
    index = ["# Reference", INTRODUCTION]
    written = {}
    for page, names in pages.items():
        about = _first_line(package()[page]) if page in package().members else ""
        written[f"reference/{page}.md"] = "\n\n".join([f"# {page}", about, *(f"::: {name}" for name in names)]) + "\n"
        index += [f"## [{page}]({page}.md)", about, *_table(names, page)]
    return {"reference/index.md": "\n\n".join(index) + "\n", **written}


def _table(names: Iterable[str], page: str) -> list[str]:
    rows = [f"| [`{n}`]({page}.md#{n}) | {_first_line(package()[n.removeprefix('spfde.')])} |" for n in names]
    return ["| name | what it is |\n|---|---|\n" + "\n".join(rows)]


def _first_line(item: griffe.Object | griffe.Alias) -> str:
    text = item.docstring.value if item.docstring is not None else ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


# --- what is public has to be documented ------------------------------------------------------------------------------


def undocumented() -> list[str]:
    """Public names without a docstring, and public methods that neither their class nor a base of it describes."""
    found = []
    for name in public_names():
        item = package()[name.removeprefix("spfde.")]
        target = item.final_target if item.is_alias else item
        if not target.has_docstring:
            found.append(name)
        if target.is_class:
            classes = [target, *target.mro()]
            for member in target.members.values():
                if member.is_function and not member.name.startswith("_"):
                    same = [base.members[member.name] for base in classes if member.name in base.members]
                    if not any(one.has_docstring for one in same):
                        found.append(f"{name}.{member.name}")
    return found


def without_card() -> list[str]:
    """Techniques that no card in docs/methods shows as ``spfde.Name``."""
    import spfde
    from spfde.core.technique import Technique

    cards = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "methods").glob("*.md"))
    public = {name: getattr(spfde, name) for name in spfde.__all__}
    names = [name for name, value in public.items() if isinstance(value, type) and issubclass(value, Technique)]
    return [name for name in names if not re.search(rf"\bspfde\.{name}\b", cards)]


# --- called by MkDocs -------------------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, what pages link to outside docs/, and the reference."""
    from mkdocs.structure.files import File

    documents = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    for path in sorted({"README.md"} | linked_files(["README.md", *documents])):
        files.append(File.generated(config, site_path(path), content=as_page(path)))
    for path, text in reference().items():
        files.append(File.generated(config, path, content=text))
    for name in undocumented():
        _log.warning("%s is public and has no docstring", name)
    for name in without_card():
        _log.warning("docs/methods: no card shows spfde.%s", name)
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Turn links as they work in the repository into links of the site."""
    path = page.file.src_uri
    return markdown if path.startswith("reference/") else with_site_links(markdown, repository_path(path))
