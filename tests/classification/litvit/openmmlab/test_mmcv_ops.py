"""mmcv's operators on torchvision: against float64 references and what mmcv's compiled operators gave."""

import itertools
import subprocess
import sys
from functools import partial
from pathlib import Path

import benchmark
import mmcv
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import litvit.openmmlab  # noqa: F401 (makes mmcv.ops importable)
from litvit.errors import InputError
from litvit.openmmlab import mmcv_ops

from mmcv.ops import RoIAlign, batched_nms, deform_conv2d, nms, sigmoid_focal_loss, soft_nms  # isort: skip

# onedl-mmcv 2.3.6 compiled for torch 2.12.1, on a CPU: arguments and results of its operators, by case.
COMPILED = np.load(Path(__file__).parents[3] / "data/goldens/mmcv_ops.npz")
CASES = {
    kind: sorted({name.rpartition("/")[0] for name in COMPILED.files if name.startswith(kind)})
    for kind in ("nms", "soft_nms", "roi_align")
}


def compiled(case):
    """The arrays of a case, by name, as tensors or numbers."""
    names = [name for name in COMPILED.files if name.rpartition("/")[0] == case]
    arrays = {name.rpartition("/")[2]: COMPILED[name] for name in names}
    return {name: torch.from_numpy(value) if value.ndim else value.item() for name, value in arrays.items()}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    """Test the stand-ins also where mmcv was compiled."""
    stand_ins = mmcv_ops._StandIns("stand-ins", None)
    for module in ("nms", "roi_align", "focal_loss", "deform_conv"):
        monkeypatch.setattr(sys.modules[f"mmcv.ops.{module}"], "ext_module", stand_ins)


def boxes_on_a_grid(n=60, seed=0):
    """Boxes with whole corners, many of them equal, and scores of which many are equal."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 12, (n, 2), generator=generator)
    sides = torch.randint(1, 9, (n, 2), generator=generator)
    return torch.cat([corners, corners + sides], 1).float(), torch.randint(1, 10, (n,), generator=generator) / 10


def iou(a, b, offset=0):
    """Intersection over union of two boxes, in Python's numbers."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    width, height = (max(0, min(ax2, bx2) - max(ax1, bx1) + offset), max(0, min(ay2, by2) - max(ay1, by1) + offset))
    areas = [(x2 - x1 + offset) * (y2 - y1 + offset) for x1, y1, x2, y2 in (a, b)]
    return width * height / (sum(areas) - width * height)


