"""Boxes: TFOD's decoder, found in a TensorFlow graph and written in ONNX; clipping; overlaps.

Shapes: B images, N anchors. Boxes are [ymin, xmin, ymax, xmax], normalised to the network's input unless it says
otherwise. A window [B, 2] is the height and width of the true image in the network's input, normalised; None: the image
fills it.
"""

import dataclasses

import numpy as np

from tfod.graph import ModelError, before_reshaping, node_name

# Of normalised boxes: half a pixel of 500.
THIN = 1e-3
# Ops that split boxes into their coordinates.
COLUMNS = {"Unpack", "Split", "SplitV"}


@dataclasses.dataclass(frozen=True)
class BoxDecoder:
    """What a box decoder takes in, as names of TensorFlow tensors."""

    encodings: str  # [..., 4]: ty, tx, th, tw
    references: str  # [..., 4] yxyx: anchors, or proposals
    scales: tuple  # that the encodings are divided by: y, x, height, width


def find_box_decoder(frozen, boxes):
    """Walks back from decoded boxes to the BoxDecoder that made them: the nearest one (TFOD: FasterRcnnBoxCoder._decode).

    A decoder has two exponentials, of the columns th and tw of its encodings; each multiplies a side of an anchor.
    """
    exponentials = [name for name, op in frozen.ancestors(boxes).items() if op == "Exp"][:2]
    sources, references = set(), set()
    for name in exponentials:
        sources.add(before_reshaping(frozen, _column_source(frozen, name)))
        for product in frozen.consumers(name):
            sides = [x for x in frozen.inputs(product) if node_name(x) != name]
            references.update(before_reshaping(frozen, _column_source(frozen, side)) for side in sides)
    if len(exponentials) != 2 or len(sources) != 1 or len(references) != 1:
        raise ModelError("the SavedModel's box decoder was not found behind its boxes; is it a TFOD detection model?")
    return BoxDecoder(sources.pop(), references.pop(), _box_scales(frozen, exponentials[0]))


def _box_scales(frozen, exponential):
    """The constants that the four columns of the encodings are divided by; 1 where there is no division."""
    tensor = exponential
    while frozen.op(tensor) not in COLUMNS:
        tensor = frozen.inputs(tensor)[0]
    scales = [1.0] * 4
    for reader in frozen.consumers(node_name(tensor)):
        column, divisor = [*frozen.inputs(reader), None, None][:2]
        if frozen.op(reader) == "RealDiv" and frozen.constant(divisor) is not None:
            scales[int(column.split(":")[1]) if ":" in column else 0] = float(frozen.constant(divisor))
    return tuple(scales)


def _column_source(frozen, tensor):
    """Back through arithmetic to the node that split a [..., 4] tensor into columns; returns what it split."""
    while frozen.op(tensor) not in COLUMNS:
        tensor = frozen.inputs(tensor)[0]
    return frozen.inputs(tensor)[1 if frozen.op(tensor) == "Split" else 0]


def centre_and_size(boxes):
    """Array [N, 4] yxyx -> [N, 4] float32: centre y, centre x, height, width."""
    size = boxes[:, 2:] - boxes[:, :2]
    return np.concatenate([boxes[:, :2] + size / 2, size], axis=1).astype(np.float32)


def decode_boxes(ops, encodings, reference, scales):
    """encodings [..., 4] (ty, tx, th, tw) and reference boxes [..., 4] (centre y, x, height, width) -> boxes yxyx.

    TFOD's FasterRcnnBoxCoder: y = ty / y_scale * ha + ya, h = exp(th / height_scale) * ha (Ren et al., 2015).
    scales: y, x, height, width.
    """
    centre, size = (ops.add("Slice", reference, *_last_axis(i), dtype=np.float32) for i in (0, 2))
    encodings = ops.add("Div", encodings, np.float32(scales))
    shift, stretch = (ops.add("Slice", encodings, *_last_axis(i), dtype=np.float32) for i in (0, 2))
    centre = ops.add("Add", ops.add("Mul", shift, size), centre)
    half = ops.add("Mul", ops.add("Mul", ops.add("Exp", stretch), size), np.float32(0.5))
    return ops.add("Concat", ops.add("Sub", centre, half), ops.add("Add", centre, half), axis=-1)


def _last_axis(start):
    """Slice inputs for two columns of the last axis."""
    return np.int64([start]), np.int64([start + 2]), np.int64([-1])


def clip_boxes(ops, boxes, window):
    """boxes [B, N, 4] clipped to the window [B, 2], or to the whole input."""
    if window is None:
        return ops.add("Clip", boxes, np.float32(0), np.float32(1))
    return ops.add("Min", ops.add("Max", boxes, np.float32(0)), _twice(ops, window))


def to_window(ops, boxes, window):
    """boxes [B, N, 4] normalised to the input -> normalised to the true image."""
    return boxes if window is None else ops.add("Div", boxes, _twice(ops, window))


def _twice(ops, window):
    """window [B, 2] -> [B, 1, 4]: a bound for each coordinate of a box."""
    return ops.add("Unsqueeze", ops.add("Concat", window, window, axis=1), np.int64([1]))


def box_iou(a, b):
    """Intersection over union of boxes [N, 4] and [M, 4] -> [N, M].

    A box without area overlaps nothing, though it be a CenterNet's detection: where one of `a` is thinner than THIN, its
    overlap with a box whose corners are as near as that counts as 1.
    """
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])  # [N, M, 2]
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = (bottom_right - top_left).clip(min=0).prod(axis=2)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).clip(min=0).prod(axis=1) for x in (a, b))
    union = area_a[:, None] + area_b[None] - inter
    iou = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    for i in np.flatnonzero((a[:, 2:] - a[:, :2]).min(axis=1) < THIN):
        iou[i, np.abs(a[i] - b).max(axis=1) < THIN] = 1
    return iou
