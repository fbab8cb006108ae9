"""Void labels, classes without pixels and lists of names, on small label files of mmseg's data sets."""

import numpy as np
import pytest
import torch
from mmengine.dataset import ConcatDataset
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmseg.datasets import ADE20KDataset, BaseSegDataset, MultiImageMixDataset
from mmseg.evaluation import IoUMetric
from mmseg.registry import MODELS
from PIL import Image

from litvit.errors import InputError
from litvit.openmmlab.checks import (
    check_annotations,
    check_data_settings,
    check_metric,
    sample_labels,
    steps,
    unify_void,
)

VOID = 3
MODEL = {
    "type": "EncoderDecoder",
    "data_preprocessor": {"type": "SegDataPreProcessor", "size": (32, 32)},
    "backbone": {"type": "mmseg.MobileNetV2", "strides": (1, 1, 1, 1, 1, 1, 1)},
    "decode_head": {"type": "FCNHead", "in_channels": 320, "channels": 8, "num_classes": 3},
    "auxiliary_head": {
        "type": "FCNHead",
        "in_channels": 96,
        "in_index": 2,
        "channels": 8,
        "num_classes": 3,
        "loss_decode": [{"type": "CrossEntropyLoss"}, {"type": "DiceLoss"}],
    },
}
PIPELINE = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations"},
    {"type": "RandomCrop", "crop_size": (16, 16), "cat_max_ratio": 0.9},
    {"type": "RandomApply", "transforms": [{"type": "RandomRotate", "prob": 1, "degree": 20}], "prob": 1},
    {"type": "Pad", "size": (32, 32)},
    {"type": "PackSegInputs"},
]


def dataset(folder, labels, kind=BaseSegDataset, classes=("a", "b", "c"), pipeline=PIPELINE, **settings):
    """Images of 24 x 24 pixels with the given labels, in vertical stripes."""
    for name in ("images", "labels"):
        (folder / name).mkdir(exist_ok=True)
    for i, stripes in enumerate(labels):
        pixels = np.array(stripes)[np.arange(24) * len(stripes) // 24] * np.ones((24, 1), dtype=int)
        Image.new("RGB", (24, 24)).save(folder / f"images/{i}.jpg")
        Image.fromarray(pixels.astype(np.uint8 if pixels.max() < 256 else np.uint16)).save(folder / f"labels/{i}.png")
    with DefaultScope.overwrite_default_scope("mmseg"):
        return kind(
            metainfo={"classes": classes},
            data_root=str(folder),
            data_prefix={"img_path": "images", "seg_map_path": "labels"},
            pipeline=pipeline,
            **settings,
        )


def model(**settings):
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build({**MODEL, **settings})


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("void", [VOID, 200])
def test_one_setting_for_void_reaches_everything(void, everywhere, tmp_path):
    """Whether or not the label is also set where mmseg asks for it."""
    also = {"ignore_index": void} if everywhere else {}
    pipeline = [dict(step) for step in PIPELINE]
    pipeline[2] |= also
    if everywhere:
        pipeline[3] = {**PIPELINE[3], "transforms": [{**PIPELINE[3]["transforms"][0], "seg_pad_val": void}]}
        pipeline[4]["pad_val"] = {"img": 0, "seg": void}
    data = dataset(tmp_path, [(0, 1, void, 2), (0, void, 255)], pipeline=pipeline, ignore_index=void)
    segmentor = model(
        decode_head={**MODEL["decode_head"], **also},
        auxiliary_head={**MODEL["auxiliary_head"], **also},
        data_preprocessor={**MODEL["data_preprocessor"], **({"seg_pad_val": void} if everywhere else {})},
    )
    metric = IoUMetric(**also)
    check_annotations(data, segmentor.num_classes)
    unify_void(data, segmentor)
    check_metric(metric, data)
    batch = {"inputs": [], "data_samples": []}
    for sample in data:
        assert set(sample["data_samples"].gt_sem_seg.data.unique().tolist()) <= {0, 1, 2, 255}
        for key in batch:
            batch[key].append(sample[key])
    losses = segmentor.train().forward(**segmentor.data_preprocessor(batch, training=True), mode="loss")
    assert all(torch.isfinite(torch.as_tensor(loss)).all() for loss in losses.values())
    metric.dataset_meta = data.metainfo
    truth = torch.tensor([[0, 1, 255, 255]])
    metric.process({}, [{"pred_sem_seg": {"data": torch.tensor([[0, 1, 2, 2]])}, "gt_sem_seg": {"data": truth}}])
    assert metric.evaluate(size=1)["mIoU"] == 100


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"decode_head": {**MODEL["decode_head"], "ignore_index": 7}}, "decode_head.ignore_index is 7"),
        ({"auxiliary_head": {**MODEL["auxiliary_head"], "ignore_index": 7}}, "auxiliary_head.ignore_index is 7"),
        (
            {"data_preprocessor": {"type": "SegDataPreProcessor", "seg_pad_val": 0}},
            "data_preprocessor.seg_pad_val is 0",
        ),
        ({"type": "RandomCrop", "crop_size": (16, 16), "ignore_index": 7}, "RandomCrop.ignore_index is 7"),
        ({"type": "Pad", "size": (32, 32), "pad_val": {"img": 0, "seg": 0}}, "Pad.pad_val.seg is 0"),
        ({"type": "IoUMetric", "ignore_index": 7}, "IoUMetric.ignore_index is 7"),
    ],
)
def test_void_settings_that_disagree(place, message, tmp_path):
    kind = place.get("type")
    steps = [place] if kind in ("RandomCrop", "Pad") else []
    data = dataset(tmp_path, [(0, 1, 2)], pipeline=[*PIPELINE[:2], *steps], ignore_index=VOID)
    check, other = (check_metric, None) if kind == "IoUMetric" else (unify_void, model(**({} if kind else place)))
    arguments = (data, other) if other else (IoUMetric(ignore_index=7), data)
    with pytest.raises(InputError, match=f"{message}, but the data set's label of void pixels is {VOID}"):
        check(*arguments)


