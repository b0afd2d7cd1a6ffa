"""Draws detections on a picture: boxes, and labels that stay readable on any background."""

import functools
import itertools

import numpy as np
from PIL import Image, ImageDraw

from fonts import label_font

# Red, green, blue, a hexadecimal digit each. Light enough for black letters on them and for frames on dark ground (CIELAB
# L* from 55 on), none of them grey (chroma from 30 on). Of the 4,096 such colours each is the one farthest, in CIEDE2000,
# from those before it: the first 20 are 16.8 apart, all 90 are 7.7 (tests/test_visualize.py).
COLOURS = """
    f44 0f0 0bf fb2 b5f 097 fbd 9fe 882 b73 f39 eea aae fb9 2a0 38f 09a ac0 9b8 a7a f8f 0d9 f89 fe0 f61 b76 4cd ba6 bfb f93
    5ba ec9 c67 87d f0d cf7 8bf 7c5 b80 795 cb0 f86 cad e8b c96 b8e 09c 9db 4a6 f26 fd7 8a2 bc7 0f8 0ee 0ec d6b f30 a90 d98
    df0 8ef fb7 89f d64 d85 da5 b6c fbf c8c 8fc 6a8 a85 dd6 0aa faa c79 7c8 995 78c 9e0 4af d80 67f 8e6 0b8 98c caf f69 0c6
"""


@functools.cache
def class_colour(label):
    """The RGB colour of class `label`, the same in every picture; from 90 classes on, colours come again."""
    colours = COLOURS.split()
    return tuple(17 * int(digit, 16) for digit in colours[label % len(colours)])


def paste_mask(mask, box, height, width, threshold):
    """Resizes a mask [h, w] to its box (bilinear) and thresholds after, as TFOD does.

    box: yxyx in pixels of an image of height x width. Returns (bool [rows, columns], top, left): the mask over the pixels
    that the box covers, and where they begin; a pixel is in the mask where the value at its centre reaches `threshold`.
    """
    ymin, xmin, ymax, xmax = (float(v) for v in box)
    top, left = max(0, int(np.floor(ymin))), max(0, int(np.floor(xmin)))
    bottom, right = min(height, int(np.ceil(ymax))), min(width, int(np.ceil(xmax)))
    rows = _interpolation(np.arange(top, bottom) + 0.5, ymin, ymax, mask.shape[0])  # [rows, h]
    columns = _interpolation(np.arange(left, right) + 0.5, xmin, xmax, mask.shape[1])  # [columns, w]
    inside = rows.any(axis=1)[:, None] & columns.any(axis=1)[None]
    return inside & (rows @ mask @ columns.T >= threshold), top, left


def _interpolation(centres, low, high, count):
    """Weights [n, count] of `count` equal cells between low and high at the points `centres`; 0 outside of them."""
    place = (centres - low) / max(high - low, 1e-6) * count - 0.5
    weights = np.maximum(0, 1 - np.abs(np.clip(place, 0, count - 1)[:, None] - np.arange(count)[None]))
    return weights * ((centres > low) & (centres < high))[:, None]


def _blend_masks(image, masks, boxes, classes, order, threshold):
    """Tints the pixels of each mask in its colour, with an opaque edge. image: RGB [H, W, 3]; returns a new one."""
    image = image.copy()
    height, width = image.shape[:2]
    thick = max(1, round(min(height, width) / 400))
    for i in order:
        mask, top, left = paste_mask(masks[i], boxes[i], height, width, threshold)
        colour = np.float32(class_colour(int(classes[i])))
        padded = np.pad(mask, thick)
        inner = mask.copy()
        for dy, dx in ((-thick, 0), (thick, 0), (0, -thick), (0, thick)):
            inner &= padded[thick + dy : thick + dy + mask.shape[0], thick + dx : thick + dx + mask.shape[1]]
        region = image[top : top + mask.shape[0], left : left + mask.shape[1]]
        region[inner] = (0.55 * region[inner] + 0.45 * colour).astype(np.uint8)
        region[mask & ~inner] = colour.astype(np.uint8)
    return image


# Sizes that can be read and seen, and how wide a report's page is (checks/report.py), in pixels of the screen.
LETTERS, TITLE, FRAME, PAGE_WIDTH = 12, 15, 1.5, 1100


