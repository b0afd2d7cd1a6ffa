"""A model.onnx on OpenVINO, on the processor."""

from commandline import UserError

from runtimes.onnx_detector import OnnxDetector


class OpenVinoDetector(OnnxDetector):
    """A detector.Detector on OpenVINO."""

    runtime = "OpenVINO"

    def __init__(self, path, model=None, cores=None):
        try:
            import openvino
        except ImportError as error:
            raise UserError(
                "--runtime openvino: OpenVINO is not installed; pip install -r requirements-openvino.txt"
            ) from error
        self.version = openvino.__version__
        super().__init__(path, model, cores)

    def _load(self, data, callers):
        import openvino

        core = openvino.Core()
        # Processors with BF16 or FP16 would compute in that (OpenVINO, "Precision Control").
        settings = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": callers}
        if self._cores:
            settings["INFERENCE_NUM_THREADS"] = self._cores
        compiled = core.compile_model(core.read_model(data), "CPU", settings)
        idle = []  # requests, each of which one thread may use at a time

        def run(inputs):
            try:
                request = idle.pop()
            except IndexError:
                request = compiled.create_infer_request()
            results = request.infer(inputs, share_inputs=True)  # copies what comes out
            idle.append(request)
            return [results[name] for name in self._outputs]

        return run
