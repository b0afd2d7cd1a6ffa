"""pipeline.config: what is read, what is repaired, and what is refused by name."""

from commandline import UserError

import pytest
from conftest import DEMO_MODEL, model_folder

from tfod.config import ENUMS, describe_resizer, read_pipeline_config

DEMO_TEXT = (DEMO_MODEL / "pipeline.config").read_text()


def read(tmp_path, text):
    path = tmp_path / "pipeline.config"
    path.write_text(text)
    return read_pipeline_config(path)


def test_reads_what_decides():
    ssd = read_pipeline_config(model_folder("fpnlite") / "pipeline.config").ssd
    assert ssd.num_classes == 90
    assert ssd.feature_extractor.type == "ssd_mobilenet_v2_fpn_keras"
    assert ssd.add_background_class
    assert ENUMS["ScoreConverter"][ssd.post_processing.score_converter] == "SIGMOID"
    nms = ssd.post_processing.batch_non_max_suppression
    assert nms.score_threshold == pytest.approx(1e-8)
    assert (nms.iou_threshold, nms.max_total_detections) == (pytest.approx(0.6), 100)
    assert describe_resizer(ssd.image_resizer) == {"kind": "fixed_shape", "height": 320, "width": 320}


def test_keep_aspect_pads_to_a_square(tmp_path):
    resizer = "keep_aspect_ratio_resizer { min_dimension: 800 max_dimension: 1333 pad_to_max_dimension: true }"
    text = DEMO_TEXT.replace("fixed_shape_resizer {\n        height: 160\n        width: 160\n      }", resizer)
    described = describe_resizer(read(tmp_path, text).ssd.image_resizer)
    assert described["kind"] == "keep_aspect_ratio"
    assert (described["height"], described["width"], described["min_dimension"]) == (1333, 1333, 800)


@pytest.mark.parametrize(
    "stray", ['input_path: "PATH_TO_BE_CONFIGURED" s', 'input_path: "PATH_TO_BE_CONFIGURED"\n    s']
)
def test_a_stray_word_is_dropped_with_a_warning(tmp_path, stray):
    with pytest.warns(UserWarning, match=r"ignored the stray word in line 3\d"):
        model = read(tmp_path, DEMO_TEXT + "eval_input_reader {\n  " + stray + "\n}\n")
    assert model.ssd.num_classes == 5


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("ssd {", "center_net {", "CenterNet"),
        ("ssd {", "experimental_model {", "experimental_model"),
        ("ssd {", "faster_rcnn {\n    number_of_stages: 1", "region proposal network alone"),
        ("ssd {", "faster_rcnn {\n    context_config { }", "Context R-CNN"),
        ("faster_rcnn_box_coder {", "keypoint_box_coder {", "keypoint_box_coder"),
        ("iou_threshold: 0.6", "iou_threshold: 0.6 soft_nms_sigma: 0.5", "soft-NMS"),
        ("iou_threshold: 0.6", "iou_threshold: 0.6 use_class_agnostic_nms: true", "use_class_agnostic_nms"),
        ("iou_threshold: 0.6", "iou_threshold: 0.6 use_combined_nms: true", "use_combined_nms"),
        ("fixed_shape_resizer {", "conditional_shape_resizer {", "conditional_shape_resizer"),
        ("height: 160", "height: 160 resize_method: AREA", "AREA"),
        ("score_converter: SIGMOID", "score_converter: SIGMOID calibration_config { }", "calibration_config"),
    ],
)
def test_refuses_by_name(tmp_path, old, new, named):
    assert old in DEMO_TEXT
    with pytest.raises(UserError, match=named):
        read(tmp_path, DEMO_TEXT.replace(old, new))


@pytest.mark.parametrize("text", ["", "{ not: [ a config", "model { }", "a: 1\nb: 2\n"])
def test_not_a_config(tmp_path, text):
    with pytest.raises(UserError, match=r"pipeline\.config"):
        read(tmp_path, text)
