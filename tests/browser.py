"""Opens a page in headless Chromium and returns what a user sees there."""

import html
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

# Put at the page's end: writes what matters into the title once every picture is loaded.
PROBE = """<script>
addEventListener("load", () => {
  const pictures = [...document.images], parts = [...document.querySelectorAll("svg, img, table")];
  const broken = pictures.filter(picture => !picture.naturalWidth).length;
  const collapsed = parts.filter(part => part.getBoundingClientRect().width < 20).length;
  document.title = [pictures.length, broken, collapsed, document.documentElement.scrollWidth > innerWidth].join();
});
</script>"""


def open_page(path, width=1200):
    """Returns (text of the page, SVG text included; pictures; broken pictures; collapsed parts; whether it is too wide)."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(Path(path).read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        options += [
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={folder}/profile",
        ]
        options += [f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom"]
        done = subprocess.run([chromium, *options, copy.as_uri()], capture_output=True, text=True, timeout=120)
    dom = done.stdout
    pictures, broken, collapsed, wide = re.search(r"<title>(.*?)</title>", dom)[1].split(",")
    text = html.unescape(re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", dom, flags=re.DOTALL))
    return re.sub(r"\s+", " ", text), int(pictures), int(broken), int(collapsed), wide == "true"
