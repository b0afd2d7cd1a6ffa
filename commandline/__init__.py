"""What the scripts share at the command line: one-line errors, whole files or none, a progress bar on a terminal."""

import codecs
import contextlib
import errno
import gc
import hashlib
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# tqdm is imported where it is used: a missing package must not keep this module from saying so.

ROOT = Path(__file__).resolve().parent.parent
# Packages that are not in requirements-runtime.txt.
REQUIREMENTS = {"tensorflow": "requirements.txt", "tf2onnx": "requirements.txt"}
REQUIREMENTS |= {"av": "requirements-video.txt", "openvino": "requirements-openvino.txt"}
REQUIREMENTS |= {"tensorrt": "requirements-gpu.txt", "pycuda": "requirements-gpu.txt"}
REQUIREMENTS |= dict.fromkeys(("ray", "pyarrow", "pandas"), "requirements-scale.txt")
REQUIREMENTS |= {"tritonclient": "requirements-triton.txt"}


# What becomes of the bytes in a file's name that are no text, as an old zip may have them.
NO_TEXT = "backslashreplace"
LONGEST_NAME = 255  # bytes of a file's name, on all usual file systems


UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # how such a text begins

# What writing to a full disk, beyond a quota or a limit (ulimit -f) ends in.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """A mistake the user can mend: its text is one line that names the file or option and what to do."""


def missing_package(name):
    """A line on a package that cannot be imported and what to do about it."""
    requirements = ROOT / REQUIREMENTS.get(name, "requirements-runtime.txt")
    venv = ROOT / ".venv"
    if venv.is_dir() and Path(sys.prefix) != venv:
        activate = venv / ("Scripts/activate" if sys.platform == "win32" else "bin/activate")
        return (
            f"the package {name} is missing here; activate the environment that has it: . {shlex.quote(str(activate))}"
        )
    pip = shlex.join([sys.executable, "-m", "pip", "install", "-r", str(requirements)])
    return f"the package {name} is missing; install it: {pip}"


