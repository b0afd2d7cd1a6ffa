"""pipeline.config: what is read, what is repaired, and what is refused by name."""

import random
import re
import subprocess
import sys
import time

from commandline import UserError

import pytest
from conftest import DEMO_MODEL, ROOT, ZOO, ZOO_ONLY, model_folder, need_shared, variants
from google.protobuf import text_format

import create_onnx
from demo import tiny_centernet
from demo import tiny_mask_rcnn as tiny
from demo.tiny_keypoints import Joints
from tfod.config import ENUMS, FIELDS, MESSAGES, describe_resizer, read_pipeline_config, read_skeleton
from tfod.convert import Options, read_model
from tfod.saved_model import SavedModel, find_pipeline_config, find_saved_model

DEMO_TEXT = (DEMO_MODEL / "pipeline.config").read_text()
MASK_TEXT = tiny.pipeline_config(tiny.Export())
FIXED = "fixed_shape_resizer {\n        height: 160\n        width: 160\n      }"
IOU = "iou_threshold: 0.6"
KEEP = "keep_aspect_ratio_resizer { min_dimension: 800 max_dimension: 1333 pad_to_max_dimension: true }"


def read(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "pipeline.config"
    path.write_bytes(text.encode(encoding))
    return read_pipeline_config(path)


def changed(old, new, text=DEMO_TEXT):
    assert old in text
    return text.replace(old, new, 1)


def refusal(tmp_path, text):
    """What a config is refused with: one line."""
    with pytest.raises(UserError) as raised:
        read(tmp_path, text)
    assert "\n" not in str(raised.value)
    return str(raised.value)


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
    described = describe_resizer(read(tmp_path, changed(FIXED, KEEP)).ssd.image_resizer)
    assert described["kind"] == "keep_aspect_ratio"
    assert (described["height"], described["width"], described["min_dimension"]) == (1333, 1333, 800)


@pytest.mark.parametrize("method", ["NEAREST_NEIGHBOR", "BICUBIC", "AREA", "1", "2", "3"])
@pytest.mark.parametrize("resizer", [FIXED, KEEP])
def test_the_resize_method_is_described(tmp_path, method, resizer):
    text = changed(FIXED, f"{resizer[:-1]} resize_method: {method} }}")
    name = ("BILINEAR", "NEAREST_NEIGHBOR", "BICUBIC", "AREA")[int(method)] if method.isdigit() else method
    assert describe_resizer(read(tmp_path, text).ssd.image_resizer)["method"] == name.lower()


@pytest.mark.parametrize("name", ["bom", "windows_path"])
def test_shared_cases_are_read(name, capsys):
    model = read_pipeline_config(need_shared("cases", "configs", f"{name}.config"))
    assert model.ssd.num_classes == 7
    assert model.ssd.post_processing.batch_non_max_suppression.iou_threshold == pytest.approx(0.6)
    assert capsys.readouterr().err == ""


def test_the_shared_unknown_resizer_is_named():
    with pytest.raises(UserError, match=r"line 5: .*keep_aspect_ratio_height_resizer"):
        read_pipeline_config(need_shared("cases", "configs", "unknown_resizer.config"))


BROKEN = {
    "Windows path": 'train_config { fine_tune_checkpoint: "C:\\Users\\me\\ckpt-0.index" }\n',
    "Windows folder": 'train_config {\n  fine_tune_checkpoint: "C:\\Users\\me\\"\n}\n',
    "empty value": "train_config {\n  batch_size:\n}\n",
    "tail of a longer file": '}\n}\neight: 1.0\n  }\n}\neval_input_reader {\n label_map_path: "a"\n}\n',
    "stray word after a string": 'eval_input_reader {\n  input_path: "PATH_TO_BE_CONFIGURED" s\n}\n',
    "stray word alone": "eval_input_reader {\n  s\n}\n",
    "braces missing": "train_config { optimizer { adam {\n",
    "curly quotes": "train_config { a: \u201cb\u201d }\n",
    "no quotes, Korean": "label_map_path: C:\\\ub77c\ubca8.pbtxt {\n",
    "prose": "don't {[<,\n# model {\n",
    "model in a string": 'eval_config { metrics_set: "model { ssd { num_classes: 9 } }" }\n',
}


@pytest.mark.parametrize("rest", BROKEN)
@pytest.mark.parametrize("first", [False, True])
def test_only_the_model_is_read(tmp_path, capsys, rest, first):
    text = BROKEN[rest] + DEMO_TEXT if first else DEMO_TEXT + BROKEN[rest]
    assert read(tmp_path, text) == read(tmp_path, DEMO_TEXT)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252", "utf-8"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_any_encoding_and_line_end(tmp_path, encoding, newline):
    text = ("# M\u00fcller\u2019s\n" + DEMO_TEXT).replace("\n", newline)
    assert read(tmp_path, text, encoding) == read(tmp_path, DEMO_TEXT)
    mistake = changed("height: 160", "height: x", text)
    with pytest.raises(
        UserError, match=rf"line {mistake[: mistake.index('height: x')].count(newline) + 1}: .*height: x"
    ):
        read(tmp_path, mistake, encoding)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model {", "model: {"),
        ("model {", "model # of my own {\n{"),
        ("box_coder {", "box_coder: # }\n{"),
        (FIXED, FIXED.replace("{", "<").replace("}", ">")),
        ('"ssd_mobilenet_v1_keras"', "\"ssd_mobilenet\" '_v1\\x5fkeras'  # {"),
        ("num_classes: 5", "num_classes: 0x5; loss: [{ a: [1e-5, 2] }, < b { } >],"),
        ("box_coder {", 'matcher { note: "} \\" }" other: \'{\' }\n    box_coder {'),
    ],
)
def test_all_of_the_text_format_is_read(tmp_path, old, new):
    assert read(tmp_path, changed(old, new)) == read(tmp_path, DEMO_TEXT)


def test_comments_in_other_encodings_do_not_matter(tmp_path):
    for encoding, comment in (
        ("shift_jis", "\u30af\u30e9\u30b9\u6570"),
        ("gbk", "\u7c7b\u522b"),
        ("cp949", "\ub77c\ubca8"),
    ):
        text = changed("num_classes: 5", f"num_classes: 5  # {comment}\n") + f"# {comment}"
        assert read(tmp_path, text, encoding) == read(tmp_path, DEMO_TEXT)
    for data in (b"\xff\xfe\x00", b"\x81\x8d", DEMO_TEXT.encode("utf-16-le")):
        (tmp_path / "pipeline.config").write_bytes(data)
        with pytest.raises(UserError, match=r"pipeline\.config"):
            read_pipeline_config(tmp_path / "pipeline.config")


@pytest.mark.parametrize("keys", [ZOO, pytest.param(ZOO_ONLY, marks=pytest.mark.zoo)])
def test_schema_covers_the_zoo(keys, capsys):
    """No field of the zoo's models is unknown, and the values are the parser's own, of the whole file."""
    for key in keys:
        path = find_pipeline_config(find_saved_model(model_folder(key)))
        whole = MESSAGES["Model"]()
        text = re.sub(r'"PATH_TO_BE_CONFIGURED" s$', '""', path.read_text(), flags=re.MULTILINE)
        text_format.Parse(
            re.sub(r"\nt\w+_config \{.*", "", text, flags=re.DOTALL)[7:].rstrip()[:-1], whole, allow_unknown_field=True
        )
        assert read_pipeline_config(path) == whole
    assert "TFOD has no such field" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "line", "named"),
    [
        ("fixed_shape_resizer {", "fixed_shape_resiser {", 5, "fixed_shape_resiser; did you mean fixed_shape_resizer?"),
        ("height: 160", "heigth: 160", 6, "heigth; did you mean height?"),
        ("height: 160", "hoehe: 160", 6, "image_resizer|fixed_shape_resizer has no field hoehe"),
        ("post_processing {", "post_procesing {", 23, "did you mean post_processing?"),
        ("iou_threshold", "IOU_treshold", 26, "did you mean iou_threshold?"),
        ("num_classes", "num_clases", 3, "did you mean num_classes?"),
        ("  ssd {", "  sdd {", 2, "did you mean ssd?"),
        ("y_scale: 10.0", "y_scales: 10.0", 16, "did you mean y_scale?"),
        ("score_converter: SIGMOID", "score_converter: SIGMOD", 30, "SIGMOD"),
        ("height: 160", "height: 160.5", 6, "160.5"),
        ("height: 160", "height: 99999999999", 6, "out of range"),
        ("height: 160", "height:", 6, "height has no value"),
        ("height: 160", "height 160", 6, "'height' stands alone"),
        ("height: 160", "s\nheight: 160", 6, "'s' stands alone"),
        ("height: 160", "height: \u201c160\u201d", 6, "curly quotes"),
        ('"ssd_mobilenet_v1_keras"', "\u201cssd_mobilenet_v1_keras\u201d", 11, "curly quotes"),
        ('"ssd_mobilenet_v1_keras"', '"ssd_mobilenet_v1_keras', 11, "without its closing quote"),
        ('"ssd_mobilenet_v1_keras"', "ssd_mobilenet_v1_keras", 11, "ssd_mobilenet_v1_keras"),
        ("width: 160\n      }\n    }\n", "width: 160\n      }\n    }\n  }\n", 11, "feature_extractor; is a brace"),
        ("width: 160\n      }\n    }\n", "width: 160\n      }\n    }\n  }}\n", 11, "feature_extractor stands outside"),
    ],
)
def test_mistakes_in_the_model_are_named_with_their_line(tmp_path, old, new, line, named):
    assert re.search(
        rf"pipeline\.config: line {line}: .*({named.replace('?', '.')})", refusal(tmp_path, changed(old, new))
    )


