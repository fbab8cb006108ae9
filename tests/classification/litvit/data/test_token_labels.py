"""Token labels: maps that follow crop and flip, the loss, exact resume, and what wrong input says."""

import json
import math
import os
import re
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from PIL import Image
from torch import nn

from litvit.data.dataset import Labels
from litvit.data.loader import train_loader
from litvit.data.readers import open_train_and_val
from litvit.data.token_labels import TokenLabels, soft_targets
from litvit.processes import EXIT_INTERRUPTED, Processes
from litvit.runs.folder import CHECKPOINT
from litvit.training.build import build_trainer
from litvit.training.recipe import parse_config
from litvit.training.tasks import TokenLabelTask

TINY_LVT = ["dims=(8,8,16,16)", "depths=(1,1,1,1)", "num_heads=(1,1,2,2)", "class_heads=2", "class_blocks=1"]
RANDOM = "--aa rand-m9-mstd0.5-inc1 --reprob 0.5 --drop-path 0.2 --drop 0.2 --aug-repeats 2 --model-ema"


def label_file(folder, image):
    return folder / image.parent.name / f"{image.stem}.pt"


@pytest.fixture(scope="session")
def digit_labels(digits, tmp_path_factory):
    """Label files of the digits' training images: 4 random classes at each of 3 x 5 places. Not to be changed."""
    folder = tmp_path_factory.mktemp("labels")
    rng = np.random.default_rng(0)
    for image in (digits / "train").rglob("*.png"):
        classes = rng.permuted(np.tile(np.arange(10), (15, 1)), axis=1)[:, :4].T.reshape(4, 3, 5)
        labels = np.stack([rng.normal(3, 2, (4, 3, 5)), classes])
        label_file(folder, image).parent.mkdir(exist_ok=True)
        torch.save(torch.from_numpy(labels).half(), label_file(folder, image))
    return folder


@pytest.fixture
def labels_copy(digit_labels, tmp_path):
    """A copy of `digit_labels` to be spoilt."""
    return Path(shutil.copytree(digit_labels, tmp_path / "labels"))


@pytest.fixture
def flags(digits, digit_labels, tmp_path):
    """A run of 2 epochs of 4 updates in tmp_path/run: a tiny LVT on 3 x 3 tokens, with all its randomness."""
    plain = "--model lvt --token-label --img-size 96 -b 20 -j 0 --mixup 0 --cutmix 0 --no-amp --log-interval 1"
    schedule = "--epochs 2 --warmup-epochs 0 --cooldown-epochs 0 --lr 2e-3"
    where = ["--token-label-data", str(digit_labels), "--output", str(tmp_path), "--experiment", "run"]
    return [str(digits), *plain.split(), *schedule.split(), *RANDOM.split(), *where, "--model-kwargs", *TINY_LVT]


def batches_of(data, labels, size, *flags, epoch=0):
    size = (size, size) if isinstance(size, int) else size
    settings = parse_config([str(data), "--model", "resnet18", *map(str, flags)])  # which has no recipe
    images, _, num_classes = open_train_and_val(settings.data)
    config = {"input_size": (3, 32 * size[0], 32 * size[1]), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    token_labels = TokenLabels(str(labels), images, num_classes, size) if labels else None
    loader = train_loader(
        images,
        settings.augment,
        config,
        Processes(torch.device("cpu")),
        batch_size=settings.data.batch_size,
        workers=settings.data.workers,
        token_labels=token_labels,
    )
    loader.set_epoch(epoch)
    return list(loader)


def test_label_maps_follow_crop_and_flip(tmp_path):
    """Three classes, scored by an image's red, green and blue: the tokens' labels are the crop's mean colours."""
    width, height = 60, 40
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    picture = np.round(255 * np.stack([x, y, np.sin(5 * x + 3 * y) / 2 + 0.5])).astype(np.uint8)
    classes = np.broadcast_to(np.arange(3)[:, None, None], picture.shape)
    for split in ("train", "val", "labels"):
        (tmp_path / split / "a").mkdir(parents=True)
    for number in range(36):
        Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / "train" / "a" / f"{number}.png")
        torch.save(torch.from_numpy(np.stack([picture / 255, classes])), tmp_path / "labels" / "a" / f"{number}.pt")
    shutil.copy(tmp_path / "train" / "a" / "0.png", tmp_path / "val" / "a")
    flags = "--num-classes 3 -b 36 -j 0 --color-jitter 0 --reprob 0 --train-interpolation bilinear"
    for hflip in (0, 1):
        wide = batches_of(tmp_path, tmp_path / "labels", (2, 3), *flags.split(), "--hflip", hflip)[0]
        colours = (wide.images / 2 + 0.5).double()
        assert colours.shape == (36, 3, 64, 96)
        tokens = nn.functional.avg_pool2d(colours, 32).flatten(2)
        expected = torch.cat([tokens.mean(2, keepdim=True), tokens], 2).transpose(1, 2).softmax(-1)
        assert (wide.target - expected).abs().max() < 0.01
        (batch,) = batches_of(tmp_path, tmp_path / "labels", 2, *flags.split(), "--hflip", hflip)
        colours = (batch.images / 2 + 0.5).double()
        tokens = nn.functional.avg_pool2d(colours, 32).flatten(2)
        expected = torch.cat([tokens.mean(2, keepdim=True), tokens], 2).transpose(1, 2).softmax(-1)
        assert batch.target.shape == (36, 5, 3)
        assert (batch.target - expected).abs().max() < 0.01
        assert (batch.target - expected[:, [0, 2, 1, 4, 3]]).abs().max() > 0.1  # flipped
        assert (batch.target - expected[:, [0, 1, 3, 2, 4]]).abs().max() > 0.1  # x and y exchanged


