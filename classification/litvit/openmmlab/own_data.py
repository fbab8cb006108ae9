"""Data of one's own for mmdet and mmseg: a config with `own_data` needs the folder of the data alone.

What the files say is put into the config before anything is built: annotation files and folders of images, names of the
classes, whether there are masks, how often a class is seen, and a schedule in iterations for that number of images. The
run's copy of the config has all of it, and no `own_data`.

    own_data = dict(classes=None, train=None, val=None, weights=None, iterations=None)

- `classes`: names of the classes, all or some of the files'. None for all.
- `train`, `val`: annotation files of detection, relative to `data_root`. None to find them.
- `weights`: a file or link, of a classifier, or of a detector or segmentor. None for the config's; "" for random ones.
- `iterations`: length of the training. None for `iterations`.
"""

import importlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image
from timm.utils.distributed import world_info_from_env

from litvit.data.listing import image_suffixes, natural_order
from litvit.data.splits import choose_names
from litvit.errors import InputError, one_line
from litvit.openmmlab.annotations import class_ids, some
from litvit.openmmlab.checkpoints import fetch, load_from_file
from litvit.openmmlab.checks import VOID_LABEL

_SPLITS = {"train": ("train",), "val": ("val", "test")}  # what names begin with; the first that is found counts
_MASKS = r"masks?|labels?|annotations?|seg(mentation)?s?|gt"
VAL_FRACTION = 0.2  # of pairs of images and masks, where no folder says which are for validation


def iterations(num_images: int, batch_size: int) -> int:
    """Return the length of a training: 12 epochs, as COCO's, and more of few images (20 of 100, at most 50).

    It is 300 iterations at least.
    """
    epochs = min(max(200 / math.sqrt(num_images), 12), 50)
    return max(math.ceil(epochs * num_images / batch_size), 300)


def complete(cfg: Config) -> list[str]:
    """Complete a config that has `own_data`, in place. Others stay as they are.

    Returns:
        Sentences on what was found and chosen.

    Raises:
        InputError: The folder does not hold such data, or holds it twice.
    """
    settings = cfg.pop("own_data", None)
    if settings is None:
        return []
    root = Path(cfg.data_root)
    if not root.is_dir():
        raise InputError(f"no data folder {root}: --cfg-options data_root=FOLDER")
    if isinstance(settings.get("classes"), str):
        settings["classes"] = [settings["classes"]]
    detects = cfg.get("default_scope", "mmdet") == "mmdet"
    num_images, notes = (_complete_detector if detects else _complete_segmentor)(cfg, root, settings)
    _set_weights(cfg, settings.get("weights"))
    total_batch = cfg.train_dataloader.batch_size * world_info_from_env()[2]
    length = settings.get("iterations") or iterations(num_images, total_batch)
    _set_schedule(cfg, length)
    chosen = "given" if settings.get("iterations") else f"chosen for {num_images} training images"
    return [*notes, f"{length} iterations of {total_batch} images, {chosen}"]


