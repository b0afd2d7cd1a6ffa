"""Which annotated image a file is, and which category of the annotations a class of the model is."""

import collections
import math
import os
import unicodedata
from pathlib import Path

from commandline import UserError, warn


def id_text(value):
    """The text that makes two ids the same: 7, 7.0 and "7" are one; None of what can be no id.

    That is all but numbers and texts, what is not finite, the empty text, and halves of a surrogate pair, which JSON can
    hold but no file that we write.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() else value
    text = str(value).strip()
    return text if text and text.encode("utf-8", "replace").decode() == text else None


def match_images(truth, files, path=""):
    """Which annotated image each file is: by the longest common end of its path and the file_name, else by a number.

    `/` and `\\` are alike, Unicode is normalised (NFC); the case of letters is passed over only by files that fit nothing
    otherwise. Where folders differ (`cam1/0001.jpg`, `cam2/0001.jpg`) the name alone is no match, unless no folder agrees
    anywhere: then the images have moved since, which is warned about. Only an image without file_name is matched by number
    (`000139.png` is the image 139). truth: of load_annotations, which has read `path`.

    Returns ({path: image id}, files that no annotation knows, annotated images without a file), in the given order. Raises
    UserError where two images fit one file, or two files one image, equally well.
    """
    files = list(dict.fromkeys(map(Path, files)))
    parts = {path: _parts(os.path.abspath(path)) for path in files}
    folders = {os.path.dirname(os.path.abspath(path)) for path in files}
    depth = len(_parts(os.path.commonpath(folders))) if folders else 0
    names = {key: _parts(image["file_name"]) for key, image in truth.imgs.items() if "file_name" in image}
    known, moved = {}, []
    for form, apart in ((str, False), (str.casefold, False), (str, True), (str.casefold, True)):
        if apart and any(len(names[key]) > 1 and _same_folder(parts[path], names[key]) for path, key in known.items()):
            break
        left = {path: tuple(map(form, each)) for path, each in parts.items() if path not in known}
        taken = set(known.values())
        free = {key: tuple(map(form, each)) for key, each in names.items() if key not in taken}
        pairs = _pairs(left, free, depth, apart, path)
        known.update(pairs)
        moved += pairs if apart else ()
    unnamed = {key: id_text(key) for key in truth.imgs if key not in names}
    numbers = {key: (str(int(text)),) for key, text in unnamed.items() if _is_whole(text)}
    left = {path: (str(int(path.stem)),) for path in files if path not in known and _is_whole(path.stem)}
    known.update(_pairs(left, numbers, 1, False, path))
    if moved:
        path = moved[0]
        warn(
            f"{len(moved)} images are known by their name alone, their folder has another name:"
            f" {path} is taken for {truth.imgs[known[path]]['file_name']}"
        )
    found = set(known.values())
    return (
        {path: known[path] for path in files if path in known},
        [path for path in files if path not in known],
        [key for key in truth.imgs if key not in found],
    )


def _parts(path):
    """The folders and the name of a path of any system, Unicode in its composed form."""
    path = unicodedata.normalize("NFC", str(path)).replace("\\", "/")
    return tuple(part for part in path.split("/") if part not in ("", "."))


def _same_folder(one, other):
    return one[-2].casefold() == other[-2].casefold()


def _is_whole(text):
    return text.isascii() and text.isdigit() and len(text) < 20


def _pairs(files, images, depth, apart, path):
    """{file: image} of those that have the longest common end with each other. files, images: {key: parts of the path}.

    depth: of the folder that the files have in common. apart: takes only those (else: none of those) that have but the name
    in common, and below that folder both have others. Raises UserError where two fit equally well; of those apart neither
    is taken.
    """
    ends = collections.defaultdict(list)
    for key, parts in images.items():
        for start in range(len(parts)):
            ends[parts[start:]].append(key)
    wanted = collections.defaultdict(list)  # {image: [(length of the common end, whether it is all below depth, file)]}
    for file, parts in files.items():
        start = next((start for start in range(len(parts)) if parts[start:] in ends), None)
        if start is None:
            continue
        length, fits = len(parts) - start, ends[parts[start:]]
        fits = [key for key in fits if len(images[key]) == length] or fits
        if apart != (length == 1 and len(parts) - depth > 1 and len(images[fits[0]]) > 1):
            continue
        if len(fits) == 1:
            wanted[fits[0]].append((length, start == depth, file))
        elif not apart:
            both = " and ".join(f"{'/'.join(images[key])} (id {key})" for key in fits[:2])
            mend = "write the folders into each file_name"
            if images[fits[0]] == images[fits[1]]:
                mend = "the image is there twice: give its objects one id"
            raise UserError(f"--annotations {path}: {file} fits two images, {both}; {mend}")
    pairs = {}
    for image, candidates in wanted.items():
        best = max(candidates)[:2]
        fits = [file for *rank, file in candidates if tuple(rank) == best]
        if len(fits) == 1:
            pairs[fits[0]] = image
        elif not apart:
            raise UserError(
                f"--input: {fits[0]} and {fits[1]} both fit the annotated image {'/'.join(images[image])} (id {image});"
                " name the folder that holds one of them"
            )
    return pairs


def match_categories(path, truth, names, metadata):
    """Which category of the annotations `path` each class of the model is: {class + class_offset: category id}.

    names: of tfod.labels.labels_of. By name where both sides have names and any is the same (case, `_` and `-` aside), else by id; and
    by id what shares its name on its own side, or has none and else no partner.
    A class that is not annotated keeps its own number, which no evaluation counts, where that is no category's and the
    annotations' ids are whole numbers too. Warns where ids and names disagree, with the first three pairs, of pairs by id
    among pairs by name, and of categories that are no class of the model. Raises UserError where two have one name and no id
    tells which is meant, and where no category with objects is a class of the model.
    """
    ids = range(metadata["class_offset"], metadata["class_offset"] + metadata["num_classes"])
    numbers = {key: int(id_text(key)) for key in truth.cats if _is_whole(id_text(key))}  # no uuids
    named = {number: name for number, name in zip(ids, names, strict=True) if name}
    with_objects = dict.fromkeys(note["category_id"] for note in truth.anns.values())
    by_name, by_id = _same_names(path, truth, named, with_objects, numbers)
    if by_name:
        taken = set(by_name.values())
        free = {key: number for key, number in numbers.items() if number in ids and key not in taken}
        nameless = {
            number: key
            for key, number in free.items()
            if number not in by_name and ("name" not in truth.cats[key] or number not in named)
        }
        by_name |= nameless
        by_id += [key for key in nameless.values() if key in with_objects]
    categories = by_name or {number: key for key, number in numbers.items() if number in ids}
    classes = {key: number for number, key in reversed(categories.items())}
    strangers = [key for key in truth.cats if key not in classes]

    def pairs(keys):
        """The first three, as "12 'stop sign' is the model's 13 'stop sign'"."""
        texts = []
        for key in list(keys)[:3]:
            number = classes.get(key)
            model = "none of it" if number is None else "the model's " + _title(number, named.get(number))
            texts.append(f"{_title(key, truth.cats[key].get('name'))} is {model}")
        return ", ".join(texts) + (", ..." if len(keys) > 3 else "")

    if not classes.keys() & with_objects.keys():
        raise UserError(
            f"--annotations {path}: none of its categories is one of the model's (ids {ids[0]} to {ids[-1]}), by name or by id:"
            f" {pairs(strangers)}; give annotations of the model's classes, or its names as --labels"
        )
    if by_name:
        other = [key for key in truth.cats if key in classes and numbers.get(key, classes[key]) != classes[key]]
        text = "have another id than the model's class of their name, and are matched by name"
    else:
        other = [key for key in truth.cats if named and key in classes and key in with_objects]
        text = "are matched with the model's by id, as no name is the same"
    if other:
        warn(f"{len(other)} categories of {path} {text}: {pairs(other)}")
    if by_id:
        text = "are matched with the model's by id, as their name is another's too or one side has none"
        warn(f"{len(by_id)} categories of {path} {text}: {pairs(by_id)}")
    if strangers:
        missed = [key for key in strangers if key in with_objects]
        effect = f": the AP of {len(missed)} of them is 0" if missed else ", and have no objects"
        shown = strangers if by_name or not missed else list(truth.cats)
        mend = "; with --labels they are matched by name" if missed and not named else ""
        how = "name" if by_name else "id"
        warn(
            f"{len(strangers)} categories of {path} are none of the model's (ids {ids[0]} to {ids[-1]}){effect}."
            f" By {how}, {pairs(shown)}{mend}"
        )
    if all(type(key) is int for key in truth.cats):
        categories |= {number: number for number in ids if number not in categories and number not in truth.cats}
    return categories


def _same_names(path, truth, named, with_objects, numbers):
    """({class: category id} of those with one name, the category ids of these that were told by their number).

    Of several categories of a name the one that has objects is meant; where several have, or several classes have the name,
    it is the one with the class's number.
    """
    keys, classes = collections.defaultdict(list), collections.defaultdict(list)
    for key, category in truth.cats.items():
        if "name" in category:
            keys[_plain(category["name"])].append(key)
    for number, name in named.items():
        classes[_plain(name)].append(number)
    same, by_id = {}, []
    for plain, sharing in classes.items():
        fits = keys.get(plain, ())
        used = [key for key in fits if key in with_objects]
        if not fits:
            continue
        if len(sharing) == 1 and len(used) < 2:
            same[sharing[0]] = (used or fits)[0]
            continue
        told = {numbers[key]: key for key in fits if numbers.get(key) in sharing}
        if lost := [key for key in used if key not in told.values()]:
            raise UserError(f"--annotations {path}: {_both_named(named[sharing[0]], sharing, used, lost[0])}")
        same |= told
        by_id += [key for key in told.values() if key in with_objects]
    return same, by_id


def _both_named(name, sharing, used, lost):
    """Why no id tells which of several classes of a name, or of several categories with objects, is meant."""
    if len(used) > 1:
        return (
            f"the categories {used[0]} and {used[1]} are both named '{name}', and both have objects;"
            " give each its own name, or their objects one category"
        )
    return (
        f"the model's classes {sharing[0]} and {sharing[1]} are both named '{name}', and neither has the id of the category"
        f" {lost}; give each class its own name as --labels"
    )


def _plain(name):
    """A name without what tools change in names: case, `_` and `-` for a space, Unicode's form."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().replace("_", " ").replace("-", " ").split())


def _title(number, name):
    return f"{number} '{name}'" if name else f"{number}"
