"""Which images the user means: files, folders, globs and lists of paths, and what the results of each are called."""

import codecs
import collections
import dataclasses
import fnmatch
import functools
import glob
import os
import re

from commandline import LONGEST_NAME, UTF_16, UserError, decode_text, shortened, warn

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
# So many kinds of files left out, or names of files that are not there, are named in a warning.
NAMED = 4
TEXT_BYTES = 4096
# A line that begins a JSON text, and hardly a path.
JSON_BEGINS = re.compile(r'[{\[]\s*(["{\[]|$)')
# What an option that find_images reads says of itself.
INPUTS = (
    f"files ({', '.join(extension[1:] for extension in EXTENSIONS)}), folders with their subfolders, quoted patterns"
    " ('photos/**/*.jpg'), or text files with a path on each line"
)
RESULT_ENDING = 4  # bytes that results' names end in: `.jpg`
NO_FILE = "neither file nor folder"


@dataclasses.dataclass(frozen=True)
class Images:
    """Image files, each once, in the order of the inputs; a folder's own files before those of its subfolders."""

    files: list  # of str: a Path each would take 200,000 of them a second and 100 MB more
    names: list  # of str: a path without extension for each one's results, relative, no two alike
    missing: int  # files that a list names and that are not there


def show_inputs(inputs):
    """The inputs in a few words: `photos`, `photos and 2 more`."""
    return f"{inputs[0]} and {len(inputs) - 1} more" if len(inputs) > 1 else str(inputs[0])


