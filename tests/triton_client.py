"""Asks a Triton server, or reads config.pbtxt as it does: for servers.py, in the environment where tritonclient is.

A pickled job on standard input, the pickled answers on standard output.
"""

import concurrent.futures
import pickle
import sys

import numpy as np
import tritonclient.grpc
import tritonclient.http
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

OUTPUTS = ("num_detections", "boxes", "scores", "classes", "names", "masks", "keypoints")


def ask(module, client, model, contents):
    images = module.InferInput("images", [len(contents), 1], "BYTES")
    images.set_data_from_numpy(np.array([[content] for content in contents], object))
    try:
        response = client.infer(model, [images])
    except InferenceServerException as error:
        return str(error)
    return {name: array for name in OUTPUTS if (array := response.as_numpy(name)) is not None}


def ask_all(addresses, requests, threads):
    answers = [None] * len(requests)

    def work(thread):
        protocol = ("grpc", "http")[thread % 2]
        module = {"grpc": tritonclient.grpc, "http": tritonclient.http}[protocol]
        with module.InferenceServerClient(addresses[protocol]) as client:
            for number in range(thread, len(requests), threads):
                answers[number] = ask(module, client, *requests[number])

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return answers


def read_config(text):
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    return json_format.MessageToDict(config, preserving_proto_field_name=True)


job = pickle.load(sys.stdin.buffer)
given = list(map(read_config, job["configs"])) if "configs" in job else ask_all(**job)
pickle.dump(given, sys.stdout.buffer)
