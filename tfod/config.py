"""pipeline.config of the TensorFlow Object Detection API (TFOD), read without TFOD.

The file is protobuf text format, of which config_text finds and checks the model's part. Fields and defaults are those of
TFOD's own .proto files (object_detection/protos, 2017 to 2022).
"""

import re
from collections.abc import Sequence
from pathlib import Path

from commandline import UserError, warn

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from images.resizing import keep_aspect_size
from tfod.config_text import CLOSING, OPENING, TOKEN, ConfigText, Field, read_text

# message -> "field:type=default ..."; a type that is no scalar names another message or an enum, * is a repeated field.
# All of TFOD's fields are here, so that a misspelt one is seen: of those without a type nothing is read.
SCHEMA = {
    "Model": "ssd:Ssd faster_rcnn:FasterRcnn center_net:CenterNet experimental_model:Unread",
    "Unread": "",
    "Ssd": "num_classes:int32 image_resizer:Resizer feature_extractor:FeatureExtractor box_coder:BoxCoder"
    " post_processing:PostProcessing add_background_class:bool=true mask_head_config:Unread"
    " anchor_generator box_predictor encode_background_as_zeros explicit_background_class freeze_batchnorm"
    " implicit_example_weight inplace_batchnorm_update loss matcher negative_class_weight normalize_loc_loss_by_codesize"
    " normalize_loss_by_num_matches return_raw_detections_during_predict similarity_calculator weight_regression_loss_by_score"
    " use_confidences_as_targets use_expected_classification_loss_under_sampling minimum_negative_sampling"
    " desired_negative_sampling_ratio",
    "FasterRcnn": "num_classes:int32 image_resizer:Resizer feature_extractor:FeatureExtractor number_of_stages:int32=2"
    " first_stage_only:bool=false first_stage_nms_score_threshold:float=0.0 first_stage_nms_iou_threshold:float=0.7"
    " first_stage_max_proposals:int32=300 use_combined_nms_in_first_stage:bool=false initial_crop_size:int32"
    " maxpool_kernel_size:int32 maxpool_stride:int32 second_stage_box_predictor:BoxPredictor"
    " second_stage_post_processing:PostProcessing context_config:Unread"
    " clip_anchors_to_image first_stage_anchor_generator first_stage_atrous_rate"
    " first_stage_box_predictor_conv_hyperparams first_stage_box_predictor_depth first_stage_box_predictor_kernel_size"
    " first_stage_box_predictor_trainable first_stage_localization_loss_weight first_stage_minibatch_size"
    " first_stage_objectness_loss_weight first_stage_positive_balance_fraction hard_example_miner inplace_batchnorm_update"
    " output_final_box_features output_final_box_rpn_features resize_masks return_raw_detections_during_predict"
    " second_stage_balance_fraction second_stage_batch_size second_stage_classification_loss"
    " second_stage_classification_loss_weight second_stage_localization_loss_weight"
    " second_stage_mask_prediction_loss_weight use_matmul_crop_and_resize use_matmul_gather_in_matcher"
    " use_static_shapes:bool=false use_static_shapes_for_eval:bool=false use_partitioned_nms_in_first_stage"
    " use_static_balanced_label_sampler",
    "CenterNet": "num_classes:int32 image_resizer:Resizer feature_extractor:FeatureExtractor post_processing:Unread"
    " object_center_params:ObjectCenterParams object_detection_task:Unread keypoint_estimation_task:Keypoints*"
    " mask_estimation_task:Unread densepose_estimation_task:Unread track_estimation_task:Unread temporal_offset_task:Unread"
    " deepmac_mask_estimation:Unread compute_heatmap_sparse keypoint_label_map_path output_prediction_dict use_depthwise",
    "ObjectCenterParams": "max_box_predictions:int32=100 object_center_loss_weight classification_loss heatmap_bias_init"
    " min_box_overlap_iou use_labeled_classes keypoint_weights_for_center center_head_params peak_max_pool_kernel_size",
    "Keypoints": "rescore_instances:bool=false keypoint_class_name:string keypoint_label_to_std:KeypointStd*"
    " predict_depth:bool=false task_name task_loss_weight loss"
    " keypoint_regression_loss_weight keypoint_heatmap_loss_weight keypoint_offset_loss_weight heatmap_bias_init"
    " keypoint_candidate_score_threshold num_candidates_per_keypoint peak_max_pool_kernel_size unmatched_keypoint_score"
    " box_scale candidate_search_scale candidate_ranking_mode score_distance_offset score_distance_multiplier"
    " std_dev_multiplier offset_peak_radius per_keypoint_offset per_keypoint_depth keypoint_depth_loss_weight"
    " clip_out_of_frame_keypoints rescoring_threshold gaussian_denom_ratio argmax_postprocessing heatmap_head_params"
    " offset_head_params regress_head_params",
    "KeypointStd": "key:string value",
    "KeypointEdge": "start:int32=0 end:int32=0",  # of eval_config
    # Of all three meta-architectures.
    "FeatureExtractor": "type:string batch_norm_trainable bgr_ordering bifpn channel_means channel_stds conv_hyperparams"
    " depth_multiplier first_stage_features_stride fpn min_depth num_layers override_base_feature_extractor_hyperparams"
    " pad_to_multiple replace_preprocessor_with_placeholder spaghettinet_arch_name upsampling_interpolation use_depthwise"
    " use_explicit_padding use_separable_conv",
    "BoxPredictor": "mask_rcnn_box_predictor:MaskRcnnBoxPredictor rfcn_box_predictor:Unread"
    " convolutional_box_predictor:Unread weight_shared_convolutional_box_predictor:Unread",
    "MaskRcnnBoxPredictor": "share_box_across_classes:bool=false predict_instance_masks:bool=false"
    " predict_keypoints:bool=false mask_height:int32=15 mask_width:int32=15 masks_are_class_agnostic:bool=false"
    " box_code_size conv_hyperparams convolve_then_upsample_masks dropout_keep_probability fc_hyperparams"
    " mask_prediction_conv_depth mask_prediction_num_conv_layers use_dropout",
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
    " max_classes_per_detection:int32=1 change_coordinate_frame:bool=true use_hard_nms use_cpu_nms",
}
# Only one field of these counts, the last (`oneof` in the .proto files).
ONE_OF = {"Model", "Resizer", "BoxCoder", "BoxPredictor"}
# Where forks of TFOD add fields that need not matter: the check against TensorFlow tells.
LOOSE = {"Ssd", "FasterRcnn", "CenterNet", "FeatureExtractor", "BoxPredictor", "MaskRcnnBoxPredictor"}
LOOSE |= {"ObjectCenterParams", "Keypoints"}
ENUMS = {
    "ScoreConverter": ("IDENTITY", "SIGMOID", "SOFTMAX"),
    "ResizeMethod": ("BILINEAR", "NEAREST_NEIGHBOR", "BICUBIC", "AREA"),
}
# Of a camera's pictures, height and width: for the message that asks for --image_size.
EXAMPLE_SIZE = (1080, 1920)
# field -> (least, most): what a model can mean. The most is several times what is in use; numbers beyond it are slips of
# the hand, and cost gigabytes before anything else notices.
LIMITS = {
    "num_classes": (1, 30_000),  # ImageNet-21k has 21,841
    # 4K video fits; TFOD's largest is 1536. Networks shrink their input 32-fold or more: below 16 there is no model.
    **dict.fromkeys(("height", "width", "min_dimension", "max_dimension"), (16, 4096)),
    "per_channel_pad_value": (-1000, 1000),  # colours 0..255, normalised or not
    **dict.fromkeys(("y_scale", "x_scale", "height_scale", "width_scale"), (1e-3, 1e4)),  # 1 / variance: 5 and 10
    **dict.fromkeys(("score_threshold", "first_stage_nms_score_threshold"), (0, 1)),
    **dict.fromkeys(("iou_threshold", "first_stage_nms_iou_threshold"), (0, 1)),
    **dict.fromkeys(("max_detections_per_class", "max_total_detections"), (1, 10_000)),  # grains on a photo: 4,500
    "max_box_predictions": (1, 3840),  # 100; TensorRT sorts no more
    "first_stage_max_proposals": (1, 5000),  # 300; each is a crop of features
    "max_classes_per_detection": (1, 30_000),
    "soft_nms_sigma": (0, 100),
    "logit_scale": (1e-3, 1e3),
    "number_of_stages": (1, 3),
    "initial_crop_size": (2, 64),  # 14 to 17 pixels of features
    **dict.fromkeys(("maxpool_kernel_size", "maxpool_stride"), (1, 64)),  # 1 or 2
    **dict.fromkeys(("mask_height", "mask_width"), (1, 512)),  # 15 to 33
}
FEATURE_EXTRACTORS = (
    "ssd_mobilenet_v1_keras",
    "ssd_mobilenet_v2_keras",
    "ssd_mobilenet_v1_fpn_keras",
    "ssd_mobilenet_v2_fpn_keras",
    "ssd_resnet50_v1_fpn_keras",
    "ssd_resnet101_v1_fpn_keras",
    "ssd_resnet152_v1_fpn_keras",
    *(f"ssd_efficientnet-b{size}_bifpn_keras" for size in range(8)),
    "faster_rcnn_resnet50_keras",
    "faster_rcnn_resnet101_keras",
    "faster_rcnn_resnet152_keras",
    "faster_rcnn_inception_resnet_v2_keras",
    # TF1's
    "ssd_mobilenet_v1",
    "ssd_mobilenet_v2",
    "faster_rcnn_inception_v2",
    "resnet_v1_50_fpn",
    "resnet_v1_101_fpn",
    "resnet_v2_50",
    "resnet_v2_101",
    "mobilenet_v2_fpn",
    "mobilenet_v2_fpn_sep_conv",
    "hourglass_20",
    "hourglass_104",
)
# What a CenterNet may give that is not converted: field -> its name.
LEFT_OUT = {
    "mask_estimation_task": "masks",
    "densepose_estimation_task": "DensePose",
    "track_estimation_task": "tracks",
    "temporal_offset_task": "temporal offsets",
    "deepmac_mask_estimation": "DeepMAC's masks",
}