def test_images_are_those_without_token_labels(digits, digit_labels):
    flags = "-b 20 --aa rand-m9-mstd0.5-inc1 --reprob 0.5 --train-interpolation random"
    plain = batches_of(digits, None, 2, *flags.split(), "-j", 0)
    for workers in (0, 1):
        labelled = batches_of(digits, digit_labels, 2, *flags.split(), "-j", workers)
        for first, second in zip(plain, labelled, strict=True):
            assert torch.equal(first.images, second.images)
            assert second.target.shape == (20, 5, 10)
            assert torch.allclose(second.target.sum(-1), torch.ones(20, 5))


def test_images_in_a_tar_have_the_same_labels(digits, digit_labels, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for folder in sorted((digits / "train").iterdir()):
            tar.add(folder, folder.name)
    shutil.copytree(digits / "val", tmp_path / "val")
    folder, tar = (batches_of(data, digit_labels, 3, "-b", 20, "-j", 0) for data in (digits, tmp_path))
    for first, second in zip(folder, tar, strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.target, second.target)


def bilinear(image, y, x):
    """Value of (H, W) at a point, whose whole numbers are the middles of the pixels."""
    H, W = image.shape
    y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
    y, x = y - top, x - left
    upper = (1 - x) * image[top, left] + x * image[top, right]
    return (1 - y) * upper + y * ((1 - x) * image[bottom, left] + x * image[bottom, right])


def align(image, box, size):
    """RoIAlign of (H, W) to size (h, w) in float64, with as many points a cell as it has pixels."""
    H, W = image.shape
    x1, y1, x2, y2 = np.asarray(box) * (W, H, W, H)
    height, width = (y2 - y1) / size[0], (x2 - x1) / size[1]
    points = math.ceil(height), math.ceil(width)
    cells = np.empty(size)
    for i, j in np.ndindex(size):
        values = [
            bilinear(
                image, y1 + height * (i + (k + 0.5) / points[0]) - 0.5, x1 + width * (j + (m + 0.5) / points[1]) - 0.5
            )
            for k, m in np.ndindex(points)
        ]
        cells[i, j] = np.mean(values)
    return cells


@pytest.mark.parametrize("size", [(3, 3), (2, 3), (3, 1)])
def test_soft_targets_against_float64(size):
    rng = np.random.default_rng(1)
    B, K, H, W, num_classes = 4, 3, 6, 9, 7
    classes = rng.permuted(np.tile(np.arange(num_classes), (B, H, W, 1)), axis=-1)[..., :K].transpose(0, 3, 1, 2)
    scores = rng.normal(0, 4, classes.shape)
    corners = np.sort(rng.uniform(0, 1, (B, 2, 2)), axis=1)  # (B, low and high, x and y)
    boxes, flipped = corners.reshape(B, 4), np.array([True, False, True, False])
    maps = torch.from_numpy(np.stack([scores, classes], 1)).float()
    targets = soft_targets(Labels(maps, torch.from_numpy(boxes).float(), torch.from_numpy(flipped)), num_classes, size)
    for b in range(B):
        dense = np.zeros((num_classes, H, W))
        np.put_along_axis(dense, classes[b], scores[b], axis=0)
        whole = np.stack([align(image, boxes[b], (1, 1)) for image in dense]).reshape(num_classes, 1)
        tokens = np.stack([align(image, boxes[b], size) for image in dense])
        tokens = (tokens[:, :, ::-1] if flipped[b] else tokens).reshape(num_classes, -1)
        expected = np.exp(np.concatenate([whole, tokens], 1).T)
        expected /= expected.sum(1, keepdims=True)
        assert np.abs(targets[b].double().numpy() - expected).max() < 1e-5


class Fixed(nn.Module):
    """A model whose scores are what it is given."""

    def __init__(self, class_logits, token_logits):
        super().__init__()
        self.class_logits, self.token_logits = nn.Parameter(class_logits), nn.Parameter(token_logits)
        self.mixed = None

    def forward(self, images, mixed=None):
        self.mixed = mixed
        return self.class_logits, self.token_logits


def test_loss_by_hand():
    """Two images, two classes, 2 x 2 tokens; every image's labels say 3/4 class 0, or class 1 for the second."""
    labels = torch.tensor([[0.75, 0.25], [0.0, 1.0]])
    target = labels[:, None].repeat(1, 5, 1)
    # the model says 1/2, 1/2 of the first image, 1/4, 3/4 of the second and its tokens, and 3/4, 1/4 of the first's
    class_logits = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    token_logits = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log()[:, None].repeat(1, 4, 1)
    model = Fixed(class_logits, token_logits)
    task = TokenLabelTask(model, (2, 2), cls_weight=2.0, dense_weight=0.5, verbose=False)
    boxes = set()
    for seed in range(20):
        np.random.seed(seed)
        result = task(torch.zeros(2, 3, 64, 64), target)
        boxes.add(tuple(model.mixed.flatten().tolist()))
        lam = 1 - model.mixed.sum().item() / 4
        # mixed targets: of the first image lam (3/4, 1/4) + (1 - lam) (0, 1), of the second the reverse
        first, second = 0.75 * lam, 0.75 * (1 - lam)  # of class 0
        ce_first = -math.log(0.5)
        ce_second = -second * math.log(0.25) - (1 - second) * math.log(0.75)
        assert first + second == pytest.approx(0.75)
        dense_first = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
        dense_second = -math.log(0.75)
        expected = 2.0 * (ce_first + ce_second) / 2 + 0.5 * (dense_first + dense_second) / 2
        assert result["loss"].item() == pytest.approx(expected, rel=1e-6)
        assert result["output"] is model.class_logits
    assert boxes == {(False,) * 4, *(tuple(place == token for place in range(4)) for token in range(4))}


def test_boxes_are_whole_rectangles_of_beta_area():
    model = Fixed(torch.zeros(3, 2), torch.zeros(3, 49, 2))
    task = TokenLabelTask(model, (7, 7), verbose=False)
    np.random.seed(0)
    areas = []
    for _ in range(500):
        task(torch.zeros(3, 3, 8, 8), torch.full((3, 50, 2), 0.5))["loss"].backward()  # an odd batch
        rows, columns = model.mixed.any(1), model.mixed.any(0)
        assert torch.equal(model.mixed, rows[:, None] & columns)
        for line in (rows, columns):
            assert line.int().diff().abs().sum() <= 2
        areas.append(model.mixed.sum().item())
    assert min(areas) == 0
    assert max(areas) >= 30
    # U^(1/2) of a side, rounded down, and on average a quarter of it past an edge
    assert 8 < np.mean(areas) < 17


def test_boxes_on_a_grid_that_is_not_square():
    model = Fixed(torch.zeros(2, 2), torch.zeros(2, 2 * 6, 2))
    task = TokenLabelTask(model, (2, 6), verbose=False)
    np.random.seed(0)
    ends = set()
    for _ in range(200):
        task(torch.zeros(2, 3, 8, 8), torch.full((2, 13, 2), 0.5))
        rows, columns = model.mixed.any(1), model.mixed.any(0)
        assert model.mixed.shape == (2, 6)
        assert torch.equal(model.mixed, rows[:, None] & columns)
        ends |= {tuple(place.tolist()) for place in model.mixed.nonzero()}
    assert ends == set(np.ndindex(2, 6))


def test_without_mix_token_no_box_is_pasted():
    model = Fixed(torch.zeros(2, 2), torch.zeros(2, 49, 2))
    task = TokenLabelTask(model, (7, 7), mix_token=False, verbose=False)
    for seed in range(20):
        np.random.seed(seed)
        task(torch.zeros(2, 3, 8, 8), torch.full((2, 50, 2), 0.5))
        assert not model.mixed.any()


def weights(folder):
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    return {**state["state_dict"], **{f"ema.{name}": value for name, value in state["state_dict_ema"].items()}}


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def run(*flags):
    return build_trainer(parse_config([str(flag) for flag in flags])).run()


def test_interrupted_the_run_ends_with_the_same_weights(flags, tmp_path):
    assert run(*flags, "--experiment", "whole") == 0
    trainer = build_trainer(parse_config(flags))
    step = trainer.guard.step

    def step_and_signal(loss):
        loss = step(loss)
        if trainer.progress.step + 1 == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return loss

    trainer.guard.step = step_and_signal
    assert trainer.run() == EXIT_INTERRUPTED
    assert run(flags[0], "--resume", tmp_path / "run", "-j", 1) == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_label_file_that_breaks_in_mid_run_ends_it_in_one_line(flags, labels_copy, digits, tmp_path, run_main):
    flags = [*flags, "--aug-repeats", "0"]  # every image is seen
    assert run(*flags, "--experiment", "whole") == 0
    broken = label_file(labels_copy, digits / "train" / "7" / "00000.png")
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    flags = [*flags, "--token-label-data", labels_copy, "--resume", "auto", "-j", 1]
    for _ in range(2):
        outcome = run_main(train, *flags)
        assert outcome.status == 2
        assert outcome.err.count("\n") == 1
        assert str(broken) in outcome.err
        assert (tmp_path / "run" / CHECKPOINT).exists()  # what was done before the broken file's update
    broken.write_bytes(content)
    assert run_main(train, *flags).status == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_two_processes_with_accumulation_and_compilation(flags, tmp_path, run_script):
    more = ["-b", 5, "--grad-accum-steps", 2, "--epochs", 1, "--torchcompile", "eager"]
    outcome = run_script("distributed_train.sh", 2, *flags, *more)
    assert outcome.status == 0, outcome.err
    assert "4 steps per epoch" in outcome.out
    assert (tmp_path / "run" / "model_best.safetensors").exists()


def test_images_that_are_not_square(flags, tmp_path, run_main):
    outcome = run_main(train, *flags, "--img-size", 64, 96, "--epochs", 1)
    assert outcome.status == 0, outcome.err
    assert "10 classes, 64 x 96 images" in outcome.out
    outcome = run_main(train, *flags, "--img-size", 64, 96, "--token-label-size", 2, "--dry-run", "--experiment", "2")
    assert outcome.err == "error: --token-label-size 2: lvt has 2 x 3 tokens at 64 x 96 pixels\n"


def test_old_commands(flags, run_main):
    outcome = run_main(train, *flags, "--model", "lvt_cls", "--cfg", "./configs/lvt.py", "--apex-amp", "--dry-run")
    assert outcome.status == 0, outcome.err
    assert "--cfg ./configs/lvt.py is not read: LVT's published settings are the model's defaults" in outcome.out


def holds_code(file):
    torch.save(Path(), file)


def changed(index, value):
    def change(file):
        labels = torch.load(file)
        labels[index] = value
        torch.save(labels, file)

    return change


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (Path.unlink, "no label file {file}: litvit make-token-labels"),
        (lambda file: shutil.rmtree(file.parent), "no label file {file} and 7 more: litvit make-token-labels"),
        (holds_code, "{file} is a plain pickle or holds code"),
        (lambda file: file.write_bytes(b""), "{file} is empty"),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), "{file} is no checkpoint, or a truncated one"),
        (lambda file: torch.save({"a": 1}, file), "{file} holds dict, not scores and classes, (2, K, H, W)"),
        (lambda file: torch.save(torch.zeros(3, 5, 2, 2), file), "{file} holds (3, 5, 2, 2), not scores and classes"),
        (changed((1, 0, 0, 0), 10), "{file} has classes outside of 0 to 9"),
        (changed((1, 0, 0, 0), -1), "{file} has classes outside of 0 to 9"),
        (changed((1, 0, 0, 0), 1.5), "{file} has classes outside of 0 to 9"),
        (changed((0, 0, 0, 0), torch.nan), "{file} has scores that are not finite"),
    ],
)
def test_wrong_label_files_are_found_at_the_start(flags, labels_copy, digits, tmp_path, run_main, spoil, says):
    file = label_file(labels_copy, min((digits / "train" / "0").iterdir()))
    spoil(file)
    outcome = run_main(train, *flags, "--token-label-data", labels_copy, "--dry-run")
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert says.format(file=file) in outcome.err
    assert not (tmp_path / "run").exists()


