"""TensorFlow: imported at first use, and kept quiet."""

import contextlib
import functools
import os
import subprocess
import sys
import warnings

from commandline import UserError, missing_package

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Reads what is held back; if its writer dies before it says that all is well, these were its last words.
WATCHER = """
import sys
held, well = b"", b"%s"
while chunk := sys.stdin.buffer.read1():
    held += chunk
    if held.endswith(well):
        sys.exit()
sys.stderr.buffer.write(held)
"""
ALL_IS_WELL = "\0all is well\0"


@functools.cache
def import_tensorflow():
    """Imports TensorFlow (5 s) with its start-up chatter off; raises UserError if it is not installed."""
    try:
        with silenced():
            import tensorflow as tf
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            raise UserError(missing_package("tensorflow")) from error
        raise UserError(f"TensorFlow cannot be imported ({first_line(error)}); install it again") from error
    tf.get_logger().setLevel("ERROR")
    return tf


@contextlib.contextmanager
def silenced():
    """Holds back Python warnings and what is written to stderr: C++ start-up lines ignore TF_CPP_MIN_LOG_LEVEL.

    If the process dies meanwhile (a processor without AVX ends in abort(), for one), what was held back is shown: another
    process has it.
    """
    watcher = subprocess.Popen(
        [sys.executable, "-ISc", WATCHER % ALL_IS_WELL.replace("\0", r"\0")],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process
    )
    stderr = os.dup(2)
    os.dup2(watcher.stdin.fileno(), 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        watcher.stdin.write(ALL_IS_WELL.encode())
        watcher.stdin.close()
        watcher.wait()


def first_line(error):
    """The first line of an exception's text, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
