"""A CenterNet's keypoints: what refines them found in the TensorFlow graph, and written in ONNX.

Joints are regressed from the middle of an object; each then moves to the best peak near it in a heatmap of its own
(center_net_meta_arch: prediction_tensors_to_keypoint_candidates, refine_keypoints).

Shapes: B images, h x w places of the heatmap, M detections, K keypoints of an object, N candidates for each of them. Points
are y, x in places unless it says otherwise.
"""

import dataclasses

from commandline import warn

import numpy as np

from tfod.graph import PICKING, RESHAPING, before_reshaping, node_name
from tfod.peaks import Peaks, find_peaks, grid_of, peak_scores

# The heads, as Parts.outputs names them: logits of the joints' heatmaps [B, h, w, K]; from there to the joint itself
# [B, h, w, 2] or one for each keypoint [B, h, w, 2 K]; from the middle of an object to its joints [B, h, w, 2 K].
HEADS = ("joint_logits", "joint_offsets", "joints")
# Ops between a head and what picks from it: of one image in a batch, in a branch of a condition.
CUTTING = {*RESHAPING, "StridedSlice", "Switch"}
SELECTS = {"Select", "SelectV2"}
# How far an invalid candidate is (refine_keypoints).
FAR = 1e5


@dataclasses.dataclass(frozen=True)
class Task:
    """How keypoints are computed."""

    heads: dict  # {name of HEADS: tensor}
    peaks: Peaks  # of the joints' heatmaps
    valid_from: float  # score of a candidate that is looked at
    matched_from: float  # score of one that a joint moves to
    unmatched_score: float  # of a joint that stays where it was regressed
    ranking: str  # of RANKINGS
    ranking_value: object  # see RANKINGS
    # Of the box that a candidate must lie in: its size in sizes of the object's box, and the way there in its longer sides;
    # None: it may lie anywhere.
    box_scale: float | None
    search_scale: float | None
    clips_boxes: bool  # to the map, before that
    clips_points: bool  # to the image; what lies outside has the score 0
    class_id: int | None  # of the objects that have keypoints, from 0; None: all
    order: tuple | None  # place of each keypoint among the results; None: as in the heads


class _Unknown(Exception):
    """Why a graph's keypoints are not converted."""


def find(frozen, centre_top_k):
    """The Task of a FrozenGraph; None where it gives no keypoints, or, with a warning, none that are converted.

    centre_top_k: the node that chooses the detections.
    """
    if not {"detection_keypoints", "detection_keypoint_scores"} <= frozen.outputs.keys():
        return None
    try:
        return _Search(frozen, centre_top_k).task()
    except _Unknown as reason:
        warn(f"keypoints are left out, other detections are converted: {reason}")
        return None