def test_a_missing_brace_is_named(tmp_path):
    text = DEMO_TEXT.rstrip().removesuffix("}")
    last = text.count("\n") + 1
    assert f"line {last}: train_config stands within" in refusal(tmp_path, text + "train_config {\n}\n}\n")
    assert "line 1: the `model {` that begins here is not closed" in refusal(tmp_path, text)
    moved = changed("width: 160\n      }", "width: 160") + "}\n"
    assert "line 9: TFOD's image_resizer has no field feature_extractor; is a brace missing" in refusal(tmp_path, moved)


def test_fields_of_a_fork_and_repeated_ones_are_warned_about(tmp_path, capsys):
    text = changed(
        "num_classes: 5", "num_classes: 9\n    num_classes: 5\n    distillation { a: 1 }\n    temperature: 2"
    )
    assert read(tmp_path, text) == read(tmp_path, DEMO_TEXT)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert re.search(r"warning: .*pipeline\.config: line 5: distillation: .*left out \(and 1 more", warnings[0])
    assert "line 4: num_classes: another value was given above; the last one counts" in warnings[1]


def test_two_models_and_two_resizers_are_merged_as_tfod_does(tmp_path, capsys):
    """text_format.Merge: the last value counts, what only the first has stays, a resizer replaces another kind of one."""
    second = f"model {{ ssd {{ num_classes: 7 image_resizer {{ {KEEP} }} }} }}"
    ssd = read(tmp_path, DEMO_TEXT + second).ssd
    assert (ssd.num_classes, ssd.feature_extractor.type) == (7, "ssd_mobilenet_v1_keras")
    assert describe_resizer(ssd.image_resizer)["kind"] == "keep_aspect_ratio"
    assert "2 models (lines 1, " in capsys.readouterr().err
    ssd = read(tmp_path, changed(FIXED, f"{FIXED} {KEEP}")).ssd
    assert describe_resizer(ssd.image_resizer)["kind"] == "keep_aspect_ratio"
    assert "keep_aspect_ratio_resizer: another value was given above" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("ssd {", "center_net {", "NMS in a CenterNet"),
        ("ssd {", "experimental_model {", "experimental_model"),
        ("ssd {", "faster_rcnn {\n    number_of_stages: 1", "region proposal network alone"),
        ("ssd {", "faster_rcnn {\n    context_config { }", "Context R-CNN"),
        ("faster_rcnn_box_coder {", "keypoint_box_coder {", "keypoint_box_coder"),
        (IOU, f"{IOU} soft_nms_sigma: 0.5", "soft-NMS"),
        (IOU, f"{IOU} use_class_agnostic_nms: true max_classes_per_detection: 2", "max_classes_per_detection above 1"),
        (
            IOU,
            f"{IOU} use_combined_nms: true use_class_agnostic_nms: true",
            "use_combined_nms with use_class_agnostic_nms",
        ),
        (IOU, f"{IOU} use_combined_nms: true use_static_shapes: true", "use_combined_nms with use_static_shapes"),
        (IOU, f"{IOU} use_static_shapes: true use_partitioned_nms: true", "use_partitioned_nms"),
        ("fixed_shape_resizer {", "conditional_shape_resizer {", "conditional_shape_resizer"),
        ("height: 160", "height: 160 convert_to_grayscale: true", "convert_to_grayscale"),
        ("score_converter: SIGMOID", "score_converter: SIGMOID calibration_config { }", "calibration_config"),
    ],
)
def test_refuses_by_name(tmp_path, old, new, named):
    assert named in refusal(tmp_path, changed(old, new))


