"""How images lie before a model: of another aspect ratio than one without padding was converted for (create_onnx.py
--image_size), or stored turned."""

import warnings

from commandline import UserError, warn

from PIL import Image

from images.decoding import EXIF_ORIENTATION, FORMATS, is_on_its_side
from images.resizing import keep_aspect_size

LOOKED_AT = 100  # images whose EXIF data are read to warn of photos that are stored turned
FIT_HELP = (
    "of a model made for one image size (create_onnx.py --image_size): resize and pad images of another aspect ratio into"
    " its input, with other results than TensorFlow's; default: refuse them"
)


def choose_fit(metadata, fit, files=(), exif_rotate=False):
    """Sets `fit` in the resizer of a detector's metadata (see images.resizing.placement_of), with a warning that says so.

    Without: raises UserError where images among `files` have another aspect ratio than the model was converted for.
    Files that cannot be read are left to who reads them.
    """
    resizer = metadata["resizer"]
    if "image_size" not in resizer:
        if fit:
            warn("--fit has no effect: the model takes images of every size")
        return
    made_for = "{1} x {0}".format(*resizer["image_size"])
    if fit:
        resizer["fit"] = True
        warn(f"--fit: where an image's aspect ratio is not that of {made_for}, results differ from TensorFlow's")
        return
    others = [(path, size) for path in files if (size := image_size(path, exif_rotate)) and not _suits(*size, resizer)]
    if others:
        path, (width, height) = others[0]
        raise UserError(
            f"{len(others)} of {len(files)} images have another aspect ratio than {made_for} (width x height), which the model"
            f" was converted for ({path}: {width} x {height}): convert for theirs, create_onnx.py --image_size"
            f" {height}x{width} (height first), or --fit, which resizes and pads them, with other results than TensorFlow's"
        )


def _suits(width, height, resizer):
    size = keep_aspect_size(height, width, resizer["min_dimension"], resizer["max_dimension"])
    return size == (resizer["height"], resizer["width"])


def image_size(path, exif_rotate=False):
    """(width, height) of an image file by its header, or None where it has none: what is wrong the loader says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                return image.size[::-1] if exif_rotate and is_on_its_side(image) else image.size
    except Exception:  # Pillow's readers raise whatever a broken file leads them into
        return None


def warn_of_turned(files, exif_rotate):
    """Warns where photos are stored turned, by their EXIF data, and are to be read as they are stored. Looks at the first ones."""
    looked_at = [] if exif_rotate else files[:LOOKED_AT]
    turned = sum(stored_orientation(path) != 1 for path in looked_at)
    if turned:
        warn(
            f"{turned} of the first {len(looked_at)} images are stored turned (EXIF), and read so, as TensorFlow reads them;"
            " --exif_rotate turns them as viewers do"
        )


def stored_orientation(path):
    """How an image file is stored by its EXIF data, 1 (upright, or nothing is said) to 8; without decoding its pixels, as a
    PNG's own getexif would to look behind them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                orientation = Image.Image.getexif(image).get(EXIF_ORIENTATION)
    except Exception:  # whatever it is, reading it will say so
        return 1
    return orientation if orientation in range(2, 9) else 1