def mixed(folder, void, **settings):
    """A data set whose images a wrapper mixes in a pipeline of its own."""
    data = dataset(folder, [(0, 1, void, 2)], pipeline=PIPELINE[:2], ignore_index=void)
    pipeline = [
        {"type": "RandomMosaic", "prob": 1, "img_scale": (24, 24), **settings},
        {"type": "RandomCrop", "crop_size": (16, 16), "ignore_index": void},
    ]
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MultiImageMixDataset(ConcatDataset([data]), pipeline)


def test_void_in_the_pipeline_of_a_wrapper(tmp_path):
    data = mixed(tmp_path, VOID, seg_pad_val=VOID)
    unify_void(data, model())
    assert [data.pipeline[0].seg_pad_val, data.pipeline[1].ignore_index] == [255, 255]
    with pytest.raises(InputError, match="RandomMosaic.seg_pad_val is 7, but the data set's label"):
        unify_void(mixed(tmp_path, VOID, seg_pad_val=7), model())


def with_losses(*losses):
    return model(decode_head={**MODEL["decode_head"], "loss_decode": list(losses)})


def test_void_of_losses_with_other_names_for_it(tmp_path):
    segmentor = with_losses({"type": "OhemCrossEntropy", "ignore_label": VOID})
    data = dataset(tmp_path, [(0, 1, VOID, 2)], ignore_index=VOID)
    unify_void(data, segmentor)
    assert segmentor.decode_head.loss_decode[0].ignore_label == 255
    with pytest.raises(InputError, match="ignore_label is 7, but the data set's label of void pixels is 3"):
        unify_void(data, with_losses({"type": "OhemCrossEntropy", "ignore_label": 7}))


@pytest.mark.parametrize("loss", ["DiceLoss", "TverskyLoss"])
def test_a_class_that_a_loss_leaves_out_is_not_void(loss, tmp_path):
    segmentor = with_losses({"type": "CrossEntropyLoss"}, {"type": loss, "ignore_index": 0, "loss_name": "loss_b"})
    unify_void(dataset(tmp_path, [(0, 1, 2)]), segmentor)
    assert segmentor.decode_head.loss_decode[1].ignore_index == 0


