"""Draws detections on a picture: boxes, and labels that stay readable on any background."""

import colorsys
import functools
import itertools

import numpy as np
from PIL import Image, ImageDraw, ImageFont


@functools.cache
def class_colour(label):
    """A stable, saturated RGB colour for class `label`: neighbours in number are far apart in hue (golden ratio)."""
    hue = (0.61803398875 * label + 0.02) % 1
    value = 1.0 if label % 2 else 0.85
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, value))


@functools.lru_cache(maxsize=64)
def _font(size):
    return ImageFont.load_default(size)


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


def draw_detections(image, boxes, scores, classes, names, masks=None, mask_threshold=0.5, with_scores=True, dashed=()):
    """Draws boxes [N, 4] yxyx in pixels on RGB [H, W, 3]; scores [N] and classes [N] (0-based) label them.
    names: of the classes, None for one without a name.

    masks: [N, h, w], each over its box, or None. with_scores: write the scores too. dashed: boxes
    that get a frame to be noticed (mark_dashed). Returns a Pillow image. Line width and text follow the image's size;
    better detections are drawn over worse ones.
    """
    image = np.ascontiguousarray(image)
    if masks is not None:
        image = _blend_masks(image, masks, boxes, classes, np.argsort(scores, kind="stable"), mask_threshold)
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    shorter = min(picture.size)
    line = max(1, round(shorter / 240))
    font_size = max(10, round(shorter / 36))
    order = np.argsort(scores, kind="stable")
    for i in order:
        _draw_box(draw, boxes[i], class_colour(int(classes[i])), line)
    for box in dashed:
        mark_dashed(picture, box)
    taken = []
    for i in order[::-1]:
        label = int(classes[i])
        name = (names[label] if label < len(names) else None) or f"class {label}"
        words = [f"{name} ", f"{scores[i]:.2f}"] if with_scores else [name]
        _draw_label(draw, picture.size, boxes[i], words, class_colour(label), font_size, line, taken)
    return picture


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
    _draw_box(ImageDraw.Draw(marked), box, colour, max(2, round(min(picture.size) / 160)))
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
    font = _font(max(12, round(width / 26)))
    bar, gap = round(1.8 * font.size), max(4, width // 120)
    sheet = Image.new("RGB", (len(panels) * (width + gap) - gap, height + bar), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (title, picture) in enumerate(panels.items()):
        sheet.paste(picture, (i * (width + gap), bar))
        draw.text((i * (width + gap) + gap, bar / 2), title, font=font, fill=(0, 0, 0), anchor="lm")
    return sheet


def _draw_box(draw, box, colour, line):
    """A coloured frame with a dark one on either side, to stand out on light, dark and like-coloured ground."""
    ymin, xmin, ymax, xmax = (float(v) for v in box)
    edge = max(1, line // 3)
    for grow, width, fill in ((edge, line + 2 * edge, (0, 0, 0)), (0, line, colour)):
        frame = [xmin - grow, ymin - grow, max(xmax + grow, xmin), max(ymax + grow, ymin)]
        draw.rectangle(frame, outline=fill, width=width)


@functools.lru_cache(maxsize=4096)
def _rendered(word, font_size):
    """A word as a mask, its bounding box (left, top, right, bottom) from the pen's place, and how far the pen goes on.

    Names and scores come again and again; to render them took most of what drawing took.
    """
    font = _font(font_size)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(word))
    mask = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), word, font=font, fill=255)
    return mask, (left, top, right, bottom), round(font.getlength(word))


def _draw_label(draw, size, box, words, colour, font_size, line, taken):
    """Writes `words` on a plate of the box's colour, where it covers no plate in `taken` if there is such a place."""
    pen, parts = 0, []
    for mask, (x0, y0, x1, y1), advance in (_rendered(word, font_size) for word in words):
        parts.append((mask, pen + x0, y0, pen + x1, y1))
        pen += advance
    left, top = (min(part[i] for part in parts) for i in (1, 2))
    right, bottom = (max(part[i] for part in parts) for i in (3, 4))
    pad = max(2, line)
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x, y = _place(size, box, width, height, taken)
    taken.append((x, y, x + width, y + height))
    draw.rectangle([x, y, x + width - 1, y + height - 1], fill=colour, outline=(0, 0, 0))
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = (0, 0, 0) if luminance > 120 else (255, 255, 255)
    for mask, mask_left, mask_top, _, _ in parts:
        draw.bitmap((x + pad + mask_left - left, y + pad + mask_top - top), mask, fill=ink)


def _place(size, box, width, height, taken):
    """The first free corner of the box for a plate: above, inside, below; else the one that covers least."""
    ymin, xmin, ymax, xmax = (float(v) for v in box)
    places = [
        (x, y)
        for y in (ymin - height, ymin, ymax, ymax - height, (ymin + ymax - height) / 2)
        for x in (xmin, xmax - width)
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