def nms_reference(boxes, scores, threshold, offset=0):
    """Keep a box if no better one that was kept overlaps it by more than the threshold."""
    boxes = boxes.tolist()
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i].item()):
        if all(iou(boxes[i], boxes[k], offset) <= threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1 / 3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_nms(offset, threshold, dtype):
    boxes, scores = boxes_on_a_grid()
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    dets, kept = nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == nms_reference(boxes, scores, threshold, offset)
    assert torch.equal(dets, torch.cat([boxes[kept], scores[kept, None]], 1))


def test_nms_by_score_and_number():
    boxes, scores = boxes_on_a_grid()
    expected = [i for i in nms_reference(boxes, scores, 0.5) if scores[i] > 0.4]
    assert nms(boxes, scores, 0.5, score_threshold=0.4)[1].tolist() == expected
    assert nms(boxes, scores, 0.5, score_threshold=0.4, max_num=3)[1].tolist() == expected[:3]
    assert nms(boxes.numpy(), scores.numpy(), 0.5, max_num=3)[1].tolist() == nms_reference(boxes, scores, 0.5)[:3]


def test_nms_of_nothing():
    dets, kept = nms(torch.empty(0, 4), torch.empty(0), 0.5, offset=1)
    assert (dets.shape, kept.shape, kept.dtype) == ((0, 5), (0,), torch.int64)
    dets, kept = soft_nms(torch.empty(0, 4), torch.empty(0), offset=1)
    assert (dets.shape, kept.shape, kept.dtype) == ((0, 5), (0,), torch.int64)


@pytest.mark.parametrize("split_thr", [10000, 10])
def test_batched_nms(split_thr):
    boxes, scores = boxes_on_a_grid()
    scores = scores + torch.linspace(0, 0.05, len(scores))  # no ties: mmcv sorts the classes' boxes as it likes
    classes = torch.arange(len(boxes)) % 3
    config = {"type": "nms", "iou_threshold": 0.5, "split_thr": split_thr}
    dets, kept = batched_nms(boxes, scores, classes, config)
    of_classes = [(classes == i).nonzero()[:, 0] for i in range(3)]
    expected = torch.cat([i[nms_reference(boxes[i], scores[i], 0.5)] for i in of_classes])
    assert kept.tolist() == expected[scores[expected].argsort(descending=True)].tolist()
    assert torch.equal(dets, torch.cat([boxes[kept], scores[kept, None]], 1))
    if split_thr > len(boxes):
        agnostic = batched_nms(boxes, scores, classes, config, class_agnostic=True)[1]
        assert agnostic.tolist() == nms_reference(boxes, scores, 0.5)


def soft_nms_reference(boxes, scores, threshold, sigma, min_score, method, offset):
    """Take the best box, decay the others, drop those below the score; without ties."""
    boxes, scores, left, taken = boxes.tolist(), scores.tolist(), list(range(len(boxes))), []
    while left:
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        taken.append((best, scores[best]))
        for i in list(left):
            overlap = iou(boxes[best], boxes[i], offset)
            linear = {"naive": 0, "linear": 1 - overlap}
            scores[i] *= (
                np.exp(-(overlap**2) / sigma) if method == "gaussian" else linear[method] ** (overlap >= threshold)
            )
            if scores[i] < min_score:
                left.remove(i)
    return zip(*taken, strict=True)


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("offset", [0, 1])
def test_soft_nms(method, offset):
    boxes, scores = boxes_on_a_grid()
    boxes, scores = boxes + torch.rand(boxes.shape) / 100, scores + torch.linspace(0, 0.05, len(scores))
    arguments = {"iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.05, "method": method, "offset": offset}
    dets, kept = soft_nms(boxes, scores, **arguments)
    indices, decayed = soft_nms_reference(boxes, scores, *arguments.values())
    assert kept.tolist() == list(indices)
    assert torch.equal(dets[:, :4], boxes[kept])
    torch.testing.assert_close(dets[:, 4], torch.tensor(decayed, dtype=torch.float32))


def roi_align_reference(x, rois, size, scale, ratio, aligned):
    """RoIAlign as defined: means of bilinear samples, zeros beyond a pixel outside the map."""
    height, width = x.shape[2:]
    pooled = []
    for index, *corners in rois.tolist():
        x1, y1, x2, y2 = (corner * scale - 0.5 * aligned for corner in corners)
        sides = [y2 - y1, x2 - x1] if aligned else [max(y2 - y1, 1), max(x2 - x1, 1)]
        samples = [ratio if ratio > 0 else int(np.ceil(side / bins)) for side, bins in zip(sides, size, strict=True)]
        weights = []  # (bins, places on the map) per axis
        for start, side, bins, n, places in zip((y1, x1), sides, size, samples, (height, width), strict=True):
            weight = torch.zeros(bins, places, dtype=x.dtype)
            for i, k in itertools.product(range(bins), range(n)):
                at = start + side / bins * (i + (k + 0.5) / n)
                if -1 <= at <= places:
                    at = min(max(at, 0), places - 1)
                    low = min(int(at), places - 1)
                    weight[i, low] += (1 - (at - low)) / n
                    weight[i, min(low + 1, places - 1)] += (at - low) / n
            weights.append(weight)
        pooled.append(torch.einsum("iy,cyx,jx->cij", weights[0], x[int(index)], weights[1]))
    return torch.stack(pooled) if pooled else x[0, :, :1, :1].expand(0, -1, *size)


ROIS = torch.tensor(
    [
        [0, 1.5, 2.5, 30, 41],
        [1, 0, 0, 63, 47],
        [1, -9, -9, 20, 20],  # partly outside
        [0, 80, 80, 95, 99],  # outside
        [0, 10, 10, 10, 10],  # without area
        [1, 5, 5, 5.5, 30],  # thin
    ]
)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [len(ROIS), 0])
def test_roi_align_and_its_gradient(aligned, ratio, n):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 16, dtype=torch.float64, requires_grad=True)
    arguments = (3, 2), 0.25, ratio
    rois = ROIS[:n].double()
    pooled = RoIAlign(*arguments, aligned=aligned)(x, rois)
    expected = roi_align_reference(x, rois, *arguments, aligned)
    torch.testing.assert_close(pooled, expected)
    gradient = torch.randn_like(pooled)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, gradient)[0] for y in (pooled, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_roi_align_is_as_exact_as_its_type(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 16).to(dtype).requires_grad_()
    pooled = RoIAlign(7, 0.25, 2)(x, ROIS.to(dtype))
    expected = roi_align_reference(x.double(), ROIS.to(dtype), (7, 7), 0.25, 2, True)
    ulps = 1 if dtype.itemsize == 2 else 32
    torch.testing.assert_close(
        pooled.double(), expected, atol=ulps * torch.finfo(dtype).eps, rtol=ulps * torch.finfo(dtype).eps
    )
    assert pooled.dtype == torch.autograd.grad(pooled.sum(), x)[0].dtype == dtype


def focal_loss_reference(x, target, gamma, alpha, weight):
    """-alpha_t (1 - p_t)^gamma log(p_t), and a weight per row by its class."""
    positive = F.one_hot(target, x.shape[1] + 1)[:, :-1].bool()
    signed = torch.where(positive, x, -x)
    weights = torch.where(positive, alpha, torch.tensor(1 - alpha, dtype=x.dtype))
    loss = -weights * torch.sigmoid(-signed) ** gamma * F.logsigmoid(signed)
    return loss if weight is None else loss * F.pad(weight, (0, 1), value=1)[target, None]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_focal_loss_and_its_gradient(gamma, weighted, dtype):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(20, 5), torch.tensor([[-60.0, -20, 0, 20, 60]]).expand(6, 5)]).to(dtype).requires_grad_()
    target = torch.cat([torch.randint(0, 6, (20,)), torch.arange(6)])  # 5 is the background
    weight = torch.rand(5).to(dtype) if weighted else None
    exact = x.detach().double().requires_grad_()
    expected = focal_loss_reference(exact, target, gamma, 0.3, weight.double() if weighted else None)
    ulps = 1 if dtype.itemsize == 2 else 32  # 16 bits: computed in float32, rounded once
    close = partial(torch.testing.assert_close, rtol=ulps * torch.finfo(dtype).eps, atol=ulps * torch.finfo(dtype).tiny)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = sigmoid_focal_loss(x, target, gamma, 0.3, weight, "none")
    close(loss.double(), expected.to(dtype).double())
    gradient = torch.ones_like(loss)
    exact_gradient = torch.autograd.grad(expected, exact, gradient.double())[0]
    close(torch.autograd.grad(loss, x, gradient)[0].double(), exact_gradient.to(dtype).double())


