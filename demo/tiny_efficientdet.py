"""Builds a tiny EfficientDet with made-up weights and exports it as TFOD exports its own, to test the conversion of these.

    python demo/tiny_efficientdet.py --output build/tiny_efficientdet

The graph follows TFOD's: colours normalised first and padded after, swish, features joined by BiFPN's fast attention, one head
of separable convolutions for all levels with batch norms of each level's own, no background class. What follows is the demo
SSD's. Some kB of weights; its detections mean nothing.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from commandline import run

from demo.exports import write_export
from demo.train_demo_ssd import BOX_SCALES, CLASSES, SIZE, Export, decode, pipeline_config, postprocess

STRIDES = (8, 16, 32)  # of the levels
ANCHORS = 3  # in each place
CHANNELS = 16
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of colours 0..1
EXPORT = Export(keep_aspect=True)


def make_anchors():
    """[A, 4] yxyx, normalised: three squares in each place, four strides wide and more."""
    anchors = []
    for stride in STRIDES:
        centres = (np.arange(SIZE // stride) + 0.5) * stride
        sides = [4 * stride * 2 ** (octave / 3) for octave in range(ANCHORS)]
        anchors += [(y - s / 2, x - s / 2, y + s / 2, x + s / 2) for y in centres for x in centres for s in sides]
    return np.float32(anchors) / SIZE


def exported_module(tf, seed=1, weighted=True):
    """The detector as TFOD's exporter writes it for an image_tensor. weighted: D0 to D5; D6 and D7 add features as they are."""
    rng = np.random.default_rng(seed)
    anchors = make_anchors()

    def preprocess(image):
        image = (tf.cast(image, tf.float32) / 255.0 - MEAN) / DEVIATION
        given = tf.cast(tf.shape(image)[:2], tf.float32)
        size = tf.cast(tf.round(given * (SIZE / tf.reduce_max(given))), tf.int32)
        image = tf.compat.v1.image.resize_bilinear(image[None], size)[0]
        return tf.image.pad_to_bounding_box(image, 0, 0, SIZE, SIZE), size

    class Detector(tf.Module):
        def __init__(self):
            super().__init__()
            self.weights = {}

        def weight(self, name, shape, spread=None, centre=0.0):
            """A variable of made-up values; the same one for the same name."""
            if name not in self.weights:
                spread = 1.6 / np.sqrt(np.prod(shape[:-1])) if spread is None else spread
                self.weights[name] = tf.Variable(np.float32(rng.normal(size=shape) * spread + centre))
            return self.weights[name]

        def conv(self, x, name, depth=CHANNELS, stride=1):
            return tf.nn.conv2d(x, self.weight(name, (3, 3, x.shape[3], depth)), stride, "SAME")

        def separable(self, x, name, depth=CHANNELS):
            deep = self.weight(f"{name}/depthwise", (3, 3, x.shape[3], 1), 1 / 3)
            point = self.weight(f"{name}/pointwise", (1, 1, x.shape[3], depth))
            return tf.nn.separable_conv2d(x, deep, point, [1, 1, 1, 1], "SAME") + self.weight(
                f"{name}/bias", (depth,), 0.1
            )

        def norm(self, x, name):
            gamma, beta, mean = (
                self.weight(f"{name}/{i}", (CHANNELS,), 0.1, centre) for i, centre in enumerate((1, 0, 0))
            )
            variance = tf.abs(self.weight(f"{name}/3", (CHANNELS,), 0.1, 1.0))
            return tf.compat.v1.nn.fused_batch_norm(x, gamma, beta, mean, variance, 0.001, is_training=False)[0]

        def joined(self, features, name):
            """Fast attention (TFOD: BiFPNCombineLayer), then swish, convolution, batch norm."""
            if weighted:
                weights = tf.nn.relu(self.weight(f"{name}/weights", (len(features), 1), 0.5, 1.0))
                weights = weights / (tf.reduce_sum(weights) + 1e-4)
                x = tf.squeeze(tf.linalg.matmul(tf.stack(features, axis=-1), weights), axis=-1)
            else:  # combine_method: "sum"
                x = functools.reduce(tf.add, features)
            return self.norm(self.separable(tf.nn.swish(x), name), f"{name}/norm")

        def pyramid(self, fine, middle, coarse):
            """One round of BiFPN: down the levels, and up again."""

            def up(x):  # TFOD: ops.nearest_neighbor_upsampling
                _, height, width, depth = x.shape
                twice = tf.stack([tf.stack([x] * 2, axis=3)] * 2, axis=2)
                return tf.reshape(twice, [1, 2 * height, 2 * width, depth])

            def down(x):
                return tf.nn.max_pool2d(x, 3, 2, "SAME")

            between = self.joined([middle, up(coarse)], "between")
            fine = self.joined([fine, up(between)], "fine")
            middle = self.joined([middle, between, down(fine)], "middle")
            return fine, middle, self.joined([coarse, down(middle)], "coarse")

        def head(self, level, x, name, depth):
            x = tf.nn.swish(self.norm(self.separable(x, name), f"{name}/norm_{level}"))
            return tf.reshape(self.separable(x, f"{name}/last", ANCHORS * depth), [1, -1, depth])

        @tf.function(input_signature=[tf.TensorSpec([1, None, None, 3], "uint8", name="input_tensor")])
        def __call__(self, input_tensor):
            spec = (tf.TensorSpec([SIZE, SIZE, 3], tf.float32), tf.TensorSpec([2], tf.int32))
            x, sizes = tf.map_fn(preprocess, input_tensor, fn_output_signature=spec)
            levels = []
            for i in range(4):
                x = tf.nn.swish(self.norm(self.conv(x, f"conv{i}", stride=2), f"norm{i}"))
                levels.append(tf.tanh(x))  # so that no picture makes all scores alike
            levels = self.pyramid(*levels[2:], tf.nn.max_pool2d(levels[3], 3, 2, "SAME"))
            codes = tf.concat([self.head(i, x, "box", 4) for i, x in enumerate(levels)], axis=1)
            logits = tf.concat([self.head(i, x, "class", len(CLASSES)) for i, x in enumerate(levels)], axis=1)
            boxes, scores = decode(tf, codes, tf.constant(anchors), BOX_SCALES), tf.sigmoid(logits)
            window = tf.cast(sizes[0], tf.float32) / SIZE
            found = postprocess(tf, boxes[0], scores[0], window, EXPORT)
            names = {"boxes": "detection_boxes", "scores": "detection_scores", "classes": "detection_classes"}
            outputs = {name: found[key][None] for key, name in names.items()} | {"num_detections": found["num"][None]}
            return outputs | {"raw_detection_boxes": boxes, "raw_detection_scores": scores}

    return Detector()


def save_export(folder, weighted=True):
    """Writes folder/saved_model and folder/pipeline.config."""
    import tensorflow as tf

    module = exported_module(tf, weighted=weighted)
    module(tf.zeros([1, SIZE, SIZE, 3], tf.uint8))  # makes the variables
    text = (
        pipeline_config(EXPORT)
        .replace("      depth_multiplier: 0.25\n", "")
        .replace("mobilenet_v1", "efficientnet-b0_bifpn")
    )
    text = text.replace("encode_background_as_zeros: true", "add_background_class: false")
    write_export(folder, module, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder to write the model into")
    args = parser.parse_args()
    save_export(args.output)
    print(f"Wrote {args.output}. Next: python create_onnx.py --saved_model {args.output} --onnx model.onnx")


if __name__ == "__main__":
    run(main)