def _set_schedule(cfg: Config, length: int) -> None:
    """Set a schedule by iterations: linear warm-up over a tenth, cosine to a hundredth, five validations."""
    warmup, interval = min(500, max(length // 10, 1)), math.ceil(length / 5)
    cfg.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": length, "val_interval": interval}
    cfg.param_scheduler = [
        {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "begin": 0, "end": warmup},
        {
            "type": "CosineAnnealingLR",
            "T_max": length - warmup,
            "eta_min_ratio": 0.01,
            "begin": warmup,
            "end": length,
            "by_epoch": False,
        },
    ]
    cfg.train_dataloader.sampler = {"type": "InfiniteSampler", "shuffle": True}
    cfg.default_hooks.checkpoint = {
        "type": "CheckpointHook",
        "by_epoch": False,
        "interval": interval,
        "max_keep_ckpts": 2,
        "save_best": "mIoU"
        if cfg.get("default_scope") == "mmseg"
        else "auto",  # mmseg's first is the accuracy of pixels
    }
    cfg.default_hooks.logger.interval = min(50, max(length // 20, 1))
    cfg.default_hooks.logger.log_metric_by_epoch = False  # the loop counts no epochs
    cfg.log_processor = {**cfg.get("log_processor", {"type": "LogProcessor", "window_size": 50}), "by_epoch": False}


def _set_weights(cfg: Config, weights: str | None) -> None:
    """Set where the training starts: by what a file holds, a backbone or a whole model."""
    if weights is None:
        return
    cfg.load_from = None
    cfg.model.backbone.init_cfg = None
    if not weights:
        return
    held = load_from_file(str(fetch(weights)))
    entries = held.get("state_dict", held) if isinstance(held, dict) else {}
    if any(str(name).removeprefix("module.").startswith("backbone.") for name in entries):
        cfg.load_from = weights
    else:
        cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": weights}


# Detection


def _complete_detector(cfg: Config, root: Path, settings: dict) -> tuple[int, list[str]]:
    from litvit.openmmlab.coco import InstancesFile  # needs mmdet

    files, notes = {}, []
    for split in _SPLITS:
        file = root / settings[split] if settings.get(split) else _annotation_file(root, split)
        if not file.is_file():
            raise InputError(f"no annotation file at {file} (own_data.{split})")
        files[split] = InstancesFile(str(file))
    categories, entries = (files["train"].dataset[key] for key in ("categories", "annotations"))
    seen = {entry["category_id"] for entry in entries}
    classes = settings.get("classes") or [entry["name"] for entry in categories if entry["id"] in seen]
    if not classes:
        raise InputError(f"{files['train'].name} has no annotations to train on")
    ids = class_ids(categories, files["train"].name, classes)
    left_out = [entry["name"] for entry in categories if entry["id"] not in ids]
    more = f"; left out: {some(left_out)}" if left_out else ""
    notes.append(f"{len(classes)} classes of {files['train'].name}: {some(classes)}{more}")
    has_masks = all(file.mask_error is None for file in files.values()) and not _are_boxes(entries)
    if not has_masks and "mask_head" in cfg.model.get("roi_head", {}):
        _drop_masks(cfg)
        notes.append("the files have no masks other than boxes: boxes alone are trained")
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        split = "train" if name.startswith("train") else "val"
        dataset = cfg[name].dataset
        dataset.update(
            data_root="",
            ann_file=files[split].name,
            data_prefix={"img": f"{_image_folder(root, files[split], split)}/"},
            metainfo={"classes": list(classes)},
        )
    for name in ("val_evaluator", "test_evaluator"):
        cfg[name].ann_file = files["val"].name
    for head in _heads(cfg.model):
        head["num_classes"] = len(classes)
    used = {entry["image_id"] for entry in entries if entry["category_id"] in ids}
    return len(used), notes


def _annotation_file(root: Path, split: str) -> Path:
    """Find the annotation file of a split by its name, or that of its folder."""
    files = {str(file.relative_to(root)): file for file in sorted((*root.glob("*.json"), *root.glob("*/*.json")))}
    found = [files[name] for name in _of_split(files, split)]
    instances = [file for file in found if file.name.startswith("instances")]
    if len(instances) == 1:
        return instances[0]
    if len(found) != 1:
        what = f"{len(found)} annotation files for {split}" if found else f"no annotation file for {split}"
        what += f" ({some(map(str, found))})" if found else ""
        raise InputError(
            f"{root} has {what}: name it like {split}.json or annotations/instances_{split}.json, or set "
            f"--cfg-options own_data.{split}=FILE"
        )
    return found[0]


def _of_split(paths: Iterable[str], split: str) -> list[str]:
    """Return the paths in which a word begins with the name of a split."""
    paths = list(paths)
    found = ([path for path in paths if re.search(rf"(^|[^a-z]){name}", path.lower())] for name in _SPLITS[split])
    return next(filter(None, found), [])


def _image_folder(root: Path, coco: Any, split: str) -> str:
    """Find the folder of the images that an annotation file names, below or beside it."""
    names = [image["file_name"] for image in coco.dataset["images"]]
    names = [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), 20)).astype(int)]
    folders = [Path(coco.name).parent, root, *sorted(path for path in root.rglob("*") if path.is_dir())]
    found = [folder for folder in dict.fromkeys(folders) if all((folder / name).is_file() for name in names)]
    found.sort(key=lambda folder: not _of_split([str(folder.relative_to(root))], split))
    if not found:
        name = names[0] if names else "any image"
        raise InputError(f"no folder in {root} has {name}, which {coco.name} names: put its images there")
    return str(found[0])


def _are_boxes(entries: Iterable[dict]) -> bool:
    """Return whether all masks are the boxes' own rectangles, as files have that were made from boxes."""
    for entry in entries:
        mask = entry.get("segmentation")
        if not isinstance(mask, list) or len(mask) != 1:
            return False
        corners = np.array(mask[0]).reshape(-1, 2)
        x, y, width, height = entry["bbox"]
        edges = ((corners == (x, y)) | (corners == (x + width, y + height))).all()
        if len(corners) not in (4, 5) or not edges:
            return False
    return True


def _drop_masks(cfg: Config) -> None:
    """Make a Mask R-CNN a Faster R-CNN."""
    if cfg.model.type == "MaskRCNN":
        cfg.model.type = "FasterRCNN"
    for part in ("mask_roi_extractor", "mask_head"):
        cfg.model.roi_head[part] = None
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for step in cfg[name].dataset.pipeline:
            if step.get("with_mask"):
                step["with_mask"] = False
    for name in ("val_evaluator", "test_evaluator"):
        cfg[name].metric = "bbox"


def _heads(model: dict) -> Iterator[dict]:
    """Yield the settings of a detector's heads that have a number of classes."""
    for name, part in model.items():
        for settings in part if isinstance(part, list) else [part]:
            if not isinstance(settings, dict):
                continue
            if name in ("bbox_head", "mask_head"):
                yield settings
            else:
                yield from _heads(settings)


# Segmentation


def find_pairs(root: Path) -> dict[str, list[tuple[str, str]]]:
    """Find images and their masks below a folder.

    A mask lies in a folder called masks, labels, annotations or the like, or ends in _mask, _label or the like, or is a
    .png beside a .jpg. Apart from that it has its image's name. Folders called train, val or test say what a pair is
    for. If there are none, `VAL_FRACTION` of the pairs are for validation, chosen by their names.

    Returns:
        Paths of images and masks, for "train" and "val".

    Raises:
        InputError: No pairs, images without a mask, or two of them.
    """
    images, masks = {}, {}
    suffixes = image_suffixes()
    files = [os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root) for name in names]
    files = [file for file in files if not any(part.startswith((".", "__MACOSX")) for part in Path(file).parts)]
    files = natural_order(file for file in files if os.path.splitext(file)[1].lower() in suffixes)
    photographs = {os.path.splitext(file)[0] for file in files if file.lower().endswith((".jpg", ".jpeg"))}
    for file in files:
        stem, suffix = os.path.splitext(file)
        *folders, name = Path(stem).parts
        plain = re.sub(rf"[-_.]({_MASKS})$", "", name, flags=re.IGNORECASE)
        in_masks = any(re.fullmatch(_MASKS, folder.lower()) for folder in folders)
        is_mask = in_masks or plain != name or (suffix.lower() == ".png" and stem in photographs)
        kinds = rf"{_MASKS}|images?|imgs?|jpegimages"
        key = "/".join((*(folder for folder in folders if not re.fullmatch(kinds, folder.lower())), plain))
        group = masks if is_mask else images
        if key in group:
            raise InputError(f"{root}: {group[key]} and {file} have one name: rename one of them")
        group[key] = file
    if not images or not masks:
        raise InputError(
            f"{root} has no pairs of images and masks: images/x.jpg and masks/x.png, or x.jpg and x_mask.png"
        )
    alone = [images[key] for key in images if key not in masks]
    if alone:
        raise InputError(f"{root}: {len(alone)} images have no mask, such as {alone[0]}: add masks, or move them away")
    folders = dict.fromkeys(key.rpartition("/")[0] for key in images)
    chosen = {name: set(_of_split(folders, name)) for name in _SPLITS}
    splits = {name: [key for key in images if key.rpartition("/")[0] in chosen[name]] for name in _SPLITS}
    if not splits["val"]:
        keys = splits["train"] or list(images)
        chosen = set(choose_names(keys, VAL_FRACTION, 0))
        splits = {"train": [key for key in keys if key not in chosen], "val": [key for key in keys if key in chosen]}
    elif not splits["train"]:
        splits["train"] = [key for key in images if key not in splits["val"]]
    if not splits["train"]:
        raise InputError(f"{root} has no pairs to train on")
    return {name: [(images[key], masks[key]) for key in keys] for name, keys in splits.items()}


