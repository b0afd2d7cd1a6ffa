"""What runs a model file, whatever runs it: what it takes, what it gives, and how it is called.

B is the number of images in a batch, D of detections in an image.
"""

import dataclasses
import typing

import numpy as np

from images.resizing import preprocess

# What a detector counts its seconds of, in `spent`: copies to and from the GPU, network, taking the results apart.
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

    def where(self, kept):
        """The detections for which `kept` [D] (bool, or a slice) holds."""
        masks = None if self.masks is None else self.masks[kept]
        return Detections(self.boxes[kept], self.scores[kept], self.classes[kept], masks)

    def above(self, score):
        """The detections that score at least that."""
        return self.where(self.scores >= score)


class Detector(typing.Protocol):
    """A model file that is open to run. A context manager: what it holds is freed on exit."""

    runtime: str  # its name, for people
    metadata: dict  # of the model, onnx_utils.read_metadata
    input: InputSpec
    max_batch: int | None  # images that it takes at a time, at most; None: any number
    batches_ahead: int  # batches that may be started before the first of them is finished
    spent: dict  # {stage of STAGES: seconds so far}

    def infer(self, batch, true_shapes=None):
        """batch: [B, height, width, 3] RGB 0..255, B at most max_batch. Returns B Detections.

        true_shapes: [B, 2] height and width in pixels of the images within padded inputs
        (images.resizing.Placement.true_shape); None: they fill them. Raises ValueError for another shape or a larger batch.
        """

    def start(self, batch, true_shapes=None):
        """Like infer, but returns at once; `finish` takes what this returns and gives the Detections.

        At most batches_ahead at a time, finished in the order in which they were started. The batch is read until then.
        """

    def finish(self, ticket):
        """Waits for a batch that was started; returns its Detections."""

    def page_lock(self, array):
        """Prepares memory (whole pages) for fast copies from it; returns what is called to undo that, or None."""

    def images_per_second(self, batch, true_shapes=None, images=500):
        """The rate of the network alone, on a batch (see infer) again and again, of about so many images."""

    def close(self): ...

    def __enter__(self): ...

    def __exit__(self, *exception): ...


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
    """{input name: array}: a batch (see Detector.infer) in the network's type and layout, filled up to a fixed batch size.

    What is so already (ImageBatcher with this spec) is not copied, but to be filled up.
    """
    inputs = {spec.name: _arrange(batch, spec)}
    if spec.true_shape:
        shapes = np.tile(np.float32([spec.height, spec.width]), (spec.batch or len(batch), 1))
        if true_shapes is not None:
            shapes[: len(batch)] = true_shapes
        inputs[spec.true_shape] = shapes
    return inputs


def _arrange(batch, spec):
    """[B, H, W, 3] in the network's type and layout, filled up with zeros to a fixed batch size."""
    batch = np.asarray(batch)
    if batch.ndim != 4 or batch.shape[1:] != (spec.height, spec.width, 3):
        raise ValueError(f"the network takes [n, {spec.height}, {spec.width}, 3] images, not {list(batch.shape)}")
    if spec.batch is not None and len(batch) > spec.batch:
        raise ValueError(f"the network takes at most {spec.batch} images at a time, not {len(batch)}")
    if spec.dtype == np.uint8 and batch.dtype != np.uint8:
        batch = np.rint(batch)
    batch = batch.astype(spec.dtype, copy=False)
    if spec.batch is not None and len(batch) < spec.batch:
        batch = np.concatenate([batch, np.zeros((spec.batch - len(batch), *batch.shape[1:]), spec.dtype)])
    if spec.layout == "NCHW":
        batch = batch.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(batch)


def split_detections(outputs, images):
    """The network's outputs {name: [B, ...]} -> the Detections of each of the first `images` images."""
    counts = outputs["num_detections"][:images, 0]
    keys = ("detection_boxes", "detection_scores", "detection_classes", "detection_masks")
    return [Detections(*(outputs[key][i, :count] for key in keys if key in outputs)) for i, count in enumerate(counts)]
