"""Drawing: colours that are told apart, frames and labels that are seen on any ground and at any width, any script."""

import warnings

import numpy as np
import pytest
from browser import open_page
from fontTools.ttLib import TTFont
from PIL import Image, features

from checks import report
from fonts import label_font
from tfod.labels import labels_of
from visualize import PAGE_WIDTH, _rendered, class_colour, draw_detections, side_by_side

COLOURS = np.array([class_colour(label) for label in range(90)])
BOX = np.float32([[60, 40, 140, 160]])


def draw(ground, names=("cat",), boxes=BOX, scores=None, classes=None, **options):
    """Pixels of detections on an image of one colour, or on a given one."""
    image = ground if np.ndim(ground) == 3 else np.full((200, 300, 3), ground, np.uint8)
    scores = np.full(len(boxes), 0.5) if scores is None else scores
    classes = np.zeros(len(boxes), int) if classes is None else classes
    return np.asarray(draw_detections(image, boxes, scores, classes, list(names), **options))


def linear(colours):
    """Linear light [N, 3] of sRGB colours [N, 3] in 0..255 (IEC 61966-2-1)."""
    values = np.asarray(colours) / 255
    return np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)


def cielab(colours):
    """L*, a*, b* [N, 3] under D65 (CIE 15)."""
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    xyz = linear(colours) @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def contrast(colour, others):
    """WCAG's contrast ratio, 1 to 21, of a colour [3] to others [N, 3]."""
    low, high = np.sort(
        [linear(np.stack([np.broadcast_to(colour, others.shape), others])) @ [0.2126, 0.7152, 0.0722]], 1
    )[0]
    return (high + 0.05) / (low + 0.05)


def test_colours_are_told_apart():
    """A difference of 2.3 is just seen; classes 1 and 9 were 19 apart, 1 and 14 nine, two of 90 one and a half."""
    lab = cielab(COLOURS)
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1000 * np.eye(len(lab))
    assert apart[:20, :20].min() >= 25
    assert apart.min() >= 10
    assert lab[:, 0].min() >= 55, "too dark for dark ground and for black letters"
    assert class_colour(90) == class_colour(0)


@pytest.mark.parametrize("ground", [(0, 0, 0), (30, 20, 10), (128, 128, 128), (255, 255, 255), "its own"])
def test_frames_stand_out_on_any_ground(ground):
    for label in range(20):
        colour = np.array(class_colour(label) if ground == "its own" else ground)
        picture = draw(colour, ["cat"] * 20, classes=np.array([label]))
        edge = picture[100, 30:50]  # across the left side of the box
        assert contrast(colour, edge).max() >= 3, (label, ground)


def plate_height(picture, ground=128):
    """Rows of the label above BOX."""
    return int((picture[:60, 45] != ground).any(axis=1).sum())


def test_labels_are_as_large_as_they_are_seen():
    """640 pixels that the page shows on a third of its width: still letters of 12 pixels and lines of one and a half."""
    image = np.full((480, 640, 3), 128, np.uint8)
    box = np.float32([[60, 40, 440, 600]])
    plain, panel = (draw(image, boxes=box, seen_width=width) for width in (None, PAGE_WIDTH / 3))
    shown = PAGE_WIDTH / 3 / 640
    assert plate_height(plain) * shown < 10
    assert plate_height(panel) * shown >= 11
    line = int((panel[250, 30:60] == class_colour(0)).all(axis=1).sum())
    assert line * shown >= 1.4
    assert (draw(image, boxes=box, seen_width=2000) == plain).all(), "never smaller than the image asks for"
    assert f"max-width: {PAGE_WIDTH}px" in report.STYLE


def test_the_best_label_is_whole_in_a_crowd():
    boxes = np.repeat(BOX, 40, axis=0)
    classes, scores = np.arange(40), np.linspace(0.3, 0.9, 40)
    crowd = draw(128, ["cat"] * 40, boxes, scores, classes)
    alone = draw(128, ["cat"] * 40, boxes[-1:], scores[-1:], classes[-1:])
    rows = slice(60 - plate_height(alone), 60)
    plate = (alone[rows] != 128).any(axis=2)
    assert plate.sum() > 500
    assert (crowd[rows][plate] == alone[rows][plate]).all()


def test_titles_do_not_run_into_each_other():
    narrow = Image.new("RGB", (30, 20), (0, 200, 0))
    sheet = np.asarray(side_by_side({"TensorFlow: 12 detections": narrow, "ONNX Runtime: 12 detections": narrow}))
    second = np.flatnonzero((sheet[-1] == (0, 200, 0)).all(axis=1))[30]  # where the second picture begins
    bar = (sheet[:-20] < 128).any(axis=(0, 2))
    assert not bar[second - 4 : second].any()
    assert bar[:second].sum() > 60 < bar[second:].sum()


