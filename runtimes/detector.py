"""What runs a model file, whatever runs it: what it takes, what it gives, and how it is called.

B is the number of images in a batch, D of detections in an image.
"""

import dataclasses
import os
import typing

import numpy as np

from images.decoding import load_image
from images.resizing import preprocess
from tfod.labels import default_labels

# What a detector counts its seconds of, in `spent`: copies to and from the GPU, network, taking the results apart. Of batches
# that go on side by side each counts in full.
STAGES = ("copy", "network", "postprocess")


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What the network takes: `batch` images (None: any number) of height x width RGB pixels, 0..255."""

    name: str
    batch: int | None
    height: int
    width: int
    layout: str  # NHWC or NCHW
    dtype: np.dtype
    true_shape: str | None  # the input for the images' sizes within padded inputs, where there is one


@dataclasses.dataclass(frozen=True)
class Detections:
    """The detections of one image, best first."""

    boxes: np.ndarray  # [D, 4] yxyx, normalised to the image
    scores: np.ndarray  # [D] float32
    classes: np.ndarray  # [D] int32, 0-based
    masks: np.ndarray | None = None  # [D, h, w] float32, the probability of the object, over its box
    keypoints: np.ndarray | None = None  # [D, K, 2] float32 y, x, normalised to the image, perhaps outside it
    keypoint_scores: np.ndarray | None = None  # [D, K] float32

    def where(self, kept):
        """The detections for which `kept` [D] (bool, or a slice) holds."""
        return Detections(**{name: None if part is None else part[kept] for name, part in vars(self).items()})

    def alone(self):
        """The same in memory of their own: as a detector gives them, they hold all that it found in their batch, masks included."""
        return Detections(**{name: None if part is None else part.copy() for name, part in vars(self).items()})

    def points(self, size, least):
        """The keypoints [D, K, 2] y, x in pixels of an image of `size` (height, width), NaN where they score less than `least`,
        or 0: the object's class has none; None where the model gives none."""
        if self.keypoints is None:
            return None
        hidden = (self.keypoint_scores < least) | (self.keypoint_scores <= 0)
        return np.where(hidden[..., None], np.float32(np.nan), self.keypoints * np.float32(size))

    def points_xy(self, size):
        """The keypoints [D, K, 3] x, y in pixels of an image of `size` (height, width), score; NaN as in `points`."""
        return np.concatenate([self.points(size, 0)[..., ::-1], self.keypoint_scores[..., None]], axis=2)

    def above(self, score):
        """The detections that score at least that."""
        return self.where(slice(np.count_nonzero(self.scores >= score)))  # best first


class Detector(typing.Protocol):
    """A model file that is open to run. A context manager: what it holds is freed on exit."""

    runtime: str  # its name, for people
    version: str  # of the runtime
    metadata: dict  # of the model, onnx_utils.read_metadata
    input: InputSpec
    max_batch: int | None  # images that it takes at a time, at most; None: any number
    usual_batch: int | None  # images at a time that it was optimised for; None: no particular number
    batches_ahead: int  # batches that may be started before the first of them is finished
    spent: dict  # {stage of STAGES: seconds so far}
    gpu: object  # the GpuContext it runs in, where it takes gpu_images.DeviceImages too; None on a processor

    def infer(self, batch, true_shapes=None):
        """batch: [B, height, width, 3] RGB 0..255, or a list of such images; B at most max_batch. Returns B Detections.

        true_shapes: [B, 2] height and width in pixels of the images within padded inputs
        (images.resizing.Placement.true_shape); None: they fill them. Raises ValueError for another shape or a larger batch.
        """

    def start(self, batch, true_shapes=None):
        """Like infer, but returns at once; `finish` takes what this returns and gives the Detections.

        At most batches_ahead at a time, finished in the order in which they were started. A list of images is read before
        this returns, an array perhaps until it is finished.
        """

    def finish(self, ticket):
        """Waits for a batch that was started; returns its Detections."""

    def images_per_second(self, batch, true_shapes=None, images=500):
        """The rate of the network alone, on a batch (see infer) again and again, of about so many images; as many
        batches side by side as `start` has."""

    def close(self): ...

    def __enter__(self): ...

    def __exit__(self, *exception): ...


@dataclasses.dataclass(frozen=True)
class Found:
    """One object in an image."""

    name: str  # of its class; the class's number from 0 where it has no name
    score: float
    box: tuple  # ymin, xmin, ymax, xmax in pixels of the image
    label: int  # its class, from 0
    mask: np.ndarray | None  # [h, w], the probability of the object, over its box
    keypoints: np.ndarray | None = (
        None  # [K, 3]: y and x in pixels of the image, score; metadata["keypoints"] names them
    )