@pytest.mark.parametrize("case", CASES["nms"])
def test_nms_as_compiled(case):
    arrays = compiled(case)
    kept = nms(arrays["boxes"], arrays["scores"], arrays["iou_threshold"], offset=arrays["offset"])[1]
    assert torch.equal(kept, arrays["kept"])


@pytest.mark.parametrize("case", CASES["soft_nms"])
def test_soft_nms_as_compiled(case):
    arrays = compiled(case)
    expected = arrays.pop("kept"), arrays.pop("dets")
    dets, kept = soft_nms(**{**arrays, "method": ["naive", "linear", "gaussian"][arrays["method"]]})
    assert torch.equal(kept, expected[0])
    torch.testing.assert_close(dets, expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES["roi_align"])
def test_roi_align_as_compiled(case):
    arrays = compiled(case)
    x = arrays["input"].requires_grad_()
    align = RoIAlign((3, 2), 0.25, arrays["sampling_ratio"], aligned=bool(arrays["aligned"]))
    pooled = align(x, arrays["rois"])
    torch.testing.assert_close(pooled, arrays["output"], rtol=1e-6, atol=1e-6)
    gradient = torch.autograd.grad(pooled, x, arrays["grad_output"])[0]
    torch.testing.assert_close(gradient, arrays["grad_input"], rtol=1e-6, atol=1e-6)


