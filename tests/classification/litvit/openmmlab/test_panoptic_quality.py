import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from litvit.errors import InputError
from litvit.openmmlab.panoptic_quality import VOID, CocoPanoptic, PanopticQuality, segment_ids

THINGS, STUFFS = {1, 2}, {3, 4}


def pixels(*runs):
    """An image of one row, (1, 1, W, 2), from runs of (length, category, number)."""
    return torch.tensor([[[[category, number] for length, category, number in runs for _ in range(length)]]])


def reference(images):
    """What COCO counts, segment by segment: for each category its sum of IoUs, matches, FPs and FNs."""
    iou_sum, matches, wrong, missed = Counter(), Counter(), Counter(), Counter()
    for preds, target, crowd in images:
        truth, guess = ([tuple(pixel) for pixel in x.view(-1, 2).tolist()] for x in (target, preds))
        pairs = Counter(zip(truth, guess, strict=True))
        crowds = {segment for segment, is_crowd in zip(truth, crowd.flatten().tolist(), strict=True) if is_crowd}
        areas, true_areas = Counter(), Counter()
        for (true, pred), overlap in pairs.items():
            true_areas[true] += overlap
            areas[pred] += overlap
        on_void = {p: sum(n for (true, pred), n in pairs.items() if pred == p and true[0] == VOID) for p in areas}
        found, used = set(), set()
        for (true, pred), overlap in pairs.items():
            if VOID in (true[0], pred[0]) or true[0] != pred[0] or true in crowds:
                continue
            iou = overlap / (areas[pred] + true_areas[true] - overlap - on_void[pred])
            if iou > 0.5:
                iou_sum[true[0]] += iou
                matches[true[0]] += 1
                found.add(true)
                used.add(pred)
        missed.update(true[0] for true in true_areas if true[0] != VOID and true not in found | crowds)
        for pred in areas:
            if pred[0] != VOID and pred not in used:
                on_crowd = sum(pairs[true, pred] for true in crowds if true[0] == pred[0])
                wrong[pred[0]] += (on_void[pred] + on_crowd) / areas[pred] <= 0.5
    return iou_sum, matches, wrong, missed


def percentages(counts):
    rows = {}
    for c in sorted(THINGS | STUFFS):
        iou_sum, matches, wrong, missed = (counter[c] for counter in counts)
        if matches + wrong + missed:
            sq, rq = iou_sum / max(matches, 1), matches / (matches + 0.5 * wrong + 0.5 * missed)
            rows[c] = (100 * sq * rq, 100 * sq, 100 * rq)
    groups = {"": rows, "_th": THINGS & rows.keys(), "_st": STUFFS & rows.keys()}
    return {
        f"{name}{group}": sum(rows[c][k] for c in chosen) / len(chosen) if chosen else math.nan
        for group, chosen in groups.items()
        for k, name in enumerate(("PQ", "SQ", "RQ"))
    }


def test_hand_computed_case_with_void_crowd_and_an_iou_of_one_half():
    target = pixels((8, 1, 1), (6, 1, 2), (6, VOID, 0), (8, 2, 1), (12, 3, 0))
    crowd = torch.zeros(1, 1, 40, dtype=torch.bool)
    crowd[..., 20:28] = True
    preds = pixels(
        (6, 1, 1),  # 6 of a true 8, 2 more below on void: IoU 6 / 8
        (6, 1, 2),  # 2 elsewhere, 4 of a true 6: IoU 4 / 8, no match
        (2, VOID, 0),
        (2, 1, 1),
        (2, 4, 0),  # all on void: no false positive, so category 4 is left out
        (5, 2, 3),  # 2 on void, 3 on the crowd, 3 more below on stuff: 5 of 8 are ignored
        (2, 2, 4),  # 2 on the crowd, 2 more below on stuff: just half, a false positive
        (3, VOID, 0),
        (3, 2, 3),
        (2, 2, 4),
        (7, 3, 0),  # IoU 7 / 12
    )
    metric = PanopticQuality(THINGS, STUFFS)
    metric.update(preds, target, crowd)
    assert metric.true_positives.tolist() == [1, 0, 1, 0]
    assert metric.false_positives.tolist() == [1, 1, 0, 0]
    assert metric.false_negatives.tolist() == [1, 0, 0, 0]
    found = {name: value.item() for name, value in metric.compute().items()}
    stuff = 7 / 12
    expected = {"PQ": (0.75 / 2 + 0 + stuff) / 3, "SQ": (0.75 + 0 + stuff) / 3, "RQ": (1 / 2 + 0 + 1) / 3}
    expected |= {"PQ_th": 0.75 / 4, "SQ_th": 0.75 / 2, "RQ_th": 1 / 4, "PQ_st": stuff, "SQ_st": stuff, "RQ_st": 1}
    assert found == pytest.approx({name: 100 * value for name, value in expected.items()}, abs=1e-12)

    # What a prediction leaves void is missed all the same.
    metric.update(pixels((4, VOID, 0)), pixels((4, 4, 0)))
    assert metric.false_negatives.tolist() == [1, 0, 0, 1]
    assert metric.compute()["PQ_st"].item() == pytest.approx(100 * stuff / 2)