def _fields():
    """Returns SCHEMA as {message: {field name: Field}}."""
    fields = {}
    for message, text in SCHEMA.items():
        parts = (re.fullmatch(r"(\w+)(?::(\w+))?(\*)?(?:=(.+))?", entry).groups() for entry in text.split())
        fields[message] = {
            name: Field(name, kind, default, bool(star), message in ONE_OF) for name, kind, star, default in parts
        }
    return fields


FIELDS = _fields()


def _message_classes():
    """Returns {message name: class} built from FIELDS; field numbers are of no account in the text format."""
    Proto = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="tfod_subset.proto", package="tfod", syntax="proto2")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        if name in ONE_OF:
            message.oneof_decl.add(name="one_of")
        for number, field in enumerate(fields.values(), 1):
            if field.kind is None:
                continue
            entry = message.field.add(name=field.name, number=number)
            entry.label = Proto.LABEL_REPEATED if field.repeated else Proto.LABEL_OPTIONAL
            if field.kind in FIELDS:
                entry.type, entry.type_name = Proto.TYPE_MESSAGE, f".tfod.{field.kind}"
            elif field.kind in ENUMS:
                entry.type, entry.type_name = Proto.TYPE_ENUM, f".tfod.{field.kind}"
            else:
                entry.type = getattr(Proto, f"TYPE_{field.kind.upper()}")
            if field.default is not None:
                entry.default_value = field.default
            if field.one_of:
                entry.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tfod.{name}")) for name in FIELDS}


