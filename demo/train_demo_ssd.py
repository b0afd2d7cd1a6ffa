"""Trains the demo's small SSD on synthetic shapes and exports it as TFOD exports its own models.

    python demo/train_demo_ssd.py --output demo            # 25 minutes on 2 cores
    python demo/train_demo_ssd.py --output build/trial --steps 20

Writes OUTPUT/ssd_mobilenet_v1_shapes/ (saved_model/, pipeline.config, labels.txt), OUTPUT/images/*.jpg and
OUTPUT/instances_shapes.json (COCO format). The network is an SSD MobileNet v1 (Liu et al., 2016; Howard et al., 2017)
at a quarter of the width: the graph, its signature and its outputs are those of a zoo model, in 2 MB.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from commandline import progress, run

from images.resizing import resize_image

CLASSES = ("circle", "square", "triangle", "star", "ring")
SIZE = 160  # the network's input, pixels
GRIDS = (10, 5, 3, 2)  # feature maps of the four levels
SCALES = (0.15, 0.3, 0.5, 0.72, 0.95)  # anchor size per level, relative to the image; the last closes the series
RATIOS = (1.0, 2.0, 0.5)
BOX_SCALES = (10.0, 10.0, 5.0, 5.0)  # of the box coder: y, x, height, width
IOU_THRESHOLD, MAX_DETECTIONS = 0.6, 100
# Overlap of an anchor with an object: from the first on it is to find it, from the second on it may (TFOD's ArgMaxMatcher).
MATCHED_FROM, UNCLEAR_FROM = 0.5, 0.35


@dataclasses.dataclass(frozen=True)
class Export:
    """What pipeline.config lets a user choose and the graph must follow."""

    converter: str = "SIGMOID"  # or SOFTMAX, IDENTITY
    scales: tuple = BOX_SCALES
    score_threshold: float = 1e-8
    per_class: int = MAX_DETECTIONS
    total: int = MAX_DETECTIONS
    rule: str = ""  # of suppression: use_class_agnostic_nms, use_combined_nms, or each class by itself
    keep_aspect: bool = False  # resize to fit, pad, instead of stretching
    method: str = "BILINEAR"  # or NEAREST_NEIGHBOR, BICUBIC, AREA
    # The exporter's input_type: image_tensor, float_image_tensor, encoded_image_string_tensor or tf_example.
    input_type: str = "image_tensor"


@dataclasses.dataclass(frozen=True)
class Scene:
    """How difficult pictures are."""

    sides: tuple = (0.16, 0.55)  # a shape's height, of the picture's shorter side
    overlap: float = 0.1  # so much of the smaller of two shapes may be within the other's box
    contrast: int = 80  # 0..255, by which a shape stands out where it can
    noise: float = 8.0  # the largest standard deviation, 0..255
    strokes: int = 14  # fewer than that


DEMO_SCENE = Scene()


def draw_scene(rng, width, height, tries=None, scene=DEMO_SCENE):
    """Draws shapes on a made-up background. Returns (RGB [H, W, 3] uint8, boxes [N, 4] yxyx pixels, classes [N]).

    tries: so many places are made up for shapes, those where another is are not used; default: 1 to 8.
    """
    base = rng.integers(30, 226, 3)
    corners = (base + rng.integers(-50, 51, (2, 3, 3))).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(corners).resize((width, height), Image.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, scene.strokes)):  # clutter: blurred strokes
        ends = rng.uniform(0, 1, 4) * [width, height, width, height]
        colour = (base + rng.integers(-80, 81, 3)).clip(0, 255)
        draw.line(list(ends), fill=tuple(colour.tolist()), width=int(rng.integers(1, 12)))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 6)))
    boxes, classes = [], []
    for _ in range(tries or rng.integers(1, 9)):
        side = min(width, height) * rng.uniform(*scene.sides)
        w, h = side * rng.uniform(0.8, 1.25), side
        x, y = rng.uniform(0, max(1, width - w)), rng.uniform(0, max(1, height - h))
        box = np.array([y, x, y + h, x + w])
        if any(_overlap(box, other) > scene.overlap for other in boxes):
            continue
        kind = int(rng.integers(len(CLASSES)))
        _draw_shape(image, kind, box, _visible_colour(rng, image.crop((x, y, x + w, y + h)), scene.contrast))
        boxes.append(box)
        classes.append(kind)
    pixels = np.asarray(image).astype(np.float32) + rng.normal(0, rng.uniform(0, scene.noise), (height, width, 1))
    return pixels.clip(0, 255).astype(np.uint8), np.array(boxes).reshape(-1, 4), np.array(classes, int)


def _visible_colour(rng, ground, wanted):
    """A made-up colour that differs from nearly all of the ground (a Pillow image): a shape that nobody sees is not fair."""
    pixels = np.asarray(ground.resize((12, 12), Image.BOX)).reshape(-1, 1, 3).astype(int)
    colours = rng.integers(0, 256, (64, 3))
    contrast = np.quantile(np.abs(pixels - colours).max(axis=2), 0.05, axis=0)  # [64]
    best = np.minimum(contrast, wanted).argmax()  # the first that is good enough, else the best
    return tuple(colours[best].tolist())


def _overlap(a, b):
    """Intersection over the smaller area."""
    inter = np.prod((np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(min=0))
    return inter / min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))


def _draw_shape(image, kind, box, colour):
    """Draws at four times the size and scales down, for smooth edges."""
    y0, x0, y1, x1 = box
    w, h = round((x1 - x0) * 4), round((y1 - y0) * 4)
    mask = Image.new("L", (w, h), 0)
    draw = ImageDraw.Draw(mask)
    if kind in (0, 4):
        draw.ellipse([0, 0, w - 1, h - 1], fill=255)
        if kind == 4:
            draw.ellipse([w * 0.27, h * 0.27, w * 0.73, h * 0.73], fill=0)
    elif kind == 1:
        draw.rectangle([0, 0, w, h], fill=255)
    elif kind == 2:
        draw.polygon([(w / 2, 0), (w, h), (0, h)], fill=255)
    else:
        angle = np.arange(10) * np.pi / 5 - np.pi / 2
        radius = np.where(np.arange(10) % 2, 0.42, 1.0)
        points = np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1)
        points = (points - points.min(0)) / np.ptp(points, axis=0) * [w - 1, h - 1]
        draw.polygon([tuple(p) for p in points], fill=255)
    mask = mask.resize((max(1, w // 4), max(1, h // 4)), Image.LANCZOS)
    image.paste(colour, (round(x0), round(y0)), mask)


def make_anchors():
    """Anchors [N, 4] yxyx, normalised: per cell three ratios at the level's scale and a square between two scales."""
    anchors = []
    for grid, scale, following in zip(GRIDS, SCALES, SCALES[1:], strict=False):
        shapes = [(scale / np.sqrt(r), scale * np.sqrt(r)) for r in RATIOS] + [(np.sqrt(scale * following),) * 2]
        centre = (np.arange(grid) + 0.5) / grid
        for y in centre:
            for x in centre:
                anchors += [(y - h / 2, x - w / 2, y + h / 2, x + w / 2) for h, w in shapes]
    return np.float32(anchors)


