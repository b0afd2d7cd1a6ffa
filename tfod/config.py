"""pipeline.config of the TensorFlow Object Detection API (TFOD), read without TFOD.

The file is protobuf text format. SCHEMA declares just the fields that decide what a model computes; the parser ignores
all others. Defaults are those of TFOD's own .proto files (object_detection/protos).
"""

import re
import warnings
from pathlib import Path

from commandline import UserError

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

# message -> "field:type=default ..."; a type that is no scalar names another message or an enum.
SCHEMA = {
    "Pipeline": "model:Model",
    "Model": "ssd:Ssd faster_rcnn:FasterRcnn center_net:Unread experimental_model:Unread",
    "Unread": "",
    "Ssd": "num_classes:int32 image_resizer:Resizer feature_extractor:FeatureExtractor box_coder:BoxCoder"
    " post_processing:PostProcessing add_background_class:bool=true mask_head_config:Unread",
    "FasterRcnn": "num_classes:int32 image_resizer:Resizer feature_extractor:FeatureExtractor number_of_stages:int32=2"
    " first_stage_nms_score_threshold:float=0.0 first_stage_nms_iou_threshold:float=0.7"
    " first_stage_max_proposals:int32=300 initial_crop_size:int32 maxpool_kernel_size:int32 maxpool_stride:int32"
    " second_stage_box_predictor:BoxPredictor second_stage_post_processing:PostProcessing"
    " context_config:Unread",
    "BoxPredictor": "mask_rcnn_box_predictor:MaskRcnnBoxPredictor rfcn_box_predictor:Unread",
    "MaskRcnnBoxPredictor": "share_box_across_classes:bool=false predict_instance_masks:bool=false"
    " predict_keypoints:bool=false mask_height:int32=15 mask_width:int32=15 masks_are_class_agnostic:bool=false",
    "FeatureExtractor": "type:string",
    "Resizer": "fixed_shape_resizer:FixedShape keep_aspect_ratio_resizer:KeepAspect identity_resizer:Unread"
    " conditional_shape_resizer:Unread pad_to_multiple_resizer:Unread",
    "FixedShape": "height:int32=300 width:int32=300 resize_method:ResizeMethod=BILINEAR convert_to_grayscale:bool=false",
    "KeepAspect": "min_dimension:int32=600 max_dimension:int32=1024 resize_method:ResizeMethod=BILINEAR"
    " pad_to_max_dimension:bool=false convert_to_grayscale:bool=false per_channel_pad_value:float*",
    "BoxCoder": "faster_rcnn_box_coder:FasterRcnnBoxCoder mean_stddev_box_coder:Unread square_box_coder:Unread"
    " keypoint_box_coder:Unread",
    "FasterRcnnBoxCoder": "y_scale:float=10.0 x_scale:float=10.0 height_scale:float=5.0 width_scale:float=5.0",
    "PostProcessing": "batch_non_max_suppression:Nms score_converter:ScoreConverter=IDENTITY logit_scale:float=1.0"
    " calibration_config:Unread",
    "Nms": "score_threshold:float=0.0 iou_threshold:float=0.6 max_detections_per_class:int32=100"
    " max_total_detections:int32=100 use_static_shapes:bool=false use_class_agnostic_nms:bool=false"
    " soft_nms_sigma:float=0.0 use_partitioned_nms:bool=false use_combined_nms:bool=false"
    " max_classes_per_detection:int32=1 change_coordinate_frame:bool=false",
}
ENUMS = {
    "ScoreConverter": ("IDENTITY", "SIGMOID", "SOFTMAX"),
    "ResizeMethod": ("UNKNOWN", "BILINEAR", "NEAREST_NEIGHBOR", "BICUBIC", "AREA"),
}
FEATURE_EXTRACTORS = (
    "ssd_mobilenet_v1_keras",
    "ssd_mobilenet_v2_keras",
    "ssd_mobilenet_v1_fpn_keras",
    "ssd_mobilenet_v2_fpn_keras",
    "ssd_resnet50_v1_fpn_keras",
    "ssd_resnet101_v1_fpn_keras",
    "ssd_resnet152_v1_fpn_keras",
    "faster_rcnn_resnet50_keras",
    "faster_rcnn_resnet101_keras",
    "faster_rcnn_resnet152_keras",
    "faster_rcnn_inception_resnet_v2_keras",
)

# A word alone on its line, or after a closing quote at the end of one: no field of the text format looks like that.
STRAY_WORD = re.compile(r'(^|"[^"\n]*")[ \t]*\b[A-Za-z]\w*[ \t]*$', re.MULTILINE)


def _message_classes():
    """Returns {message name: class} built from SCHEMA; field numbers are of no account in the text format."""
    Field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="tfod_subset.proto", package="tfod", syntax="proto2")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, field in enumerate(fields.split(), 1):
            field_name, kind, default = re.fullmatch(r"(\w+):(\w+\*?)(?:=(.+))?", field).groups()
            repeated, kind = kind.endswith("*"), kind.rstrip("*")
            entry = message.field.add(name=field_name, number=number)
            entry.label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
            if kind in SCHEMA:
                entry.type, entry.type_name = Field.TYPE_MESSAGE, f".tfod.{kind}"
            elif kind in ENUMS:
                entry.type, entry.type_name = Field.TYPE_ENUM, f".tfod.{kind}"
            else:
                entry.type = getattr(Field, f"TYPE_{kind.upper()}")
            if default is not None:
                entry.default_value = default
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tfod.{name}")) for name in SCHEMA}


MESSAGES = _message_classes()