def _tell_missing_package(kind, error, trace):
    """An excepthook for what comes before `run`: a package that a script of this project misses is a line and status 2,
    Ctrl-C status 130, neither a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    name = (getattr(error, "name", None) or "").split(".")[0]
    ours = (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()
    if not issubclass(kind, ModuleNotFoundError) or not name or ours:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"{Path(sys.argv[0]).name}: {missing_package(name)}", file=sys.stderr, flush=True)
    os._exit(2)  # an excepthook cannot choose the status otherwise


def _leave(*_):
    """A handler of signals for the imports of a script: nothing is begun, and KeyboardInterrupt may not come through."""
    os._exit(130)


UNSTOPPED = set()  # code of functions


def unstopped(function):
    """A decorator: a stop comes when the function has returned, which it does soon. What it has begun is known to who ends it."""
    UNSTOPPED.add(function.__code__)
    return function


def _stop(_, frame):
    """A handler of signals: KeyboardInterrupt, but after an import or an `unstopped` function that is going on.

    In the midst of an import, packages of native code make an ImportError of it (onnxruntime), or crash.
    """
    while frame:
        if frame.f_code in UNSTOPPED or frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.setitimer(signal.ITIMER_REAL, 0.05)  # a SIGALRM, which comes here as well
            return
        frame = frame.f_back
    raise KeyboardInterrupt


# What stops a script, nothing half-written: Ctrl-C, and docker stop and systemd. SIGALRM: see _stop.
STOPS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGALRM] if hasattr(signal, "setitimer") else [])]


def _on_stops(handler):
    """Sets the handler of the signals that stop a script; what runs in the background of a shell still ignores Ctrl-C."""
    for number in STOPS:
        if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


_script = getattr(sys.modules["__main__"], "__file__", None)
if _script and Path(_script).resolve().parent in (ROOT, ROOT / "benchmarks"):
    sys.excepthook = _tell_missing_package
    _on_stops(_leave)


def run(main):
    """Calls `main()` and ends the process with what it returns (None is 0).

    A UserError becomes one line on stderr and status 2, as what the system says of a file that it names; Ctrl-C and SIGTERM
    become status 130. For scripts alone: from the end of `main` on, neither signal does anything.
    """
    sys.stdout.reconfigure(errors=NO_TEXT)  # stderr does so by itself
    _on_stops(_stop if hasattr(signal, "setitimer") else signal.default_int_handler)
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:  # who read the output has left, as `head` does (docs.python.org, "Note on SIGPIPE")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno in FULL:
            place = error.filename or f"temporary files in {tempfile.gettempdir()}"
            line = f"cannot write {place}: {error.strerror}; make room there"
        elif isinstance(error.filename, (str, bytes, os.PathLike)):  # no permission, a name too long, a file that went
            line = f"{os.fsdecode(error.filename)}: {error.strerror}; name another, or mend this one"
        else:
            raise
        print(f"{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # Python takes a while to end, part of it with its own handlers gone: the status stands, and no signal changes it.
        _on_stops(signal.SIG_IGN)
        gc.freeze()  # else Python searches all that TensorFlow made for what can be freed: 1.7 s


@contextlib.contextmanager
def leaving_at_once():
    """Within it a stop ends the process at once, status 130: for native code that goes on for minutes, and calls back into
    Python and swallows what that raises, KeyboardInterrupt too (TensorRT's builder, its logger). What was printed stays; a
    file that is being written would be left half-written.
    """
    sys.stdout.flush()
    before = {number: signal.getsignal(number) for number in STOPS}
    _on_stops(_leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command(script, *arguments):
    """A command to paste: the interpreter in use, the script `script` beside the running one, paths quoted."""
    path = Path(sys.argv[0]).resolve().with_name(script)
    interpreter = Path(sys.executable)
    if (found := shutil.which("python")) and os.path.samefile(found, interpreter) and sys.prefix in found:
        interpreter = "python"
    here = Path.cwd()
    words = [x.relative_to(here) if isinstance(x, Path) and x.is_relative_to(here) else x for x in (interpreter, path)]
    return shlex.join(map(str, [*words, *arguments]))


def warn(text):
    """Prints a one-line warning, past a progress bar if one is shown."""
    from tqdm import tqdm

    tqdm.write(f"warning: {text}", file=sys.stderr)


def decode_text(data, errors="strict"):
    """The text of a user's file: UTF-8 or UTF-16, with a byte order mark or without, else the cp1252 of Windows.

    errors: "replace" where what cannot be decoded does not matter. Lines end with \\n. Raises ValueError for no text.
    """
    if data.startswith(UTF_16):
        text = data.decode("utf-16", errors)
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("cp1252", errors)
    if "\0" in text:
        raise ValueError("it is not text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def make_folder(path):
    """Creates the folder `path` (and its parents) and returns it as a Path; raises UserError if that cannot be."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}; choose another output") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {path}: no permission; choose another output")
    return path


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path beside `path` to write to; renames it to `path` on success, removes it on any failure."""
    path = Path(path)
    # The suffix stays last: some writers choose the format by it.
    ending = f".{os.getpid()}.part{path.suffix}"
    temporary = path.with_name(shortened(f".{path.stem}", len(os.fsencode(ending))) + ending)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another output") from error
    finally:
        temporary.unlink(missing_ok=True)


def shortened(name, room):
    """A file's name, shortened where with `room` more bytes it would be longer than file systems take; no two alike."""
    data, most = os.fsencode(name), LONGEST_NAME - room
    if len(data) <= most:
        return name
    digest = hashlib.sha256(data).hexdigest()[:16]
    return data[: most - len(digest) - 1].decode(errors="ignore") + "~" + digest


def printable(text):
    """A text with names of files in it, which need not be text, as one that any file takes: as `run` has them printed."""
    return text.encode(errors=NO_TEXT).decode()


def remove_parts(folder):
    """Removes what processes that were killed within whole_file left in a folder and those below it."""
    for path in Path(folder).rglob(".*.part*"):
        number = re.fullmatch(r"\..*\.(\d+)\.part(\.\w+)?", path.name)
        if number and not _is_running(int(number[1])):
            path.unlink(missing_ok=True)


def _is_running(number):
    """Whether there is a process of this number."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


@contextlib.contextmanager
def steps():
    """Yields a function that shows, on a terminal, what is being done (`reading ...`), until the next or the end."""
    shown = sys.stderr.isatty()

    def show(text):
        if shown:
            print(f"\r\033[K{text and f'{text} ...'}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")


def progress(items, **options):
    """tqdm over `items`, shown on a terminal only."""
    from tqdm import tqdm

    return tqdm(items, disable=not sys.stderr.isatty(), leave=False, **options)