@pytest.fixture
def fonts(tmp_path, monkeypatch):
    """A system whose only fonts are those in the folder that is returned."""

    def forget():
        for cache in (label_font.installed_fonts, label_font.runs, _rendered):
            cache.cache_clear()
        label_font._FONTS.clear()

    monkeypatch.setattr(label_font, "font_folders", lambda: [tmp_path / "fonts"])
    (tmp_path / "fonts").mkdir()
    forget()
    yield tmp_path / "fonts"
    forget()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("кошка", "щенок"),
        ("γάτα", "ψάρι"),
        ("ữ ệ ạ", "ỡ ấ ị"),
        ("ğış", "İŞç"),
        ("قطة", "كلب"),
        ("חתול", "כלבה"),
        ("կատու", "ձուկը"),
    ],
)
def test_the_bundled_font_has_the_script(fonts, one, other):
    """Two names of as many letters: as empty squares they would look the same."""
    assert [path for _, path in label_font.runs(one)] == [label_font.BUNDLED]
    pictures = [draw(128, [name]) for name in (one, other, "class 0")]
    assert (pictures[0] != pictures[1]).sum() > 100
    assert (pictures[0] != pictures[2]).sum() > 100


@pytest.mark.skipif(
    not features.check("raqm"), reason="needs Pillow with Raqm and FriBiDi (apt-get install libfribidi0)"
)
def test_names_run_right_to_left():
    word, first, last = (np.asarray(_rendered(text, 40)[0]).astype(int) for text in ("אבג", "א", "ג"))
    word, first, last = (mask[:, mask.any(axis=0)] for mask in (word, first, last))
    assert np.abs(word[-len(first) :, -first.shape[1] :] - first).mean() < 10
    assert np.abs(word[-len(last) :, : last.shape[1]] - last).mean() < 10
    joined, apart = _rendered("ببب", 40)[0].width, 3 * _rendered("ب", 40)[0].width
    assert joined < 0.8 * apart


def test_without_raqm_the_id_is_drawn(fonts, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(features, "check", lambda feature: False)
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\nقطة\nn\u0303andu\u0301\nक्ष\n", encoding="utf-8")
    names = labels_of(labels, {"num_classes": 4}, "model.onnx")
    assert "2 of 4 class names" in (said := capsys.readouterr().err)
    assert "libfribidi0" in said
    assert (draw(128, names, classes=np.array([1])) == draw(128, ["", "class 1"], classes=np.array([1]))).all()
    assert label_font.runs(names[2]) == [("ñandú", label_font.BUNDLED)]  # composed, so nothing clings


def test_a_name_that_no_font_has_is_said_once_and_drawn_as_its_id(fonts, tmp_path, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\n猫\nแมว\nкошка\n고양이\n犬\n", encoding="utf-8")
    names = labels_of(labels, {"num_classes": 6}, "model.onnx")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "4 of 6 class names" in said
    assert "(猫, แมว, 고양이, ...)" in said
    assert "fonts-noto-cjk" in said
    drawn = draw(128, names, classes=np.array([1]))
    assert (drawn == draw(128, ["cat", "class 1"], classes=np.array([1]))).all()
    assert capsys.readouterr().err == ""
    assert names[1] == "猫"  # tables have the name


def font_of(letters, path):
    """Writes a font with DejaVu's glyphs under other letters: {letter: the one that it looks like}."""
    font = TTFont(label_font.BUNDLED)
    glyphs = font.getBestCmap()
    for table in font["cmap"].tables:
        table.cmap = {ord(letter): glyphs[ord(like)] for letter, like in letters.items()}
    font.save(path)
    return path


def test_a_font_of_the_system_is_found(fonts, capsys):
    """The first that has it, Noto before others; files that are no fonts, and fonts without it, are passed over."""
    (fonts / "deep").mkdir()
    (fonts / "NotoSans-Broken.ttf").write_bytes(b"no font")
    font_of({"ж": "A"}, fonts / "NotoSansOther-Regular.ttf")
    font_of({"猫": "X"}, fonts / "wqy-zenhei.ttc")
    font_of({"猫": "X"}, fonts / "NotoSansTest-Bold.ttf")
    right = font_of({"猫": "A", "犬": "B"}, fonts / "deep" / "NotoSansTest-Regular.ttf")
    assert label_font.runs("猫 cat") == [("猫", right), (" cat", label_font.BUNDLED)]
    assert label_font.runs("ж") == [("ж", label_font.BUNDLED)]
    drawn, like = (np.asarray(_rendered(text, 30)[0]) for text in ("猫犬", "AB"))
    assert (drawn == like).all()
    label_font.warn_of_undrawable(["猫", "犬", "cat"])
    assert capsys.readouterr().err == ""


def test_plots_name_classes_in_any_script(fonts, tmp_path):
    """Text that the reader's browser draws; matplotlib's own remarks about glyphs and formulas stay out of it."""
    font_of({c: "M" for c in "長い名前"}, fonts / "NotoSansTest-Regular.ttf")
    names = ["кошка", "قطة", "長い名前", "แมว", "US$ and AU$", "a_$b$"]

    def curves(axes):
        for name in names:
            axes.plot([0, 1], [0, 1], label=name)
        axes.legend()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot = report.plot(curves)
    for name in names:
        assert f">{name}</text>" in plot
    report.write_page(tmp_path / "page.html", "names", "", [report.plots(plot)])
    text, *_ = open_page(tmp_path / "page.html")
    assert all(name in text for name in names)