def mirrored_anchors():
    """Indices [N]: the anchor that lies where anchor i comes to lie when the image is mirrored left to right."""
    per_cell, begin, order = len(RATIOS) + 1, 0, []
    for grid in GRIDS:
        cells = begin + np.arange(grid * grid * per_cell).reshape(grid, grid, per_cell)
        order.append(cells[:, ::-1].ravel())
        begin += cells.size
    return np.concatenate(order)


def encode(boxes, classes, anchors):
    """Matches boxes [N, 4] (normalised) to anchors: (encodings [A, 4], one-hot classes [A, C], matched [A], clear [A]).

    clear: 0 for anchors that overlap an object too little to be asked for it and too much to be called background. Where
    they were background, one shape in ten scored less than 0.5; so one in forty does.
    """
    top, bottom = (
        np.maximum(anchors[:, None, :2], boxes[None, :, :2]),
        np.minimum(anchors[:, None, 2:], boxes[None, :, 2:]),
    )
    inter = (bottom - top).clip(min=0).prod(2)
    areas = [(b[:, 2:] - b[:, :2]).prod(1) for b in (anchors, boxes)]
    iou = inter / (areas[0][:, None] + areas[1][None] - inter)
    best, overlap = iou.argmax(1), iou.max(1)
    matched = overlap >= MATCHED_FROM
    force = iou.argmax(0)
    best[force], matched[force] = np.arange(len(boxes)), True
    size, box_size = anchors[:, 2:] - anchors[:, :2], (boxes[:, 2:] - boxes[:, :2])[best]
    shift = ((boxes[best, :2] + box_size / 2) - (anchors[:, :2] + size / 2)) / size
    codes = np.concatenate([shift, np.log(box_size / size)], axis=1) * np.float32(BOX_SCALES)
    target = np.zeros((len(anchors), len(CLASSES)), np.float32)
    target[matched, classes[best[matched]]] = 1
    clear = matched | (overlap < UNCLEAR_FROM)
    return codes.astype(np.float32), target, matched.astype(np.float32), clear.astype(np.float32)