@pytest.mark.parametrize("name", ["use_static_shapes", "use_class_agnostic_nms", "use_combined_nms"])
def test_other_forms_of_suppression_are_read(tmp_path, name):
    nms = read(tmp_path, changed(IOU, f"{IOU} {name}: true")).ssd.post_processing.batch_non_max_suppression
    assert getattr(nms, name)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("first_stage_max", "use_static_shapes: true use_static_shapes_for_eval: true first_stage_max", "for_eval"),
        ("max_total_detections", "use_combined_nms: true max_total_detections", "use_combined_nms of a second stage"),
        ("max_total_detections", "use_static_shapes: true max_total_detections", "use_static_shapes with masks"),
        ("second_stage_post", "second_stage_box_predictor { rfcn_box_predictor { } } second_stage_post", "R-FCN"),
    ],
)
def test_two_stages_refuse_by_name(tmp_path, old, new, named):
    assert named in refusal(tmp_path, changed(old, new, MASK_TEXT))


def test_combined_suppression_of_padded_images_is_refused(tmp_path):
    text = changed(FIXED, KEEP, changed(IOU, f"{IOU} use_combined_nms: true"))
    assert "use_combined_nms with padding" in refusal(tmp_path, text)


def test_boxes_of_the_padded_image_are_refused(tmp_path):
    text = changed("iou_threshold: 0.6", "iou_threshold: 0.6 change_coordinate_frame: false")
    assert read(tmp_path, text)  # no padding, no difference
    assert "change_coordinate_frame" in refusal(tmp_path, changed(FIXED, KEEP, text))


