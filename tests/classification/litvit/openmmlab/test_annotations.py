"""What an annotation file may hold, and what is refused in one line that names file, entry and key."""

import copy
import re

import pytest

from litvit.errors import InputError
from litvit.openmmlab.annotations import check_instances, check_masks, check_panoptic, class_ids, thing_names

INSTANCES = {
    "images": [
        {"id": 3, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 4, "file_name": "b.jpg", "width": 40, "height": 30},
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {
            "id": 10 + i,
            "image_id": 3 + i % 2,
            "category_id": 7,
            "bbox": [1, 2, 10, 8],
            "area": 50,
            "iscrowd": 0,
            "segmentation": [[1, 2, 11, 2, 11, 10]],
        }
        for i in range(3)
    ],
}
PANOPTIC = {
    "images": INSTANCES["images"],
    "categories": [{"id": 7, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}],
    "annotations": [
        {
            "image_id": number,
            "file_name": f"{number}.png",
            "segments_info": [
                {"id": 5, "category_id": 7, "bbox": [1, 2, 10, 8], "area": 80, "iscrowd": 0},
                {"id": 6, "category_id": 2, "bbox": [0, 0, 40, 30], "area": 900, "iscrowd": 0},
            ],
        }
        for number in (3, 4)
    ],
}
RLE = {"size": [30, 40], "counts": [1200]}


def changed(content, part, number, **values):
    """A copy with values of an entry changed; `...` drops a key."""
    content = copy.deepcopy(content)
    entry = content
    for key in part.split("."):
        entry = entry[int(key) if key.isdigit() else key]
    entry = entry[number]
    for key, value in values.items():
        entry[key] = value
        if value is ...:
            del entry[key]
    return content


@pytest.mark.parametrize(
    ("part", "number", "values", "message"),
    [
        ("annotations", 1, {"bbox": ...}, "annotations[1] (id 11) has no 'bbox'"),
        (
            "annotations",
            1,
            {"bbox": [1, 2, 3]},
            "'bbox' of annotations[1] (id 11) is [1, 2, 3], and is not [x, y, width",
        ),
        ("annotations", 1, {"bbox": [1, 2, 3, "4"]}, "'bbox' of annotations[1] (id 11)"),
        ("annotations", 1, {"bbox": [1, 2, 3, float("nan")]}, "'bbox' of annotations[1] (id 11)"),
        ("annotations", 1, {"bbox": [9, 9, -5, 4]}, "and has a negative width"),
        ("annotations", 1, {"iscrowd": 2}, "'iscrowd' of annotations[1] (id 11) is 2"),
        ("annotations", 1, {"iscrowd": "no"}, "'iscrowd' of annotations[1] (id 11) is no, and is no int"),
        (
            "annotations",
            1,
            {"category_id": 1},
            "'category_id' of annotations[1] (id 11) is 1, and is the id of no category",
        ),
        ("annotations", 1, {"category_id": ...}, "annotations[1] (id 11) has no 'category_id'"),
        ("annotations", 1, {"image_id": ...}, "annotations[1] (id 11) has no 'image_id'"),
        ("images", 1, {"id": 3}, "'id' of images[0] (id 3) is 3, and is another image's too"),
        ("images", 1, {"width": ...}, "images[1] (id 4) has no 'width'"),
        ("images", 1, {"height": 0}, "'height' of images[1] (id 4) is 0"),
        ("images", 1, {"file_name": ...}, "images[1] (id 4) has no 'file_name'"),
        ("categories", 1, {"id": 7}, "'id' of categories[0] (id 7) is 7, and is another category's too"),
        ("categories", 1, {"name": ...}, "categories[1] (id 2) has no 'name'"),
        ("categories", 1, {"id": "2"}, "'id' of categories[1] (id 2) is 2, and is no int"),
    ],
)
def test_wrong_entries_of_instances(part, number, values, message):
    check_instances(copy.deepcopy(INSTANCES), "x.json")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        check_instances(changed(INSTANCES, part, number, **values), "x.json")
    assert str(caught.value).startswith("x.json: ")
    assert "\n" not in str(caught.value)