def training_set(count, anchors, seed=1):
    """Images [count, 160, 160, 3] uint8 and what `encode` gives for each, stacked."""
    rng = np.random.default_rng(seed)
    images, encoded = [], []
    for _ in progress(range(count), desc="drawing"):
        width, height = rng.integers(160, 400, 2)
        pixels, boxes, classes = draw_scene(rng, int(width), int(height))
        images.append(np.rint(resize_image(pixels, SIZE, SIZE)).astype(np.uint8))
        encoded.append(encode(boxes / np.array([height, width] * 2), classes, anchors))
    return np.stack(images), *(np.stack(values) for values in zip(*encoded, strict=True))


def vary(rng, images, codes, targets, matched, clear, mirrored):
    """A batch of the training set with colours exchanged, inverted and shifted, half of it mirrored. images: 0..255, float."""
    batch = len(images)
    images = np.stack([image[..., rng.permutation(3)] for image in images])
    inverted, flipped = rng.random((2, batch)) < 0.5
    images[inverted] = 255 - images[inverted]
    images[flipped] = images[flipped, :, ::-1]
    contrast, brightness = rng.uniform(0.7, 1.3, (batch, 1, 1, 3)), rng.uniform(-30, 30, (batch, 1, 1, 1))
    images = images * contrast.astype(np.float32) + brightness.astype(np.float32)
    for values in (codes, targets, matched, clear):
        values[flipped] = values[flipped][:, mirrored]
    codes[flipped] *= np.float32([1, -1, 1, 1])  # y, x, height, width
    return images.clip(0, 255), codes, targets, matched, clear