def find_images(inputs, option="--input", output=None):
    """Returns the Images of one or several inputs; what a folder holds besides is warned about, counted, in one line.

    inputs: paths of images, of folders (with subfolders), of text files of paths (one a line, relative to the text file's
    folder; blank lines and those with # are skipped), or patterns, where ** is any number of folders. Hidden files and
    folders are passed over, links to folders followed, each folder read once. output: a folder that is left out where an
    input folder holds it. Raises UserError, naming `option`, for an input that gives no image.
    """
    search = _Search(option, output)
    for given in [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs:
        search.add(os.fspath(given))
    if search.left_out:
        warn(f"{option}: {len(search.found)} images found, besides them left out: {_counted(search.left_out)}")
    files = [os.path.join(base, within) for base, within in search.found]
    return Images(files, result_names(search.found), search.missing)


class _Search:
    """The images found so far, and the folders read."""

    def __init__(self, option, output):
        self.option, self.missing = option, 0
        self.found = []  # (base folder as the user names it, path within it)
        self.known = collections.defaultdict(set)  # {real path of a folder: names of images found there}
        self.left_out = collections.Counter()  # {kind: names}
        self.read = set()  # real paths of the folders read whole
        self.output = None if output is None else os.path.realpath(output)
        self.real_path = functools.cache(os.path.realpath)  # of the few folders that many files are in

    def add(self, given):
        """Adds the images of one input."""
        if os.path.isdir(given):
            if not os.access(given, os.R_OK | os.X_OK):
                raise UserError(f"{self.option} {given}: no permission to read this folder; choose another")
            if not self.add_folder(given, ""):
                others = f", only {_counted(self.left_out)}" if self.left_out else ""
                raise UserError(
                    f"{self.option} {given}: no images there ({' '.join(EXTENSIONS)}){others}; name another folder"
                )
        elif os.path.isfile(given):
            if _is_list(given):
                self.add_list(given)
            else:
                self.add_file(*os.path.split(given))
        elif os.path.lexists(given):
            raise UserError(f"{self.option} {given}: it is no file and no folder, or a link to nothing; name an image")
        elif glob.has_magic(given):
            self.add_pattern(given)
        else:
            raise UserError(f"{self.option} {given}: no such file or folder")

    def add_file(self, base, within):
        """Adds the file base/within. base: the folder that results are named from."""
        folder, name = os.path.split(os.path.join(base, within))
        self.add_names(base, os.path.dirname(within), self.real_path(folder), [name])

    def add_folder(self, base, within):
        """Adds the images in and below the folder base/within; returns whether there are any, or were before."""
        if os.path.realpath(os.path.join(base, within)) in self.read:
            return True
        any_image = False
        for folder, real, names, others in _folders(base, within, self.read, self.output):
            images = [name for name in names if is_image(name)]
            self.add_names(base, folder, real, images)
            any_image |= bool(images)
            self.left_out.update(others)
            if len(images) < len(names):
                self.left_out.update(_kind(name) for name in names if not is_image(name))
        return any_image

    def add_names(self, base, folder, real, names):
        """Adds the files of the folder base/folder, whose real path is `real`, that were not added before."""
        known = self.known[real]
        self.found += [(base, os.path.join(folder, name)) for name in names if name not in known]
        known.update(names)

    def add_list(self, given):
        """Adds what a text file of paths names. What is not there is warned about in one line."""
        base, absent = os.path.dirname(given), []
        with open(given, "rb") as file:
            data = file.read()
        if data.startswith(UTF_16):
            data = decode_text(data, "replace").encode()
        lines = [os.fsdecode(line).strip() for line in data.removeprefix(codecs.BOM_UTF8).splitlines()]
        names = [line for line in lines if line and not line.startswith("#")]
        if names and JSON_BEGINS.match(names[0]):
            raise UserError(
                f"{self.option} {given}: it is a JSON file, no list of images; write a path on each line, or name a folder"
            )
        for name in names:
            path = os.path.normpath(os.path.join(base, name))
            within = os.path.relpath(path, base or os.curdir)
            inside = not within.startswith(os.pardir + os.sep)
            if os.path.isfile(path):
                self.add_file(*((base, within) if inside else os.path.split(path)))
            elif os.path.isdir(path):
                self.add_folder(*((base, within) if inside else (path, "")))
            else:
                absent.append(name)
        shown = ", ".join(absent[:NAMED]) + (", ..." if absent[NAMED:] else "")
        if len(absent) == len(names):
            what = f"none of the {len(names)} files it names is there ({shown})" if names else "it names no file"
            raise UserError(
                f"{self.option} {given}: {what}; write a path on each line, as seen from the folder of this file"
            )
        if absent:
            warn(f"{self.option} {given}: {len(absent)} of the {len(names)} files it names are not there: {shown}")
        self.missing += len(absent)

    def add_pattern(self, given):
        """Adds the images, and those in the folders, that a pattern matches."""
        start = re.search(r"[*?[]", given).start()
        base = given[:start].rpartition(os.sep)[0] or (os.sep if given.startswith(os.sep) else "")
        any_image = False
        for within in _matches(base, "", given[len(base) :].strip(os.sep).split(os.sep), self.output):
            path = os.path.join(base, within)
            if is_image(path):  # not looked at, as in a folder
                self.add_file(base, within)
                any_image = True
            elif os.path.isdir(path):
                any_image |= self.add_folder(base, within)
            else:
                self.left_out[_kind(path) if os.path.isfile(path) else NO_FILE] += 1
        if not any_image:
            raise UserError(f"{self.option} {given}: no image matches this pattern, and no file has this name")


def _counted(left_out):
    """`3 .txt, 1 hidden`, most first."""
    kinds = left_out.most_common()
    text = ", ".join(f"{count} {kind}" for kind, count in kinds[:NAMED])
    return text + (f", {sum(count for _, count in kinds[NAMED:])} of other kinds" if kinds[NAMED:] else "")


def is_image(name):
    return name.lower().endswith(EXTENSIONS)


def _kind(name):
    """What a file that is no image is counted as."""
    return os.path.splitext(name)[1].lower() or "without extension"


def _is_list(path):
    """Whether a file is a text file of paths: by its name and its start, no image, which all have zeros there, as of texts
    UTF-16 alone has (what PowerShell's > writes)."""
    if is_image(path):
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(TEXT_BYTES)
        return start.startswith(UTF_16) or b"\0" not in start
    except OSError:
        return False  # loading it will say why


def _folders(base, within, read, output=None):
    """Yields (folder, real path, names of its files, Counter of other names) for base/within and the folders below it.

    `folder` is relative to base. In order of names; links to folders come last. Each folder is read once (`read`: real paths,
    added to), so that links make no circle. Hidden folders and `output` are not read.
    """
    waiting, links = [within], collections.deque()
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()
        path = os.path.join(base, folder)
        real = os.path.realpath(path)
        if real in read:
            continue
        read.add(real)
        if real == output and folder:  # else the user asks for it
            yield folder, real, [], {"the output folder": 1}
            continue
        names, inside, others = [], [], collections.Counter()
        try:
            with os.scandir(path or os.curdir) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        others["hidden"] += 1
                    elif (entry.is_symlink() and is_image(entry.name)) or _is(entry.is_file):
                        names.append(entry.name)  # a link called an image is not looked at: 200,000 take seconds
                    elif not _is(entry.is_dir):
                        others[NO_FILE] += 1
                    elif entry.is_symlink():
                        links.append(os.path.join(folder, entry.name))
                    else:
                        inside.append(os.path.join(folder, entry.name))
        except OSError as error:
            others[f"unreadable folder ({path}: {error.strerror})"] += 1
        waiting += sorted(inside, reverse=True)
        yield folder, real, sorted(names), others


def _is(check):
    """A check of a directory entry; no for what cannot be looked at, as a link to itself."""
    try:
        return check()
    except OSError:
        return False


def _matches(base, within, parts, output):
    """Yields the paths below base/within, relative to base, that match the parts of a pattern; hidden ones where asked for."""
    if not parts:
        yield within
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        for folder, real, *_ in _folders(base, within, set(), output):
            if real != output:
                yield from _matches(base, folder, rest, output)
    elif glob.has_magic(part):
        for name in _names(os.path.join(base, within)):
            if fnmatch.fnmatch(name, part) and (part.startswith(".") or not name.startswith(".")):
                yield from _matches(base, os.path.join(within, name), rest, output)
    elif os.path.lexists(os.path.join(base, within, part)):
        yield from _matches(base, os.path.join(within, part), rest, output)


def _names(folder):
    try:
        return sorted(os.listdir(folder or os.curdir))
    except OSError:
        return []  # no folder, or none for us


def result_names(places):
    """A name for the results of each (base folder, path within): its path without extension from the folder that all bases
    have in common, which for one folder is the folder itself; with extension where two would be alike. One that leaves no room
    for the results' own extension is shortened."""
    bases = {base: os.path.abspath(base) for base, _ in places}
    root = os.path.commonpath(bases.values())
    prefixes = {base: os.path.relpath(path, root) for base, path in bases.items()}
    paths = [within if prefixes[base] == os.curdir else os.path.join(prefixes[base], within) for base, within in places]
    stems = [os.path.splitext(path)[0] for path in paths]
    taken = collections.Counter(map(str.lower, paths))
    taken.update(map(str.lower, stems))
    names = [stem if taken[stem.lower()] == 1 else path for stem, path in zip(stems, paths, strict=True)]
    fits = LONGEST_NAME - RESULT_ENDING
    return [name if len(name) <= fits and name.isascii() else _with_room(name) for name in names]


def _with_room(name):
    """A result's name whose last part leaves room for `.jpg`."""
    folder, last = os.path.split(name)
    return os.path.join(folder, shortened(last, RESULT_ENDING))