def test_other_operators_are_refused_when_they_are_called():
    image, offset = torch.randn(1, 3, 8, 8), torch.zeros(1, 18, 6, 6)
    message = "mmcv's deform_conv_forward is not among the operators that torchvision provides: install a compiled mmcv"
    with pytest.raises(InputError, match=message):
        deform_conv2d(image, offset, torch.randn(3, 3, 3, 3))
    with pytest.raises(InputError, match="set pool_mode='avg'"):
        RoIAlign(7, pool_mode="max")(image, ROIS[:1])


STUB = """
from litvit.openmmlab.mmcv_ops import nms, softnms  # as if compiled
def get_compiling_cuda_version(): return "not available"
def __getattr__(name): return name
"""


@pytest.mark.parametrize(
    ("module", "gpu", "sentence"),
    [
        (None, False, "mmcv was installed without compiled operators: torchvision's are used"),
        (STUB, False, "mmcv's own compiled operators are used"),
        (STUB, True, "mmcv was compiled without GPU operators: torchvision's are used"),
        ("raise ImportError('undefined symbol')", False, "do not fit this torch (undefined symbol): torchvision's are"),
    ],
)
def test_which_operators_are_used(module, gpu, sentence, tmp_path):
    """In a process of its own, with a module instead of the compiled one."""
    (tmp_path / "_ext.py").write_text(module or "")
    program = f"""
import sys, mmcv, torch
mmcv.__path__.insert(0, {str(tmp_path)!r})
{"sys.modules['mmcv._ext'] = None  # as if not installed" if module is None else ""}
torch.cuda.is_available = lambda: {gpu}
import litvit.openmmlab
from litvit.openmmlab.mmcv_ops import provide_operators
import mmcv.ops
assert mmcv.ops.get_compiling_cuda_version() == "not available"
print(provide_operators(), mmcv.ops.nms(torch.eye(4), torch.ones(4), 0.5)[1].tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sentence in done.stdout


def test_the_benchmark_leaves_out_an_operator_without_stand_in(run_main, monkeypatch):
    monkeypatch.setattr(mmcv, "_ext", mmcv_ops._StandIns("stand-ins", None), raising=False)
    outcome = run_main(benchmark, "dtm", "--batch-size", 1, "--repeats", 1, "--threads", 1)
    assert outcome.status == 0, outcome.err
    assert "torchvision / ours" in outcome.out
    assert "mmcv / ours" not in outcome.out


def run_without_operators(program):
    program = f"import sys, mmcv\nsys.modules['mmcv._ext'] = None  # as if not installed\n{program}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_importing_models_first_is_one_line():
    done = run_without_operators("import mmseg.models, litvit.openmmlab")
    assert "import litvit.openmmlab, which provides some, before mmseg.models" in done.stderr.splitlines()[-1]


def test_mmdets_interfaces_may_be_imported_first():
    """A config imports litvit.openmmlab after them."""
    program = "from mmdet.apis import DetInferencer; import litvit.openmmlab, mmcv.ops, mmdet.structures.mask as masks"
    done = run_without_operators(f"{program}; assert masks.structures.roi_align is mmcv.ops.roi_align")
    assert done.returncode == 0, done.stderr