def build_network(tf):
    """Images [B, 160, 160, 3] in -1..1 -> (encodings [B, A, 1, 4], logits [B, A, classes + 1]) as TFOD's predictor."""
    layers = tf.keras.layers
    base = tf.keras.applications.MobileNet((SIZE, SIZE, 3), alpha=0.25, include_top=False, weights=None)
    features = [base.get_layer("conv_pw_11_relu").output, base.get_layer("conv_pw_13_relu").output]
    for level, depth in enumerate((128, 96)):
        x = layers.Conv2D(depth // 2, 1, use_bias=False, name=f"extra_{level}_squeeze")(features[-1])
        x = layers.ReLU(6.0)(layers.BatchNormalization(momentum=0.97)(x))
        x = layers.Conv2D(depth, 3, strides=2, padding="same", use_bias=False, name=f"extra_{level}")(x)
        features.append(layers.ReLU(6.0)(layers.BatchNormalization(momentum=0.97)(x)))
    per_cell, columns = len(RATIOS) + 1, len(CLASSES) + 1
    encodings, logits = [], []
    for level, x in enumerate(features):
        box = layers.Conv2D(per_cell * 4, 3, padding="same", name=f"box_{level}")(x)
        encodings.append(layers.Reshape((-1, 1, 4))(box))
        bias = tf.keras.initializers.Constant(-4.6)
        score = layers.Conv2D(per_cell * columns, 3, padding="same", bias_initializer=bias, name=f"class_{level}")(x)
        logits.append(layers.Reshape((-1, columns))(score))
    join = layers.Concatenate(axis=1)
    return tf.keras.Model(base.input, [join(encodings), layers.Concatenate(axis=1)(logits)])


def train(tf, network, data, steps, batch=32):
    """Focal loss on classes (background column unused, as with encode_background_as_zeros), smooth L1 on boxes.

    Learning rate and weight decay are large: with a fifth of the rate and no decay, three times as many shapes were missed.
    """
    schedule = tf.keras.optimizers.schedules.CosineDecay(1e-3, steps, warmup_target=2e-2, warmup_steps=steps // 20 + 1)
    optimizer = tf.keras.optimizers.AdamW(schedule, weight_decay=0.05)

    @tf.function
    def step(x, code, target, match, clear):
        with tf.GradientTape() as tape:
            box, logit = network(x, training=True)
            box, logit = box[:, :, 0], logit[:, :, 1:]
            cross = tf.nn.sigmoid_cross_entropy_with_logits(target, logit)
            p = tf.abs(target - tf.sigmoid(logit))
            weight = tf.where(target > 0, 0.15, 0.85) * p**2 * clear[..., None]
            count = tf.reduce_sum(match) + 1
            off = tf.abs(box - code)
            smooth = tf.where(off < 1, 0.5 * off**2, off - 0.5)
            loss = tf.reduce_sum(weight * cross) * 4 / count + tf.reduce_sum(smooth * match[..., None]) * 2 / count
        variables = network.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    rng, mirrored, mean = np.random.default_rng(2), mirrored_anchors(), 0.0
    for i in progress(range(steps), desc="training"):
        rows = rng.integers(0, len(data[0]), batch)
        images, *encoded = (values[rows] for values in data)
        images, *encoded = vary(rng, images.astype(np.float32), *encoded, mirrored)
        loss = step(tf.constant(images * 2 / 255 - 1, tf.float32), *encoded)
        mean = 0.98 * mean + 0.02 * float(loss)
        if (i + 1) % 200 == 0:
            print(f"step {i + 1}: loss {mean / (1 - 0.98 ** (i + 1)):.3f}", flush=True)


def exported_module(tf, network, anchors, export):
    """The detector as TFOD's exporter_lib_v2 and ssd_meta_arch write it: resize in a loop, decode, per-class NMS."""
    encoded = export.input_type in ("encoded_image_string_tensor", "tf_example")
    dtype = "float32" if export.input_type == "float_image_tensor" else "uint8"
    signature = tf.TensorSpec([1 if dtype == "uint8" else None, None, None, 3], dtype, name="input_tensor")
    converters = {"SIGMOID": tf.sigmoid, "SOFTMAX": tf.nn.softmax, "IDENTITY": tf.identity}

    def preprocess(image):
        image = tf.cast(image, tf.float32) * (2.0 / 255.0) - 1.0
        size = tf.constant([SIZE, SIZE])
        if export.keep_aspect:
            given = tf.cast(tf.shape(image)[:2], tf.float32)
            size = tf.cast(tf.round(given * (SIZE / tf.reduce_max(given))), tf.int32)
        image = tf.compat.v1.image.resize_images(image, size, getattr(tf.compat.v1.image.ResizeMethod, export.method))
        return tf.image.pad_to_bounding_box(image, 0, 0, SIZE, SIZE), size

    def decode_image(text):
        if export.input_type == "tf_example":
            fields = {"image/encoded": tf.io.FixedLenFeature((), tf.string, "")}
            text = tf.io.parse_single_example(text, fields)["image/encoded"]
        return tf.image.decode_image(text, channels=3, expand_animations=False)

    def detect(boxes, scores, true_size):
        window = tf.cast(true_size, tf.float32) / SIZE  # height, width of the image within the padded input
        return postprocess(tf, boxes, scores, window, export)

    class Detector(tf.Module):
        def __init__(self):
            super().__init__()
            # The variables alone: a tracked Keras model would save all of its own functions beside the signature.
            self.parameters = [variable.value for variable in network.variables]

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="input_tensor") if encoded else signature])
        def __call__(self, input_tensor):
            if encoded:  # exporter_lib_v2.DetectionFromEncodedImageModule, DetectionFromTFExampleModule
                spec = tf.TensorSpec([None, None, 3], tf.uint8)
                input_tensor = tf.map_fn(decode_image, input_tensor, fn_output_signature=spec)
            spec = (tf.TensorSpec([SIZE, SIZE, 3], tf.float32), tf.TensorSpec([2], tf.int32))
            images, sizes = tf.map_fn(preprocess, input_tensor, fn_output_signature=spec)
            encodings, logits = network(images, training=False)
            boxes = decode(tf, tf.squeeze(encodings, axis=2), tf.constant(anchors), export.scales)
            scores = converters[export.converter](logits)
            spec = {key: tf.TensorSpec([export.total], tf.float32) for key in ("scores", "classes")}
            spec |= {"boxes": tf.TensorSpec([export.total, 4], tf.float32), "num": tf.TensorSpec([], tf.float32)}
            found = tf.map_fn(lambda x: detect(*x), (boxes, scores[:, :, 1:], sizes), fn_output_signature=spec)
            return {
                "detection_boxes": found["boxes"],
                "detection_scores": found["scores"],
                "detection_classes": found["classes"],
                "num_detections": found["num"],
                "raw_detection_boxes": boxes,
                "raw_detection_scores": scores,
            }

    return Detector()