def random_image(seed):
    """Blocks of segments, a prediction that is the truth in most of them, shifted, and a crowd for each thing."""
    generator = torch.Generator().manual_seed(seed)

    def rows(high, count):
        return torch.randint(high, (count,), generator=generator)

    categories, numbers = rows(5, 12), torch.arange(12)
    categories[categories == 0] = VOID
    truth = torch.stack((categories, numbers), -1)[rows(12, 36).view(6, 6)]
    guess = truth.clone()
    changed = rows(3, 36).view(6, 6) == 0
    guess[changed] = truth.view(-1, 2)[rows(36, int(changed.sum()))]
    guess[..., 1] += 100
    truth, guess = (x.repeat_interleave(5, 0).repeat_interleave(7, 1) for x in (truth, guess))
    guess = guess.roll(tuple(rows(3, 2).tolist()), (0, 1))
    crowd_number = [int(numbers[categories == thing][0]) if (categories == thing).any() else -1 for thing in THINGS]
    crowd = torch.isin(truth[..., 1], torch.tensor(crowd_number))
    return guess, truth, crowd


def test_random_images_against_a_plain_reference():
    images = [random_image(seed) for seed in range(40)]
    counts = reference(images)
    assert all(sum(counter.values()) > 20 for counter in counts)
    metric = PanopticQuality(THINGS, STUFFS)
    for batch in (images[:1], images[1:15], images[15:]):
        metric.update(*map(torch.stack, zip(*batch, strict=True)))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx(percentages(counts), abs=1e-5)  # torchmetrics divides in float32


def test_perfect_empty_and_meaningless():
    metric = PanopticQuality(THINGS, STUFFS)
    metric.update(pixels((3, 1, 0), (3, 1, 1)), pixels((3, 1, 7), (3, 1, 5)))
    scores = metric.compute()
    assert [scores[name].item() for name in ("PQ", "SQ", "RQ", "PQ_th")] == [100] * 4
    assert scores["PQ_st"].isnan()
    with pytest.raises(InputError, match="prediction of 1 x 3 pixels for a ground truth of 1 x 4"):
        metric.update(pixels((3, 1, 0)), pixels((4, 1, 0)))


def test_colours_are_ids():
    colours = np.array([[[1, 0, 0], [0, 1, 0], [7, 2, 255]]], dtype=np.uint8)
    assert segment_ids(colours).tolist() == [[1, 256, 7 + 2 * 256 + 255 * 65536]]


@pytest.fixture
def coco(tmp_path):
    """An image of 2 x 3 pixels: a thing, a crowd and void."""
    parts = [{"id": 300, "category_id": 1, "iscrowd": 0}, {"id": 70000, "category_id": 2, "iscrowd": 1}]
    content = {
        "categories": [{"id": i, "name": f"c{i}", "isthing": int(i in THINGS)} for i in sorted(THINGS | STUFFS)],
        "annotations": [{"image_id": 5, "file_name": "5.png", "segments_info": parts}],
    }
    ids = np.array([[300, 300, 0], [70000, 70000, 0]])
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "5.png")
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return tmp_path


def test_coco_files(coco):
    truth = CocoPanoptic(coco / "truth.json", coco)
    assert [category["name"] for category in truth.categories] == ["c1", "c2", "c3", "c4"]
    target, crowd = truth.target(5)
    assert target[..., 0].tolist() == [[1, 1, VOID], [2, 2, VOID]]
    assert len(target[..., 1].unique()) == 3
    assert crowd.tolist() == [[False] * 3, [True, True, False]]


def test_wrong_coco_files(coco):
    with pytest.raises(InputError, match="cannot read .*nowhere.json': No such file"):
        CocoPanoptic(coco / "nowhere.json", coco)
    for name, text, message in (
        ("list.json", "[]", "is no COCO annotation file: it has no list 'categories'"),
        (
            "instances.json",
            '{"categories": [{"id": 1, "name": "cat"}], "annotations": [{"id": 1, "image_id": 1}]}',
            r": annotations\[0\] \(id 1\) has no 'segments_info'",
        ),
        ("broken.json", "{", "is not JSON, or cut off"),
    ):
        (coco / name).write_text(text)
        with pytest.raises(InputError, match=f"{name}'? ?{message}"):
            CocoPanoptic(coco / name, coco)
    truth = CocoPanoptic(coco / "truth.json", coco)
    with pytest.raises(InputError, match="has no image 6"):
        truth.target(6)
    Image.new("RGB", (3, 2), (9, 9, 9)).save(coco / "5.png")
    with pytest.raises(InputError, match="5.png' has a segment 592137 that '.*truth.json' lacks"):
        truth.target(5)
    (coco / "5.png").unlink()
    with pytest.raises(InputError, match="cannot read '.*5.png': No such file"):
        truth.target(5)
