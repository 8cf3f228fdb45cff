"""Pages in a real browser, without a window: what is cut off, and what would scroll sideways."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

# A frame has the width that it is given, whereas a window of 390 pixels is wider than that.
_PROBE = """<!doctype html><meta charset="utf-8"><body>
%s
<pre id="found"></pre>
<script>
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, width = frame.clientWidth, words = [];
    for (const details of page.querySelectorAll("details")) details.open = true;
    const told = (element, why) => words.push(why + ": " + element.outerHTML.slice(0, 90));
    if (page.documentElement.scrollWidth > width) words.push("the page scrolls to " + page.documentElement.scrollWidth);
    for (const element of page.body.querySelectorAll("*")) {
      if (element.closest("thead") && getComputedStyle(element.closest("thead")).position === "absolute") continue;
      const box = element.getBoundingClientRect();
      if (box.left < -0.5 || box.right > width + 0.5) told(element, "out of the page");
      if (element.clientWidth && element.scrollWidth > element.clientWidth + 1) told(element, "wider than its place");
    }
    found[frame.width] = words;
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


def browser() -> str:
    """The program; where there is none, the test is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium")
    return found


def cut_off(page: Path, widths: Sequence[int]) -> dict[int, list[str]]:
    """For each width what does not fit in the page, all its details opened.

    Args:
        page: an HTML file that needs nothing else.
        widths: in pixels.
    """
    text = html.escape(page.read_text(encoding="utf-8"))
    frames = "\n".join(f'<iframe width="{width}" height="2000" srcdoc="{text}"></iframe>' for width in widths)
    probe = page.with_name("probe.html")
    probe.write_text(_PROBE % frames, encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'browser'}")
    command = [browser(), *options, "--dump-dom", probe.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'<pre id="found">(.+?)</pre>', ended.stdout, re.DOTALL)
    assert found is not None, ended.stderr
    return {int(width): words for width, words in json.loads(html.unescape(found[1])).items()}