def decode(tf, encodings, anchors, scales):
    """encodings [B, A, 4], anchors [A, 4] -> boxes [B, A, 4] (TFOD: FasterRcnnBoxCoder._decode on all images at once)."""
    batch, count = tf.shape(encodings)[0], tf.shape(anchors)[0]
    tiled = tf.reshape(tf.tile(anchors[None], [batch, 1, 1]), [-1, 4])
    ymin, xmin, ymax, xmax = tf.unstack(tf.transpose(tiled))
    ty, tx, th, tw = tf.unstack(tf.transpose(tf.reshape(encodings, [-1, 4])))
    ha, wa = ymax - ymin, xmax - xmin
    y, x = ty / scales[0] * ha + (ymin + ha / 2), tx / scales[1] * wa + (xmin + wa / 2)
    h, w = tf.exp(th / scales[2]) * ha, tf.exp(tw / scales[3]) * wa
    boxes = tf.transpose(tf.stack([y - h / 2, x - w / 2, y + h / 2, x + w / 2]))
    return tf.reshape(boxes, tf.stack([batch, count, 4]))


def postprocess(tf, boxes, scores, window, export):
    """boxes [A, 4], scores [A, C] -> TFOD's outputs for one image (post_processing.multiclass_non_max_suppression).

    window: [2] height and width of the image within the input, normalised: boxes are clipped to it, then scaled by it.
    """
    if export.rule == "use_combined_nms":
        limits = export.per_class, export.total, IOU_THRESHOLD, export.score_threshold
        found = tf.image.combined_non_max_suppression(boxes[None, :, None], scores[None], *limits)
        rows, kept, labels = (x[0] for x in found[:3])
        used = tf.range(export.total) < found.valid_detections[0]
        labels = tf.where(used, labels + 1, 0.0)
        return {"boxes": rows, "scores": kept, "classes": labels, "num": tf.cast(found.valid_detections[0], tf.float32)}
    rows, labels, kept = [], [], []
    for label in range(len(CLASSES)):
        values, most = scores[:, label], export.per_class
        if export.rule == "use_class_agnostic_nms":  # once for all classes: each box has its best alone
            values, most = tf.reduce_max(scores, axis=1), export.total
        picked, values = tf.image.non_max_suppression_with_scores(
            boxes, values, most, IOU_THRESHOLD, export.score_threshold
        )
        rows.append(tf.gather(boxes, picked))
        kept.append(values)
        if export.rule == "use_class_agnostic_nms":
            labels.append(tf.cast(tf.gather(tf.argmax(scores, axis=1), picked) + 1, tf.float32))
            break
        labels.append(tf.fill(tf.shape(picked), float(label + 1)))
    kept, order = tf.nn.top_k(tf.concat(kept, 0), k=tf.size(tf.concat(kept, 0)))
    rows, labels = tf.gather(tf.concat(rows, 0), order), tf.gather(tf.concat(labels, 0), order)
    rows = tf.clip_by_value(rows, 0.0, tf.tile(window, [2]))
    solid = (rows[:, 2] - rows[:, 0]) * (rows[:, 3] - rows[:, 1]) > 0
    rows, labels, kept = (tf.boolean_mask(x, solid)[: export.total] for x in (rows, labels, kept))
    missing = export.total - tf.size(kept)
    return {
        "boxes": tf.ensure_shape(tf.pad(rows / tf.tile(window, [2]), [[0, missing], [0, 0]]), [export.total, 4]),
        "scores": tf.ensure_shape(tf.pad(kept, [[0, missing]]), [export.total]),
        "classes": tf.ensure_shape(tf.pad(labels, [[0, missing]]), [export.total]),
        "num": tf.cast(tf.size(kept), tf.float32),
    }