def test_another_shape_later_names_the_file(flags, labels_copy, digits, run_main):
    file = label_file(labels_copy, digits / "train" / "9" / "00000.png")
    torch.save(torch.zeros(2, 4, 5, 3), file)
    outcome = run_main(train, *flags, "--token-label-data", labels_copy, "--aug-repeats", 0)
    assert outcome.status == 2
    assert f"{file} is (2, 4, 5, 3), but " in outcome.err


def test_labels_of_other_classes_are_refused(flags, labels_copy, run_main):
    teacher = labels_copy / "teacher.json"
    flags = [*flags, "--token-label-data", labels_copy, "--dry-run"]
    for classes, says in (
        (list("0123456789"), None),
        (list("0123465789"), "number 5 is 5, not 6"),
        ([*"012"], "10 and 3"),
    ):
        teacher.write_text(json.dumps({"classes": classes}))
        outcome = run_main(train, *flags)
        assert outcome.status == (2 if says else 0)
        assert (says or "") in outcome.err
    teacher.write_text("{")
    assert "teacher.json" in run_main(train, *flags).err


def test_labels_with_a_gradient_reach_the_trainer(flags, labels_copy, run_main):
    file = labels_copy / "3" / "00000.pt"
    torch.save(nn.Parameter(torch.load(file, weights_only=True).float()), file)
    flags = [*flags, "--token-label-data", labels_copy, "--epochs", 1, "--aug-repeats", 0, "-j", 1]
    assert run_main(train, *flags).status == 0


