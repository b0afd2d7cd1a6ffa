"""Which file is which image, and which category which class."""

import unicodedata

from commandline import UserError

import pytest
from pycocotools.coco import COCO

from checks.matching import match_categories, match_images

# ---- which file is which image


def annotated(*names, ids=None):
    """pycocotools' COCO of images with those names (None: without)."""
    truth = COCO()
    entries = zip(ids or range(1, len(names) + 1), names, strict=True)
    truth.dataset = {"images": [{"id": key, **({"file_name": name} if name else {})} for key, name in entries]}
    truth.dataset |= {"annotations": [], "categories": []}
    truth.createIndex()
    return truth


def matched(truth, *files):
    known, unknown, absent = match_images(truth, files)
    return {str(path): key for path, key in known.items()}, list(map(str, unknown)), absent


def test_files_are_matched_by_their_folders():
    truth = annotated("cam1/0001.jpg", "cam2/0001.jpg", "cam2/0002.jpg")
    assert matched(truth, "data/cam2/0001.jpg", "data/cam1/0001.jpg", "data/cam1/0002.jpg", "data/cam3/0001.jpg") == (
        {"data/cam2/0001.jpg": 2, "data/cam1/0001.jpg": 1},
        ["data/cam1/0002.jpg", "data/cam3/0001.jpg"],
        [3],
    )
    # One folder alone is told by its own name.
    assert matched(truth, "cam2/0001.jpg")[0] == {"cam2/0001.jpg": 2}


@pytest.mark.parametrize(
    "name", ["a\\b\\x.jpg", "/data/me/a/b/x.jpg", "C:\\data\\a\\b\\x.jpg", "./b//x.jpg", "../b/x.jpg"]
)
def test_paths_of_other_systems(name):
    assert matched(annotated(name, "c/x.jpg"), "in/a/b/x.jpg", "in/a/c/x.jpg")[0] == {
        "in/a/b/x.jpg": 1,
        "in/a/c/x.jpg": 2,
    }


def test_names_are_matched_in_any_form_of_unicode():
    composed, apart = (unicodedata.normalize(form, "Größe é.jpg") for form in ("NFC", "NFD"))
    assert composed != apart
    for name, file in ((composed, apart), (apart, composed)):
        assert matched(annotated(name), file)[0] == {file: 1}


def test_case_is_the_last_resort():
    assert matched(annotated("IMG_1.JPG", "b.jpg"), "img_1.jpg", "B.JPG")[0] == {"img_1.jpg": 1, "B.JPG": 2}
    assert matched(annotated("A.jpg", "a.jpg"), "a.jpg", "A.jpg")[0] == {"a.jpg": 2, "A.jpg": 1}
    assert matched(annotated("A.jpg"), "a.jpg", "A.jpg") == ({"A.jpg": 1}, ["a.jpg"], [])


def test_numbers_count_only_without_a_name():
    truth = annotated("77.png", None, None, ids=[5, 139, "12"])
    known, unknown, absent = matched(truth, "5.jpg", "77.jpg", "000000000139.png", "0012.jpg", "²3.jpg")
    assert known == {"000000000139.png": 139, "0012.jpg": "12"}
    assert (unknown, absent) == (["5.jpg", "77.jpg", "²3.jpg"], [5])
    assert matched(annotated(None, ids=["9" * 5000]), "1.jpg")[1] == ["1.jpg"]


@pytest.mark.parametrize(
    "names, files, match",
    [
        (("a.jpg", "a.jpg"), ["a.jpg"], r"a.jpg fits two images, a.jpg \(id 1\) and a.jpg \(id 2\)"),
        (("train/a.jpg", "val/a.jpg"), ["in/a.jpg"], r"train/a.jpg \(id 1\) and val/a.jpg \(id 2\)"),
        (("A.jpg", "A.JPG"), ["a.jpg"], "fits two images"),
        (("a.jpg",), ["x/a.jpg", "y/a.jpg"], "x/a.jpg and y/a.jpg both fit"),
        ((None,), ["1.jpg", "01.png"], "1.jpg and 01.png both fit"),
    ],
)
def test_what_fits_twice_is_refused_by_name(names, files, match):
    with pytest.raises(UserError, match=match):
        matched(annotated(*names), *files)


