"""Peaks of a CenterNet's heatmaps: found in the TensorFlow graph, and written in ONNX (center_net_meta_arch's
top_k_feature_map_locations).

Shapes: B images, h x w places, C channels.
"""

import dataclasses

import numpy as np

from tfod.graph import before_reshaping, node_name


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The best peaks of a heatmap: nodes and tensors of the TensorFlow graph."""

    top_k: str
    logits: str  # [B, h, w, C]
    window: int  # side of the square of places that a peak is the highest of; 1: every place is a peak
    tolerance: float  # by which a peak may be less than the highest
    count: int  # of what is chosen, of all channels together or of each


def find_peaks(frozen, top_k):
    """The Peaks that a TopKV2 chooses from, or None where it chooses from something else.

    Sigmoid -> MaxPool -> Sub -> Abs -> Less -> Cast -> Mul with the Sigmoid -> Reshape -> TopKV2; without a window the
    Sigmoid alone.
    """
    values, count = frozen.inputs(top_k)
    tensor, pool, tolerance = before_reshaping(frozen, values), None, 0.0
    scores, ops = tensor, ("Mul", "Cast", "Less", "Abs", "Sub")
    for op in () if frozen.op(tensor) == "Sigmoid" else ops:
        if frozen.op(tensor) != op:
            return None
        inputs = frozen.inputs(tensor)
        if op == "Mul":
            scores, tensor = sorted(inputs, key=lambda x: frozen.op(x) == "Cast")
        elif op == "Sub":
            pool = next((x for x in inputs if frozen.op(x) == "MaxPool"), None)
        else:
            tolerance = frozen.constant(inputs[1]) if op == "Less" else tolerance
            tensor = inputs[0]
    window = set(frozen.nodes[node_name(pool)].attr["ksize"].list.i[1:3]) if pool else {1}
    if frozen.op(scores) != "Sigmoid" or tolerance is None or len(window) != 1 or (pool is None and scores != tensor):
        return None
    count = frozen.constant(count)
    return Peaks(top_k, frozen.inputs(scores)[0], window.pop(), float(tolerance), int(count)) if count else None


def peak_scores(ops, logits, peaks):
    """The heatmap's scores [B, C, h, w] of its logits [B, h, w, C], 0 where no peak is."""
    scores = ops.add("Sigmoid", ops.add("Transpose", logits, perm=[0, 3, 1, 2]))
    if peaks.window == 1:
        return scores
    # SAME, which puts the odd one of an even window's padding behind.
    before, after = (peaks.window - 1) // 2, peaks.window // 2
    pads = [before, before, after, after]
    highest = ops.add("MaxPool", scores, kernel_shape=[peaks.window] * 2, strides=[1, 1], pads=pads)
    below = ops.add("Abs", ops.add("Sub", scores, highest))
    is_peak = ops.add("Less", below, np.float32(peaks.tolerance), dtype=bool)
    return ops.add("Where", is_peak, scores, np.float32(0), dtype=np.float32)


def grid_of(height, width):
    """The places of a map, row by row: [height * width, 2] float32, y and x."""
    return np.stack(np.mgrid[:height, :width], axis=-1).reshape(-1, 2).astype(np.float32)
