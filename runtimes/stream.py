"""Images from anywhere (frames of a camera, arrays) through a detector, in order, the stages beside one another."""

import collections
import concurrent.futures
import contextlib

import numpy as np

from image_batcher import preprocess

THREADS = 4


def in_order(pool, function, items, ahead):
    """Yields function(item) for each item, in order, computed in `pool` up to `ahead` items before they are asked for."""
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def detect_stream(detector, images, batch_size=1):
    """Yields (image, Detections) for each RGB image [H, W, 3] of an iterable, in order.

    The next images are taken and resized while the network runs on those before.
    """
    resizer = detector.metadata["resizer"]
    running = collections.deque()

    def finish():
        batch, ticket = running.popleft()
        return zip(batch, detector.finish(ticket), strict=True)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool, contextlib.ExitStack() as stack:
        stack.callback(lambda: [finish() for _ in range(len(running))])  # what was started must end
        prepared = in_order(pool, lambda image: (image, *preprocess(image, resizer)), images, THREADS)
        for batch in _batches(prepared, batch_size):
            frames, tensors, placements = zip(*batch, strict=True)
            shapes = np.float32([placement.true_shape for placement in placements])
            running.append((frames, detector.start(np.stack(tensors), shapes)))
            if len(running) >= detector.batches_ahead:
                yield from finish()
        while running:
            yield from finish()


def _batches(items, size):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