class _Search:
    """The way through a graph to a Task."""

    def __init__(self, frozen, centre_top_k):
        self.frozen, self.nodes = frozen, frozen.ancestors(frozen.outputs["detection_keypoints"])
        self.nodes |= frozen.ancestors(frozen.outputs["detection_keypoint_scores"])
        self.boxes = frozen.ancestors(frozen.outputs["detection_boxes"])
        self.chosen = frozen.descendants([centre_top_k])
        self.centre = centre_top_k

    def task(self):
        frozen = self.frozen
        found = [(name, find_peaks(frozen, name)) for name in self._of("TopKV2") if name not in self.boxes]
        if len(found) != 1 or found[0][1] is None:
            what = f"{len(found)} keypoint tasks" if len(found) > 1 else "they are chosen otherwise than by candidates"
            raise _Unknown(f"the model has {what} (one task with several candidates for each keypoint is known)")
        peaks = found[0][1]
        mask, unmatched, _ = self._choice()
        limits = self._limits(mask)
        candidates = frozen.descendants([peaks.top_k])
        ranking, value = self._ranking()
        if ranking in NEED_BOXES and limits["box_scale"] is None:
            raise _Unknown(f"{ranking} without boxes")
        return Task(
            self._heads(peaks, candidates),
            peaks,
            self._valid_from(peaks.top_k),
            unmatched_score=unmatched,
            ranking=ranking,
            ranking_value=value,
            clips_points=self._clips_points(),
            class_id=self._class_id(),
            order=self._order(),
            **limits,
        )

    def _of(self, *ops):
        return [name for name, op in self.nodes.items() if op in ops]

    def _constant(self, tensor):
        """A constant's value, through reshaping, into the branch of a condition too; None for what is none."""
        while self.frozen.op(tensor) in {*RESHAPING, "Switch"}:
            tensor = self.frozen.inputs(tensor)[0]
        return self.frozen.constant(tensor)

    def _factor(self, tensor):
        """The constant in a product, or None."""
        tensor = before_reshaping(self.frozen, tensor)
        if self.frozen.op(tensor) != "Mul":
            return None
        values = [x for x in map(self._constant, self.frozen.inputs(tensor)) if x is not None]
        return float(np.prod([x.reshape(-1)[0] for x in values])) if values else None

    def _choice(self):
        """(number of failed tests, unmatched score, candidates' scores): where joints stay or move."""
        found = []
        for name in self._of(*SELECTS):
            condition, stays, moves = self.frozen.inputs(name)
            condition = before_reshaping(self.frozen, condition)
            score = self._factor(stays)
            if self.frozen.op(condition) == "Greater" and score is not None:
                found.append((self.frozen.inputs(condition)[0], score, moves))
        if len(found) != 1:
            raise _Unknown("how they move to candidates was not found")
        return found[0]

    def _tests(self, tensor):
        """The comparisons that are added up to a number of failed tests."""
        if self.frozen.op(tensor) in ("AddV2", "Add", "Cast"):
            return [test for x in self.frozen.inputs(tensor) for test in self._tests(x)]
        return [tensor]

    def _limits(self, mask):
        """matched_from, box_scale, search_scale, clips_boxes: what the tests compare with."""
        frozen, scores, radius, edges = self.frozen, [], None, []
        for test in self._tests(mask):
            value, limit = frozen.inputs(test)
            if (constant := self._constant(limit)) is not None:
                scores.append(float(constant))
            elif frozen.op(before_reshaping(frozen, value)) == "Min":
                radius = self._factor(limit)
            else:
                edges.append(limit)
        if len(scores) != 1 or len(edges) not in (0, 4) or bool(edges) != (radius is not None):
            raise _Unknown("the tests of their candidates were not found")
        if not edges:
            return {"matched_from": scores[0], "box_scale": None, "search_scale": None, "clips_boxes": False}
        behind = {name: op for name, op in frozen.ancestors(edges[0]).items() if name in self.chosen}
        if not any(name in self.boxes and op in PICKING for name, op in behind.items()):
            raise _Unknown("candidates are looked for in the box around the joints, not in the object's")
        halves = [self._factor(name) for name in frozen.ancestors(edges[0]) if self._is_constant_product(name)]
        if not halves:
            raise _Unknown("the size of the box of their candidates was not found")
        return {
            "matched_from": scores[0],
            "box_scale": 2 * halves[0],
            "search_scale": radius,
            "clips_boxes": "Minimum" in behind.values(),
        }

    def _is_constant_product(self, name):
        constants = [self._constant(x) is not None for x in self.frozen.inputs(name)]
        return self.frozen.op(name) == "Mul" and all(constants)

    def _heads(self, peaks, candidates):
        """Of what is picked from the network: by a candidate's place, and by an object's alone."""
        by_candidate, by_object = set(), set()
        for name in self._of(*PICKING):
            source = self._source(self.frozen.inputs(name)[0])
            if name in self.chosen | candidates and node_name(source) not in self.chosen | candidates:
                if name in candidates:
                    by_candidate.add(source)
                elif name not in self.boxes:
                    by_object.add(source)
        if len(by_candidate) != 1 or len(by_object) != 1:
            raise _Unknown("their heads were not found")
        heads = self._source(peaks.logits), by_candidate.pop(), by_object.pop()
        return dict(zip(HEADS, heads, strict=True))

    def _source(self, tensor):
        while self.frozen.op(tensor) in CUTTING:
            tensor = self.frozen.inputs(tensor)[0]
        return tensor

    def _valid_from(self, top_k):
        """The constant that candidates' scores are compared with to count the valid ones."""
        found = set()
        for name in self._of("GreaterEqual"):
            value, limit = self.frozen.inputs(name)
            if node_name(before_reshaping(self.frozen, value)) == top_k and self._constant(limit) is not None:
                found.add(float(self._constant(limit)))
        if len(found) != 1:
            raise _Unknown("the least score of their candidates was not found")
        return found.pop()

    def _ranking(self):
        """(of RANKINGS, its value), of which candidate is the best."""
        frozen = self.frozen
        if self._of("ArgMin"):
            return "min_distance", None
        found = [frozen.inputs(name)[0] for name in self._of("ArgMax")]
        op = frozen.op(found[0]) if len(found) == 1 else None
        if op == "RealDiv":
            addends = frozen.inputs(frozen.inputs(found[0])[1])
            constants = [x for x in map(self._constant, addends) if x is not None]
            if constants:
                return "score_distance_ratio", float(constants[0])
            factors = [x for x in map(self._size_factor, addends) if x is not None]
            if factors:
                return "score_scaled_distance_ratio", factors[0]
        raise _Unknown(
            "candidate_ranking_mode is none of min_distance, score_distance_ratio, score_scaled_distance_ratio"
        )

    def _size_factor(self, tensor):
        """The factor of the longer side of a box, or None."""
        return self._factor(self._source(tensor))

    def _clips_points(self):
        """Whether scores of points outside the image become 0 (clip_out_of_frame_keypoints)."""
        last = before_reshaping(self.frozen, self.frozen.outputs["detection_keypoint_scores"])
        if self.frozen.op(last) not in SELECTS:
            return False
        return self.frozen.op(before_reshaping(self.frozen, self.frozen.inputs(last)[0])) == "LogicalAnd"

    def _class_id(self):
        """The class that an object's is compared with (_get_instance_indices)."""
        found = []
        for name in self._of("Equal"):
            if name in self.chosen:
                filled = [x for x in self.frozen.inputs(name) if node_name(x) not in self.chosen]
                values = [self.frozen.inputs(x)[1] if self.frozen.op(x) == "Fill" else x for x in filled]
                found += [self._constant(x) for x in values]
        scatters = self._of("ScatterNd")
        if len(found) > 1 or bool(found) != bool(scatters) or any(value is None for value in found):
            raise _Unknown("the class that they are of was not found")
        return int(found[0].reshape(-1)[0]) if found else None

    def _order(self):
        """The rows that keypoints are scattered to (_pad_to_full_keypoint_dim)."""
        orders = set()
        for name in self._of("ScatterNd"):
            rows = self.frozen.inputs(name)[0]
            if self._constant(rows) is not None:
                orders.add(tuple(self._constant(rows).reshape(-1).tolist()))
            elif node_name(rows) not in self.chosen:  # else of the detections that have keypoints
                raise _Unknown("their order was not found")
        if len(orders) > 1 or any(sorted(order) != list(range(len(order))) for order in orders):
            raise _Unknown("their order was not found")
        return orders.pop() if orders else None


