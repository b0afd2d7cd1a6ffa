"""Where a script may write: over nothing that it reads, and nowhere twice."""

import os
from pathlib import Path

from commandline import UserError, make_folder


def check_outputs(outputs, inputs):
    """Raises UserError unless each output can be written, and is no file that is read and no other output; called before the
    long work, not after it.

    outputs, inputs: {option: its files, None for one that was not given}. Files are told apart by what they are, not by their
    names: a link to an input is that input.
    """
    outputs = [(option, path) for option, paths in outputs.items() for path in paths if path]
    taken = {}
    if any(os.path.exists(path) for _, path in outputs):  # else none is an input, of which there may be 200,000
        taken = {_identity(path): option for option, paths in inputs.items() for path in paths if path}
    written = set()
    for option, path in outputs:
        identity = _identity(path)
        if identity in written and taken[identity] == option:
            raise UserError(
                f"{option} {path}: two results would be written there; give one of them an {option} of its own"
            )
        if identity in taken:
            raise UserError(f"{option} {path}: that is {_of(taken[identity])} file; give another")
        _check_writable(path)
        taken[identity] = option
        written.add(identity)


def read_by(args, files=()):
    """{option: its files} of what the options of a script name and it reads, for the functions here. files: its images."""
    named = {f"--{name}": [getattr(args, name, None)] for name in ("engine", "annotations", "labels")}
    return {**named, "--input": [*files, *args.input]}


def output_folder(args, names, files, more=None):
    """The folder of --output. Raises UserError where one of the files `names` in it would be written over what is read: `files`,
    the images, what options name, and `more`, {option: its files}."""
    output = make_folder(args.output)
    check_outputs({"--output": [output / name for name in names]}, {**read_by(args, files), **(more or {})})
    return output


def check_results(output, names, endings, files):
    """Raises UserError where the results of images, output/NAME and one of the endings for each of the names, would be
    written over one of a few files.

    files: {option: its files, None for one that was not given}.
    """
    within, known = os.path.join(os.path.realpath(output), ""), None
    for option, paths in files.items():
        for path in filter(None, paths):
            stem, ending = os.path.splitext(os.path.realpath(path))
            if ending in endings and stem.startswith(within):
                known = known or set(names)
                if stem[len(within) :] in known:
                    raise UserError(
                        f"--output {output}: the results of an image would be written over {path}, which is"
                        f" {_of(option)} file; choose another folder"
                    )


def refuse_to_overwrite(images, inputs, output, within=""):
    """Raises UserError where results would lie in a folder that images are read from, now or by the next run.

    inputs: what the user named, of which the Images come. within: the folder in `output` for the results of images, which would be
    read with `output`, where that is an input or what a pattern looks in.
    """
    sources = {os.path.realpath(folder) for folder in {*map(os.path.dirname, images.files), *inputs}}
    targets = {os.path.realpath(os.path.join(output, within, name)) for name in set(map(os.path.dirname, images.names))}
    shared = sources & targets
    if within:
        folders = {
            given if os.path.isdir(given) else os.path.dirname(given) for given in inputs if not os.path.isfile(given)
        }
        shared |= {os.path.realpath(folder) for folder in folders} & {os.path.realpath(output)}
    if shared:
        raise UserError(
            f"--output {output}: results would lie in {min(shared)}, where images are read: choose another folder, so"
            " that none is overwritten or taken for an input"
        )


def _identity(path):
    """What two names of one file have in common: its device and number, of one that is not there its real path."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def _of(option):
    """An option's name in the genitive."""
    return f"{option}'" if option.endswith("s") else f"{option}'s"


def _check_writable(path):
    """Raises UserError unless a file `path` can be made, its folder too."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file to write")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a device or a pipe: name a file to write")
    make_folder(path.parent)
    target = path if path.exists() else path.parent
    if not os.access(target, os.W_OK):
        raise UserError(f"cannot write {path}: no permission; choose another output")
