"""NVIDIA's Triton server from the wheel nvidia-pytriton, in the environment build/tritonserver (make test), on loopback."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from conftest import ROOT

ENVIRONMENT = ROOT / "build" / "tritonserver"
STARTS_WITHIN, STOPS_WITHIN = 60, 30


class Server:
    """A running server: `http` and `grpc` are its addresses, `log` what it printed so far."""

    def __init__(self, process, http, grpc, log_file):
        self.process, self.http, self.grpc, self._log_file = process, http, grpc, log_file

    @property
    def log(self):
        return self._log_file.read_text(errors="replace")

    @property
    def stubs(self):
        """The process ids of the Python models."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        tasks = children.parent.parent.glob("*/children")
        return [int(number) for task in tasks for number in task.read_text().split()]


def is_running(pid):
    return Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@contextlib.contextmanager
def triton_server(repository, folder):
    """Yields a Server on a model repository; it must stop by itself when told to, with its Python processes.

    folder: for its log and a copy of its Python backend with the stub of this Python. Skips where it is not installed.
    """
    packages = next(ENVIRONMENT.glob("lib/python3*/site-packages"), None)
    if packages is None or not (packages / "pytriton").is_dir():
        pytest.skip("Triton's server is not installed: make build/tritonserver/.ready")
    wheel = packages / "pytriton" / "tritonserver"
    backends = folder / "backends"
    shutil.copytree(wheel / "backends", backends, dirs_exist_ok=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(wheel / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    libraries = [packages / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    environment = {
        **os.environ,
        "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",  # the Python that the stub takes for its own
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
    }
    http, grpc = free_ports(2)
    options = ["--model-repository", repository, "--backend-directory", backends, "--allow-metrics", "false"]
    options += ["--http-address", "127.0.0.1", "--http-port", http, "--grpc-address", "127.0.0.1", "--grpc-port", grpc]
    log_file = folder / "server.log"
    with open(log_file, "w") as log:
        command = [wheel / "bin" / "tritonserver", *options]
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
    server = Server(process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log_file)
    try:
        wait_until_ready(server)
        yield server
        stubs = server.stubs
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOPS_WITHIN) == 0, server.log
        assert stubs and not any(map(is_running, stubs))
    finally:
        process.kill()
        process.wait()


def wait_until_ready(server):
    import tritonclient.http

    end = time.monotonic() + STARTS_WITHIN
    with tritonclient.http.InferenceServerClient(server.http) as client:  # a server waits for open connections to end
        while time.monotonic() < end:
            assert server.process.poll() is None, server.log
            with contextlib.suppress(OSError):
                if client.is_server_ready():
                    return
            time.sleep(0.1)
    raise AssertionError(server.log)


def free_ports(count):
    """Numbers of ports on loopback that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
