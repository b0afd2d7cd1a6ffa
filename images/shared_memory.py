"""Images in memory that worker processes share with the one that started them (runtimes.workers)."""

import dataclasses
import math

import numpy as np

# What a worker process shares with the one that started it: memories for tensors, and an Arena for decoded images.
SHARED, PICTURES = [], []


def attach(memories, pictures):
    """Called in a new worker process: takes its shared memories (runtimes.workers)."""
    SHARED[:], PICTURES[:] = memories, [pictures]


def rows_of(memory, shape, dtype):
    """A shared memory as an array [n, *shape]."""
    return np.frombuffer(memory, dtype).reshape(-1, *shape)


class Room:
    """A part of the memory for decoded images, free again when nothing holds this any more."""

    def __init__(self, free):
        """free: where the free ones begin (runtimes.workers)."""
        self.begin, self._free = free.pop(), free

    def __del__(self):
        self._free.append(self.begin)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded image in memory that worker processes share. To one of them it comes as an array [height, width, 3]."""

    room: Room  # what it lies in
    begin: int
    shape: tuple

    def __reduce__(self):
        return picture_at, (self.begin, self.shape)


def picture_at(begin, shape):
    """In a worker process: its memory for decoded images from byte `begin` on as an array uint8."""
    return np.frombuffer(PICTURES[0].buffer, np.uint8, math.prod(shape), begin).reshape(shape)