MESSAGES = _message_classes()


def read_pipeline_config(path):
    """Reads a pipeline.config and returns its `model` message (fields as in SCHEMA).

    Only the model is read, whatever else stands in the file. A field given twice and several models are merged, the last
    value counts (TFOD: text_format.Merge in config_util). Raises UserError if the file is missing, is no
    pipeline.config, has a value or a field in the model that cannot be, or describes a model that is not converted.
    """
    path = Path(path)
    config = ConfigText(path, read_text(path), FIELDS)
    if not config.models:
        raise UserError(f"{path} is not a pipeline.config (no `model {{ ... }}` in it); use the file of the export")
    model, contents = MESSAGES["Model"](), config.contents("Model", LOOSE)
    try:
        text_format.Merge(contents, model)
    except text_format.ParseError as error:
        line, column = error.GetLine(), error.GetColumn()
        value = contents.split("\n")[line - 1][max(0, column - 40) : column + 20].strip()
        reason = re.sub(r"^[\d: ]*|tfod\.", "", str(error).rsplit("': ", 1)[-1])[:120]
        raise config.error(line, f"{value}: {reason}") from error
    if model.WhichOneof("one_of") is None:
        nothing = f"{path} describes no model (no `model {{ ssd ... }}`): use the pipeline.config of the export"
        raise config.problem or UserError(nothing)
    part = _refuse_unsupported(model, path)
    if config.problem:
        raise config.problem
    _refuse_values(part, path)
    if part.feature_extractor.type not in FEATURE_EXTRACTORS:
        kind = part.feature_extractor.type[:60]
        config.warnings.append(f"the feature extractor {kind!r} is untested; trust the check's verdict")
    left_out = [LEFT_OUT[field.name] for field, _ in part.ListFields() if field.name in LEFT_OUT]
    if any(task.predict_depth for task in getattr(part, "keypoint_estimation_task", ())):
        left_out.append("the depths of keypoints")
    if left_out:
        config.warnings.append(f"{', '.join(left_out)} are left out")
    for text in config.warnings:
        warn(f"{path}: {text}")
    return model


