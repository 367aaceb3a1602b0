"""Ready networks: well-known small networks that timm has pretrained weights for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ready:
    """A network that can be fine-tuned at once."""

    name: str
    """As a command takes it: efficientvit_m1 (a network of ours), timm/lcnet_050.ra2_in1k."""
    timm: str
    """timm's name of its weights, with their tag."""
    source: str
    """The paper that the network is from."""


_TIMM = (
    ("lcnet_050.ra2_in1k", "PP-LCNet (arXiv 2109.15099)"),
    ("lcnet_075.ra2_in1k", "PP-LCNet (arXiv 2109.15099)"),
    ("lcnet_100.ra2_in1k", "PP-LCNet (arXiv 2109.15099)"),
    ("mobilenetv3_small_100.lamb_in1k", "MobileNetV3 (arXiv 1905.02244)"),
    ("mobilenetv3_large_100.ra_in1k", "MobileNetV3 (arXiv 1905.02244)"),
    ("mobilenetv4_conv_small_050.e3000_r224_in1k", "MobileNetV4 (arXiv 2404.10518)"),
    ("mobilenetv4_conv_small.e2400_r224_in1k", "MobileNetV4 (arXiv 2404.10518)"),
    ("mobilenetv4_conv_medium.e500_r256_in1k", "MobileNetV4 (arXiv 2404.10518)"),
    ("repghostnet_100.in1k", "RepGhost (arXiv 2211.06088)"),
    ("tf_efficientnet_lite0.in1k", "EfficientNet-Lite (TensorFlow's tpu repository)"),
    ("tf_efficientnet_lite1.in1k", "EfficientNet-Lite (TensorFlow's tpu repository)"),
    ("tf_efficientnet_lite2.in1k", "EfficientNet-Lite (TensorFlow's tpu repository)"),
    ("efficientnet_b0.ra_in1k", "EfficientNet (arXiv 1905.11946)"),
    ("tiny_vit_5m_224.dist_in22k_ft_in1k", "TinyViT (arXiv 2207.10666)"),
    ("repvit_m0_9.dist_300e_in1k", "RepViT (arXiv 2307.09283)"),
    ("regnety_004.tv2_in1k", "RegNet (arXiv 2003.13678)"),
)
"""timm's own networks, with the weights that timm takes by default (but of TinyViT's, those with 1,000 classes)."""


def ready_networks() -> tuple[Ready, ...]:
    """Every ready network: the published ones of the five families that timm has weights for, then timm's own."""
    from timm import get_pretrained_cfg

    from search_spaces.registry import FAMILIES

    found = []
    for family in FAMILIES.values():
        for name, variant in family.variants.items():
            config = get_pretrained_cfg(variant.timm) if variant.timm else None
            if config is not None and config.has_weights:
                found.append(Ready(name, f"{config.architecture}.{config.tag}", variant.source))
    return (*found, *(Ready(f"timm/{name}", name, source) for name, source in _TIMM))
