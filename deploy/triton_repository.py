"""A model repository of Triton Inference Server: the network, a model that takes encoded images, and how to start both."""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

from commandline import ROOT, UserError, printable
from commandline.version import VERSION

from deploy.closure import copy_needed
from deploy.triton_config import images_config, network_config
from onnx_utils import read_metadata
from runtimes import standard_graph

# How config.pbtxt begins in the folders that a later export may replace.
MADE_BY = "# Made by export_triton.py"
# What deploy/triton_model.py imports, and what runs a network within it. The Python backend that was tried (Triton 2.51, in
# NVIDIA's container 24.10) dies with NumPy 2.
PACKAGES = ("numpy<2", "Pillow>=10.1", "simplejpeg>=1.7", "protobuf>=4.25", "tqdm>=4.60")
DETECTOR_PACKAGES = ("onnx>=1.15", "onnx-graphsurgeon>=0.5")
# NVIDIA's Triton containers by the TensorRT in them, which must be the engine's; for ONNX files, the one that was tried.
# (https://docs.nvidia.com/deeplearning/frameworks/support-matrix)
CONTAINERS = {"8.5": "23.03", "8.6": "24.02"}
CONTAINER = "24.10"

README = """# {name} and {name}_images for Triton Inference Server

Made by export_triton.py {version} of `{source}`.{container_note} Start the server, in this folder:

```
docker run --rm {gpus}--shm-size 1g -p 8000:8000 -p 8001:8001 -v "$PWD:/models" nvcr.io/nvidia/tritonserver:{container}-py3 \\
    sh -c "pip install -r /models/{name}_images/requirements.txt && exec tritonserver --model-repository /models"
```

Ask it (`pip install 'tritonclient[http,grpc]'`):

```python
import numpy as np
import tritonclient.http

photos = [[open("photo.jpg", "rb").read()]]  # N lists of one encoded image each
images = tritonclient.http.InferInput("images", [len(photos), 1], "BYTES")
images.set_data_from_numpy(np.array(photos, object))
found = tritonclient.http.InferenceServerClient("localhost:8000").infer("{name}_images", [images])
count = found.as_numpy("num_detections")[0, 0]
for name, score, box in zip(*(found.as_numpy(key)[0, :count] for key in ("names", "scores", "boxes"))):
    print(name.decode(), score, box)  # xmin ymin xmax ymax in pixels of the photo
```

`{name}_images` takes up to {most} images a request, of any kind that infer.py reads. It gives `num_detections` [N, 1] and, with
room for the image that has most of them, `boxes` [N, M, 4], `scores` [N, M], `classes` [N, M] (from 0), `names` [N, M]{more}.
Detections under {threshold:g} are left out: `nms_threshold` in its config.pbtxt. A request with an image that cannot be read gets an
error that says which and why. The names are those in its labels.txt.

{network_note}
"""


def export(folder, name, network, data, names, source, *, threshold, instances, in_process, fit, tensorrt=None):
    """Writes the models NAME_images and, unless the network is to run within it, NAME into a repository, all or nothing.

    network: a triton_config.Network; data: the model file's bytes; names: of the classes, None for one without; source: the
    file, for people; fit: see images.aspect; tensorrt: the version that an engine is for. Models of that name of an earlier export are replaced.
    Raises UserError where what lies there is not ours. Returns the names of the models.
    """
    models = [f"{name}_images"] if in_process else [name, f"{name}_images"]
    for target in (folder / name, folder / f"{name}_images"):
        if target.exists() and not is_ours(target):
            raise UserError(
                f"--name {name}: {target} is there and export_triton.py did not make it; choose another name"
            )
    note = folder / "README.md"
    if note.exists() and "Made by export_triton.py" not in note.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"--repository {folder}: its README.md is not of export_triton.py; choose another folder")
    head = f"{MADE_BY} {VERSION} of {source}.\n"
    # Beside the repository, not in it: a server may be watching that.
    with tempfile.TemporaryDirectory(prefix=".export_triton.", dir=folder.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        old.mkdir()
        images = new / f"{name}_images"
        (images / "1").mkdir(parents=True)
        config = images_config(images.name, network, None if in_process else name, threshold, instances, fit)
        write(images / "config.pbtxt", head + config)
        write(images / "labels.txt", "".join(f"{label or number}\n" for number, label in enumerate(names)))
        write(images / "requirements.txt", "".join(f"{line}\n" for line in packages(network, in_process, tensorrt)))
        # As onnx_utils.check_metadata passed it when the file was opened; in the server there need be no package for ONNX.
        write(images / "1" / "metadata.json", json.dumps(network.metadata, indent=1, sort_keys=True))
        shutil.copyfile(ROOT / "deploy" / "triton_model.py", images / "1" / "model.py")
        copy_needed(ROOT / "deploy" / "triton_model.py", images / "1")
        holder = images if in_process else new / name
        (holder / "1").mkdir(parents=True, exist_ok=True)
        (holder / "1" / network.file_name).write_bytes(data)
        if not in_process:
            write(holder / "config.pbtxt", head + network_config(name, network))
            shutil.copyfile(images / "labels.txt", holder / "labels.txt")
        write(new / "README.md", readme(name, network, source, threshold, in_process, tensorrt))
        for target in (folder / name, folder / f"{name}_images"):
            with contextlib.suppress(FileNotFoundError):
                target.rename(old / target.name)
        for target in (*models, "README.md"):
            (new / target).replace(folder / target)
    return models


def write(path, text):
    path.write_text(printable(text), encoding="utf-8")


def is_ours(model):
    """Whether a folder is a model that export_triton.py made."""
    config = model / "config.pbtxt"
    return config.is_file() and config.read_text(encoding="utf-8", errors="replace").startswith(MADE_BY)


def standard_form(model):
    """A converted model as the bytes of a file that Triton's backend for ONNX Runtime runs: no plugins."""
    if read_metadata(model, "the model")["ops"] != "standard":
        model = standard_graph.standard_file(model)
    return model.SerializeToString()


def packages(network, in_process, tensorrt):
    """What is to be installed where Triton's Python backend runs, as lines of a requirements file."""
    if not in_process:
        return PACKAGES
    runtime = (f"tensorrt=={tensorrt}", "pycuda>=2022.2") if network.is_engine else ("onnxruntime>=1.17",)
    return (*PACKAGES, *DETECTOR_PACKAGES, *runtime)


def readme(name, network, source, threshold, in_process, tensorrt):
    """README.md of the repository."""
    container = CONTAINER
    container_note = ""
    if network.is_engine:
        short = ".".join(tensorrt.split(".")[:2])
        container = CONTAINERS.get(short, "xx.yy")
        container_note = f" The container must have TensorRT {short}, which built the engine, and the GPU its model."
        if container == "xx.yy":
            container_note += " NVIDIA's support matrix says which does: put it in the place of xx.yy."
    note = f"`{name}` is the network itself: prepared pixels in, all detections out, as the project's README.md says."
    if in_process:
        note = (
            "The network runs within the Python model, on TensorRT."
            if network.is_engine
            else ("The network runs within the Python model, on ONNX Runtime and processors.")
        )
    return README.format(
        name=name,
        version=VERSION,
        source=source,
        container=container,
        container_note=container_note,
        gpus="--gpus all " if network.is_engine or not in_process else "",
        most=network.max_batch,
        more=(", `masks` [N, M, h, w]: probabilities over each box" if network.metadata.get("mask_size") else "")
        + (", `keypoints` [N, M, K, 3]: x, y in pixels, score" if network.metadata.get("keypoints") else ""),
        threshold=threshold,
        network_note=note,
    )