def _refuse_unsupported(model, path):
    """Raises UserError, naming the setting, for anything whose detections this tool would get wrong.

    Returns the meta-architecture's message.
    """

    def refuse(what):
        raise UserError(
            f"{path}: {what} is not supported; this tool converts SSD, CenterNet, and Faster R-CNN with hard NMS"
        )

    meta = model.WhichOneof("one_of")
    if meta == "experimental_model":
        refuse("experimental_model")
    part = getattr(model, meta)
    if part.feature_extractor.type.startswith("lstm"):
        refuse(
            f"the feature extractor {part.feature_extractor.type[:60]!r} (a model of video, with a state from frame to frame)"
        )
    if meta == "center_net":
        _refuse_center_net(part, refuse)
        _refuse_resizer(part.image_resizer, refuse)
        return part
    if meta == "faster_rcnn":
        _refuse_two_stage(part, refuse)
        post = part.second_stage_post_processing
    else:
        _refuse_ssd(part, refuse)
        post = part.post_processing
    _refuse_resizer(part.image_resizer, refuse)
    _refuse_post_processing(post, part.image_resizer, refuse)
    return part


def _refuse_values(part, path):
    """Raises UserError for what a model must have and lacks, and for numbers that it cannot have."""
    given = {
        "num_classes": part.HasField("num_classes"),
        "image_resizer": part.image_resizer.WhichOneof("one_of"),
        "feature_extractor's type": part.feature_extractor.type,
        "initial_crop_size": part.DESCRIPTOR.name != "FasterRcnn" or part.HasField("initial_crop_size"),
    }
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise UserError(f"{path}: the model lacks {', '.join(missing)}; use the pipeline.config of the export")
    _refuse_out_of_range(part, path, "model")
    keep = part.image_resizer.keep_aspect_ratio_resizer
    least, most, padding = keep.min_dimension, keep.max_dimension, len(keep.per_channel_pad_value)
    if least > most:
        raise UserError(f"{path}: min_dimension {least} is above max_dimension {most}; correct them")
    if padding not in (0, 3):
        raise UserError(f"{path}: per_channel_pad_value needs three numbers, not {padding}; correct it")