def draw_detections(
    image,
    boxes,
    scores,
    classes,
    names,
    masks=None,
    mask_threshold=0.5,
    with_scores=True,
    dashed=(),
    seen_width=None,
    points=None,
    skeleton=(),
):
    """Draws boxes [N, 4] yxyx in pixels on RGB [H, W, 3]; scores [N] and classes [N] (0-based) label them.
    names: of the classes, None for one without a name.

    masks: [N, h, w], each over its box, or None. with_scores: write the scores too. dashed: boxes
    that get a frame to be noticed (mark_dashed). points: keypoints [N, K, 2] y, x in pixels, NaN where none is drawn;
    skeleton: pairs of them to be joined. Returns a Pillow image. Lines and letters follow the image's size, or
    seen_width, the pixels of the screen that its width will have, where that needs larger ones.
    Better detections are drawn over worse ones. A name that no font here has is replaced by its id (label_font.runs).
    """
    image = np.ascontiguousarray(image)
    order = np.argsort(scores, kind="stable")
    if masks is not None:
        image = _blend_masks(image, masks, boxes, classes, order, mask_threshold)
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    shorter, shrunk = min(picture.size), picture.width / seen_width if seen_width else 0
    line = max(1, round(shorter / 240), round(FRAME * shrunk))
    font_size = max(10, round(shorter / 36), round(LETTERS * shrunk))
    for i in order:
        _draw_box(draw, boxes[i], class_colour(int(classes[i])), line)
        if points is not None:
            _draw_keypoints(draw, points[i], skeleton, class_colour(int(classes[i])), line)
    for box in dashed:
        mark_dashed(picture, box)
    taken, plates = [], []
    for i in order[::-1]:  # the best choose their place first
        label = int(classes[i])
        words = [_shown_name(names, label), *([f"{scores[i]:.2f}"] if with_scores else [])]
        (width, height), parts = _label(words, font_size, max(2, line))
        x, y = _place(picture.size, boxes[i], width, height, taken)
        taken.append((x, y, x + width, y + height))
        plates.append((taken[-1], parts, class_colour(label)))
    for (left, top, right, bottom), parts, colour in reversed(plates):
        draw.rectangle([left, top, right - 1, bottom - 1], fill=colour, outline=(0, 0, 0))
        for mask, x, y in parts:
            draw.bitmap((left + x, top + y), mask, fill=(0, 0, 0))
    return picture


def _shown_name(names, label):
    name = names[label] if label < len(names) else None
    return name if name and label_font.runs(name) else f"class {label}"


def mark_box(picture, box, colour=(255, 60, 60)):
    """Returns a copy of a Pillow image, somewhat dimmed but for the box (yxyx in pixels), which gets a frame."""
    ymin, xmin, ymax, xmax = (float(v) for v in box)
    inside = (
        max(0, int(xmin)),
        max(0, int(ymin)),
        min(picture.width, int(xmax) + 1),
        min(picture.height, int(ymax) + 1),
    )
    marked = Image.blend(picture, Image.new("RGB", picture.size), 0.35)
    if inside[2] > inside[0] and inside[3] > inside[1]:
        marked.paste(picture.crop(inside), inside)
    _draw_box(ImageDraw.Draw(marked), box, colour, max(2, round(min(picture.size) / 100)))
    return marked


def mark_dashed(picture, box):
    """Draws a thick dashed frame in red and white, unlike any detection's, around the box (yxyx in pixels)."""
    ymin, xmin, ymax, xmax = (float(v) for v in box)
    draw, line = ImageDraw.Draw(picture), max(3, round(min(picture.size) / 110))
    out = line / 2 + 2
    ymin, ymax = max(ymin - out, line / 2), min(ymax + out, picture.height - line / 2)
    xmin, xmax = max(xmin - out, line / 2), min(xmax + out, picture.width - line / 2)
    corners = [(xmin, ymin), (xmax, ymin), (xmax, ymax), (xmin, ymax), (xmin, ymin)]
    for begin, end in itertools.pairwise(corners):
        steps = max(1, round(np.hypot(end[0] - begin[0], end[1] - begin[1]) / (4 * line)))
        for k in range(steps):
            part = [
                (begin[0] + (end[0] - begin[0]) * share, begin[1] + (end[1] - begin[1]) * share)
                for share in (k / steps, (k + 1) / steps)
            ]
            draw.line(part, fill=(230, 0, 0) if k % 2 == 0 else (255, 255, 255), width=line)


