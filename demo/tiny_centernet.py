"""Builds a tiny CenterNet with made-up weights and exports it as TFOD exports its own, to test the conversion of CenterNets.

    python demo/tiny_centernet.py --output build/tiny_centernet

The graph follows center_net_meta_arch: resized and padded first, colours normalised after (red and blue swapped for some
backbones), heads at stride 4, the best peaks of the heatmap. A few kB of weights; its detections mean nothing.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from commandline import run

from demo.exports import write_export
from demo.tiny_keypoints import HEADS, Joints, keypoints_of

STRIDE = 4
CHANNELS = 16
# What TFOD's feature extractors do to colours: (channels, mean, deviation); hourglass: as the zoo's configs say.
BACKBONES = {
    "resnet_v1_50_fpn": ([2, 1, 0], (103.939, 116.779, 123.68), (1.0, 1.0, 1.0)),
    "resnet_v2_50": ([0, 1, 2], (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "mobilenet_v2_fpn": ([0, 1, 2], (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "hourglass_20": ([2, 1, 0], (104.01362, 114.034225, 119.916595), (73.60277, 69.89082, 70.91508)),
}


@dataclasses.dataclass(frozen=True)
class Export:
    """What a test varies."""

    backbone: str = "resnet_v1_50_fpn"
    keep_aspect: bool = True
    side: int = 96  # of the network's input, pixels
    total: int = 100
    levels: int | None = None  # heatmap logits rounded to so many a unit: equal scores in many places
    seed: int = 1
    classes: int = 4
    joints: Joints | None = None  # of its keypoints
    size: float = 2.0  # of boxes without weights, places


def make_weights(export):
    """{name: float32 array} of a network that spreads its scores."""
    rng = np.random.default_rng(export.seed)
    shapes = {
        "conv1": (3, 3, 3, 12),
        "conv2": (3, 3, 12, CHANNELS),
        "deep": (3, 3, CHANNELS, CHANNELS),
        "up": (3, 3, CHANNELS, CHANNELS),  # transposed: [h, w, out, in]
        "depthwise": (3, 3, CHANNELS, 1),
        "second": (3, 3, CHANNELS, CHANNELS),
    }
    for stack in (0, 1):
        shapes |= {f"{head}_{stack}": (3, 3, CHANNELS, CHANNELS) for head in ("center", "box_scale", "box_offset")}
        shapes |= {
            f"center_{stack}/last": (1, 1, CHANNELS, export.classes),
            f"box_scale_{stack}/last": (1, 1, CHANNELS, 2),
        }
        shapes[f"box_offset_{stack}/last"] = (1, 1, CHANNELS, 2)
    if export.joints:
        lasts = export.joints.shapes(CHANNELS)
        shapes |= {head: (3, 3, CHANNELS, CHANNELS) for head in lasts} | {f"{head}/last": lasts[head] for head in lasts}
    gain = {"conv1": 0.02 if BACKBONES[export.backbone][2][0] == 1 else 1.6}
    gain |= {f"{head}_{stack}/last": 2.0 for stack in (0, 1) for head in ("center", "box_scale", "box_offset")}
    gain |= {f"{HEADS[0]}/last": 3.0, f"{HEADS[2]}/last": 1.5}
    weights = {}
    for name, shape in shapes.items():
        inputs = np.prod(shape[:-1]) if name != "depthwise" else 9
        weights[name] = (rng.normal(size=shape) * gain.get(name, 1.6) / np.sqrt(inputs)).astype(np.float32)
    return weights


def best_peaks(tf, logits, count):
    """Heatmap logits [1, h, w, C] -> (scores, y, x, classes), each [count] (TFOD: top_k_feature_map_locations)."""
    _, _, width, classes = logits.shape
    scores = tf.sigmoid(logits)
    highest = tf.nn.max_pool2d(scores, 3, 1, "SAME")
    peaks = tf.cast(tf.abs(scores - highest) < 1e-6, tf.float32)
    scores, index = tf.math.top_k(tf.reshape(scores * peaks, [1, -1]), count)
    place = index[0] // classes
    return scores[0], place // width, place - place // width * width, index[0] - place * classes


def boxes_at(tf, y, x, sizes, offsets, year=2021):
    """Boxes [count, 4] in places (TFOD: prediction_tensors_to_boxes). sizes, offsets: [1, h, w, 2].

    year: 2020: as exports of July 2020 pick, and do not clip.
    """
    high, wide = (float(side) for side in sizes.shape[1:3])
    if year == 2020:
        index = (y * sizes.shape[2] + x)[None]
        sizes, offsets = (tf.gather(tf.reshape(head, [1, -1, 2]), index, batch_dims=1) for head in (sizes, offsets))
    else:
        index = tf.stack([tf.zeros_like(y), y, x], axis=1)
        sizes, offsets = (tf.reshape(tf.gather_nd(head, index), [1, -1, 2]) for head in (sizes, offsets))
    (height, width), (y_offset, x_offset) = (tf.unstack(part[0], axis=1) for part in (tf.maximum(sizes, 0.0), offsets))
    y, x = tf.cast(y, tf.float32) + y_offset, tf.cast(x, tf.float32) + x_offset
    corners = (y - height / 2, high), (x - width / 2, wide), (y + height / 2, high), (x + width / 2, wide)
    if year == 2020:
        return tf.stack([corner for corner, _ in corners], axis=1)
    return tf.stack([tf.clip_by_value(corner, 0.0, limit) for corner, limit in corners], axis=1)


def exported_module(tf, export):
    """The detector as TFOD's exporter writes it for an image_tensor."""
    side = export.side
    order, mean, deviation = BACKBONES[export.backbone]

    def preprocess(image):
        image, size = tf.cast(image, tf.float32), tf.constant([side, side])
        if export.keep_aspect:
            full = tf.cast(tf.shape(image)[:2], tf.float32)
            size = tf.cast(tf.round(full * (side / tf.reduce_max(full))), tf.int32)
        image = tf.compat.v1.image.resize_bilinear(image[None], size)[0]
        image = tf.image.pad_to_bounding_box(image, 0, 0, side, side)
        return (tf.gather(image, order, axis=-1) - mean) / deviation, size

    class Detector(tf.Module):
        def __init__(self):
            super().__init__()
            self.weights = {name: tf.Variable(value) for name, value in make_weights(export).items()}

        def conv(self, x, name, stride=1):
            return tf.nn.conv2d(x, self.weights[name], stride, "SAME")

        def up(self, x, shape):
            """Twice as large: as the backbone does it."""
            if export.backbone == "resnet_v2_50":
                return tf.nn.conv2d_transpose(x, self.weights["up"], shape, 2, "SAME")
            return tf.compat.v1.image.resize_nearest_neighbor(x, shape[1:3])

        def head(self, x, name):
            return self.conv(tf.nn.relu(self.conv(x, name)), f"{name}/last")

        @tf.function(input_signature=[tf.TensorSpec([1, None, None, 3], "uint8", name="input_tensor")])
        def __call__(self, input_tensor):
            spec = (tf.TensorSpec([side, side, 3], tf.float32), tf.TensorSpec([2], tf.int32))
            x, true_shapes = tf.map_fn(preprocess, input_tensor, fn_output_signature=spec)
            x = tf.nn.relu(self.conv(tf.nn.relu(self.conv(x, "conv1", 2)), "conv2", 2))
            x = x + self.up(tf.nn.relu(self.conv(x, "deep", 2)), x.shape)
            if export.backbone == "mobilenet_v2_fpn":
                x = tf.nn.relu(tf.nn.depthwise_conv2d(x, self.weights["depthwise"], [1, 1, 1, 1], "SAME"))
            x = tf.tanh(x)  # so that no picture makes all scores alike
            stacks = [x, x - tf.tanh(self.conv(x, "second"))][: 2 if export.backbone == "hourglass_20" else 1]
            heads = [
                [self.head(x, f"{name}_{i}") for name in ("center", "box_scale", "box_offset")]
                for i, x in enumerate(stacks)
            ]
            centres, sizes, offsets = heads[-1]
            centres -= 2.19  # TFOD's heatmap_bias_init
            if export.levels:
                centres = tf.round(centres * export.levels) / export.levels
            features = stacks[-1]
            scores, y, x, classes = chosen = best_peaks(tf, centres, export.total)
            strided = boxes_at(tf, y, x, export.size + sizes, offsets, export.joints.year if export.joints else 2021)
            true_shape = tf.tile(tf.cast(true_shapes[0], tf.float32), [2])
            detections = {
                "detection_boxes": tf.clip_by_value(strided * STRIDE / true_shape, 0.0, 1.0)[None],
                "detection_scores": scores[None],
                "detection_classes": tf.cast(classes, tf.float32)[None] + 1,
                "num_detections": tf.cast(tf.math.count_nonzero(scores > 0), tf.float32)[None],
                "detection_boxes_strided": strided[None],
            }
            if export.joints:
                heads = [self.head(features, head) for head in HEADS]
                points = [
                    keypoints_of(tf, export.joints, heads, chosen, strided, true_shape[:2], float(STRIDE))
                    for _ in range(export.joints.tasks)
                ]
                detections["detection_keypoints"], detections["detection_keypoint_scores"] = (
                    tf.concat(parts, axis=2) for parts in zip(*points, strict=True)
                )
            return detections

    return Detector()


