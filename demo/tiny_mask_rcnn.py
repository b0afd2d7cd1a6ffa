"""Builds a tiny Mask R-CNN with made-up weights and exports it as TFOD exports its own, to test the two-stage path.

    python demo/tiny_mask_rcnn.py --output build/tiny_mask_rcnn
    python demo/tiny_mask_rcnn.py --output build/tiny_faster_rcnn --no_masks

The graph follows faster_rcnn_meta_arch: first stage, proposals clipped to the true image and zero-padded, crops with a
max-pool behind, second stage with a box per class, per-class suppression, masks of the final boxes. A few kB of weights;
its detections mean nothing.
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

CLASSES = 4
STRIDE = 8
ANCHOR_SIDES = (24.0, 48.0)  # pixels
MASK = 15  # mask height and width


@dataclasses.dataclass(frozen=True)
class Export:
    """What a test varies."""

    masks: bool = True
    keep_aspect: bool = True
    pad: bool = True  # to a square, where the aspect ratio is kept
    share_box: bool = False
    side: int = 128  # of the network's input, pixels
    proposals: int = 30
    crop: int = 6
    first_threshold: float = 0.0
    score_threshold: float = 0.0
    per_class: int = 10
    total: int = 20
    ties: bool = False  # a first stage that scores all anchors alike
    skip: bool = False  # a second stage whose last features are also the crop itself, as Inception ResNet's are
    seed: int = 1


def make_weights(export):
    """{name: float32 array} of a network that spreads its scores."""
    rng = np.random.default_rng(export.seed)
    last = 24 + (16 if export.skip else 0)
    shapes = {
        "conv1": (3, 3, 3, 12),
        "conv2": (3, 3, 12, 16),
        "conv3": (3, 3, 16, 16),
        "rpn": (3, 3, 16, 16),
        "objectness": (1, 1, 16, 2 * len(ANCHOR_SIDES)),
        "rpn_box": (1, 1, 16, 4 * len(ANCHOR_SIDES)),
        "second": (3, 3, 16, 24),
        "class": (last, CLASSES + 1),
        "box": (last, 4 if export.share_box else 4 * CLASSES),
        "mask": (3, 3, last, CLASSES),
    }
    gain = {"objectness": 3.0, "rpn_box": 1.5, "class": 4.0, "box": 1.5, "mask": 2.0}
    weights = {}
    for name, shape in shapes.items():
        spread = gain.get(name, 1.6) / np.sqrt(np.prod(shape[:-1]))
        weights[name] = (rng.normal(size=shape) * spread).astype(np.float32)
    if export.ties:
        weights["objectness"] *= 0
    return weights


def make_anchors(side):
    """[A, 4] yxyx in pixels: two squares in each cell."""
    centres = (np.arange(side // STRIDE) + 0.5) * STRIDE
    return np.float32(
        [(y - s / 2, x - s / 2, y + s / 2, x + s / 2) for y in centres for x in centres for s in ANCHOR_SIDES]
    )


def anchors_of(tf, features):
    """make_anchors for features [1, H, W, C] of any size."""
    y, x = (tf.cast(tf.range(tf.shape(features)[i]), tf.float32) * STRIDE + STRIDE / 2 for i in (1, 2))
    y, x, half = tf.meshgrid(y, x, tf.constant(ANCHOR_SIDES) / 2, indexing="ij")
    return tf.reshape(tf.stack([y - half, x - half, y + half, x + half], axis=3), [-1, 4])


def decode(tf, encodings, boxes):
    """encodings [N, 4] and boxes [N, 4] -> [N, 4] (TFOD: FasterRcnnBoxCoder._decode)."""
    ymin, xmin, ymax, xmax = tf.unstack(tf.transpose(boxes))
    ty, tx, th, tw = tf.unstack(tf.transpose(encodings))
    ha, wa = ymax - ymin, xmax - xmin
    y, x = ty / 10.0 * ha + (ymin + ha / 2), tx / 10.0 * wa + (xmin + wa / 2)
    h, w = tf.exp(th / 5.0) * ha, tf.exp(tw / 5.0) * wa
    return tf.transpose(tf.stack([y - h / 2, x - w / 2, y + h / 2, x + w / 2]))


def suppress(tf, boxes, scores, per_class, total, iou, threshold, window):
    """boxes [N, C, 4] in pixels, scores [N, C] -> (boxes [total, 4], scores, classes, number), clipped and zero-padded."""
    rows, values, labels = [], [], []
    for label in range(scores.shape[1]):
        picked, kept = tf.image.non_max_suppression_with_scores(
            boxes[:, label], scores[:, label], per_class, iou, threshold
        )
        rows.append(tf.gather(boxes[:, label], picked))
        values.append(kept)
        labels.append(tf.fill(tf.shape(picked), float(label)))
    values = tf.concat(values, 0)
    values, order = tf.nn.top_k(values, k=tf.size(values))
    rows, labels = tf.gather(tf.concat(rows, 0), order), tf.gather(tf.concat(labels, 0), order)
    rows = tf.clip_by_value(rows, 0.0, tf.tile(window, [2]))
    solid = (rows[:, 2] - rows[:, 0]) * (rows[:, 3] - rows[:, 1]) > 0
    rows, values, labels = (tf.boolean_mask(x, solid)[:total] for x in (rows, values, labels))
    missing = total - tf.size(values)
    rows = tf.ensure_shape(tf.pad(rows, [[0, missing], [0, 0]]), [total, 4])
    values, labels = (tf.ensure_shape(tf.pad(x, [[0, missing]]), [total]) for x in (values, labels))
    return rows, values, labels, total - missing


def exported_module(tf, export):
    """The detector as TFOD's exporter writes it for an image_tensor."""
    side, anchors = export.side, make_anchors(export.side)

    def preprocess(image):
        image, size = tf.cast(image, tf.float32), tf.constant([side, side])
        if export.keep_aspect:
            full = tf.cast(tf.shape(image)[:2], tf.float32)
            size = tf.cast(tf.round(full * (side / tf.reduce_max(full))), tf.int32)
        image = tf.compat.v1.image.resize_bilinear(image[None], size)[0]
        if export.pad:
            image = tf.image.pad_to_bounding_box(image, 0, 0, side, side)
        return image * (2.0 / 255.0) - 1.0, size

    class Detector(tf.Module):
        def __init__(self):
            super().__init__()
            self.weights = {name: tf.Variable(value) for name, value in make_weights(export).items()}

        def conv(self, x, name, stride=1):
            return tf.nn.conv2d(x, self.weights[name], stride, "SAME")

        def crop(self, features, boxes, size):
            """Crops at boxes [N, 4] in pixels of the input's size, and the max-pool that TFOD puts behind each crop."""
            index = tf.zeros([tf.shape(boxes)[0]], tf.int32)
            crops = tf.image.crop_and_resize(features, boxes / size, index, [export.crop, export.crop])
            crops = tf.nn.max_pool2d(crops, 2, 2, "SAME")
            made = tf.nn.relu(self.conv(crops, "second"))
            return tf.concat([made, crops], axis=3) if export.skip else made

        def head(self, crops, name):
            """A head of the second stage. As TFOD's, each takes the average for itself: nodes that are equal but for their names."""
            with tf.name_scope(f"{name}_head"):
                means = tf.reduce_mean(crops, axis=[1, 2], keepdims=True, name="AvgPool")
                return tf.matmul(tf.reshape(means, [-1, means.shape[3]], name="flatten"), self.weights[name])

        @tf.function(input_signature=[tf.TensorSpec([1, None, None, 3], "uint8", name="input_tensor")])
        def __call__(self, input_tensor):
            shape = [side, side, 3] if export.pad else [None, None, 3]
            spec = (tf.TensorSpec(shape, tf.float32), tf.TensorSpec([2], tf.int32))
            x, sizes = tf.map_fn(preprocess, input_tensor, fn_output_signature=spec)
            window = tf.cast(sizes[0], tf.float32)
            size = side if export.pad else tf.tile(window, [2])  # of the input
            for name in ("conv1", "conv2", "conv3"):
                x = tf.nn.relu(self.conv(x, name, stride=2))
            features = x
            places = tf.constant(anchors) if export.pad else anchors_of(tf, features)
            x = tf.nn.relu(self.conv(features, "rpn"))
            objectness = tf.nn.softmax(tf.reshape(self.conv(x, "objectness"), [1, -1, 2]))[0, :, 1:]
            boxes = decode(tf, tf.reshape(self.conv(x, "rpn_box"), [-1, 4]), places)
            count = export.proposals
            limits = (count, count, 0.7, export.first_threshold, window)
            proposals, _, _, valid = suppress(tf, boxes[:, None], objectness, *limits)
            crops = self.crop(features, proposals, size)
            scores = tf.nn.softmax(self.head(crops, "class"))
            codes = tf.reshape(self.head(crops, "box"), [count, -1, 4])
            per_box = codes.shape[1]
            tiled = tf.reshape(tf.tile(proposals[:, None], [1, per_box, 1]), [-1, 4])
            boxes = tf.reshape(decode(tf, tf.reshape(codes, [-1, 4]), tiled), [count, per_box, 4])
            per_class = tf.tile(boxes, [1, CLASSES // per_box, 1])
            best = tf.argmax(scores[:, 1:], axis=1)
            raw = tf.clip_by_value(tf.gather(per_class, best, batch_dims=1), 0.0, tf.tile(window, [2]))
            limits = (export.per_class, export.total, 0.6, export.score_threshold, window)
            found = suppress(tf, per_class[:valid], scores[:, 1:][:valid], *limits)
            outputs = {
                "detection_boxes": (found[0] / tf.tile(window, [2]))[None],
                "detection_scores": found[1][None],
                "detection_classes": found[2][None] + 1,
                "num_detections": tf.cast(found[3], tf.float32)[None],
                "raw_detection_boxes": (raw / tf.tile(window, [2]))[None],
                "raw_detection_scores": tf.expand_dims(scores, 0),
            }
            if export.masks:
                crops = self.crop(features, found[0], size)
                crops = tf.compat.v1.image.resize_bilinear(crops, [MASK, MASK], align_corners=True)
                logits = self.conv(crops, "mask")
                logits = tf.reshape(tf.transpose(logits, [0, 3, 1, 2]), [-1, MASK, MASK])
                chosen = tf.range(export.total) * CLASSES + tf.cast(found[2], tf.int32)
                outputs["detection_masks"] = tf.sigmoid(tf.gather(logits, chosen))[None]
            return outputs

    return Detector()


def pipeline_config(export):
    """The text of the pipeline.config that describes an Export."""
    resizer = f"fixed_shape_resizer {{ height: {export.side} width: {export.side} }}"
    if export.keep_aspect:
        limits = (
            f"min_dimension: {export.side} max_dimension: {export.side} pad_to_max_dimension: {str(export.pad).lower()}"
        )
        resizer = f"keep_aspect_ratio_resizer {{ {limits} }}"
    masks = f"predict_instance_masks: true mask_height: {MASK} mask_width: {MASK}" if export.masks else ""
    return f"""model {{
  faster_rcnn {{
    number_of_stages: {3 if export.masks else 2}
    num_classes: {CLASSES}
    image_resizer {{ {resizer} }}
    feature_extractor {{ type: "faster_rcnn_inception_resnet_v2_keras" }}
    first_stage_nms_score_threshold: {export.first_threshold}
    first_stage_nms_iou_threshold: 0.7
    first_stage_max_proposals: {export.proposals}
    initial_crop_size: {export.crop}
    maxpool_kernel_size: 2
    maxpool_stride: 2
    second_stage_box_predictor {{
      mask_rcnn_box_predictor {{ share_box_across_classes: {str(export.share_box).lower()} {masks} }}
    }}
    second_stage_post_processing {{
      batch_non_max_suppression {{
        score_threshold: {export.score_threshold}
        iou_threshold: 0.6
        max_detections_per_class: {export.per_class}
        max_total_detections: {export.total}
      }}
      score_converter: SOFTMAX
    }}
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
    parser.add_argument("--no_masks", action="store_true", help="a Faster R-CNN instead")
    args = parser.parse_args()
    save_export(args.output, Export(masks=not args.no_masks))
    print(f"Wrote {args.output}. Next: python create_onnx.py --saved_model {args.output} --onnx model.onnx")


if __name__ == "__main__":
    run(main)
