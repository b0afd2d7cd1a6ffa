"""Keypoints of the tiny CenterNets: as center_net_meta_arch computes them, in the forms that exports of different years have."""

import dataclasses

import numpy as np

HEADS = ("joint_logits_0", "joint_offsets_0", "joints_0")


@dataclasses.dataclass(frozen=True)
class Joints:
    """What a test varies of a keypoint_estimation_task."""

    count: int = 5
    candidates: int = 30
    window: int = 3
    threshold: float = 0.1  # keypoint_candidate_score_threshold
    unmatched: float = 0.1  # unmatched_keypoint_score
    box_scale: float = 1.2
    search_scale: float = 0.3
    ranking: str = "min_distance"
    ranking_value: float = 1.0
    shared_offset: bool = False  # one for all keypoints
    class_id: int | None = None  # of the only class with keypoints; None: the model has one class
    boxes: bool = True  # whether candidates must lie in the object's box
    order: tuple | None = None  # keypoint ids of the label map, of a model of several classes
    year: int = 2021  # 2020: exports of July 2020, the zoo's
    tasks: int = 1

    @property
    def clips(self):
        """clip_out_of_frame_keypoints: always in 2020."""
        return self.year == 2020

    def shapes(self, channels):
        """{name of a head's last convolution: shape of its weights}."""
        offsets = 2 if self.shared_offset else 2 * self.count
        return dict(zip(HEADS, ((1, 1, channels, n) for n in (self.count, offsets, 2 * self.count)), strict=True))

    def config(self):
        """The text of the task."""
        return f"""
    keypoint_estimation_task {{
      task_name: "shape"
      keypoint_class_name: "shape"
      keypoint_candidate_score_threshold: {self.threshold}
      num_candidates_per_keypoint: {self.candidates}
      peak_max_pool_kernel_size: {self.window}
      unmatched_keypoint_score: {self.unmatched}
      box_scale: {self.box_scale}
      candidate_search_scale: {self.search_scale}
      candidate_ranking_mode: "{self.ranking}"
    }}"""


def keypoints_of(tf, joints, heads, chosen, boxes, true_shape, stride):
    """(keypoints [1, M, K, 2] normalised, scores [1, M, K]).

    heads: logits, offsets, regressed joints, each [1, h, w, ...]; chosen: scores, y, x, classes, each [M]; boxes: [M, 4] in
    places; true_shape: [2] float.
    """
    scores, y, x, classes = chosen
    if joints.class_id is None:
        points, values = refine(tf, joints, heads, y, x, boxes)
    else:
        of_class = tf.logical_and(scores > 0, tf.equal(classes, tf.fill(classes.shape, joints.class_id)))
        rows = tf.cast(tf.where(of_class)[:, 0], tf.int32)
        points, values = of_some(tf, joints, heads, rows, y, x, boxes)
    points = points * tf.reshape(stride / true_shape, [1, 1, 1, 2])
    if joints.clips:
        inside = [tf.logical_and(side >= 0.0, side <= 1.0) for side in tf.unstack(points, axis=3)]
        window = tf.constant([[0.0, 0.0, 1.0, 1.0]])
        points = tf.map_fn(lambda pair: clip(tf, *pair), (points, window), fn_output_signature=tf.float32)
        values = tf.where(tf.logical_and(*inside), values, tf.zeros_like(values))
    return points, values


def clip(tf, points, window):
    """Points [M, K, 2] within a window yxyx (TFOD: keypoint_ops.clip_to_window)."""
    y, x = tf.split(points, 2, axis=2)
    top, left, bottom, right = tf.unstack(window)
    return tf.concat([tf.maximum(tf.minimum(y, bottom), top), tf.maximum(tf.minimum(x, right), left)], axis=2)


def of_some(tf, joints, heads, rows, y, x, boxes):
    """Keypoints of the detections `rows` alone, 0 for the others (TFOD: _postprocess_keypoints_multi_class)."""
    most, count = y.shape[0], joints.count

    def some():
        order = tf.expand_dims(list(joints.order or range(count)), axis=-1)
        points, values = refine(tf, joints, heads, *(tf.gather(part, rows) for part in (y, x, boxes)))
        found = tf.shape(rows)[0]
        points = tf.scatter_nd(order, tf.transpose(points, [2, 0, 1, 3]), [count, 1, found, 2])
        values = tf.scatter_nd(order, tf.transpose(values, [2, 0, 1]), [count, 1, found])
        return tf.transpose(points, [1, 2, 0, 3]), tf.transpose(values, [1, 2, 0])

    def none():
        return tf.zeros([1, 0, count, 2]), tf.zeros([1, 0, count])

    def spread():
        parts = tf.transpose(points, [1, 0, 2, 3]), tf.transpose(values, [1, 0, 2])
        spread = tf.scatter_nd(rows[:, None], parts[0], [most, 1, count, 2])
        spread_values = tf.scatter_nd(rows[:, None], parts[1], [most, 1, count])
        return tf.transpose(spread, [1, 0, 2, 3]), tf.transpose(spread_values, [1, 0, 2])

    points, values = tf.cond(tf.shape(rows)[0] > 0, some, none)
    return tf.cond(tf.shape(rows)[0] > 0, spread, lambda: (tf.zeros([1, most, count, 2]), tf.zeros([1, most, count])))


