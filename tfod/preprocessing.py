"""What TFOD does to an image before the network: found and measured in the TensorFlow graph, written anew in ONNX."""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

import onnx_utils
from images import resizing
from tfod import tf1
from tfod.config import wrong_config
from tfod.graph import ModelError


def find_preprocessed_images(frozen):
    """The float32 tensor [B, H, W, 3] of resized, normalised images, where the network proper begins.

    TFOD preprocesses image by image in a loop (exporter_lib_v2: tf.map_fn over the batch) and stacks what comes out:
    the stack is the last tensor before the first convolution. Of a TF1 export, the arithmetic on its colours behind it, too.
    """
    scores = frozen.outputs.get("raw_detection_scores", frozen.outputs["detection_boxes"])
    if stacks := tf1.find_image_stacks(frozen, scores):
        return tf1.behind_colours(frozen, stacks[0])
    found = [
        name
        for name, op in frozen.ancestors(scores).items()
        if op == "TensorListStack" and len(frozen.static_shape(name)) == 4 and frozen.is_float(name, "element_dtype")
    ]
    if len(found) != 1:
        raise ModelError(
            "the SavedModel's image preprocessing was not found (no loop over the batch); "
            "export it with TFOD's exporter_main_v2.py as image_tensor or float_image_tensor"
        )
    return found[0]


@dataclasses.dataclass(frozen=True)
class Colours:
    """What becomes of colours: normalised = raw[order] * scale + offset, for each of the network's channels."""

    order: list  # [3] which of R, G, B a channel takes: 0 1 2, or 2 1 0 where TFOD swaps red and blue
    scale: np.ndarray  # [3]
    offset: np.ndarray  # [3]
    pad_value: list | None  # [3] of a keep-aspect resizer's padding, in raw RGB

    def normalise(self, image):
        """RGB [H, W, 3], 0..255 -> what the network takes."""
        return image[..., self.order] * self.scale + self.offset


def probe_preprocessing(frozen, images, resizer):
    """Measures what the model's preprocessing does to colours, on images that its resizer leaves at their size.

    images: of find_preprocessed_images. resizer: the dict of config.describe_resizer. Returns Colours. (SSD pads after
    normalising: its padding of 0 is the raw 127.5 of a MobileNet; Faster R-CNN and CenterNet before.) Raises UserError if
    the preprocessing is not of that form.
    """
    subgraph = frozen.extract([images], control=True)
    padded = resizer["kind"] == "keep_aspect_ratio" and "image_size" not in resizer
    height = resizer["min_dimension"] if padded else resizer["height"]
    width = resizer["width"]

    def preprocess(image):
        return frozen.run([images], subgraph, {frozen.image: frozen.feed(image)})[0][0].astype(np.float64)

    shape = (height, width, 3)
    offset = preprocess(np.zeros(shape))[0, 0]
    scale = (preprocess(np.full(shape, 255.0))[0, 0] - offset) / 255
    image = np.random.default_rng(0).integers(0, 256, shape)
    result = preprocess(image)
    fits = result.shape[:2] == (resizer["height"], width)
    for colours in (Colours(order, scale, offset, None) for order in ([0, 1, 2], [2, 1, 0])):
        if fits and np.abs(colours.normalise(image) - result[:height]).max() < 1e-3:
            break
    else:
        raise ModelError(
            "the SavedModel's preprocessing is not the config's resizer and a scale per channel; "
            "is the pipeline.config the model's own?"
        )
    _check_resizing(preprocess, resizer, colours)
    pad_value = None
    if padded:  # a panorama leaves the bottom right corner empty
        pad_value = (preprocess(np.zeros((max(1, width // 4), width, 3)))[-1, -1] - offset) / scale
        pad_value = pad_value[colours.order].round(3).tolist()
    return Colours(colours.order, scale.astype(np.float32), offset.astype(np.float32), pad_value)


def _check_resizing(preprocess, resizer, colours):
    """Raises UserError unless an image of another size is resized by the config's method. preprocess: the model's own."""
    height, width = resizer["height"] * 3 // 4, resizer["width"] * 5 // 4
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    if "image_size" in resizer:  # the input is as large as the resizer makes this image
        made = resizing.keep_aspect_size(height, width, resizer["min_dimension"], resizer["max_dimension"])
        resizer = {**resizer, "height": made[0], "width": made[1]}
    resized, placement = resizing.preprocess(image, resizer)
    filled = tuple(slice(side) for side in placement.true_shape)
    if np.abs(colours.normalise(resized[filled]) - preprocess(image)[filled]).max() > 1e-3:
        raise ModelError(
            "the SavedModel does not resize images as the config's image_resizer says"
            f" ({resizer['kind']}, {resizer.get('method', 'bilinear')});"
            " is the pipeline.config the model's own?"
        )


def check_colours(config, scale, folder):
    """Raises UserError if colours scaled by `scale` [3] are not what the config's backbone takes (TFOD's feature extractors).

    ResNet V1 subtracts a mean and scales nothing; MobileNet, Inception, MobileDet, NAS, PNAS and ResNet V2 scale.
    """
    kind = config.feature_extractor.type
    scaling = any(name in kind for name in ("mobilenet", "inception", "mobiledet", "nas", "resnet_v2"))
    if ("resnet" in kind or scaling) and scaling == np.allclose(scale, 1):
        raise wrong_config(folder, f"it says {kind}, the model {'does not scale' if scaling else 'scales'} colours")


def add_inputs(graph, images, colours, resizer, options):
    """Puts the file's inputs before the network: raw RGB 0..255, colours normalised inside the graph.

    With a keep-aspect resizer there is a second one, true_shape [B, 2]: height and width in pixels of the image within the
    padded input. Replaces the graph's inputs: images is the network's own. options: convert.Options. Returns the second
    input as a window (see boxes), or None.
    """
    ops = onnx_utils.OpBuilder(graph, "preprocessing")
    batch, height, width = options.batch_size or "batch", resizer["height"], resizer["width"]
    nchw = options.input_format == "NCHW"
    shape = [batch, 3, height, width] if nchw else [batch, height, width, 3]
    x = gs.Variable("input_tensor", np.dtype(options.input_type), shape)
    graph.inputs = [x]
    if options.input_type == "uint8":
        x = ops.cast(x, np.float32)
    if not nchw:
        x = ops.add("Transpose", x, perm=[0, 3, 1, 2])
    if colours.order != [0, 1, 2]:
        x = ops.add("Gather", x, np.int64(colours.order), axis=1)
    if np.any(colours.scale != 1):
        x = ops.add("Mul", x, colours.scale.reshape(1, 3, 1, 1))
    if np.any(colours.offset != 0):
        x = ops.add("Add", x, colours.offset.reshape(1, 3, 1, 1))
    onnx_utils.replace_tensor(graph, images, x)
    if resizer["kind"] != "keep_aspect_ratio":
        return None
    true_shape = gs.Variable("true_shape", np.float32, [batch, 2])
    graph.inputs.append(true_shape)
    return ops.add("Div", true_shape, np.float32([height, width]))