def add_keypoints(ops, network, task, places, corners):
    """Keypoints of the detections at `places` [B, M]: (points [B, M, K, 2], scores [B, M, K]).

    corners: their boxes [B, M, 4] yxyx in places, not clipped.
    """
    _, height, width, count = network.shapes["joint_logits"]
    grid = grid_of(height, width)
    points, scores, kept = candidates(ops, network, task, grid)  # [B, K * N, 2], [B, K, N]
    joints = ops.gather_rows(ops.reshape(network.outputs["joints"], [0, height * width, 2 * count]), places)
    middles = ops.add("Unsqueeze", ops.add("Gather", grid, places, axis=0), np.int64([2]))
    joints = ops.add("Add", ops.reshape(joints, [0, -1, count, 2]), middles)
    joints = ops.add("Transpose", joints, perm=[0, 2, 1, 3])  # [B, K, M, 2]
    distances = distances_to(ops, joints, ops.reshape(points, [0, count, kept, 2]))  # [B, K, M, N]
    each = ops.add("Unsqueeze", scores, np.int64([2]))
    is_valid = ops.add("GreaterOrEqual", each, np.float32(task.valid_from), dtype=bool)
    distances = ops.add("Where", is_valid, distances, np.float32(FAR), dtype=np.float32)
    if task.clips_boxes:
        corners = ops.add("Min", ops.add("Max", corners, np.float32(0)), np.float32([height, width] * 2))
    low, high = (ops.add("Unsqueeze", ops.slice(corners, 2, i, i + 2), np.int64([1])) for i in (0, 2))  # [B, 1, M, 2]
    side = ops.add("ReduceMax", ops.add("Sub", high, low), axes=[3], keepdims=1)
    best = RANKINGS[task.ranking](ops, distances, each, side, task.ranking_value)  # [B, K, M]
    rows = ops.add("Add", best, np.arange(count)[:, None] * kept)
    rows = ops.reshape(rows, [0, -1])
    points = ops.reshape(ops.gather_rows(points, rows), [0, count, -1, 2])  # [B, K, M, 2]
    scores = ops.reshape(ops.gather_rows(ops.reshape(scores, [0, count * kept]), rows), [0, count, -1])
    stays = ops.add("Less", scores, np.float32(task.matched_from), dtype=bool)
    if task.box_scale is not None:
        stays = ops.add("Or", stays, is_far(ops, task, points, distances, low, high))
    points = ops.add("Where", ops.add("Unsqueeze", stays, np.int64([3])), joints, points, dtype=np.float32)
    scores = ops.add("Where", stays, np.float32(task.unmatched_score), scores, dtype=np.float32)
    points, scores = ops.add("Transpose", points, perm=[0, 2, 1, 3]), ops.add("Transpose", scores, perm=[0, 2, 1])
    if task.order is not None and list(task.order) != list(range(count)):
        back = np.argsort(task.order)
        points, scores = (ops.add("Gather", x, back, axis=2) for x in (points, scores))
    return points, scores