def side_by_side(panels):
    """Pictures of one size next to each other, each under its title. panels: {title: Pillow image}."""
    width, height = next(iter(panels.values())).size
    gap = max(4, width // 120)
    font = label_font.load(label_font.BUNDLED, max(12, round(TITLE * len(panels) * width / PAGE_WIDTH)))
    column = max(width, *(round(font.getlength(title)) + gap for title in panels)) + gap
    bar = round(1.8 * font.size)
    sheet = Image.new("RGB", (len(panels) * column - gap, height + bar), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (title, picture) in enumerate(panels.items()):
        sheet.paste(picture, (i * column, bar))
        draw.text((i * column + gap, bar / 2), title, font=font, fill=(0, 0, 0), anchor="lm")
    return sheet


def _draw_box(draw, box, colour, line):
    """A coloured frame with a dark one on either side, to stand out on light, dark and like-coloured ground."""
    ymin, xmin, ymax, xmax = (float(v) for v in box)
    edge = max(1, line // 3)
    for grow, width, fill in ((edge, line + 2 * edge, (0, 0, 0)), (0, line, colour)):
        frame = [xmin - grow, ymin - grow, max(xmax + grow, xmin), max(ymax + grow, ymin)]
        draw.rectangle(frame, outline=fill, width=width)


def _draw_keypoints(draw, points, skeleton, colour, line):
    """Dots at points [K, 2] (y, x), in a colour for each keypoint, over the lines of the skeleton in the object's."""
    shown = [tuple(point[::-1].tolist()) if np.isfinite(point).all() else None for point in points]
    edge = max(1, line // 3)
    ends = [(shown[a], shown[b]) for a, b in skeleton if shown[a] and shown[b]]
    for width, fill in ((line + 2 * edge, (0, 0, 0)), (line, colour)):
        for pair in ends:
            draw.line(pair, fill=fill, width=width)
    for number, point in enumerate(shown):
        if point:
            for radius, fill in ((1.5 * line + edge + 1, (0, 0, 0)), (1.5 * line + 1, class_colour(number))):
                (x, y) = point
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)


@functools.lru_cache(maxsize=4096)
def _rendered(word, font_size):
    """A word as a mask, cut to its ink, and where that begins below the line of writing (negative: above it).

    Names and scores come again and again; to render them took most of what drawing took.
    """
    pen, parts = 0, []
    for text, path in label_font.runs(word):
        font = label_font.load(path, font_size)
        left, top, right, bottom = (round(edge) for edge in font.getbbox(text, anchor="ls"))
        parts.append((text, font, pen, (pen + left, top, pen + right, bottom)))
        pen += round(font.getlength(text))
    edges = np.array([box for *_, box in parts])
    (left, top), (right, bottom) = edges[:, :2].min(axis=0).tolist(), edges[:, 2:].max(axis=0).tolist()
    mask = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    for text, font, place, _ in parts:
        ImageDraw.Draw(mask).text((place - left, -top), text, font=font, fill=255, anchor="ls")
    return mask, top


def _label(words, font_size, pad):
    """(width, height) of a plate with those words next to each other, and [(mask, x, y)] of what is drawn on it."""
    rendered = [_rendered(word, font_size) for word in words]
    top = min(top for _, top in rendered)
    x, parts = pad, []
    for mask, begin in rendered:
        parts.append((mask, x, pad + begin - top))
        x += mask.width + font_size // 3
    return (x - font_size // 3 + pad, max(y + mask.height for mask, _, y in parts) + pad), parts


def _place(size, box, width, height, taken):
    """The first free place at the box for a plate, a corner first: above, inside, below; else the one that covers least."""
    ymin, xmin, ymax, xmax = (float(v) for v in box)
    places = [
        (x, y)
        for y in (ymin - height, ymin, ymax, ymax - height, (ymin + ymax - height) / 2)
        for x in (xmin, xmax - width, (xmin + xmax - width) / 2)
    ]
    best, least = None, None
    for x, y in places:
        x = round(min(max(x, 0), max(0, size[0] - width)))
        y = round(min(max(y, 0), max(0, size[1] - height)))
        covered = sum(
            max(0, min(x + width, x1) - max(x, x0)) * max(0, min(y + height, y1) - max(y, y0))
            for x0, y0, x1, y1 in taken
        )
        if least is None or covered < least:
            best, least = (x, y), covered
        if covered == 0:
            break
    return best