def read_pipeline_config(path):
    """Reads a pipeline.config and returns its `model` message (fields as in SCHEMA).

    A stray word, like the `s` after a string in the zoo's Mask R-CNN file, is dropped with a warning.
    Raises UserError if the file is missing, is no pipeline.config, or describes a model that this tool does not convert.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"cannot read {path}: {reason}; --pipeline_config takes the model's pipeline.config") from error
    try:
        model = _parse(text)
    except text_format.ParseError as error:
        repaired = STRAY_WORD.sub(r"\1", text)
        try:
            model = _parse(repaired)
        except text_format.ParseError:
            raise UserError(f"{path} is not a pipeline.config: line {error}; use the file of the export") from error
        lines = [text.count("\n", 0, match.end()) + 1 for match in STRAY_WORD.finditer(text)]
        warnings.warn(f"{path}: ignored the stray word in line {', '.join(map(str, lines))}", stacklevel=2)
    _refuse_unsupported(model, path)
    return model


def _parse(text):
    pipeline = MESSAGES["Pipeline"]()
    text_format.Parse(text, pipeline, allow_unknown_field=True)
    return pipeline.model


def _refuse_unsupported(model, path):
    """Raises UserError, naming the setting, for anything whose detections this tool would get wrong."""

    def refuse(what):
        raise UserError(
            f"{path}: {what} is not supported; this tool converts SSD and Faster R-CNN with hard per-class NMS"
        )

    for name, label in (
        ("center_net", "the meta-architecture CenterNet"),
        ("experimental_model", "experimental_model"),
    ):
        if model.HasField(name):
            refuse(label)
    if model.HasField("faster_rcnn"):
        _refuse_two_stage(model.faster_rcnn, refuse)
        part = model.faster_rcnn
        post = part.second_stage_post_processing
    elif model.HasField("ssd"):
        _refuse_ssd(model.ssd, refuse)
        part = model.ssd
        post = part.post_processing
    else:
        raise UserError(f"{path} describes no model (no `model {{ ssd ... }}`): use the pipeline.config of the export")
    _refuse_resizer(part.image_resizer, refuse)
    _refuse_post_processing(post, refuse)
    if part.num_classes < 1:
        raise UserError(f"{path}: num_classes is missing; use the pipeline.config of the export")
    if part.feature_extractor.type not in FEATURE_EXTRACTORS:
        warnings.warn(
            f"{path}: the feature extractor {part.feature_extractor.type!r} is untested; trust the check's verdict",
            stacklevel=2,
        )


def _refuse_two_stage(faster_rcnn, refuse):
    predictor = faster_rcnn.second_stage_box_predictor
    if faster_rcnn.number_of_stages == 1:
        refuse("a region proposal network alone (number_of_stages: 1)")
    if faster_rcnn.HasField("context_config"):
        refuse("Context R-CNN (context_config)")
    if predictor.HasField("rfcn_box_predictor"):
        refuse("R-FCN (rfcn_box_predictor)")
    if predictor.mask_rcnn_box_predictor.predict_keypoints:
        refuse("predict_keypoints")


def _refuse_ssd(ssd, refuse):
    coder = ssd.box_coder
    for name in ("keypoint_box_coder", "mean_stddev_box_coder", "square_box_coder"):
        if coder.HasField(name):
            refuse(name)
    if ssd.HasField("mask_head_config"):
        refuse("mask_head_config (SSD with masks)")


def _refuse_resizer(resizer, refuse):
    for name in ("identity_resizer", "conditional_shape_resizer", "pad_to_multiple_resizer"):
        if resizer.HasField(name):
            refuse(f"{name} (an input without one fixed size)")
    chosen = resizer.keep_aspect_ratio_resizer
    if resizer.HasField("keep_aspect_ratio_resizer"):
        if not chosen.pad_to_max_dimension:
            refuse("keep_aspect_ratio_resizer without pad_to_max_dimension (an input without one fixed size)")
    elif resizer.HasField("fixed_shape_resizer"):
        chosen = resizer.fixed_shape_resizer
    else:
        refuse("a model without image_resizer")
    if ENUMS["ResizeMethod"][chosen.resize_method] != "BILINEAR":
        refuse(f"resize_method {ENUMS['ResizeMethod'][chosen.resize_method]}")
    if chosen.convert_to_grayscale:
        refuse("convert_to_grayscale")


def _refuse_post_processing(post, refuse):
    nms = post.batch_non_max_suppression
    for name in ("use_class_agnostic_nms", "use_combined_nms", "use_static_shapes", "use_partitioned_nms"):
        if getattr(nms, name):
            refuse(f"{name} in batch_non_max_suppression")
    if nms.soft_nms_sigma > 0:
        refuse("soft-NMS (soft_nms_sigma in batch_non_max_suppression)")
    if post.HasField("calibration_config"):
        refuse("calibration_config in post_processing")


def wrong_config(folder, what):
    """The UserError of a config that does not describe the SavedModel in `folder`; what: in which point."""
    return UserError(f"the pipeline.config is not that of {folder}: {what}; use the model's own --pipeline_config")


def describe_resizer(resizer):
    """Returns {kind, height, width[, min_dimension, max_dimension, pad_value]}: the network's input and how to fill it.

    height and width are pixels of the network's input; keep_aspect pads to a square of max_dimension (TFOD's
    resize_to_range with pad_to_max_dimension).
    """
    if resizer.HasField("fixed_shape_resizer"):
        fixed = resizer.fixed_shape_resizer
        return {"kind": "fixed_shape", "height": fixed.height, "width": fixed.width}
    keep = resizer.keep_aspect_ratio_resizer
    side = keep.max_dimension
    return {
        "kind": "keep_aspect_ratio",
        "height": side,
        "width": side,
        "min_dimension": keep.min_dimension,
        "max_dimension": side,
        "pad_value": list(keep.per_channel_pad_value) or [0.0, 0.0, 0.0],
    }
