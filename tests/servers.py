"""Servers on loopback, from the environment build/servers (make test makes it): NVIDIA's Triton, and moto's for S3."""

import contextlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

ENVIRONMENT = ROOT / "build" / "servers"
PYTHON = ENVIRONMENT / "bin" / "python"
STARTS_WITHIN, STOPS_WITHIN, ANSWERS_WITHIN = 120, 60, 240


class Triton:
    """A running Triton server: `http` and `grpc` are its addresses, `log` what it printed so far."""

    def __init__(self, process, http, grpc, log_file):
        self.process, self.http, self.grpc, self._log_file = process, http, grpc, log_file

    @property
    def log(self):
        return self._log_file.read_text(errors="replace")

    @property
    def stubs(self):
        """The process ids of the Python models."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(number) for task in tasks for number in task.read_text().split()]

    def ask(self, requests, threads=1):
        """The answers to requests (model, encoded images): {output: array}, or a text, the error. Every second thread asks
        over gRPC, the others over HTTP."""
        addresses = {"http": self.http, "grpc": self.grpc}
        return call_client({"addresses": addresses, "requests": requests, "threads": threads})


def call_client(job):
    """What triton_client.py gives for a job."""
    need("tritonclient")
    client = subprocess.run(
        [PYTHON, Path(__file__).with_name("triton_client.py")],
        input=pickle.dumps(job),
        capture_output=True,
        timeout=ANSWERS_WITHIN,
        check=False,
    )
    assert client.returncode == 0, client.stderr.decode()
    return pickle.loads(client.stdout)


def read_configs(texts):
    """config.pbtxt files as Triton reads them: dicts."""
    return call_client({"configs": texts})


def need(package):
    """The folder of packages in build/servers; skips the test where that or the package is absent."""
    packages = next(ENVIRONMENT.glob("lib/python3*/site-packages"), None)
    if packages is None or not (packages / package).is_dir():
        pytest.skip(f"{package} is not installed in build/servers: make build/servers/.ready")
    return packages


def is_running(pid):
    return Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@contextlib.contextmanager
def triton_server(repository, folder):
    """Yields a Triton on a model repository; it must stop by itself when told to, with its Python processes.

    folder: for its log and a copy of its Python backend with the stub of this Python.
    """
    packages = need("pytriton")
    wheel = packages / "pytriton" / "tritonserver"
    backends = folder / "backends"
    shutil.copytree(wheel / "backends", backends, dirs_exist_ok=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(wheel / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    libraries = [packages / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    environment = {
        **os.environ,
        "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",  # the Python that the stub takes for its own
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
    }
    http, grpc = free_ports(2)
    options = ["--model-repository", repository, "--backend-directory", backends, "--allow-metrics", "false"]
    options += ["--http-address", "127.0.0.1", "--http-port", http, "--grpc-address", "127.0.0.1", "--grpc-port", grpc]
    log_file = folder / "server.log"
    with open(log_file, "w") as log:
        command = [wheel / "bin" / "tritonserver", *options]
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
    server = Triton(process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log_file)
    try:
        wait_until_ready(process, f"http://{server.http}/v2/health/ready", log_file)
        yield server
        stubs = server.stubs
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOPS_WITHIN) == 0, server.log
        assert stubs and not any(map(is_running, stubs))
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def s3_server(folder):
    """Yields the address HOST:PORT of an empty object store; folder: for its log."""
    need("moto")
    (port,) = free_ports(1)
    log_file = folder / "s3.log"
    with open(log_file, "w") as log:
        command = [PYTHON, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/", log_file)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process, address, log_file):
    """Waits until the address of a process's server answers."""
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end:
        assert process.poll() is None, log_file.read_text(errors="replace")
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(address, timeout=10):
            return
        time.sleep(0.1)
    raise AssertionError(log_file.read_text(errors="replace"))


def free_ports(count):
    """Numbers of ports on loopback that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
