"""Images from anywhere (frames of a camera, arrays) through a detector, in order, the stages beside one another."""

import collections
import contextlib
import itertools

import numpy as np

from images.resizing import preprocess
from runtimes.workers import Workers


def detect_stream(detector, images, batch_size=1):
    """Yields (image, Detections) for each RGB image [H, W, 3] of an iterable, in order.

    The next images are taken and resized while the network runs on those before.
    """
    resizer = detector.metadata["resizer"]
    running = collections.deque()

    def finish():
        batch, ticket = running.popleft()
        return zip(batch, detector.finish(ticket), strict=True)

    with Workers(0) as workers, contextlib.ExitStack() as stack:
        stack.callback(lambda: [finish() for _ in range(len(running))])  # what was started must end
        prepared = workers.map(lambda image: (image, *preprocess(image, resizer)), zip(images))
        while batch := list(itertools.islice(prepared, batch_size)):
            frames, tensors, placements = zip(*batch, strict=True)
            shapes = np.float32([placement.true_shape for placement in placements])
            running.append((frames, detector.start(list(tensors), shapes)))
            if len(running) >= detector.batches_ahead:
                yield from finish()
        while running:
            yield from finish()