def test_copies_deeper_down_are_not_taken():
    truth = annotated("a.jpg", "b.jpg")
    known, unknown, _ = matched(truth, "in/a.jpg", "in/results/a.jpg", "in/results/b.jpg")
    assert (known, unknown) == ({"in/a.jpg": 1, "in/results/b.jpg": 2}, ["in/results/a.jpg"])


def test_a_folder_with_another_name_is_said(capsys):
    truth = annotated("JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/c.jpg")
    assert matched(truth, "in/images/a.jpg", "in/more/b.jpg", "in/more/d.jpg")[0] == {
        "in/images/a.jpg": 1,
        "in/more/b.jpg": 2,
    }
    said = capsys.readouterr().err
    assert "2 images are known by their name alone" in said
    assert "in/images/a.jpg is taken for JPEGImages/a.jpg" in said
    assert matched(truth, "images/a.jpg")[0] == {"images/a.jpg": 1}  # its own folder is all that is named
    assert capsys.readouterr().err == ""


# ---- which category is which class


def categories(*names, ids=None, objects=None):
    """pycocotools' COCO of categories with those names (None: without), each with an object, or those of `objects`."""
    ids = list(ids or range(1, len(names) + 1))
    truth = COCO()
    truth.dataset = {
        "images": [],
        "categories": [{"id": key, **({"name": name} if name else {})} for key, name in zip(ids, names, strict=True)],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": key} for i, key in enumerate(ids if objects is None else objects, 1)
        ],
    }
    truth.createIndex()
    return truth


def classes_of(truth, names, count=3):
    """names: the model's, or None for a model without."""
    return match_categories("a.json", truth, names or [None] * count, {"num_classes": count, "class_offset": 1})


def test_categories_are_matched_by_name(capsys):
    assert classes_of(categories("cat", "dog", "bird"), ["cat", "dog", "bird"]) == {1: 1, 2: 2, 3: 3}
    assert capsys.readouterr().err == ""
    assert classes_of(categories("bird", "Traffic_Light", ids=[0, 1]), ["bird", "traffic light", "cat"]) == {
        1: 0,
        2: 1,
        3: 3,
    }
    assert capsys.readouterr().err == (
        "warning: 2 categories of a.json have another id than the model's class of their name, and are matched by name:"
        " 0 'bird' is the model's 1 'bird', 1 'Traffic_Light' is the model's 2 'traffic light'\n"
    )
    assert classes_of(categories("dog", "cat", ids=["u", "v"]), ["cat", "dog", "bird"]) == {1: "v", 2: "u"}
    assert capsys.readouterr().err == ""  # ids that are no numbers disagree with nothing


def test_a_mismatch_is_said_with_the_first_three_pairs(capsys):
    names = [f"thing {i}" for i in range(1, 6)]
    shifted = categories(*names, ids=range(5))
    assert classes_of(shifted, names, 5) == {i: i - 1 for i in range(1, 6)}
    assert capsys.readouterr().err.endswith(
        "0 'thing 1' is the model's 1 'thing 1', 1 'thing 2' is the model's 2 'thing 2',"
        " 2 'thing 3' is the model's 3 'thing 3', ...\n"
    )
    assert classes_of(shifted, None, 5) == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5}
    said = capsys.readouterr().err
    assert said.startswith(
        "warning: 1 categories of a.json are none of the model's (ids 1 to 5): the AP of 1 of them is 0."
    )
    assert (
        "0 'thing 1' is none of it, 1 'thing 2' is the model's 1, 2 'thing 3' is the model's 2, ...; with --labels"
        in said
    )
    translated = categories("Katze", "Hund", ids=[1, 2])
    assert classes_of(translated, ["cat", "dog", "bird"]) == {1: 1, 2: 2, 3: 3}
    assert "by id, as no name is the same: 1 'Katze' is the model's 1 'cat', 2 'Hund'" in capsys.readouterr().err