def candidates(tf, joints, logits, offsets):
    """The best peaks of each keypoint: (points [1, N, K, 2], scores [1, N, K], valid ones [1, K])."""
    _, height, width, count = logits.shape
    scores = tf.sigmoid(logits)
    if joints.window > 1:
        highest = tf.nn.max_pool2d(scores, joints.window, 1, "SAME")
        scores = scores * tf.cast(tf.abs(scores - highest) < 1e-6, tf.float32)
    flat = tf.reshape(tf.transpose(scores, [0, 3, 1, 2]), [1, count, -1])
    values, index = tf.math.top_k(flat, joints.candidates)
    index = tf.reshape(count * index + tf.range(count)[None, :, None], [1, -1])
    place, channel = index // count, index % count
    y, x = place // width, place % width
    if joints.year == 2020:
        picked = tf.gather(tf.reshape(offsets, [1, height * width, -1]), y * width + x, batch_dims=1)
    else:
        picked = tf.gather_nd(offsets, tf.stack([tf.zeros_like(y[0]), y[0], x[0]], axis=1))[None]
    if not joints.shared_offset:
        pairs = tf.reshape(picked, [1, count * joints.candidates, -1, 2])
        if joints.year == 2020:
            picked = tf.gather(pairs, channel, batch_dims=2)
        else:
            each = tf.range(count * joints.candidates)
            picked = tf.gather_nd(pairs, tf.stack([tf.zeros_like(each), each, channel[0]], axis=1))[None]
    dy, dx = tf.unstack(picked, axis=2)
    points = tf.stack([tf.cast(y, tf.float32) + dy, tf.cast(x, tf.float32) + dx], axis=2)
    points = tf.transpose(tf.reshape(points, [1, count, joints.candidates, 2]), [0, 2, 1, 3])
    values = tf.transpose(values, [0, 2, 1])
    return points, values, tf.reduce_sum(tf.cast(values >= joints.threshold, tf.int32), axis=1)


def regressed(tf, joints, vectors, y, x):
    """Joints [1, m, K, 2] of the objects at y, x [m]."""
    _, height, width, _ = vectors.shape
    if joints.year == 2020:
        picked = tf.gather(tf.reshape(vectors, [1, height * width, -1]), (y * width + x)[None], batch_dims=1)
    else:
        picked = tf.gather_nd(vectors, tf.stack([tf.zeros_like(y), y, x], axis=1))
    dy, dx = tf.unstack(tf.reshape(picked, [1, -1, joints.count, 2]), axis=3)
    y, x = tf.cast(y[None, :, None], tf.float32), tf.cast(x[None, :, None], tf.float32)
    return tf.reshape(
        tf.reshape(tf.stack([y + dy, x + dx], axis=3), [1, -1, 2 * joints.count]), [1, -1, joints.count, 2]
    )


def ranked(tf, joints, distances, values, boxes):
    """Index of the best candidate [1, m, K] (TFOD: refine_keypoints)."""
    if joints.ranking == "min_distance":
        return tf.argmin(distances, axis=2)
    if joints.ranking == "gaussian_weighted":  # with one sigma for all
        return tf.argmax(values[:, None] * tf.exp(-distances * distances / (2 * joints.ranking_value**2)), axis=2)
    if joints.ranking == "score_distance_ratio":
        away = distances + joints.ranking_value
    else:
        top, left, bottom, right = tf.unstack(boxes[None], axis=2)
        away = distances + (tf.maximum(bottom - top, right - left) * joints.ranking_value)[:, :, None, None]
    return tf.argmax(values[:, None] / away, axis=2)


def refine(tf, joints, heads, y, x, boxes):
    """(keypoints [1, m, K, 2] in places, scores [1, m, K]) of the objects at y, x [m] with boxes [m, 4] (TFOD: refine_keypoints)."""
    logits, offsets, vectors = heads
    starts = regressed(tf, joints, vectors, y, x)
    points, values, valid = candidates(tf, joints, logits, offsets)
    invalid = tf.tile(tf.range(joints.candidates)[None, :, None], [1, 1, joints.count]) >= valid[:, None]
    targets = points
    if joints.year == 2020:
        ones = tf.ones_like(values)
        targets = points * tf.where(invalid, np.nan * ones, ones)[..., None]
    apart = starts[:, :, None] - targets[:, None]
    distances = tf.sqrt(tf.reduce_sum(apart * apart, axis=-1))  # [1, m, N, K]
    if joints.year != 2020:
        far = tf.tile(invalid[:, None], [1, tf.shape(y)[0], 1, 1])
        distances = tf.where(far, tf.ones_like(distances) * 1e5, distances)
    best = tf.transpose(ranked(tf, joints, distances, values, boxes), [0, 2, 1])  # [1, K, m]
    near = tf.transpose(tf.gather(tf.transpose(points, [0, 2, 1, 3]), best, batch_dims=2), [0, 2, 1, 3])
    scores = tf.transpose(tf.gather(tf.transpose(values, [0, 2, 1]), best, batch_dims=2), [0, 2, 1])
    least = joints.unmatched if joints.year == 2020 else joints.threshold
    failed = tf.cast(scores < least, tf.int32)
    if joints.boxes:
        high, wide = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        cy, cx = boxes[:, 0] + high / 2, boxes[:, 1] + wide / 2
        half = tf.constant(0.5) * tf.constant(joints.box_scale)
        scaled = tf.stack([cy - half * high, cx - half * wide, cy + half * high, cx + half * wide], axis=1)
        top, left, bottom, right = tf.unstack(tf.tile(scaled[None, :, None], [1, 1, joints.count, 1]), axis=3)
        radius = tf.maximum(bottom - top, right - left) * joints.search_scale
        tests = near[..., 0] < top, near[..., 0] > bottom, near[..., 1] < left, near[..., 1] > right
        far = tf.reduce_min(distances, axis=2) > radius
        for test in (*tests, far):
            failed += tf.cast(test, tf.int32)
    stays = failed > 0
    points = tf.where(tf.tile(stays[..., None], [1, 1, 1, 2]), starts, near)
    return points, tf.where(stays, joints.unmatched * tf.ones_like(scores), scores)