def _refuse_out_of_range(message, path, place):
    """Raises UserError for a number that no model can mean (LIMITS), in this message or one within it."""
    for field, value in message.ListFields():
        if field.message_type:
            for part in value if isinstance(value, Sequence) else [value]:
                _refuse_out_of_range(part, path, field.name)
        elif field.name in LIMITS:
            least, most = LIMITS[field.name]
            for number in [value] if isinstance(value, int | float) else value:
                if not least <= number <= most:  # true of nan
                    raise UserError(
                        f"{path}: {field.name} of {place} is {number:.8g}, not within {least:g} to {most:g}; correct it"
                    )


def _refuse_two_stage(faster_rcnn, refuse):
    predictor = faster_rcnn.second_stage_box_predictor
    if faster_rcnn.number_of_stages == 1 or faster_rcnn.first_stage_only:
        refuse("a region proposal network alone (number_of_stages: 1)")
    if faster_rcnn.use_combined_nms_in_first_stage:
        refuse("use_combined_nms_in_first_stage")
    if faster_rcnn.use_static_shapes and faster_rcnn.use_static_shapes_for_eval:
        refuse("use_static_shapes_for_eval (suppression of proposals as a loop)")
    nms = faster_rcnn.second_stage_post_processing.batch_non_max_suppression
    if nms.use_combined_nms:
        refuse("use_combined_nms of a second stage")
    if nms.use_static_shapes and predictor.mask_rcnn_box_predictor.predict_instance_masks:
        refuse("use_static_shapes with masks")
    if faster_rcnn.HasField("context_config"):
        refuse("Context R-CNN (context_config)")
    if predictor.HasField("rfcn_box_predictor"):
        refuse("R-FCN (rfcn_box_predictor)")
    if predictor.mask_rcnn_box_predictor.predict_keypoints:
        refuse("predict_keypoints")


def _refuse_center_net(center_net, refuse):
    if center_net.HasField("post_processing"):
        refuse("NMS in a CenterNet (post_processing)")
    if not center_net.HasField("object_detection_task"):
        refuse("a CenterNet without boxes (no object_detection_task)")
    if any(task.rescore_instances for task in center_net.keypoint_estimation_task):
        refuse("rescore_instances")


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
    if resizer.fixed_shape_resizer.convert_to_grayscale or resizer.keep_aspect_ratio_resizer.convert_to_grayscale:
        refuse("convert_to_grayscale")


def _refuse_post_processing(post, resizer, refuse):
    nms = post.batch_non_max_suppression
    if resizer.HasField("keep_aspect_ratio_resizer") and not nms.change_coordinate_frame:
        refuse("change_coordinate_frame: false with padding (boxes relative to the padded image)")
    if nms.use_partitioned_nms:
        refuse("use_partitioned_nms in batch_non_max_suppression")
    if nms.use_class_agnostic_nms and nms.max_classes_per_detection > 1:
        refuse("max_classes_per_detection above 1 with use_class_agnostic_nms")
    if nms.use_combined_nms:
        for name in ("use_class_agnostic_nms", "use_static_shapes"):
            if getattr(nms, name):
                refuse(f"use_combined_nms with {name}")
        if resizer.HasField("keep_aspect_ratio_resizer"):
            refuse("use_combined_nms with padding")
    if nms.soft_nms_sigma > 0:
        refuse("soft-NMS (soft_nms_sigma in batch_non_max_suppression)")
    if post.HasField("calibration_config"):
        refuse("calibration_config in post_processing")


