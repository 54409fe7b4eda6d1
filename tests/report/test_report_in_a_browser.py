"""The report page in headless Chromium: silent console, no sideways scrolling, light and dark."""

from __future__ import annotations

import functools
import http.server
import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import browsers
from trl_sync.cli.report import show_report

CHROMIUM = browsers.chromium()
WIDTHS = {"phone": 390, "laptop": 1280}
# blink's numbers of the preferred colour scheme
SCHEMES = {"dark": 0, "light": 1}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="Chromium is no Python package, so `make test` cannot install it: where the system "
        "has none, the page is only parsed, by the other tests of this folder",
    ),
]

# Chromium's own window is at least 500 wide; a frame may be as narrow as a phone.
FRAME = """<!doctype html><meta charset="utf-8"><title>frame</title>
<iframe src="/run/report.html" style="width: {width}px; height: 800px; border: 0"
  onload="measure(this)"></iframe>
<script>
function measure(frame) {{
  const page = frame.contentDocument, root = page.documentElement;
  document.documentElement.dataset.seen = JSON.stringify({{
    title: page.title, text: page.body.innerText.length,
    inner: frame.contentWindow.innerWidth, scroll: root.scrollWidth,
    background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    colour: frame.contentWindow.getComputedStyle(page.body).color,
  }});
}}
</script>"""


@pytest.fixture
def served(tmp_path: Path, make_run: Callable[..., Path]) -> Iterator[str]:
    """The address of a folder with the page of a run."""
    show_report([make_run()], as_json=False)
    quiet = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def look(address: str, *, scheme: str) -> tuple[dict[str, Any], list[str]]:
    """What the frame measured, and what was written to the console."""
    assert CHROMIUM is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [
        "--window-size=1400,900",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
    ]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", address], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found is not None, done.stdout[:500] + done.stderr[-2000:]
    return json.loads(unescape(found[1])), re.findall(r".*CONSOLE.*", done.stderr)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_says_nothing_on_the_console(
    served: str, tmp_path: Path, width: str
) -> None:
    pixels = WIDTHS[width]
    (tmp_path / "frame.html").write_text(FRAME.format(width=pixels))
    backgrounds = {}
    for scheme in SCHEMES:
        seen, console = look(f"{served}/frame.html", scheme=scheme)
        assert console == []
        assert seen["text"] > 500
        assert seen["inner"] == pixels
        assert seen["scroll"] <= pixels
        assert seen["background"] != seen["colour"]
        backgrounds[scheme] = sum(map(int, re.findall(r"\d+", seen["background"])[:3]))
    assert backgrounds["dark"] < 3 * 64 < 3 * 192 < backgrounds["light"]


def test_the_console_is_heard(served: str, tmp_path: Path) -> None:
    page = FRAME.format(width=390) + "<script>console.error('a mistake')</script>"
    (tmp_path / "frame.html").write_text(page)
    _, console = look(f"{served}/frame.html", scheme="light")
    assert any("a mistake" in line for line in console)