def test_categories_of_other_classes(capsys):
    truth = categories("cat", "zebra", "gnu", objects=[1, 2])
    assert classes_of(truth, ["dog", "cat", "zebras"]) == {2: 1}  # 3 is the gnu's id: not the zebras' too
    assert (
        "2 categories of a.json are none of the model's (ids 1 to 3): the AP of 1 of them is 0"
        in capsys.readouterr().err
    )
    roboflow = categories("pets", "cat", ids=[0, 1], objects=[1])
    assert classes_of(roboflow, None) == {1: 1, 2: 2, 3: 3}
    assert "1 categories of a.json are none of the model's (ids 1 to 3), and have no objects" in capsys.readouterr().err
    for strange in (categories("gnu", ids=[7]), categories("gnu", ids=["u"]), categories("gnu", "cat", objects=[1])):
        with pytest.raises(UserError, match=r"none of its categories is one of the model's .* 'gnu' is none"):
            classes_of(strange, ["cat", "dog", "bird"] if len(strange.cats) > 1 else None)


def test_two_categories_of_one_name():
    twice = categories("pets", "pets", ids=[0, 1], objects=[1])
    assert classes_of(twice, ["pets"], 1) == {1: 1}  # the one that has objects
    with pytest.raises(UserError, match="the categories 0 and 1 are both named 'pets', and both have objects"):
        classes_of(categories("pets", "pets", ids=[0, 1]), ["pets"], 1)
    assert classes_of(categories("pets", "pets"), None) == {1: 1, 2: 2, 3: 3}  # by id they are two


def test_one_image_under_two_ids_is_named_with_its_file():
    with pytest.raises(
        UserError, match=r"^--annotations b.json: .*; the image is there twice: give its objects one id"
    ):
        match_images(annotated("in/a.jpg", "in\\a.jpg"), ["in/a.jpg"], "b.json")
    with pytest.raises(UserError, match=r"^--annotations b.json: .*; write the folders into each file_name"):
        match_images(annotated("train/a.jpg", "val/a.jpg"), ["in/a.jpg"], "b.json")


def test_classes_of_one_name_are_told_by_their_ids(capsys):
    names = ["cat", "dog", "cat"]
    assert classes_of(categories("cat", "dog"), names) == {1: 1, 2: 2, 3: 3}  # 3 is a number that no evaluation counts
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "1 categories of a.json are matched with the model's by id, as their name is another's too" in said
    assert said.endswith(": 1 'cat' is the model's 1 'cat'\n")
    assert classes_of(categories("cat", "dog", "Cat"), names) == {1: 1, 2: 2, 3: 3}
    assert "1 'cat' is the model's 1 'cat', 3 'Cat' is the model's 3 'cat'\n" in capsys.readouterr().err
    assert classes_of(categories("cat", "dog", ids=[3, 2], objects=[2]), names) == {1: 1, 2: 2, 3: 3}
    assert capsys.readouterr().err == ""  # of what has no objects nothing depends on it


def test_classes_of_one_name_that_no_id_tells_are_refused():
    with pytest.raises(
        UserError, match="classes 1 and 3 are both named 'cat', and neither has the id of the category 7"
    ):
        classes_of(categories("cat", "dog", ids=[7, 2]), ["cat", "dog", "cat"])
    with pytest.raises(UserError, match="the categories 1 and 4 are both named 'cat', and both have objects"):
        classes_of(categories("cat", "dog", "cat", ids=[1, 2, 4]), ["cat", "dog", "cat"])


def test_what_has_no_name_is_matched_by_id(capsys):
    assert classes_of(categories("cat", None, "bird"), ["cat", "dog", "bird"]) == {1: 1, 2: 2, 3: 3}
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("or one side has none: 2 is the model's 2 'dog'\n")
    assert classes_of(categories("cat", "dog", "bird", ids=["1", "2", "3"]), ["cat", None, "bird"]) == {
        1: "1",
        2: "2",
        3: "3",
    }
    assert "2 'dog' is the model's 2\n" in capsys.readouterr().err
    assert classes_of(categories("dog", None), ["cat", "dog", "bird"]) == {2: 1, 3: 3}  # 2 is the dog's
    assert "the AP of 1 of them is 0. By name, 2 is none of it" in capsys.readouterr().err
    assert classes_of(categories("cat", "gnu"), ["cat", "dog", "bird"]) == {1: 1, 3: 3}  # both have names
