"""Fonts for class names in any script: DejaVu Sans, which lies beside this file, and what the machine has besides.

DejaVu Sans covers Latin (Vietnamese and Turkish too), Cyrillic, Greek, Armenian, Georgian, Hebrew and most of Arabic. It is
part of the project, unchanged, as Pillow's own font has Latin only and the network's machine need not have matplotlib,
which brings the same file. Chinese, Japanese, Korean, Thai and the scripts of India take megabytes each: their fonts are
looked for where the system keeps them.
"""

import functools
import itertools
import os
import sys
import unicodedata
from pathlib import Path

from commandline import warn

from PIL import ImageFont, features

BUNDLED = Path(__file__).resolve().parent / "DejaVuSans.ttf"
# How the file names of fonts with many scripts begin, in the order they are tried: Noto, then what Windows, macOS and
# Linux distributions bring for Chinese, Japanese, Korean, Thai, Devanagari and all else.
FAMILIES = ("notosans", "noto", "sourcehan", "msyh", "yugoth", "meiryo", "malgun", "leelawui", "nirmala", "segoeui")
FAMILIES += ("pingfang", "hiragino", "applesdgothic", "thonburi", "kohinoor", "arial unicode", "wqy", "droidsans")
# A code point that no font has a glyph for ("noncharacter", Unicode 23.7): drawn as what stands for a missing one.
NO_CHARACTER = "\U0010ffff"


def font_folders():
    """Where this system keeps its fonts: the user's and everybody's."""
    home = Path.home()
    if sys.platform == "win32":
        local = Path(os.environ.get("LOCALAPPDATA", home))
        return [local / "Microsoft" / "Windows" / "Fonts", Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"]
    if sys.platform == "darwin":
        return [home / "Library" / "Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    data = os.environ.get("XDG_DATA_HOME") or home / ".local" / "share"
    return [Path(data) / "fonts", home / ".fonts", Path("/usr/local/share/fonts"), Path("/usr/share/fonts")]


@functools.cache
def installed_fonts():
    """Font files of the system that may have other scripts: by family, the regular weight before the others."""
    found = []
    for folder in font_folders():
        for path in folder.rglob("*"):
            name = path.name.lower()
            family = next((i for i, begin in enumerate(FAMILIES) if name.startswith(begin)), None)
            if family is not None and path.suffix.lower() in (".ttf", ".ttc", ".otf"):
                found.append((family, "regular" not in name and "-" in name, name, path))
    return [path for *_, path in sorted(found)]


@functools.lru_cache(maxsize=64)
def load(path, size):
    return ImageFont.truetype(path, size)


def covered(path, characters):
    """The set of those characters that the font has a glyph for; empty where the file cannot be read."""
    try:
        font = ImageFont.truetype(path, 20, layout_engine=ImageFont.Layout.BASIC)
        missing = bytes(font.getmask(NO_CHARACTER))
        return {c for c in characters if c.isspace() or bytes(font.getmask(c)) not in (missing, b"")}
    except (OSError, ValueError):  # a bitmap font without this size, for one
        return set()


_FONTS = {}  # character -> path of the first font that has it, or None


def _look_up(characters):
    """Fills _FONTS for those characters, with one look at each font at most."""
    missing = {c for c in characters if c not in _FONTS}
    for path in _fonts():
        if not missing:
            return
        found = covered(path, missing)
        _FONTS.update(dict.fromkeys(found, path))
        missing -= found
    _FONTS.update(dict.fromkeys(missing))


def _fonts():
    yield BUNDLED
    yield from installed_fonts()


def _composed(name):
    """Letters and accents as one character each where Unicode has it, no line breaks."""
    return unicodedata.normalize("NFC", " ".join(name.split()))


def _clings(character):
    """Whether it is drawn with the character before it: accents, vowel signs, joiners."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")


@functools.lru_cache(maxsize=4096)
def runs(name):
    """A name as [(text, path of its font)], in the order they are drawn; None if it cannot be drawn right here.

    None where no font has a character, and where Pillow lacks Raqm with FriBiDi for a script that runs from right to left
    or has signs that cling to letters: without it, Pillow draws letters apart and in the wrong order
    (pillow.readthedocs.io, ImageFont.Layout).
    """
    text = _composed(name)
    letters = [c for c in text if not _clings(c)]
    _look_up(text)
    if not all(_FONTS[c] for c in text if unicodedata.category(c) != "Cf"):
        return None
    backwards = any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)
    if (backwards or len(letters) < len(text)) and not features.check("raqm"):
        return None
    if backwards:  # letters join and change places: all of them in one font
        whole = [path for path in dict.fromkeys(map(_FONTS.get, letters)) if covered(path, letters) >= set(letters)]
        return [(text, whole[0])] if whole else None
    paths = []
    for c in text:
        paths.append(paths[-1] if paths and _clings(c) else _FONTS[c] or BUNDLED)
    pieces = itertools.groupby(zip(text, paths, strict=True), key=lambda pair: pair[1])
    return [("".join(c for c, _ in piece), path) for path, piece in pieces]


def warn_of_undrawable(names):
    """One warning if some of the class names cannot be drawn: pictures show their ids instead. None is no name."""
    names = [name for name in names if name]
    _look_up(set("".join(map(_composed, names))))
    lost = [name for name in names if runs(name) is None]
    if lost:
        shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        mend = "install a Noto font of their script (Debian: fonts-noto-core, fonts-noto-cjk)"
        if not features.check("raqm"):
            mend += " and FriBiDi (Debian: libfribidi0)"
        warn(
            f"{len(lost)} of {len(names)} class names cannot be drawn with the fonts here ({shown}):"
            f" pictures show their ids; {mend}"
        )