def candidates(ops, network, task, grid):
    """The best peaks for each keypoint: (points [B, K * N, 2], scores [B, K, N], falling, N)."""
    _, height, width, count = network.shapes["joint_logits"]
    places, kept = height * width, min(task.peaks.count, height * width)
    scores = peak_scores(ops, network.outputs["joint_logits"], task.peaks)
    scores, rows = ops.top_k(ops.reshape(scores, [0, count, places]), kept)
    offsets, flat = network.outputs["joint_offsets"], ops.reshape(rows, [0, count * kept])
    if network.shapes["joint_offsets"][-1] == 2 * count and count > 1:  # one for each keypoint
        offsets = ops.add("Transpose", ops.reshape(offsets, [0, places, count, 2]), perm=[0, 2, 1, 3])
        rows = ops.reshape(ops.add("Add", rows, np.arange(count)[:, None] * places), [0, count * kept])
        offsets = ops.gather_rows(ops.reshape(offsets, [0, count * places, 2]), rows)
    else:
        offsets = ops.gather_rows(ops.reshape(offsets, [0, places, 2]), flat)
    return ops.add("Add", ops.add("Gather", grid, flat, axis=0), offsets), scores, kept


def distances_to(ops, joints, points):
    """Distances [B, K, M, N] of joints [B, K, M, 2] and points [B, K, N, 2]."""
    points = ops.add("Transpose", points, perm=[0, 1, 3, 2])  # [B, K, 2, N]
    squares = []
    for axis in (0, 1):
        apart = ops.add("Sub", ops.slice(joints, 3, axis, axis + 1), ops.slice(points, 2, axis, axis + 1))
        squares.append(ops.add("Mul", apart, apart))
    return ops.add("Sqrt", ops.add("Add", *squares))


def is_far(ops, task, points, distances, low, high):
    """Whether points [B, K, M, 2] lie outside the boxes from `low` to `high` [B, 1, M, 2], larger by box_scale, or no
    candidate is near enough: [B, K, M] bool."""
    size = ops.add("Sub", high, low)
    middle = ops.add("Add", low, ops.add("Mul", size, np.float32(0.5)))
    reach = ops.add("Mul", size, np.float32(0.5) * np.float32(task.box_scale))
    low, high = ops.add("Sub", middle, reach), ops.add("Add", middle, reach)
    outside = ops.add("Max", ops.add("Sub", low, points), ops.add("Sub", points, high))
    outside = ops.add("ReduceMax", outside, axes=[3], keepdims=0)
    radius = ops.add("ReduceMax", ops.add("Sub", high, low), axes=[3], keepdims=0)  # [B, 1, M]
    radius = ops.add("Mul", radius, np.float32(task.search_scale))
    nearest = ops.add("ReduceMin", distances, axes=[3], keepdims=0)
    return ops.add(
        "Or",
        ops.add("Greater", outside, np.float32(0), dtype=bool),
        ops.add("Greater", nearest, radius, dtype=bool),
    )


def to_image(ops, points, window):
    """Points [B, M, K, 2] normalised to the input -> normalised to the true image; window: see boxes."""
    return points if window is None else ops.add("Div", points, ops.add("Unsqueeze", window, np.int64([1, 2])))


def clip_to_image(ops, points, scores):
    """Points [B, M, K, 2], normalised to the image, clipped to it; the scores [B, M, K] of those outside are 0."""
    inside = ops.add("Clip", points, np.float32(0), np.float32(1))
    moved = ops.add("ReduceMax", ops.add("Abs", ops.add("Sub", points, inside)), axes=[3], keepdims=0)
    outside = ops.add("Greater", moved, np.float32(0), dtype=bool)
    return inside, ops.add("Where", outside, np.float32(0), scores, dtype=np.float32)


def _nearest(ops, distances, *_):
    return ops.add("ArgMin", distances, dtype=np.int64, axis=3, keepdims=0)


def _best_by_distance(ops, distances, scores, _, offset):
    ratio = ops.add("Div", scores, ops.add("Add", distances, np.float32(offset)))
    return ops.add("ArgMax", ratio, dtype=np.int64, axis=3, keepdims=0)


def _best_by_size(ops, distances, scores, side, factor):
    ratio = ops.add("Div", scores, ops.add("Add", distances, ops.add("Mul", side, np.float32(factor))))
    return ops.add("ArgMax", ratio, dtype=np.int64, axis=3, keepdims=0)


# candidate_ranking_mode -> function of (ops, distances [B, K, M, N], scores [B, K, 1, N], longer sides of the boxes
# [B, 1, M, 1], value) that gives the best candidates [B, K, M]. value: score_distance_offset, score_distance_multiplier.
RANKINGS = {
    "min_distance": _nearest,
    "score_distance_ratio": _best_by_distance,
    "score_scaled_distance_ratio": _best_by_size,
}
NEED_BOXES = {"score_scaled_distance_ratio"}