def test_images_that_share_a_label_file_are_refused(flags, digits_copy, run_main):
    image = digits_copy / "train" / "4" / "00001.png"
    Image.open(image).convert("RGB").save(image.with_suffix(".jpg"))
    outcome = run_main(train, digits_copy, *flags[1:], "--dry-run")
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert re.search(r"4/00001.jpg and .*4/00001.png would share the labels 4/00001.pt", outcome.err)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--token-label-data", "nowhere"], "--token-label-data nowhere: no such folder"),
        (["--mixup", 0.8], "--mixup 0 --cutmix 0, or --no-token-label"),
        (["--cutmix", 1], "--mixup 0 --cutmix 0, or --no-token-label"),
        (["--dataset", "wds/x"], "not with --dataset wds/x"),
        (["--model", "resnet18", "--model-kwargs"], "resnet18 cannot mix and score its tokens"),
        (["--model", "volo_d1_224", "--model-kwargs"], "volo_d1_224 cannot mix and score its tokens"),
        (["--token-label-size", 7], "--token-label-size 7: lvt has 3 x 3 tokens at 96 x 96 pixels"),
        (["--img-size", 100], "a multiple of 32, not 100"),
        (["--dense-weight", -1], "--dense-weight must be at least 0"),
    ],
)
def test_wrong_flags_are_one_line(flags, tmp_path, run_main, more, says):
    outcome = run_main(train, *flags, *more, "--dry-run")
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert says in outcome.err
    assert not (tmp_path / "run").exists()


def test_token_labels_need_a_folder(digits, run_main):
    outcome = run_main(train, digits, "--model", "lvt", "--token-label", "--mixup", 0, "--cutmix", 0, "--dry-run")
    assert outcome.status == 2
    assert "--token-label needs --token-label-data DIR" in outcome.err