def _complete_segmentor(cfg: Config, root: Path, settings: dict) -> tuple[int, list[str]]:
    pairs = find_pairs(root)
    counts = np.zeros(256, int)
    for _, mask in pairs["train"]:
        counts += _count_labels(root / mask)
    found = set(np.flatnonzero(counts).tolist())
    for _, mask in pairs["val"]:
        found |= set(np.flatnonzero(_count_labels(root / mask)).tolist())
    labels, names = _labels_and_names(root, sorted(found), settings.get("classes"))
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        split = "train" if name.startswith("train") else "val"
        pipeline = cfg[name].dataset.pipeline
        cfg[name].dataset = {
            "type": "PairsDataset",
            "data_root": str(root),
            "split": split,
            "labels": labels,
            "void": sorted(found - set(labels)),
            "metainfo": {"classes": names},
            "pipeline": pipeline,
        }
    imports = [*(cfg.get("custom_imports") or {}).get("imports", ()), "litvit.openmmlab.pairs"]
    cfg.custom_imports = {"imports": list(dict.fromkeys(imports)), "allow_failed_imports": False}  # of the run's copy
    importlib.import_module("litvit.openmmlab.pairs")  # needs mmseg
    pixels = np.maximum(counts[labels], 1)
    # Rare classes weigh more, by the root of how rare they are: their own share would make them win everywhere.
    weights = np.clip(np.sqrt(np.median(pixels) / pixels), 0.25, 8).round(3).tolist()
    for name in ("decode_head", "auxiliary_head"):
        for head in cfg.model[name] if isinstance(cfg.model.get(name), list) else [cfg.model.get(name)]:
            if head:
                head.num_classes = len(labels)
                head.loss_decode.class_weight = weights
    shown = ", ".join(f"{label} {name} (weight {w:g})" for label, name, w in zip(labels, names, weights, strict=True))
    void = sorted(found - set(labels))
    notes = [
        f"{len(pairs['train'])} + {len(pairs['val'])} pairs of images and masks in {root}",
        f"labels and classes: {shown}" + (f"; void: {some(map(str, void))}" if void else ""),
    ]
    return len(pairs["train"]), notes


