"""Class scores: how TFOD makes them of a head's predictions, found in a TensorFlow graph and written in ONNX."""

import dataclasses

import numpy as np

from tfod.config import ENUMS, wrong_config
from tfod.graph import RESHAPING


@dataclasses.dataclass(frozen=True)
class ScoreHead:
    """How class predictions become scores."""

    logits: str  # the TensorFlow tensor [B, anchors, classes (+ background)]
    converter: str  # SIGMOID, SOFTMAX or IDENTITY
    logit_scale: float

    def convert(self, ops, logits):
        """Adds the nodes that make scores of logits [..., classes (+ background)]."""
        if self.logit_scale != 1:
            logits = ops.add("Mul", logits, np.float32(self.logit_scale))
        if self.converter == "SOFTMAX":
            return ops.add("Softmax", logits, axis=-1)
        return ops.add("Sigmoid", logits) if self.converter == "SIGMOID" else logits


def find_score_head(frozen, tensor):
    """Walks back from the scores `tensor` (raw_detection_scores, say) to the ScoreHead that they are made by."""
    converter, scale = "IDENTITY", 1.0
    while True:
        op, inputs = frozen.op(tensor), frozen.inputs(tensor)
        if op in ("Sigmoid", "Softmax"):
            converter = op.upper()
        elif op in ("Mul", "RealDiv"):
            factor = frozen.constant(inputs[1])
            if factor is None or factor.size != 1:
                return ScoreHead(tensor, converter, scale)
            scale *= float(factor) if op == "Mul" else 1.0 / float(factor)
        elif op not in RESHAPING:
            return ScoreHead(tensor, converter, scale)
        tensor = inputs[0]


def check_converter(head, post_processing, folder):
    """Raises UserError if a config's post_processing message names another score converter than the ScoreHead's."""
    wanted = ENUMS["ScoreConverter"][post_processing.score_converter]
    if head.converter != wanted:
        raise wrong_config(folder, f"it says score_converter {wanted}, the model computes {head.converter}")