def pipeline_config(export):
    """The text of the pipeline.config that describes an Export."""
    method = "" if export.method == "BILINEAR" else f"\n        resize_method: {export.method}"
    resizer = f"fixed_shape_resizer {{\n        height: {SIZE}\n        width: {SIZE}{method}\n      }}"
    if export.keep_aspect:
        limits = f"min_dimension: {SIZE} max_dimension: {SIZE} pad_to_max_dimension: true{method}"
        resizer = f"keep_aspect_ratio_resizer {{ {limits} }}"
    rule = f"\n        {export.rule}: true" if export.rule else ""
    scales = zip(("y", "x", "height", "width"), export.scales, strict=True)
    scales = "\n        ".join(f"{name}_scale: {value}" for name, value in scales)
    return f"""model {{
  ssd {{
    num_classes: {len(CLASSES)}
    image_resizer {{
      {resizer}
    }}
    feature_extractor {{
      type: "ssd_mobilenet_v1_keras"
      depth_multiplier: 0.25
    }}
    box_coder {{
      faster_rcnn_box_coder {{
        {scales}
      }}
    }}
    encode_background_as_zeros: true
    post_processing {{
      batch_non_max_suppression {{
        score_threshold: {export.score_threshold}
        iou_threshold: {IOU_THRESHOLD}
        max_detections_per_class: {export.per_class}
        max_total_detections: {export.total}{rule}
      }}
      score_converter: {export.converter}
    }}
  }}
}}
"""


def save_export(tf, folder, network, anchors, export):
    """Writes folder/saved_model, folder/pipeline.config and folder/labels.txt."""
    module = exported_module(tf, network, anchors, export)
    tf.saved_model.save(module, str(folder / "saved_model"), signatures={"serving_default": module.__call__})
    (folder / "pipeline.config").write_text(pipeline_config(export))
    (folder / "labels.txt").write_text("\n".join(CLASSES) + "\n")


def write_images(output, count=8, seed=99, tries=8, scene=DEMO_SCENE):
    """Writes unseen scenes as JPEG with their annotations in COCO format."""
    folder = output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    coco = {"images": [], "annotations": [], "categories": categories}
    for number in range(1, count + 1):
        width, height = [(640, 480), (480, 640), (800, 450), (500, 500)][number % 4]
        pixels, boxes, classes = draw_scene(rng, width, height, tries, scene)
        name = f"shapes_{number:02}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=88)
        coco["images"].append({"id": number, "file_name": name, "width": width, "height": height})
        for (y0, x0, y1, x1), label in zip(boxes.tolist(), classes.tolist(), strict=True):
            w, h = x1 - x0, y1 - y0
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [round(v, 2) for v in (x0, y0, w, h)],
                    "area": round(w * h, 2),
                    "iscrowd": 0,
                }
            )
    (output / "instances_shapes.json").write_text(json.dumps(coco, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder to write the model and the images into")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of 32 images; default: 6000")
    parser.add_argument("--scenes", type=int, default=16000, help="training images to draw; default: 16000")
    args = parser.parse_args()
    import tensorflow as tf

    tf.keras.utils.set_random_seed(3)
    anchors = make_anchors()
    network = build_network(tf)
    train(tf, network, training_set(args.scenes, anchors), args.steps)
    model = args.output / "ssd_mobilenet_v1_shapes"
    save_export(tf, model, network, anchors, Export())
    write_images(args.output)
    print(f"Wrote {model}. Next: python create_onnx.py --saved_model {model} --onnx model.onnx")


if __name__ == "__main__":
    run(main)
