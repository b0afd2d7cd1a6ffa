"""What an actor of Ray Data does: paths of images in, a Parquet file of what is in them out.

Only paths and counts travel between machines, and the model, once to each of them.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path

from commandline import UserError
from commandline.options import KEYPOINT_THRESHOLD, check_detection_type

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from checks.coco import encode_mask
from deploy.storage import Folder, load
from images.aspect import choose_fit
from results import Summary, encode_picture
from runtimes import open_detector
from runtimes.gpu_images import choose_decoder
from runtimes.pipeline import choose_batch_size, detect_files, open_workers
from tfod.labels import labels_of
from visualize import draw_detections

MASK = pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()})  # COCO's run-length encoding
SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "boxes": pa.list_(pa.list_(pa.float32())),  # xmin ymin xmax ymax in pixels of the image
        "scores": pa.list_(pa.float32()),
        "classes": pa.list_(pa.int32()),  # from 0
        "names": pa.list_(pa.string()),
        "masks": pa.list_(MASK),  # null without --detection_type segmentation
        "keypoints": pa.list_(pa.list_(pa.list_(pa.float32()))),  # x, y in pixels, score; null: the model gives none
        "error": pa.string(),  # why the image cannot be read; null where it can
    }
)
DETECTIONS, PICTURES = "detections", "pictures"  # folders of the output
SETTINGS = b"tfod_tensorrt"  # in the files' metadata: what --resume compares
MANY = 1_000_000  # images that an actor may get: worker processes pay


@dataclasses.dataclass(frozen=True)
class Job:
    """What all actors are told."""

    engine: str  # the model file's name, for people
    model: bytes
    model_digest: str
    labels: tuple | None  # (name, bytes) of a labels file
    beside: tuple  # the same of each file beside the model that may have its class names; none with `labels`
    output: str
    store: str | None  # an address of the object store that the images are in
    threshold: float
    masks_from: float | None
    batch_size: int | None
    picture_format: str | None  # jpg or png; None: no pictures
    exif_rotate: bool
    max_pixels: int | None
    fit: bool
    decoder: str
    cores: int

    def settings(self):
        """What results depend on, as bytes."""
        chosen = {"model": self.model_digest, "nms_threshold": self.threshold, "iou_threshold": self.masks_from}
        chosen |= {"labels": hashlib.sha256(repr((self.labels, self.beside)).encode()).hexdigest()}
        chosen |= {"exif_rotate": self.exif_rotate, "max_pixels": self.max_pixels, "fit": self.fit}
        return json.dumps(chosen).encode()


class RayDetector:
    """Called by Ray Data with tables of paths and names of results."""

    def __init__(self, job):
        """Raises UserError where the model cannot run here."""
        self._job, self._output = job, Folder(job.output)
        with tempfile.TemporaryDirectory() as folder:  # what is open no longer needs the files
            model = Path(folder, Path(job.engine).name)
            model.write_bytes(job.model)
            self._detector = open_detector(model, cores=job.cores)
            for name, data in (*job.beside, *filter(None, [job.labels])):
                Path(folder, name).write_bytes(data)
            labels = Path(folder, job.labels[0]) if job.labels else None
            metadata = self._detector.metadata
            check_detection_type("bbox" if job.masks_from is None else "segmentation", metadata, job.engine)
            self._labels = labels_of(labels, metadata, model)
        self._least = metadata["score_threshold"]
        choose_fit(metadata, job.fit)
        self._batch_size = choose_batch_size(self._detector, job.batch_size, 1, job.engine)
        self._workers = open_workers(self._detector, MANY, self._batch_size, job.cores)
        self._load = functools.partial(load, store=job.store, exif_rotate=job.exif_rotate, max_pixels=job.max_pixels)
        self._pictures = None
        if job.picture_format:
            skeleton = metadata.get("skeleton") or ()
            self._pictures = Pictures(
                job.output, self._labels, job.masks_from, skeleton, job.picture_format, self._load
            )

    def __call__(self, table):
        """Writes the results of a table's images (`path`, `name`) as one file; returns one row: a Summary's, `skipped`, and
        `least`, the model's own threshold."""
        paths, names = ([os.fsdecode(value) for value in table[key].to_pylist()] for key in ("path", "name"))
        rows, summary = [None] * len(paths), Summary()

        def skip(number, path, why):
            rows[number] = {"path": path, "error": why}

        decoder = choose_decoder(self._job.decoder, self._detector, paths, self._job.exif_rotate)
        options = {"keep_images": bool(self._pictures), "load": self._load, "decoder": decoder, "skip": skip}
        detected = detect_files(self._detector, paths, self._batch_size, self._workers, **options)
        chosen = (dataclasses.replace(item, found=item.found.above(self._job.threshold)) for item in detected)
        if self._pictures:
            items = ((item, names[item.number]) for item in chosen)
            chosen = self._workers.map(self._pictures.write, items, through_memory=bool(decoder))
        for item in chosen:
            rows[item.number] = self._row(item)
            summary.add(names[item.number], item.found)
        self._write(paths, rows)
        counts = {**dataclasses.asdict(summary), "skipped": len(paths) - summary.images, "least": self._least}
        return pa.table({name: [value] for name, value in counts.items()})

    def _row(self, item):
        """A Detected as a row of the results."""
        found, size = item.found, (item.placement.height, item.placement.width)
        boxes = found.boxes * np.float32(size * 2)
        masks = None
        if self._job.masks_from is not None:
            masks = [
                encode_mask(m, box, *size, self._job.masks_from) for m, box in zip(found.masks, boxes, strict=True)
            ]
        return {
            "path": item.path,
            "boxes": boxes[:, [1, 0, 3, 2]].tolist(),
            "scores": found.scores.tolist(),
            "classes": found.classes.tolist(),
            "names": [self._labels[label] or str(label) for label in found.classes.tolist()],
            "masks": masks,
            "keypoints": None if found.keypoints is None else found.points_xy(size).tolist(),
        }

    def _write(self, paths, rows):
        """Writes rows as a Parquet file that is named after their images: a task that runs again writes the same file."""
        schema, file = SCHEMA.with_metadata({SETTINGS: self._job.settings()}), io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(rows, schema), file, compression="zstd")
        digest = hashlib.sha256(os.fsencode("\n".join(paths))).hexdigest()
        self._output.write(f"{DETECTIONS}/{digest[:20]}.parquet", file.getvalue())


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Draws and writes pictures, in whatever process."""

    output: str
    labels: list
    masks_from: float | None
    skeleton: list  # pairs of keypoints
    format: str
    load: functools.partial  # for images that are not kept

    def write(self, item, name):
        """Writes pictures/NAME of a Detected; returns it without the image."""
        image = self.load(item.path) if item.image is None else item.image
        found, name = item.found, f"{PICTURES}/{name}.{self.format}"
        boxes = found.boxes * np.float32(image.shape[:2] * 2)
        masks = found.masks if self.masks_from is not None else None
        points = {"points": found.points(image.shape[:2], KEYPOINT_THRESHOLD), "skeleton": self.skeleton}
        shown = boxes, found.scores, found.classes, self.labels, masks, self.masks_from or 0.0
        drawn = draw_detections(image, *shown, **points)
        Folder(self.output).write(name, encode_picture(drawn, self.format, name))
        return dataclasses.replace(item, image=None)


def images_done(output, settings):
    """The paths in the results that lie in a Folder already: a set. Raises UserError where other settings made them.

    settings: of Job.settings.
    """
    done = set()
    for path in output.files(DETECTIONS, ".parquet"):
        try:
            with output.open(path) as file:
                table = parquet.read_table(file, columns=["path"])
        except (pa.ArrowException, OSError, KeyError) as error:
            raise UserError(f"--resume: {path} is not of this tool or broken ({error}); remove it") from error
        if (table.schema.metadata or {}).get(SETTINGS) != settings:
            raise UserError(
                f"--resume: {path} was made by another model, with other class names or options; choose another --output"
            )
        done.update(table["path"].to_pylist())
    return done
