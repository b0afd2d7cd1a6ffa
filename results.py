"""What commands write of detections: tables, pictures, and a line that sums them up."""

import dataclasses
import io

from commandline import UserError, whole_file

import numpy as np

from images.decoding import simplejpeg

# JPEG at this quality takes 1 ms for 640x480; PNG 21 ms at its lowest compression, ten times what decoding took.
JPEG_QUALITY = 92
MAX_JPEG_SIDE = 65_500  # libjpeg's


def result_rows(found, size):
    """Detections of an image of `size` (height, width) as lines `xmin ymin xmax ymax score class`, tab-separated, in pixels;
    then `x y score` of each keypoint, empty where the class has none."""
    points = None if found.keypoints is None else found.points_xy(size)
    rows = zip(found.boxes * np.float32((*size, *size)), found.scores, found.classes, strict=True)
    for i, ((ymin, xmin, ymax, xmax), value, label) in enumerate(rows):
        columns = [f"{xmin:.2f}", f"{ymin:.2f}", f"{xmax:.2f}", f"{ymax:.2f}", f"{value:.6f}", str(label)]
        for x, y, certainty in () if points is None else points[i]:
            columns += ["", "", ""] if np.isnan(y) else [f"{x:.2f}", f"{y:.2f}", f"{certainty:.6f}"]
        yield "\t".join(columns) + "\n"


def write_results(path, found, size):
    """Writes detections (see result_rows) as a file."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(result_rows(found, size))


def write_picture(path, picture):
    """Writes a Pillow image as .jpg or .png."""
    data = encode_picture(picture, path.suffix[1:], path)
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def encode_picture(picture, format, path):
    """A Pillow image as the bytes of a "jpg" or "png" file. Raises UserError, naming its `path`, where a JPEG cannot be."""
    if format == "jpg" and max(picture.size) > MAX_JPEG_SIDE:
        raise UserError(f"cannot write {path}: a JPEG has at most {MAX_JPEG_SIDE:,} pixels a side; use --format png")
    if format == "jpg" and simplejpeg is not None:  # the same libjpeg-turbo, twice as fast as through Pillow
        return simplejpeg.encode_jpeg(np.asarray(picture), JPEG_QUALITY, "RGB", "420")
    file = io.BytesIO()
    if format == "jpg":
        picture.save(file, "JPEG", quality=JPEG_QUALITY)
    else:
        picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


@dataclasses.dataclass
class Summary:
    """What was found in how many images."""

    detections: int = 0
    images: int = 0
    empty: int = 0  # images without any
    most: int = 0  # detections in the image `example`
    example: object = None

    def add(self, image, found):
        count = len(found.scores)
        self.images, self.detections, self.empty = self.images + 1, self.detections + count, self.empty + (not count)
        if count > self.most or self.example is None:
            self.example, self.most = image, count

    def merge(self, other):
        """Adds what another Summary counted."""
        self.images, self.detections = self.images + other.images, self.detections + other.detections
        self.empty += other.empty
        if other.most > self.most or self.example is None:
            self.example, self.most = other.example, other.most

    def text(self, threshold, unit="image", least=0.0):
        """`61 detections of 0.3 and more in 9 images; 3 images without any (...)`

        threshold: what scores less was left out; least: what scores less the model itself leaves out.
        """
        with_some = self.images - self.empty
        text = f"{self.detections} detections of {max(threshold, least):g} and more in {with_some} {unit}{'s' * (with_some != 1)}"
        if self.empty:
            text += f"; {self.empty} {unit}{'s' * (self.empty != 1)} without any"
            if least > 0 and least >= threshold:
                text += " (the model was made to leave out weaker ones)"
            elif threshold > 0:
                text += f" (--nms_threshold {min(0.1, threshold / 2):g} shows weaker ones)"
        return text
