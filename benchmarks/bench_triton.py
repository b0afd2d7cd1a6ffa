"""Measures a Triton server with a model of export_triton.py: images/s and latencies under several clients at once.

    python benchmarks/bench_triton.py --address localhost:8001 --input val2017
    python benchmarks/bench_triton.py --address localhost:8001 --input val2017 --clients 1 8 32 --requests 600

It needs tritonclient (requirements-triton.txt). Each client, a thread, sends one photo a request over gRPC and waits for the
answer before the next. The photos are read into memory first. Bounded: it ends after so many requests for each number of
clients.
"""

import concurrent.futures
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commandline import run
from commandline.inputs import find_images
from commandline.options import count, make_parser

import numpy as np


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--address", default="localhost:8001", help="of the server, gRPC; default: localhost:8001")
    add("--name", default="detector_images", help="of the model; default: detector_images")
    add("--input", nargs="+", required=True, metavar="PATH", help="photos, as of infer.py")
    add("--clients", type=count, nargs="+", default=[1, 8, 32], metavar="N", help="at once; default: 1 8 32")
    add("--requests", type=count, default=600, metavar="N", help="for each number of clients; default: 600")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    import tritonclient.grpc  # here: --help and --version need no packages

    photos = [Path(path).read_bytes() for path in find_images(args.input).files[: args.requests]]
    with tritonclient.grpc.InferenceServerClient(args.address) as client:
        seconds_of(client, args.name, photos[:20])
        for clients in args.clients:
            requests = list(itertools.islice(itertools.cycle(photos), args.requests))
            begun = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(clients) as pool:
                parts = pool.map(
                    lambda part: seconds_of(client, args.name, part), (requests[n::clients] for n in range(clients))
                )
                latencies = [1000 * seconds for part in parts for seconds in part]
            rate = len(latencies) / (time.perf_counter() - begun)
            p50, p90, p99 = np.percentile(latencies, [50, 90, 99])
            print(f"{clients:3} clients: {rate:7.1f} images/s; ms: median {p50:.1f}, p90 {p90:.1f}, p99 {p99:.1f}")


def seconds_of(client, name, photos):
    """How long each photo's request took, one after another."""
    import tritonclient.grpc

    taken = []
    for photo in photos:
        images = tritonclient.grpc.InferInput("images", [1, 1], "BYTES")
        images.set_data_from_numpy(np.array([[photo]], object))
        begun = time.perf_counter()
        client.infer(name, [images])
        taken.append(time.perf_counter() - begun)
    return taken


if __name__ == "__main__":
    run(main)