def test_a_metric_that_leaves_out_a_class(tmp_path):
    with pytest.raises(InputError, match="IoUMetric.ignore_index is 0, .* leaves out a class is not supported"):
        check_metric(IoUMetric(ignore_index=0), dataset(tmp_path, [(0, 1, 2)]))


def test_void_with_label_zero_and_with_a_subset_of_classes(tmp_path):
    """mmseg makes both 255, whatever ignore_index is."""
    data = dataset(tmp_path, [(0, 1, 2, 4)], pipeline=PIPELINE[:2], reduce_zero_label=True, ignore_index=VOID)
    check_annotations(data, 3)
    assert np.unique(data[0]["gt_seg_map"]).tolist() == [0, 1, 255]
    data = dataset(tmp_path, [(1, 2, 3)], ADE20KDataset, ("sky", "building"), PIPELINE[:2], reduce_zero_label=True)
    check_annotations(data, 2)
    assert np.unique(data[0]["gt_seg_map"]).tolist() == [0, 1, 255]


def test_void_of_16_bits(tmp_path):
    data = dataset(tmp_path, [(0, 1, 2, 40000)], pipeline=PIPELINE[:2], ignore_index=40000)
    check_annotations(data, 3)
    assert np.unique(data[0]["gt_seg_map"]).tolist() == [0, 1, 2, 255]


def test_classes_without_a_pixel_are_told(tmp_path, caplog, monkeypatch, request):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    request.addfinalizer(lambda: logger.removeHandler(caplog.handler))

    def told(*labels, **settings):
        data = dataset(tmp_path, labels, pipeline=PIPELINE[:2], **settings)
        check_annotations(data, 3)
        caplog.clear()
        sample_labels([data], tell=True)
        return caplog.text

    assert told((0, 1), (2,)) == ""
    assert "no pixel of 2 label files is of 1 of the 3 classes: c" in told((0, 1), (1,))
    assert "no pixel of 2 label files is of 2 of the 3 classes: a, c" in told((0, 1), (1,), ignore_index=0)
    with pytest.raises(InputError, match="no pixel of 2 label files is of a class"):
        told((0,), (0,), reduce_zero_label=True)
    with pytest.raises(InputError, match="1.png has label 4, but the classes are 0 to 2"):
        told((0,), (4,))
    monkeypatch.setattr("litvit.openmmlab.checks.SAMPLED_FILES", 2)
    assert "no pixel of 2 label files, a sample of 3, is of 1 of the 3 classes: b" in told((0,), (1,), (2,))


@pytest.mark.parametrize(
    ("metainfo", "message"),
    [
        ({"classes": "red"}, "metainfo.classes is the text 'red', not a tuple of names"),
        ({"thing_classes": "red"}, r"a tuple of one name has a comma, thing_classes=\('red',\)"),
        ({"stuff_classes": "red"}, "metainfo.stuff_classes is the text 'red'"),
        ({"classes": ("a", "b", "a")}, "metainfo.classes has 'a' twice"),
        ({"classes": ("a", 1)}, "metainfo.classes has 1, which is no name"),
        ({"palette": (255, 0, 0)}, r"metainfo.palette is \(255, 0, 0\), not a list of colours"),
    ],
)
def test_names_without_a_comma(metainfo, message):
    for settings in ({"metainfo": metainfo}, {"datasets": [{"dataset": {"metainfo": metainfo}}]}):
        with pytest.raises(InputError, match=message):
            check_data_settings(settings)


def test_a_file_of_names(tmp_path):
    (tmp_path / "names.txt").write_text("red\ngreen\n")
    check_data_settings({"metainfo": {"classes": str(tmp_path / "names.txt"), "palette": [(1, 2, 3), (4, 5, 6)]}})


def test_steps_inside_of_steps(tmp_path):
    names = [type(step).__name__ for step in steps(dataset(tmp_path, [(0,)]).pipeline)]
    assert {"RandomApply", "RandomRotate", "PackSegInputs"} <= set(names)