def test_tf1_names_are_read(tmp_path, capsys):
    for kind in ("ssd_mobilenet_v1", "ssd_mobilenet_v2"):
        assert read(tmp_path, changed("ssd_mobilenet_v1_keras", kind)).ssd.feature_extractor.type == kind
    assert not capsys.readouterr().err
    assert read(tmp_path, changed("ssd_mobilenet_v1_keras", "ssd_inception_v2"))
    assert "'ssd_inception_v2' is untested" in capsys.readouterr().err


def test_models_of_video_are_refused(tmp_path):
    said = refusal(tmp_path, changed("ssd_mobilenet_v1_keras", "lstm_ssd_mobilenet_v1"))
    assert "'lstm_ssd_mobilenet_v1'" in said
    assert "not supported" in said


def test_a_resizer_that_does_not_pad_needs_the_size_of_the_images(tmp_path):
    model = read(tmp_path, changed(FIXED, "keep_aspect_ratio_resizer { min_dimension: 600 max_dimension: 1024 }"))
    with pytest.raises(UserError, match=r"--image_size 1080x1920 for example \(576 x 1024 input\)"):
        describe_resizer(model.ssd.image_resizer)
    described = describe_resizer(model.ssd.image_resizer, (480, 640))
    assert (described["height"], described["width"], described["image_size"]) == (600, 800, [480, 640])
    with pytest.raises(UserError, match="--image_size 10x9000"):
        describe_resizer(model.ssd.image_resizer, (10, 9000))


