"""A report as one self-contained HTML page: numbers, plots (SVG, by matplotlib) and pictures inside the file."""

import base64
import contextlib
import datetime
import functools
import html
import importlib.metadata
import io
import platform
import shlex
import sys
import warnings
from pathlib import Path

from commandline import printable, warn, whole_file
from commandline.version import VERSION

from PIL import Image

from fonts import label_font

# Packages whose versions decide numbers and pictures.
PACKAGES = ("tensorrt", "onnxruntime", "openvino", "tensorflow", "tensorflow-cpu", "numpy", "Pillow")
PACKAGES += ("faster-coco-eval", "pycocotools")
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --good: #1a7f37; --bad: #c62828; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.note { opacity: .75; margin-top: .2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { background: var(--soft); position: sticky; top: 0; }
.scroll { overflow-x: auto; display: inline-block; max-width: 100%; border: 1px solid var(--line); }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots figure { margin: 0; background: #fff; border-radius: 6px; }
.plots svg { max-width: 100%; height: auto; display: block; }
.pictures { display: grid; gap: 1rem; } .pictures figure { margin: 0; }
.pictures img { width: 100%; height: auto; object-fit: contain; object-position: left top; display: block; }
.pictures.small img { max-height: 20rem; }
@media (max-width: 700px) { .pictures.small { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; } }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .5rem; } footer code { overflow-wrap: anywhere; }
figcaption { font-size: .85rem; opacity: .85; padding: .2rem 0; overflow-wrap: anywhere; }
.passed { color: var(--good); } .failed { color: var(--bad); } .verdict { font-weight: 600; font-size: 1.1rem; }
"""


def write_page(path, title, subtitle, parts):
    """Writes the page; parts: HTML of the functions below, in order."""
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f'<p class="note">{html.escape(subtitle)}</p>\n' + "\n".join([*parts, _footer()]) + "\n</body>\n</html>\n"
    )
    with whole_file(path) as temporary:
        Path(temporary).write_text(printable(page), encoding="utf-8")


def _footer():
    """When, by which command and with which versions a page was made."""
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    line = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return (
        f'<footer class="note"><p>{made}, version {VERSION}</p>\n<p><code>{html.escape(line)}</code></p>\n'
        f"<p>{html.escape(', '.join(versions))}</p></footer>"
    )


def section(title, *parts, note=""):
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<h2>{html.escape(title)}</h2>\n{note}\n" + "\n".join(parts)


def table(columns, rows, identity=""):
    """A table, all of its rows. columns: names; rows: lists of str; identity: its id."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    head = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table id="{html.escape(identity)}">{head}\n<tbody>\n{body}\n</tbody></table></div>'


def verdict(passed, text):
    return f'<p class="verdict {"passed" if passed else "failed"}">{html.escape(text)}</p>'


def plots(*figures):
    return '<div class="plots">' + "".join(f"<figure>{figure}</figure>" for figure in figures) + "</div>"


def plot(draw, width=5.2, height=3.8):
    """SVG of a matplotlib plot: `draw(axes)` draws it. A sentence in its place where matplotlib is not installed."""
    if not (pyplot := _pyplot()):
        return '<p class="note">No plot: matplotlib is not installed.</p>'
    import matplotlib

    # Text stays text, which the reader's browser draws; a class name's dollar signs are no formula.
    text = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 9}
    with matplotlib.rc_context({**text, "axes.grid": True, "grid.alpha": 0.3}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        axes.set_axisbelow(True)
        draw(axes)
        _measure_with_right_fonts(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


@functools.cache
def _pyplot():
    """matplotlib.pyplot; None, with a warning, where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError:
        warn("the report has no plots: matplotlib is not installed; pip install matplotlib")
        return None
    return pyplot


def _measure_with_right_fonts(figure):
    """Adds the fonts to a figure's texts that have their script, so that a legend is as wide as the names in it."""
    from matplotlib import font_manager, text

    for part in figure.findobj(text.Text):
        paths = {path for _, path in label_font.runs(part.get_text()) or ()} - {label_font.BUNDLED}
        for path in paths:
            font_manager.fontManager.addfont(path)
        families = [font_manager.get_font(path).family_name for path in sorted(paths)]
        part.set_fontfamily([*part.get_fontfamily(), *families])


def pictures(figures, columns):
    """figures: list of (Pillow image, caption); `columns` to a row."""
    cells = "\n".join(
        f'<figure><img alt="{html.escape(caption)}" src="{_data_url(picture)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for picture, caption in figures
    )
    small = " small" if columns > 1 else ""
    return f'<div class="pictures{small}" style="grid-template-columns: repeat({columns}, minmax(0, 1fr))">\n{cells}\n</div>'


def shrink(picture, longest):
    """The picture with its longer side at most `longest` pixels."""
    picture = picture.copy()
    picture.thumbnail((longest, longest), Image.Resampling.BILINEAR)
    return picture


def _data_url(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
