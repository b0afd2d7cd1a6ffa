"""A model.onnx on ONNX Runtime, on the processor or on its CUDA provider."""

from commandline import UserError

from runtimes.onnx_detector import OnnxDetector


class OrtDetector(OnnxDetector):
    """A detector.Detector on ONNX Runtime."""

    runtime = "ONNX Runtime"

    def __init__(self, path, model=None, cores=None, gpu=None):
        """gpu: the number of that to run on, with ONNX Runtime's CUDA provider; None: the processor. Else as OnnxDetector."""
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"--engine {path}: ONNX Runtime is not installed; pip install onnxruntime") from error
        self._provider, self._settings = "CPUExecutionProvider", {}
        if gpu is not None:
            self.runtime = "ONNX Runtime's CUDA provider"
            self._provider, self._settings = "CUDAExecutionProvider", {"device_id": str(gpu)}
            if self._provider not in onnxruntime.get_available_providers():
                raise UserError(
                    f"--runtime cuda: ONNX Runtime {onnxruntime.__version__} here has no CUDA provider; pip install"
                    " onnxruntime-gpu in place of onnxruntime"
                )
            onnxruntime.set_default_logger_severity(4)  # where it does not start, the message in _load says so
        self.version = onnxruntime.__version__
        super().__init__(path, model, cores)

    def _load(self, data, callers):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads(callers)
        # In FP16 the scales that this optimizer gives to biases underflow: FPNLite's AP falls to 0.01.
        disabled = ["WeightBiasQuantization"] if self._half_quantized else []
        session = onnxruntime.InferenceSession(
            data, options, providers=[(self._provider, self._settings)], disabled_optimizers=disabled
        )
        if session.get_providers()[0] != self._provider:  # ONNX Runtime goes on without, on the processor
            raise UserError(
                "--runtime cuda: ONNX Runtime's CUDA provider does not start here: it needs an NVIDIA GPU, and CUDA and"
                " cuDNN of the versions that onnxruntime-gpu was built for"
            )
        return lambda inputs: session.run(self._outputs, inputs)
