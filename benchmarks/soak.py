"""Runs infer.py on very many images and says whether memory, handles and results stay what they were at the beginning.

    python benchmarks/soak.py --engine model.onnx --input demo/images --output build/soak --images 100000
    python benchmarks/soak.py --engine engine.trt --input val2017 --output soak --images 3000000 --seconds 900

The images are links, a folder for each pass over --input. Of the results those of the first and of the last whole pass are
kept, and compared byte for byte. Exit status 1: they differ, or something grew. Needs Linux. What follows `--` goes to
infer.py.
"""

import collections
import contextlib
import filecmp
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commandline import UserError, make_folder, run
from commandline.inputs import find_images
from commandline.options import count, make_parser

INFER = Path(__file__).resolve().parent.parent / "infer.py"
# What has grown by more than this share, and by more than three standard deviations, is not flat.
GROWTH = 0.02


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("-e", "--engine", required=True, help="the model: model.onnx or engine.trt")
    add("-i", "--input", required=True, help="a folder of images, taken again and again")
    add("-o", "--output", required=True, help="folder for the links and the results; must not exist")
    add("--images", type=count, default=100_000, metavar="N", help="default: 100000")
    add("--seconds", type=count, metavar="N", help="stop after so long")
    add("--every", type=float, default=1.0, metavar="SECONDS", help="how often to look; default: 1")
    add("options", nargs="*", metavar="OPTION", help="after `--`: options of infer.py")
    return parser.parse_args(argv)


def make_links(files, folder, images):
    """A folder for each pass over the files, until there are so many links; returns the number of passes."""
    passes = -(-images // len(files))
    for number in range(passes):
        here = make_folder(folder / f"{number:06}")
        for file in files[: images - number * len(files)]:
            (here / Path(file).name).symlink_to(Path(file).resolve())
    return passes


def processes_of(parent):
    """Process numbers of a process and of all that it started, from /proc."""
    children = collections.defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):  # it may have ended meanwhile
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            children[int(after_name[1])].append(int(entry.name))
    found = [parent]
    for process in found:
        found += children[process]
    return found


def look(parent):
    """{what: how much} of a process and its own: MB of memory, open files, GPU memory.

    Memory without that of files, which other programs share: its part would grow where they end.
    """
    seen = {"memory MB": 0.0, "open files": 0}
    for process in processes_of(parent):
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            seen["memory MB"] += (
                sum(int(rollup.partition(kind)[2].split()[0]) for kind in ("Pss_Anon:", "Pss_Shmem:")) / 1000
            )
            seen["open files"] += len(os.listdir(f"/proc/{process}/fd"))
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):  # what others do on the rest is not ours
            query += ["-i", visible]
        used = subprocess.run(query, capture_output=True, text=True).stdout.split()
        seen["GPU memory MB"] = sum(map(float, used))
    return seen


def watch(process, results, passes, seconds, every):
    """Looks at a process until it ends, tidying up behind it; returns [look()]."""
    samples, begun, oldest = [], time.monotonic(), 1
    while process.poll() is None:
        time.sleep(every)
        if seconds and time.monotonic() - begun > seconds and process.poll() is None:
            process.send_signal(signal.SIGTERM)  # what a shell starts in the background does not get SIGINT
            seconds = None
        newest = max((int(folder.name) for folder in results.glob("[0-9]*")), default=None)
        if newest is None:
            continue
        with contextlib.suppress(IndexError, ValueError):  # it has just ended
            samples.append(look(process.pid))
        # What is drawn is drawn by several workers: the passes before the last three are whole.
        while oldest < newest - 3:
            shutil.rmtree(results / f"{oldest:06}")
            oldest += 1
    print(f"{passes} passes asked for, {time.monotonic() - begun:.0f} s, looked at {len(samples)} times")
    return samples


def flat(samples):
    """Prints what was seen by quarters; returns whether the last one is like the second. The first one is the start."""
    quarter, fine = len(samples) // 4, True
    if quarter < 3:
        raise UserError(f"looked {len(samples)} times only; take more --images, or look more often (--every)")
    for what in samples[-1]:
        values = [seen[what] for seen in samples if what in seen]
        values = values[:-1]  # it may have been ending
        parts = [values[i * len(values) // 4 : (i + 1) * len(values) // 4] for i in range(4)]
        means = [statistics.fmean(part) for part in parts]
        spread = max(statistics.pstdev(part) for part in parts[1:])
        growth = means[3] - means[1]
        grown = growth > max(3 * spread, GROWTH * means[1])
        fine = fine and not grown
        quarters = ", ".join(f"{mean:.1f}" for mean in means)
        print(f"{what}: {quarters} by quarters; {growth:+.1f}, spread {spread:.1f}: {'GREW' if grown else 'flat'}")
    return fine


def compare_passes(results, files):
    """Compares the results of the first and the last whole pass; returns whether they are the same."""
    names = sorted(path.name for path in (results / "000000").iterdir())
    whole = [folder for folder in sorted(results.glob("[0-9]*")) if len(list(folder.iterdir())) == len(names)]
    if len(whole) < 2 or not names:
        raise UserError("there was no second whole pass to compare with; take more --images")
    same, other, missing = filecmp.cmpfiles(whole[0], whole[-1], names, shallow=False)
    print(
        f"results of passes {whole[0].name} and {whole[-1].name} ({len(files)} images, {len(names)} files):"
        f" {len(same)} the same, {len(other)} others, {len(missing)} missing"
    )
    return len(same) == len(names)


def main(argv=None):
    args = parse_args(argv)
    files = find_images([args.input]).files
    output = Path(args.output)
    if output.exists():
        raise UserError(f"--output {output} is there; name a new folder, or remove it")
    passes = make_links(files, output / "links", args.images)
    infer = [
        sys.executable,
        INFER,
        "--engine",
        args.engine,
        "--input",
        output / "links",
        "--output",
        output / "results",
    ]
    log = output / "infer.log"
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen([*map(str, infer), *args.options], stdout=file, stderr=subprocess.STDOUT)
        try:
            samples = watch(process, output / "results", passes, args.seconds, args.every)
        finally:
            process.kill()
    if process.returncode not in (0, 130):
        raise UserError(f"infer.py ended with status {process.returncode}; see {log}")
    print("infer.py:", log.read_text(encoding="utf-8", errors="replace").splitlines()[-1][-300:])
    fine = compare_passes(output / "results", files)
    fine = flat(samples) and fine
    print(f"Wrote {output}. Next: {shlex.join(['rm', '-r', str(output)])}")
    return 0 if fine else 1


if __name__ == "__main__":
    run(main)
