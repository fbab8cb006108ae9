"""Class scores of single tokens: every layout of features, and what a label file keeps of them."""

import pytest
import timm
import torch

from litvit.errors import InputError
from litvit.training.teacher import num_prefix_tokens, token_scores, top_scores

SWIN = {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "window_size": 2}
LIT = {"img_size": 64, "depths": (1, 1, 1, 1)}


def build(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **kwargs).double().eval()
    for classifier in filter(None, (model.get_classifier(), getattr(model, "aux_head", None))):
        for layer in [classifier] if isinstance(classifier, torch.nn.Linear) else classifier:
            torch.nn.init.normal_(layer.weight, std=0.1)  # timm's start at nearly nothing
    return model


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {}),
        ("nf_resnet26", {}),
        ("efficientnet_b0", {}),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("lit_s", {"dims": (16, 32, 48, 96), **LIT}),
        ("mixer_s32_224", {"img_size": 64}),  # NLC, no class token
    ],
)
@torch.no_grad()
def test_with_mean_pooling_their_mean_is_the_score_of_the_image(name, kwargs):
    model = build(name, **kwargs)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    scores = token_scores(model, images)
    assert scores.shape == (3, 2, 2, 7)
    torch.testing.assert_close(scores.mean((1, 2)), model(images).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("convnext_atto", {}),  # NCHW, a norm after pooling
        ("mobilenetv3_small_050", {}),  # NCHW, a convolution after pooling
        ("mambaout_femto", {}),  # NHWC
        ("swin_tiny_patch4_window7_224", SWIN),
        ("lit_ti", {"dims": (16, 32, 40, 64), **LIT}),  # NLC, a class token
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1}),  # two of them
        ("deit3_small_patch16_224", {"img_size": 32, "depth": 1}),
        ("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 1, "embed_dim": 96}),  # attention pooling
        ("coat_lite_tiny", {"img_size": 64, "serial_depths": (1, 1, 1, 1)}),
    ],
)
@torch.no_grad()
def test_a_token_scores_as_a_map_of_that_token_alone(name, kwargs):
    model = build(name, **kwargs)
    size = kwargs.get("img_size", 64)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    features = model.forward_features(images)
    scores = token_scores(model, images)
    assert scores.shape == (2, 2, 2, 7)
    for row in range(2):
        for column in range(2):
            if features.dim() == 3:
                token = features[:, num_prefix_tokens(model) + 2 * row + column, None]
            elif getattr(model, "output_fmt", "NCHW") == "NHWC":
                token = features[:, row, None, column, None]
            else:
                token = features[:, :, row, None, column, None]
            expected = model.forward_head(token.expand_as(features).contiguous()).float()
            torch.testing.assert_close(scores[:, row, column], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kwargs"), [("volo_d1_224", {"img_size": 64}), ("lvt", {})])
@torch.no_grad()
def test_models_that_learnt_from_token_labels_have_a_head_for_them(name, kwargs):
    model = build(name, **kwargs)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    scores = token_scores(model, images)
    expected = model.aux_head(model.forward_features(images)[:, 1:]).float()
    assert scores.shape[1] == scores.shape[2]
    torch.testing.assert_close(scores.flatten(1, 2), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_maps_need_not_be_square():
    model = build("deit_tiny_patch16_224", img_size=(32, 80), depth=1)
    images = torch.randn(1, 3, 32, 80, dtype=torch.float64)
    expected = model.head(model.forward_features(images)[:, 1:]).float().reshape(1, 2, 5, 7)
    torch.testing.assert_close(token_scores(model, images), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_model_without_patch_tokens_is_refused():
    model = build("pit_ti_224", img_size=64)
    with pytest.raises(InputError, match="0 last tokens are no map"):
        token_scores(model, torch.randn(1, 3, 64, 64, dtype=torch.float64))


@pytest.mark.parametrize("num_classes", [2, 5, 6, 10, 2049, 3000])
def test_what_is_read_back_gives_the_teachers_probabilities(num_classes):
    torch.manual_seed(0)
    scores = 3 * torch.randn(2, 3, 4, num_classes) + 20
    labels = top_scores(scores)
    k = min(5, num_classes)
    assert labels.shape == (2, 2, k, 3, 4)
    assert labels.dtype == (torch.float16 if num_classes < 3000 else torch.float32)
    best, classes = labels.double().unbind(1)
    dense = torch.zeros(2, num_classes, 3, 4, dtype=torch.float64).scatter(1, classes.long(), best)
    expected, numbers = scores.double().softmax(-1).sort(dim=-1, descending=True)
    assert torch.equal(classes.long(), numbers[..., :k].permute(0, 3, 1, 2))
    read = dense.softmax(1).gather(1, classes.long())
    torch.testing.assert_close(read, expected[..., :k].permute(0, 3, 1, 2), rtol=1e-2, atol=1e-6)