def test_what_can_be_read_in_one_way_only():
    content = changed(INSTANCES, "annotations", 0, iscrowd=..., area=...)
    content["annotations"][1] |= {"iscrowd": False, "area": 0}
    content["annotations"][2] |= {"image_id": 99}
    content["images"][0]["width"] = 40.0
    (notice,) = check_instances(content, "x.json")
    assert "1 of 3 annotations are of images that the file lacks" in notice
    assert "annotations[2] (id 12)" in notice
    assert [(one["iscrowd"], one["area"]) for one in content["annotations"]] == [(0, 80), (0, 80)]
    assert check_instances({**copy.deepcopy(INSTANCES), "annotations": []}, "x.json") == []
    test_set = {key: INSTANCES[key] for key in ("images", "categories")}
    assert check_instances(test_set, "x.json") == []
    with pytest.raises(InputError, match="no annotation has an id of 'images'"):
        check_instances({**INSTANCES, "annotations": [{**INSTANCES["annotations"][0], "image_id": "3"}]}, "x.json")


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([50, 2, 10, 8], "1 of 3 boxes are smaller than a pixel or outside of their image"),
        ([5, 2, 0.5, 8], "1 of 3 boxes are smaller than a pixel"),
        ([20, 15, 38, 28], "1 of 3 boxes reach out of their image"),
    ],
)
def test_boxes_that_are_told(box, message):
    notices = check_instances(changed(INSTANCES, "annotations", 2, bbox=box), "x.json")
    assert message in notices[0]
    assert "annotations[2] (id 12)" in notices[0]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 5, 5]], "'segmentation' of annotations[1] (id 11) is [[1, 1, 5, 5]], and has no polygon of at least"),
        ([], "has no polygon of at least three points"),
        (..., "annotations[1] (id 11) has no 'segmentation'"),
        (None, "'segmentation' of annotations[1] (id 11) is None"),
        ([1, 2, 11, 2, 11, 10], "is no list of polygons"),
        ([[1, 2, 11, 2, 11, 10, 3]], "is no list of polygons"),
        ([[1, 2, 11, 2, 11, "10"]], "has a coordinate that is no number"),
        ({"size": [40, 30], "counts": [1200]}, "is no run-length encoding of its image's 30 x 40 pixels"),
        ({"size": [30, 40], "counts": [120]}, "is no run-length encoding"),
        ({"size": [30, 40]}, "is no run-length encoding"),
    ],
)
def test_wrong_masks(mask, message):
    content = changed(INSTANCES, "annotations", 1, segmentation=mask)
    check_instances(content, "x.json")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        check_masks(content, "x.json")
    assert "x.json" in str(caught.value)
    assert "annotations[1] (id 11)" in str(caught.value)


def test_parts_of_masks():
    """A part of two points has no pixel, as long as there is another part."""
    whole = [1, 2, 11, 2, 11, 10]
    content = changed(INSTANCES, "annotations", 1, segmentation=[[1, 1, 5, 5], whole])
    content["annotations"][0]["segmentation"] = RLE
    check_instances(content, "x.json")
    check_masks(content, "x.json")
    assert content["annotations"][1]["segmentation"] == [whole]


@pytest.mark.parametrize(
    ("part", "number", "values", "message"),
    [
        ("annotations", 1, {"segments_info": ...}, "annotations[1] (image_id 4) has no 'segments_info'"),
        (
            "annotations",
            1,
            {"image_id": 3},
            "'image_id' of annotations[0] (image_id 3) is 3, and is the image of another",
        ),
        ("annotations.1.segments_info", 0, {"id": ...}, "annotations[1].segments_info[0] (image 4) has no 'id'"),
        ("annotations.1.segments_info", 0, {"id": 0}, "'id' of annotations[1].segments_info[0] (image 4) is 0"),
        ("annotations.1.segments_info", 0, {"id": 6}, "has one id twice"),
        (
            "annotations.1.segments_info",
            0,
            {"category_id": 1},
            "annotations[1].segments_info[0] (image 4) is 1, and is",
        ),
        ("annotations.1.segments_info", 0, {"iscrowd": None}, "'iscrowd' of annotations[1].segments_info[0] (image 4)"),
    ],
)
def test_wrong_entries_of_panoptic_files(part, number, values, message):
    check_panoptic(copy.deepcopy(PANOPTIC), "x.json")
    with pytest.raises(InputError, match=re.escape(message)):
        check_panoptic(changed(PANOPTIC, part, number, **values), "x.json")


def test_missing_keys_of_panoptic_files():
    content = changed(PANOPTIC, "annotations", 0, file_name=...)
    content["images"][0]["file_name"] = "x/a.jpeg"
    content["annotations"][0]["segments_info"][0].pop("iscrowd")
    assert check_panoptic(content, "x.json") == []
    assert content["annotations"][0]["file_name"] == "x/a.png"
    assert content["annotations"][0]["segments_info"][0]["iscrowd"] == 0


def test_classes_are_matched_by_name():
    categories = [*INSTANCES["categories"], {"id": 9, "name": "cow"}, {"id": 10, "name": "cow"}]
    assert class_ids(categories, "x.json", ("dog", "cat")) == [2, 7]
    with pytest.raises(InputError, match="x.json has no class Dog: its classes are cat, dog, cow"):
        class_ids(categories, "x.json", ("cat", "Dog"))
    with pytest.raises(InputError, match="2 categories with the name 'cow'"):
        class_ids(categories, "x.json", ("cow",))


def test_things_are_those_of_file_and_config():
    categories, bare = PANOPTIC["categories"], [{"id": 7, "name": "cat"}, {"id": 2, "name": "sky"}]
    for things in (["cat"], None):
        assert thing_names(categories, "x.json", ("sky", "cat"), things) == {"cat"}
    assert thing_names(bare, "x.json", ("cat", "sky"), ["cat"]) == {"cat"}
    assert thing_names(categories, "x.json", ("sky",), []) == set()
    with pytest.raises(InputError, match=r"x.json: categories\[0\] \(cat\) needs an 'isthing'"):
        thing_names(bare, "x.json", ("cat", "sky"), None)
    with pytest.raises(InputError, match=r"'isthing' of categories\[1\] \(sky\) is 0, but the config names it"):
        thing_names(categories, "x.json", ("cat", "sky"), ["cat", "sky"])