# What a field's number is replaced by, besides what is no number of its type.
BAD = {
    "num_classes": ("0", "-1", "1000000"),
    "height": ("0", "-5", "2147483647", "5000"),
    "width": ("0", "-5", "2147483647"),
    "y_scale": ("0", "-10", "nan", "inf", "1e39"),
    "x_scale": ("0", "nan"),
    "height_scale": ("0", "nan"),
    "width_scale": ("0.0", "-inf"),
    "score_threshold": ("nan", "inf", "-0.1", "2"),
    "iou_threshold": ("nan", "inf", "-1", "2"),
    "max_detections_per_class": ("0", "-1", "2000000000"),
    "max_total_detections": ("0", "-100", "2000000000"),
    "logit_scale": ("0", "nan", "inf"),
    "soft_nms_sigma": ("-1", "nan"),
    "min_dimension": ("0", "-800", "1000000", "1334"),
    "max_dimension": ("0", "1000000", "799"),
    "per_channel_pad_value": ("nan", "1e30", "1 per_channel_pad_value: 2"),
    "number_of_stages": ("0", "7"),
    "first_stage_nms_score_threshold": ("nan", "2"),
    "first_stage_nms_iou_threshold": ("nan", "-1"),
    "first_stage_max_proposals": ("0", "-3", "2000000000"),
    "initial_crop_size": ("0", "1000000"),
    "maxpool_kernel_size": ("0", "-1"),
    "maxpool_stride": ("0", "1000000"),
    "mask_height": ("0", "1000000"),
    "mask_width": ("-3",),
}
# Where to put a field that neither config has.
PLACES = {
    "logit_scale": ("score_converter:", DEMO_TEXT),
    "soft_nms_sigma": ("iou_threshold:", DEMO_TEXT),
    "min_dimension": ("pad_to_max_dimension", changed(FIXED, KEEP)),
    "max_dimension": ("pad_to_max_dimension", changed(FIXED, KEEP)),
    "per_channel_pad_value": ("pad_to_max_dimension", changed(FIXED, KEEP)),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]])
def test_numbers_out_of_range_are_refused_by_name(tmp_path, name, value):
    before, text = PLACES.get(name, ("", DEMO_TEXT if re.search(rf"\b{name}:", DEMO_TEXT) else MASK_TEXT))
    if re.search(rf"\b{name}:", text):
        text = re.sub(rf"\b{name}:\s*\S+", f"{name}: {value}", text, count=1)
    else:
        text = changed(
            before or "first_stage_max_proposals", f"{name}: {value} {before or 'first_stage_max_proposals'}", text
        )
    assert name in refusal(tmp_path, text)


def test_numbers_in_use_are_in_range(tmp_path):
    """The largest and least of the zoo and of users' files."""
    for old, new in (
        ("num_classes: 5", "num_classes: 2854"),
        (FIXED, "fixed_shape_resizer { height: 2160 width: 3840 }"),
        ("max_total_detections: 100", "max_total_detections: 4500"),
        ("score_threshold: 1e-08", "score_threshold: 0"),
        ("iou_threshold: 0.6", "iou_threshold: 1.0"),
        ("y_scale: 10.0", "y_scale: 1"),
    ):
        read(tmp_path, changed(old, new))


@pytest.mark.parametrize(
    ("lacking", "named"),
    [
        (r"num_classes: 5", "num_classes"),
        (r"image_resizer \{[^}]*\}\s*\}", "image_resizer"),
        (r"type: \"\w+\"", "feature_extractor's type"),
    ],
)
def test_what_a_model_must_have(tmp_path, lacking, named):
    text, count = re.subn(lacking, "", DEMO_TEXT)
    assert count == 1
    assert f"the model lacks {named}" in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["", "{ not: [ a config", "model { }", "a: 1\nb: 2\n", "\0\1\2", "x" * 10**6])
def test_not_a_config(tmp_path, text):
    with pytest.raises(UserError, match=r"pipeline\.config"):
        read(tmp_path, text)


def test_no_such_file(tmp_path):
    for path, reason in ((tmp_path, "not a file"), (tmp_path / "absent", "No such file"), ("/dev/zero", "not a file")):
        with pytest.raises(UserError, match=reason):
            read_pipeline_config(path)


