"""The real Python bindings of several TensorRT versions, importable without TensorRT's libraries or a GPU.

Run as a script: `python trt_bindings.py FOLDER` imports the bindings unpacked there and prints every name that they
have, dotted, as JSON.
"""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGES = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.16": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}


def prepare(version, folder):
    """Downloads the bindings into `folder` and builds stand-ins for the C libraries they link; returns their folder."""
    folder = Path(folder) / version
    if (folder / "ready").exists():
        return folder
    wheels = folder / "wheels"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", wheels]
    subprocess.run([*download, PACKAGES[version]], check=True)
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    library = next(folder.glob("*/tensorrt.so"))
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    ).stdout
    needed = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    names = re.findall(r" U (\w+)$", undefined, re.MULTILINE)
    functions = [name for name in names if not name.startswith(("Py", "_Py"))]
    source = folder / "standins.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions))
    for soname in re.findall(r"\[(libnv\w+\.so\.\d+)\]", needed):
        build = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{soname}", "-o", folder / soname, source]
        subprocess.run(build, check=True)
    (folder / "ready").touch()
    return folder


def names(version, folder):
    """The dotted names under the module `tensorrt` of that version: {"Builder", "BuilderFlag.FP16", ...}."""
    folder = prepare(version, folder)
    environment = {"LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, __file__, folder], env=environment, check=True, capture_output=True, text=True
    )
    return set(json.loads(done.stdout))


def main(folder):
    sys.path.insert(0, folder)
    import tensorrt_bindings as trt

    found = set()
    for name in dir(trt):
        found.add(name)
        value = getattr(trt, name)
        if isinstance(value, type):
            found.update(f"{name}.{attribute}" for attribute in dir(value))
    print(json.dumps(sorted(found)))


if __name__ == "__main__":
    main(sys.argv[1])