def detect(detector, image, threshold=0.3, names=None):
    """The objects in one image that score `threshold` and more, surest first: a list of Found.

    image: RGB uint8 [height, width, 3], 0..255, or the path of a file. names: of the classes; default: those in the model's
    file, COCO's for 90 classes. Raises images.decoding.ImageError for a file that cannot be read,
    ValueError for what is no such array.
    """
    pixels = load_image(image) if isinstance(image, (str, os.PathLike)) else rgb_array(image)
    found = detect_image(detector, pixels).above(threshold)
    names = names or detector.metadata.get("labels") or default_labels(detector.metadata["num_classes"])
    boxes = found.boxes * np.float32(pixels.shape[:2] * 2)
    masks = [None] * len(boxes) if found.masks is None else found.masks
    points = [None] * len(boxes)
    if found.keypoints is not None:
        places = found.keypoints * np.float32(pixels.shape[:2])
        points = np.concatenate([places, found.keypoint_scores[..., None]], axis=2)
    rows = zip(found.scores.tolist(), boxes.tolist(), found.classes.tolist(), masks, points, strict=True)
    return [Found(names[label] or str(label), score, tuple(box), label, *more) for score, box, label, *more in rows]


def rgb_array(image):
    """A user's image as an array; raises ValueError for any but RGB uint8 [H, W, 3]: of other numbers the network would make
    nothing, and not say so."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        what = type(image).__name__ if pixels.dtype == object else f"{pixels.dtype} {list(pixels.shape)}"
        raise ValueError(f"an image is uint8 RGB [height, width, 3], 0..255; this is {what}")
    return pixels


def detect_image(detector, image):
    """Detections of one RGB image [H, W, 3] of any size, preprocessing included."""
    tensor, placement = preprocess(image, detector.metadata["resizer"])
    return detector.infer(tensor[None], [placement.true_shape])[0]


def input_spec(metadata):
    """The InputSpec of a model with this metadata."""
    resizer = metadata["resizer"]
    return InputSpec(
        "input_tensor",
        metadata["batch_size"],
        resizer["height"],
        resizer["width"],
        metadata["input_format"],
        np.dtype(metadata["input_type"]),
        "true_shape" if resizer["kind"] == "keep_aspect_ratio" else None,
    )


def network_inputs(batch, true_shapes, spec):
    """{input name: array}: a batch (see Detector.infer) in the network's type and layout, filled up to a fixed batch size."""
    inputs = {spec.name: image_input(batch, spec)}
    if spec.true_shape:
        inputs[spec.true_shape] = shape_input(true_shapes, len(batch), spec)
    return inputs


def image_input(batch, spec, memory=None):
    """A batch as the network's first input, [size, H, W, 3] or [size, 3, H, W], filled up with zeros to a fixed size.

    memory: an array of that shape and the network's type to put it into. Without, an array that is so already is not copied.
    Raises ValueError for images of another size, and for too many.
    """
    if spec.batch is not None and len(batch) > spec.batch:
        raise ValueError(f"the network takes at most {spec.batch} images at a time, not {len(batch)}")
    for image in batch:
        if np.shape(image) != (spec.height, spec.width, 3):
            raise ValueError(f"the network takes [{spec.height}, {spec.width}, 3] images, not {list(np.shape(image))}")
    size = spec.batch or len(batch)
    is_so = isinstance(batch, np.ndarray) and (spec.layout, batch.dtype, len(batch)) == ("NHWC", spec.dtype, size)
    if memory is None and is_so:
        return np.ascontiguousarray(batch)
    shape = (size, spec.height, spec.width, 3)
    if memory is None:
        memory = np.empty(shape if spec.layout == "NHWC" else (size, 3, *shape[1:3]), spec.dtype)
    images = memory if spec.layout == "NHWC" else memory.transpose(0, 2, 3, 1)
    for row, image in enumerate(batch):
        images[row] = np.rint(image) if spec.dtype == np.uint8 and image.dtype != np.uint8 else image
    images[len(batch) :] = 0
    return memory


def shape_input(true_shapes, images, spec):
    """The true_shape input [size, 2] float32: the whole input where nothing is said, and where the batch is filled up."""
    shapes = np.tile(np.float32([spec.height, spec.width]), (spec.batch or images, 1))
    if true_shapes is not None:
        shapes[:images] = true_shapes
    return shapes


def split_detections(outputs, images):
    """The network's outputs {name: [B, ...]} -> the Detections of each of the first `images` images."""
    counts = outputs["num_detections"][:images, 0]
    parts = [field.name for field in dataclasses.fields(Detections) if f"detection_{field.name}" in outputs]
    return [
        Detections(**{part: outputs[f"detection_{part}"][i, :count] for part in parts})
        for i, count in enumerate(counts)
    ]


def output_names(metadata):
    """The names of the network's outputs."""
    names = ["num_detections", "detection_boxes", "detection_scores", "detection_classes"]
    names += ["detection_masks"] if metadata.get("mask_size") else []
    return names + (["detection_keypoints", "detection_keypoint_scores"] if metadata.get("keypoints") else [])
