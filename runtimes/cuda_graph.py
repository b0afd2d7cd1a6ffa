"""CUDA graphs through the driver's own interface, as pycuda has no call for them."""

import ctypes

from commandline import UserError

from runtimes.cuda_driver import cuda_driver


class CudaGraph:
    """Work captured from a stream, replayed at once. (CUDA driver API, "Graph Management")."""

    THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating

    def __init__(self, stream, definition, executable):
        self._stream, self._definition, self._executable = stream, definition, executable

    @classmethod
    def capture(cls, stream, enqueue):
        """Captures what `enqueue()` puts on the pycuda stream; None where that cannot be captured."""
        driver, handle = cuda_driver(), ctypes.c_void_p(stream.handle)
        definition, executable = ctypes.c_void_p(), ctypes.c_void_p()
        if driver.cuStreamBeginCapture_v2(handle, cls.THREAD_LOCAL):
            return None
        try:
            enqueue()
            failed = False
        except UserError:
            failed = True
        failed |= bool(driver.cuStreamEndCapture(handle, ctypes.byref(definition)))
        if failed or not definition:
            return None
        if driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), definition, ctypes.c_ulonglong(0)):
            driver.cuGraphDestroy(definition)
            return None
        return cls(handle, definition, executable)

    def launch(self):
        error = cuda_driver().cuGraphLaunch(self._executable, self._stream)
        if error:
            raise RuntimeError(f"CUDA graph launch failed with error {error}")

    def free(self):
        cuda_driver().cuGraphExecDestroy(self._executable)
        cuda_driver().cuGraphDestroy(self._definition)
