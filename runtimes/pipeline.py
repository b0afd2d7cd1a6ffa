"""Image files through a detector, all stages at once.

Workers decode and resize, the network runs beside them. Results come in input order, memory is bounded; who draws and
writes them has Workers.map, which does that beside all of it.
"""

import collections
import contextlib
import dataclasses

from commandline import UserError

import onnx_utils
from image_batcher import ImageBatcher
from images.decoding import load_image
from runtimes.detector import Detections
from runtimes.device_images import DeviceImage
from runtimes.gpu_images import GpuBatcher
from runtimes.workers import Workers


@dataclasses.dataclass
class Times:
    """Seconds spent in each stage, added up over its workers, and the number of images."""

    decode: float = 0.0
    resize: float = 0.0
    copy: float = 0.0
    network: float = 0.0
    postprocess: float = 0.0
    images: int = 0
    skipped: int = 0

    def add(self, other):
        """Adds another's seconds and images."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class Detected:
    """What was found in a file."""

    number: int  # of the file, from 0
    path: object  # str or Path, as it was given
    image: object  # as decoded, an array or shared_memory.Picture; None where it is not kept: see ImageBatcher
    placement: object  # images.resizing.Placement
    found: Detections


def choose_batch_size(detector, asked, usual, path):
    """Images at a time: what a fixed model takes, else `asked`, else as many of `usual` as it can take.

    path: of the model's file. Raises UserError, naming it and --batch_size, where the model cannot.
    """
    fixed, most = detector.input.batch, detector.max_batch
    if asked is None:
        return fixed or min(usual, most or usual)
    if asked < 1:
        raise UserError(f"--batch_size {asked}: give 1 or more")
    if most and asked > most:
        what = f"{path} takes {'one image' if most == 1 else f'at most {most} images'} at a time"
        raise UserError(f"--batch_size {asked}: {what}; {_for_larger_batches(detector, asked)}")
    spec = detector.input
    onnx_utils.check_batch_size(asked, spec.height, spec.width, spec.dtype)
    return asked


def _for_larger_batches(detector, asked):
    """How a model is made that takes `asked` images at a time, where an open one does not."""
    is_engine = detector.usual_batch is not None
    if detector.input.batch is None:
        return f"build it with build_engine.py --batch 1 {asked} {asked}"
    return "convert it with create_onnx.py --batch_size dynamic" + (
        ", and build the engine of that" if is_engine else ""
    )


def open_workers(detector, images, batch_size, cores=None):
    """The Workers for `images` images: to decode, and for whatever is done with the detections. cores: default, all that
    may be used."""
    spec = detector.input
    return Workers(images, 3 * spec.height * spec.width * spec.dtype.itemsize, batch_size, cores)


def batcher_for(detector, files, batch_size, workers, keep_images=False, load=load_image, decoder=None, skip=None):
    """An ImageBatcher, or with a GpuDecoder a GpuBatcher, of what the detector takes."""
    resizer, dtype = detector.metadata["resizer"], detector.input.dtype
    if decoder:
        return GpuBatcher(files, resizer, batch_size, decoder, load, skip, keep_images)
    return ImageBatcher(files, resizer, batch_size, workers, dtype, keep_images, load, skip)


def detect_files(
    detector, files, batch_size, workers, times=None, keep_images=False, load=load_image, decoder=None, skip=None
):
    """Yields a Detected for each image file, in order.

    times: a Times to add to. keep_images, load, skip: as of ImageBatcher. decoder: of gpu_images.choose_decoder. A file
    that cannot be read is left out. Any other error, in whatever stage, is raised here. Closing the generator (Ctrl-C does)
    ends all stages.
    """
    times = times if times is not None else Times()
    batcher = batcher_for(detector, files, batch_size, workers, keep_images, load, decoder, skip)
    running, before = collections.deque(), dict(detector.spent)  # of (Batch, ticket)
    batches = iter(batcher)
    try:
        for batch in batches:
            with _naming(batch):
                running.append((batch, detector.start(batch.tensors, batch.true_shapes)))
            if len(running) >= detector.batches_ahead:
                yield from _finish(detector, *running.popleft(), times)
        while running:
            yield from _finish(detector, *running.popleft(), times)
    finally:
        batches.close()
        with contextlib.suppress(Exception):
            while running:
                detector.finish(running.popleft()[1])
        for stage, seconds in detector.spent.items():
            setattr(times, stage, getattr(times, stage) + seconds - before[stage])
        times.decode += batcher.decode_seconds
        times.resize += batcher.resize_seconds
        times.skipped += batcher.skipped


def _finish(detector, batch, ticket, times):
    with _naming(batch):
        found = detector.finish(ticket)
    times.images += len(found)
    rows = zip(batch.numbers, batch.paths, batch.images, batch.placements, found, strict=True)
    for number, path, image, *rest in rows:
        image = image.download(detector.gpu) if isinstance(image, DeviceImage) else image
        yield Detected(number, path, image, *rest)


@contextlib.contextmanager
def _naming(batch):
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the runtime raises
        raise UserError(f"the network failed on {', '.join(map(str, batch.paths))}: {error}") from error


@contextlib.contextmanager
def naming_results_of(path):
    """Turns an error of writing an image's results into a UserError that names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: its results could not be written ({error}); choose another --output") from error