@pytest.mark.fuzz
def test_any_text_is_a_model_or_one_line(tmp_path):
    """Mutated configs: a value or a UserError within a second."""
    rng = random.Random(18)
    bits = [
        "{",
        "}",
        "<",
        ":",
        '"',
        "'",
        "#",
        "\n",
        "\u201c",
        "\\",
        "model {",
        "nan",
        "-1",
        "9" * 5000,
        "[",
        "\x85",
        "{" * 2000,
    ]
    bits += [*FIELDS["Ssd"], *FIELDS["Nms"], "train_config {", "1e400", "\u0663", "1_0", "\ufeff", "0x1F"]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(variants(600)):
        text = rng.choice([DEMO_TEXT, MASK_TEXT])
        for _ in range(rng.choice([1, 1, 2, 5])):
            start = rng.randrange(len(text))
            text = text[:start] + rng.choice(bits) + text[start + rng.choice([0, 0, 1, 5, 40]) :]
        begun = time.process_time()
        try:
            read(tmp_path, text)
            outcomes["read"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        assert time.process_time() - begun < 1
    assert min(outcomes.values()) > 50


@pytest.mark.parametrize(
    "text", ['model { ssd { type "' + "'\\" * 90_000, "model {" * 28_000, "model { ssd { " + "a: 1 " * 30_000]
)
def test_hostile_text_is_told_at_once(tmp_path, text):
    begun = time.process_time()
    refusal(tmp_path, text)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    ("edges", "joined"),
    [
        ("keypoint_edge { start: 0 end: 4 } keypoint_edge: {\n start: 4\n end: 3 }", ((0, 4), (4, 3))),
        ("keypoint_edge { end: 1 start: 2 }", ((2, 1),)),
        ("keypoint_edge < start: 1; end: 2; >", ((1, 2),)),
        ("keypoint_edge { end: 3 }", ((0, 3),)),  # proto2's 0
        ("keypoint_edge { start: 0x2, # from\n end: 1 }", ((2, 1),)),
        ("keypoint_edge: [{ start: 1 end: 2 }, { end: 2 }]", ((1, 2), (0, 2))),
        ("# keypoint_edge { start: 1 end: 2 }", ()),
        ('all_metrics: "# { keypoint_edge { start: 5 end: 6 }" keypoint_edge { start: 1 end: 2 }', ((1, 2),)),
        ("", ()),
    ],
)
def test_lines_between_keypoints(tmp_path, capsys, edges, joined):
    """As protobuf's text format has them, whatever else of the file is broken."""
    path = tmp_path / "pipeline.config"
    path.write_text(DEMO_TEXT + 'eval_config: {\n input_path: "X" s\n' + edges + "\n}")
    assert read_skeleton(path) == joined
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "edge", ["{ start: one end: 2 }", "{ from: 1 end: 2 }", "{ start: 1 { end: 2 } }", "{ start: 1 end:"]
)
def test_a_line_between_keypoints_that_cannot_be_read_is_told_of(tmp_path, capsys, edge):
    path = tmp_path / "pipeline.config"
    path.write_text(f"eval_config {{\n keypoint_edge {{ start: 1 end: 2 }}\n keypoint_edge {edge}")
    assert read_skeleton(path) == ((1, 2),)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: line 3: keypoint_edge {{" in line
    assert "is left out" in line


def test_a_line_to_a_keypoint_that_there_is_not_drops_itself_alone(tmp_path, capsys):
    tiny_centernet.save_export(tmp_path, tiny_centernet.Export(classes=1, side=64, joints=Joints(class_id=0)))
    with SavedModel(tmp_path / "saved_model") as saved_model:
        model = read_model(saved_model, read_pipeline_config(tmp_path / "pipeline.config"))
    options = create_onnx.with_keypoints(Options(skeleton=((0, 4), (4, 5), (-1, 2), (3, 1))), model, None)
    assert options.skeleton == ((0, 4), (3, 1))
    assert "the model has 5; 2 of 4 left out" in capsys.readouterr().err


def test_a_refusal_is_one_line_before_tensorflow_starts(tmp_path):
    (tmp_path / "saved_model").mkdir()
    (tmp_path / "saved_model" / "saved_model.pb").write_bytes(b"")
    text = changed("max_total_detections: 100", "max_total_detections: 2000000000 max_total_detections: -1")
    (tmp_path / "pipeline.config").write_text(text)
    options = ["--saved_model", tmp_path, "--onnx", tmp_path / "m.onnx"]
    process = subprocess.run(
        [sys.executable, ROOT / "create_onnx.py", *options], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert "max_total_detections of batch_non_max_suppression is -1" in process.stderr


@pytest.mark.parametrize(
    ("resizer", "number"), [("fixed_shape_resizer { height: 4096 width: 4096 }", "10"), (FIXED, "7000"), (KEEP, "1000")]
)
def test_a_batch_that_cannot_be_meant_is_refused(tmp_path, resizer, number):
    (tmp_path / "saved_model").mkdir()
    (tmp_path / "saved_model" / "saved_model.pb").write_bytes(b"")
    (tmp_path / "pipeline.config").write_text(changed(FIXED, resizer))
    options = ["--saved_model", tmp_path, "--onnx", tmp_path / "m.onnx", "--batch_size", number]
    process = subprocess.run(
        [sys.executable, ROOT / "create_onnx.py", *options], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 2
    assert "--batch_size" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
