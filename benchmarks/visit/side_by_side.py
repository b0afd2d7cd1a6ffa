"""side_by_side.py IMAGES ENGINE BATCH,BATCH,...: rates of an engine's network alone by how many execution contexts it has."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from commandline.inputs import find_images

import numpy as np

from images.decoding import load_image
from images.resizing import preprocess
from runtimes.trt_detector import SLOTS, TrtDetector


def main(folder, engine, sizes):
    files = find_images([folder]).files
    opened = TrtDetector._open_contexts
    for most in (SLOTS, 1):
        TrtDetector._open_contexts = lambda self, most=most: opened(self)[:most]
        with TrtDetector(engine) as detector:
            count = len({id(slot.context) for slot in detector._slots})
            for size in map(int, sizes.split(",")):
                images = [preprocess(load_image(x), detector.metadata["resizer"])[0] for x in files[:size]]
                median, worst, _ = detector.benchmark(np.stack(images))
                in_a_second = int(1000 / median * size)
                together = detector.images_per_second(np.stack(images), images=in_a_second)
                print(
                    f"{Path(engine).name}, {count} contexts, batch {size}: {together:.0f} images/s, one batch at a time"
                    f" {median:.3f} ms (p99 {worst:.3f})",
                    flush=True,
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
