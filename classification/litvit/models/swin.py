"""timm's Swin with deformable token merging (LIT, Table 3)."""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from torch import nn

from litvit.dtm import replace_merging
from litvit.models.backbone import default_cfg

default_cfgs = generate_default_cfgs(
    {
        "swin_tiny_dtm": default_cfg(
            paper_name="Less is More: Pay Less Attention in Vision Transformers",
            paper_ids="arXiv:2105.14217",
            crop_pct=0.875,
            fixed_input_size=True,
            first_conv="patch_embed.proj",
            classifier="head.fc",
        )
    }
)


def _build(**kwargs) -> SwinTransformer:
    model = SwinTransformer(**kwargs)
    replace_merging(model, kwargs.get("img_size", 224))
    return model


@register_model
def swin_tiny_dtm(pretrained: bool = False, **kwargs) -> nn.Module:
    """Swin-T with deformable token merging; 28.3 M parameters, 4.5 G multiply-adds at 224."""
    config = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    config |= kwargs
    return build_model_with_cfg(
        _build,
        "swin_tiny_dtm",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": tuple(range(len(config["depths"])))},
        **config,
    )