def pipeline_config(export):
    """The text of the pipeline.config that describes an Export."""
    resizer = f"fixed_shape_resizer {{ height: {export.side} width: {export.side} }}"
    if export.keep_aspect:
        limits = f"min_dimension: {export.side} max_dimension: {export.side}"
        resizer = f"keep_aspect_ratio_resizer {{ {limits} pad_to_max_dimension: true }}"
    return f"""model {{
  center_net {{
    num_classes: {export.classes}
    feature_extractor {{ type: "{export.backbone}" }}
    image_resizer {{ {resizer} }}
    object_detection_task {{ task_loss_weight: 1.0 }}
    object_center_params {{ max_box_predictions: {export.total} }}{export.joints.config() if export.joints else ""}
  }}
}}
"""


def save_export(folder, export):
    """Writes folder/saved_model and folder/pipeline.config."""
    import tensorflow as tf

    write_export(folder, exported_module(tf, export), pipeline_config(export))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder to write the model into")
    parser.add_argument(
        "--backbone", choices=BACKBONES, default="resnet_v1_50_fpn", help="whose colours and upsampling"
    )
    parser.add_argument("--keypoints", action="store_true", help="with keypoints, of one class")
    args = parser.parse_args()
    more = {"classes": 1, "joints": Joints()} if args.keypoints else {}
    save_export(args.output, Export(backbone=args.backbone, **more))
    print(f"Wrote {args.output}. Next: python create_onnx.py --saved_model {args.output} --onnx model.onnx")


if __name__ == "__main__":
    run(main)