def read_skeleton(path):
    """Pairs of keypoints, from 0, that eval_config's keypoint_edge joins in pictures: a tuple, empty where there are none.

    Warns of an edge that cannot be read: it is left out.
    """
    text, edges = read_text(Path(path)), []
    for start, end in _spans(text, "keypoint_edge"):
        edge, contents = MESSAGES["KeypointEdge"](), text[start:end]
        try:
            text_format.Merge(contents, edge)
        except text_format.ParseError:
            line, contents = text.count("\n", 0, start) + 1, " ".join(contents.split())[:60]
            warn(
                f"{path}: line {line}: keypoint_edge {{{contents}}} is left out; it has a start and an end, both numbers"
            )
        else:
            edges.append((edge.start, edge.end))
    return tuple(edges)


def _spans(text, name):
    """Yields (begin, end) of what stands between the braces of each field of that name, wherever it is; of a list too.

    The field's messages have none within them.
    """
    tokens = [token for token in TOKEN.finditer(text) if not token[0].startswith("#")]
    words = [token[0] for token in tokens]
    for i in (i for i, word in enumerate(words) if word == name):
        i += 1 + (words[i + 1 : i + 2] == [":"])
        while i < len(words) and words[i] in OPENING:
            end = next((j for j in range(i + 1, len(words)) if words[j] in CLOSING), None)
            stop = tokens[end].start() if end else len(text)
            yield tokens[i].end(), stop
            i = end + 1 if end else len(words)


def wrong_config(folder, what):
    """The UserError of a config that does not describe the SavedModel in `folder`; what: in which point."""
    return UserError(f"the pipeline.config is not that of {folder}: {what}; use the model's own --pipeline_config")


def describe_resizer(resizer, image_size=None):
    """Returns {kind, height, width[, method][, min_dimension, max_dimension, pad_value[, image_size]]}: the input and how to
    fill it.

    height and width are pixels of the network's input; keep_aspect pads to a square of max_dimension (TFOD's
    resize_to_range with pad_to_max_dimension). Where it does not pad, the input is what it makes of images of `image_size`
    [height, width]: UserError where that is not given. method: as of images.resizing.resize_image; without it bilinear.
    """
    chosen = getattr(resizer, resizer.WhichOneof("one_of"))
    method = ENUMS["ResizeMethod"][chosen.resize_method].lower()
    method = {} if method == "bilinear" else {"method": method}
    if resizer.HasField("fixed_shape_resizer"):
        return {"kind": "fixed_shape", "height": chosen.height, "width": chosen.width, **method}
    height = width = chosen.max_dimension
    fixed = {}
    if not chosen.pad_to_max_dimension:
        height, width = _size_of_input(chosen, image_size)
        fixed = {"image_size": list(image_size)}
    return {
        "kind": "keep_aspect_ratio",
        "height": height,
        "width": width,
        **method,
        "min_dimension": chosen.min_dimension,
        "max_dimension": chosen.max_dimension,
        "pad_value": list(chosen.per_channel_pad_value) or [0.0, 0.0, 0.0],
        **fixed,
    }


def _size_of_input(keep_aspect, image_size):
    """The input's (height, width) for images of `image_size`. Raises UserError, naming the option, where it is not given."""
    limits = keep_aspect.min_dimension, keep_aspect.max_dimension
    if image_size is None:
        height, width = keep_aspect_size(*EXAMPLE_SIZE, *limits)
        raise UserError(
            f"the model's keep_aspect_ratio_resizer ({limits[0]}/{limits[1]}) does not pad: its input's size follows the"
            f" image's; name the height and width of your images, --image_size {EXAMPLE_SIZE[0]}x{EXAMPLE_SIZE[1]} for"
            f" example ({height} x {width} input)"
        )
    size = keep_aspect_size(*image_size, *limits)
    if min(size) < LIMITS["height"][0]:
        raise UserError(
            f"--image_size {image_size[0]}x{image_size[1]}: the model's input would be {size[0]} x {size[1]}"
        )
    return size
