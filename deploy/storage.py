"""Files by their addresses: a path of this machine, or s3://bucket/key, gs://bucket/key, whatever pyarrow.fs has.

An address may carry options for pyarrow behind a ?, as s3://bucket/photos?region=eu-central-1; what is shown of it carries
none, and no credentials (https://arrow.apache.org/docs/python/filesystems.html).
"""

import contextlib
import fnmatch
import functools
import glob
import io
import os
import posixpath
import urllib.parse
from pathlib import Path

from commandline import UserError, whole_file
from commandline.inputs import Images, is_image, result_names

import pyarrow
from pyarrow import fs

from images.decoding import ImageError, decode_image, load_image

# Of so many remote images the EXIF data are looked at, which lie in so many bytes: each takes a request.
FEW = 10
BEGINNING = 2**18


def is_remote(address):
    """Whether it is no path of this machine."""
    return "://" in str(address)


@functools.cache
def _file_system(options):
    """pyarrow's file system for an address without its key."""
    return fs.FileSystem.from_uri(options)[0]


def open_store(address, option):
    """(pyarrow's file system, path within it) of a remote address. Raises UserError, naming `option`."""
    split = urllib.parse.urlsplit(address)
    try:
        return _file_system(urllib.parse.urlunsplit((*split[:2], "", split.query, ""))), _key(split)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{option} {shown(address)}: {str(error).splitlines()[0]}") from error


def _key(split):
    return f"{split.netloc.rpartition('@')[2]}{urllib.parse.unquote(split.path)}".strip("/")


def shown(address):
    """An address without options and credentials."""
    split = urllib.parse.urlsplit(address)
    return f"{split.scheme}://{_key(split)}" if is_remote(address) else str(address)


def find_remote(addresses, option="--input"):
    """commandline.inputs.Images of remote addresses: images, folders with their subfolders, patterns. `files` are as shown.

    In a pattern * stands for any letters, / too. Raises UserError for an address that gives no image.
    """
    places = {}
    for address in addresses:
        system, path = open_store(address, option)
        pattern = path if glob.has_magic(path) else None
        base = posixpath.dirname(path[: glob.escape(path).index("[")]) if pattern else path
        try:
            (info,) = system.get_file_info([base])
            found = [info] if info.is_file else system.get_file_info(fs.FileSelector(base, recursive=True))
        except OSError as error:
            raise UserError(f"{option} {shown(address)}: {str(error).splitlines()[0]}") from error
        names = sorted(item.path for item in found if item.is_file and (info.is_file or is_image(item.path)))
        names = [name for name in names if pattern is None or fnmatch.fnmatchcase(name, pattern.replace("**/", "*"))]
        if not names:
            raise UserError(f"{option} {shown(address)}: no images there; name another folder")
        scheme = urllib.parse.urlsplit(address).scheme
        base = posixpath.dirname(base) if info.is_file else base
        places |= {f"{scheme}://{name}": (f"/{base}", posixpath.relpath(name, base)) for name in names}
    return Images(list(places), result_names(list(places.values())), 0)


def load(path, store=None, exif_rotate=False, max_pixels=None):
    """images.decoding.load_image of a path, or of a remote address as shown. store: an address of the same store."""
    if not is_remote(path):
        return load_image(path, exif_rotate, max_pixels)
    system, _ = open_store(store, "--input")
    try:
        with system.open_input_file(path.split("://", 1)[1]) as file:
            data = file.read()
    except OSError as error:
        raise ImageError(str(error).splitlines()[0]) from error
    return decode_image(data, exif_rotate, max_pixels)


def beginnings(paths, store):
    """What Image.open takes to read the kind and EXIF data of images: `paths`, or the beginnings of the first few remote ones."""
    if store is None:
        return paths
    system, _ = open_store(store, "--input")
    files = []
    for path in paths[:FEW]:
        with contextlib.suppress(OSError), system.open_input_file(path.split("://", 1)[1]) as file:
            files.append(io.BytesIO(file.read(BEGINNING)))
    return files


class Folder:
    """A folder for results, of this machine or remote. Files in it are whole or not there."""

    def __init__(self, address, option="--output"):
        self.address = str(address)
        if is_remote(address):
            self._system, self._path = open_store(self.address, option)
        else:
            self._system, self._path = fs.LocalFileSystem(), os.path.abspath(address)

    def write(self, name, data):
        """Writes bytes as NAME, a relative path. In an object store a file appears when it is closed."""
        path = posixpath.join(self._path, name)
        if isinstance(self._system, fs.LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                temporary.write_bytes(data)
            return
        with self._system.open_output_stream(path) as file:
            file.write(data)

    def files(self, folder, extension):
        """The paths, for `open`, of the files that lie directly in a folder in it and end so."""
        place = fs.FileSelector(posixpath.join(self._path, folder), allow_not_found=True)
        found = self._system.get_file_info(place)
        names = (item for item in found if item.is_file and not item.base_name.startswith("."))
        return sorted(item.path for item in names if item.path.endswith(extension))

    def open(self, path):
        """An open file of pyarrow's, to read."""
        return self._system.open_input_file(path)