def _count_labels(file: Path) -> np.ndarray:
    """Return how many pixels of a mask have each label."""
    try:
        with Image.open(file) as image:
            labels = np.asarray(image)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {one_line(error)}") from error
    if labels.ndim > 2 or labels.min(initial=0) < 0 or labels.max(initial=0) > 255:
        raise InputError(
            f"{file} has colours or numbers above 255, but a pixel's label is one number from 0 to 255: save one "
            "channel, or a palette's indices"
        )
    return np.bincount(labels.ravel().astype(int), minlength=256)


def _labels_and_names(root: Path, found: Sequence[int], wanted: Sequence[str] | None) -> tuple[list[int], list[str]]:
    """Return the label of each class in the masks, and the classes' names.

    `classes.txt` in the folder names the classes, one per line, from label 0. 255 is void, except in masks of 0 and
    255 alone.
    """
    file = root / "classes.txt"
    labels = list(found) if set(found) <= {0, VOID_LABEL} else [label for label in found if label != VOID_LABEL]
    if file.is_file():
        known = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        numbers = labels if len(labels) == len(known) == 2 else list(range(len(known)))
        if beyond := sorted(set(labels) - set(numbers)):
            raise InputError(f"{file} names {len(known)} classes, but the masks have label {beyond[0]}: add its name")
        of_name = dict(zip(known, numbers, strict=True))
    elif wanted and len(wanted) == len(labels):
        of_name = dict(zip(wanted, labels, strict=True))
    elif wanted:
        raise InputError(
            f"own_data.classes has {len(wanted)} names, the masks of {root} have labels {some(map(str, labels))}: name "
            f"each, or all classes in {file}, one per line, to choose some"
        )
    else:
        of_name = {str(label): label for label in labels}
    if missing := [name for name in wanted or () if name not in of_name]:
        raise InputError(f"{file} has no class {missing[0]}: its classes are {some(of_name)}")
    names = list(wanted or of_name)
    if len(names) < 2:
        raise InputError(f"the masks of {root} have one class, {names[0] if names else 'void'}: to train takes two")
    return [of_name[name] for name in names], names
