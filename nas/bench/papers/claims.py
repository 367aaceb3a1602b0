"""What the five papers say about speed, as data: each claim with the published figures it rests on.

Networks are named as on the command line, with "@px" where the resolution is not the published one, and "block/NAME"
for a block of `blocks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nas.measure.device import device_kind
from nas.measure.runtime import RUNTIMES, Settings

Where = Literal["GPU", "CPU", "ONNX CPU"]

LEVIT_CONDITIONS = (
    "GPU: V100, fp16, batch 2048 (EfficientNet-B2: 512); CPU: Xeon Gold 6138, PyTorch, fp32, batch 16, 1 thread"
)
EFFICIENTVIT_CONDITIONS = (
    "GPU: V100, fp16, batch 2048; CPU: Xeon E5-2690 v4, PyTorch, fp32, batch 16, 1 thread; ONNX Runtime on that CPU"
)
SHVIT_CONDITIONS = (
    "GPU: A100, fp16, batch 256; CPU: Xeon Gold 5218R, PyTorch, batch 16, 1 thread; ONNX Runtime on that CPU, batch 16"
)
EVIT_CONDITIONS = "one GPU, PyTorch (an A100 at batch 128, from memory)"
SEPVIT_CONDITIONS = "one GPU, PyTorch; model and batch not in our sources (a V100, from memory)"


@dataclass(frozen=True)
class Published:
    """One published pair of figures. unit: "img/s", "us", or "x" where only the ratio was published.

    caveat: what weakens the figure, such as being read off a plot.
    """

    where: Where
    subject: float
    baseline: float = 1.0
    unit: Literal["img/s", "us", "x"] = "img/s"
    caveat: str = ""

    @property
    def ratio(self) -> float:
        """How many times as fast as the baseline the subject is."""
        return self.baseline / self.subject if self.unit == "us" else self.subject / self.baseline


@dataclass(frozen=True)
class BlockPart:
    """One line of a table of a block's parts: published microseconds; None where that block has no such part."""

    name: str
    subject: str | None
    baseline: str | None
    published_us: tuple[float | None, float | None]


@dataclass(frozen=True)
class Claim:
    """subject is said to run `published` times as fast as baseline, under `conditions`.

    batch: on a CPU, the paper's own for it, or what stands for a GPU's large one (4); None where the claim is about
    batch 1. threads: 1 where one thread's work is what counts, None elsewhere. note: what a reader has to know
    about how it is measured here.
    """

    id: str
    paper: str
    statement: str
    subject: str
    baseline: str
    published: tuple[Published, ...]
    conditions: str
    source: str
    batch: int | None = 16
    threads: int | None = None
    parts: tuple[BlockPart, ...] = ()
    note: str = ""

    def published_for(self, settings: Settings) -> Published:
        """The figure published for the kind of device and runtime that comes nearest."""
        if device_kind(settings.device) == "cuda":
            wanted: tuple[Where, ...] = ("GPU",)
        else:
            onnx = RUNTIMES[settings.runtime].artifact == "onnx"
            wanted = ("ONNX CPU", "CPU") if onnx else ("CPU", "ONNX CPU")
        by_place = {figure.where: figure for figure in self.published}
        return next((by_place[place] for place in wanted if place in by_place), self.published[0])


def _evit(keep: int, subject: float) -> Claim:
    return Claim(
        f"evit-keep{keep}",
        "EViT",
        f"EViT-DeiT-S at keep rate 0.{keep // 10} against DeiT-S",
        f"evit_small_keep{keep}",
        "timm/deit_small_patch16_224",
        (Published("GPU", subject, 2923, caveat="DeiT-S's 2923 img/s from memory"),),
        EVIT_CONDITIONS,
        "official README's table (fused)" + ("; abstract: 50% faster" if keep == 70 else ""),
        batch=4,
    )


_BLOCK_NOTE = "28 x 28 tokens, width 192, 6 heads, windows of 7 in all three: the paper's sizes are not in our sources"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "levit-192",
        "LeViT",
        "LeViT-192 against EfficientNet-B2 at 260 px",
        "levit_192",
        "timm/efficientnet_b2@260",
        (Published("GPU", 8601, 2149), Published("CPU", 65.0, 13.1)),
        LEVIT_CONDITIONS,
        "Table 3 (80.0 and 80.1 top-1); abstract: 5 times faster than EfficientNet on CPU at 80%",
        note="260 px: the resolution at which B2 has the 1000M MACs the paper gives it",
    ),
    Claim(
        "levit-block",
        "LeViT",
        "A stage 1 block of LeViT-256 against one of DeiT-Tiny, 14 x 14 tokens",
        "block/levit_256",
        "block/deit_tiny",
        (Published("CPU", 2365, 2474, "us"),),
        "one core of a Xeon E5-2698, PyTorch, batch 1; DeiT's GELU replaced by Hardswish",
        "supplementary Table 1",
        batch=None,
        threads=1,
        parts=(
            BlockPart("LayerNorm (both); LeViT's BatchNorm is folded", None, "block/deit_tiny.norms", (None, 49)),
            BlockPart("projection to Q and K", "block/levit_256.qk", "block/deit_tiny.qk", (275, 299)),
            BlockPart("projection to V", "block/levit_256.v", "block/deit_tiny.v", (275, 172)),
            BlockPart("product Q K^T", "block/levit_256.logits", "block/deit_tiny.logits", (159, 228)),
            BlockPart("product A V", "block/levit_256.mix", "block/deit_tiny.mix", (206, 161)),
            BlockPart("attention's output projection", "block/levit_256.proj", "block/deit_tiny.proj", (310, 175)),
            BlockPart("MLP", "block/levit_256.mlp", "block/deit_tiny.mlp", (1140, 1390)),
        ),
        note="the paper's totals are the sums of its parts; ours are whole blocks, softmax, bias and reshapes included",
    ),
    Claim(
        "efficientvit-m5-mobilenetv3",
        "EfficientViT",
        "EfficientViT-M5 against MobileNetV3-Large",
        "efficientvit_m5",
        "timm/mobilenetv3_large_100@224",
        (Published("GPU", 1.404, unit="x"), Published("CPU", 1.452, unit="x")),
        EFFICIENTVIT_CONDITIONS,
        "abstract: 40.4% and 45.2% higher throughput on GPU and CPU",
        note="the paper's own ONNX column has M5 behind, 62.5 against 70.5 img/s (from memory)",
    ),
    Claim(
        "efficientvit-m5-efficientnet",
        "EfficientViT",
        "EfficientViT-M5 against EfficientNet-B0",
        "efficientvit_m5",
        "timm/efficientnet_b0@224",
        (Published("GPU", 2.3, unit="x"), Published("CPU", 1.9, unit="x")),
        EFFICIENTVIT_CONDITIONS,
        "section on ImageNet results, by two third-party notes",
    ),
    Claim(
        "efficientvit-m4-levit",
        "EfficientViT",
        "EfficientViT-M4 against LeViT-128S",
        "efficientvit_m4",
        "levit_128s",
        (Published("ONNX CPU", 1.342, unit="x"),),
        EFFICIENTVIT_CONDITIONS,
        "comparison after 1000 epochs with distillation, by two third-party notes: 34.2% faster as ONNX",
    ),
    Claim(
        "efficientvit-m4-mobilenetv3",
        "EfficientViT",
        "EfficientViT-M4 against MobileNetV3-Large",
        "efficientvit_m4",
        "timm/mobilenetv3_large_100@224",
        (Published("GPU", 26201, 13994), Published("CPU", 113, 43), Published("ONNX CPU", 616, 613)),
        SHVIT_CONDITIONS,
        "SHViT's Table 2, which measured both",
    ),
    Claim(
        "efficientvit-m2-mobilevit",
        "EfficientViT",
        "EfficientViT-M2 against MobileViT-XXS at 256 px",
        "efficientvit_m2",
        "timm/mobilevit_xxs@256",
        (Published("GPU", 5.8, unit="x"), Published("CPU", 3.7, unit="x"), Published("ONNX CPU", 7.4, unit="x")),
        EFFICIENTVIT_CONDITIONS,
        "abstract",
    ),
    Claim(
        "swin-mhsa-share",
        "EfficientViT",
        "Swin-T spends a smaller share of its time in memory-bound operators at 20% MHSA layers than at its own 50%",
        "Swin-T with 5 of 24 layers MHSA",
        "Swin-T (12 of 24)",
        (),
        "44% of the time of a Swin-T of 1.25 times the throughput with 20% MHSA (from memory), on a GPU",
        "section 2.1, figure 3",
        batch=4,
        threads=1,
        note="the accuracy half of the finding, best at 20 to 40% MHSA, needs training: not measured",
    ),
    Claim(
        "deit-head-similarity",
        "EfficientViT",
        "Attention maps of DeiT-Tiny's heads are alike",
        "DeiT-Tiny",
        "",
        (),
        "trained DeiT-T, ImageNet images",
        "section 2.2, figure 4 (no figure in our sources)",
        batch=None,
    ),
    _evit(90, 3197),
    _evit(80, 3619),
    _evit(70, 4385),
    _evit(60, 4722),
    _evit(50, 5408),
    Claim(
        "evit-304",
        "EViT",
        "EViT-DeiT-S at keep rate 0.5 and 304 px costs what DeiT-S does at 224 px",
        "evit_small_keep50@304",
        "timm/deit_small_patch16_224",
        (Published("GPU", 1.0, unit="x"),),
        EVIT_CONDITIONS,
        "abstract: 1% more accuracy at the same computational cost (4.45G against 4.61G MACs)",
        batch=4,
    ),
    Claim(
        "shvit-s1",
        "SHViT",
        "SHViT-S1 against MobileNetV3-Small",
        "shvit_s1",
        "timm/mobilenetv3_small_100@224",
        (Published("GPU", 33489, 31477), Published("CPU", 143, 167), Published("ONNX CPU", 1111, 1172)),
        SHVIT_CONDITIONS,
        "Table 2",
    ),
    Claim(
        "shvit-s3",
        "SHViT",
        "SHViT-S3 against FasterNet-T1",
        "shvit_s3",
        "timm/fasternet_t1@224",
        (Published("GPU", 20522, 17827), Published("CPU", 62, 41), Published("ONNX CPU", 731, 552)),
        SHVIT_CONDITIONS,
        "Table 2",
    ),
    Claim(
        "shvit-s4",
        "SHViT",
        "SHViT-S4 at 256 px against EfficientNet-B1 at 240 px",
        "shvit_s4",
        "timm/efficientnet_b1@240",
        (Published("GPU", 14283, 4982), Published("CPU", 36, 11), Published("ONNX CPU", 509, 156)),
        SHVIT_CONDITIONS,
        "Table 2",
    ),
    Claim(
        "shvit-s4-mobilevitv2",
        "SHViT",
        "SHViT-S4 at 256 px against MobileViTv2 1.0 at 256 px",
        "shvit_s4",
        "timm/mobilevitv2_100@256",
        (Published("GPU", 14283, 4345), Published("CPU", 36, 7), Published("ONNX CPU", 509, 63)),
        SHVIT_CONDITIONS,
        "Table 2; abstract: 3.3 times faster on GPU, 8.1 on CPU",
    ),
    Claim(
        "sepvit-block-swin",
        "SepViT",
        "One SepViT block against Swin's pattern of two blocks",
        "block/sepvit",
        "block/swin_pair",
        (Published("GPU", 1.6, unit="x"),),
        SEPVIT_CONDITIONS,
        "paper's comparison of blocks, by a third-party note: 60% faster in PyTorch, 55% in TensorRT",
        batch=4,
        note=_BLOCK_NOTE,
    ),
    Claim(
        "sepvit-block-twins",
        "SepViT",
        "One SepViT block against Twins' pattern of two blocks",
        "block/sepvit",
        "block/twins_pair",
        (Published("GPU", 1.6, unit="x"),),
        SEPVIT_CONDITIONS,
        "paper's comparison of blocks, by a third-party note: 60% faster in PyTorch, 55% in TensorRT",
        batch=4,
        note=_BLOCK_NOTE,
    ),
    Claim(
        "sepvit-s",
        "SepViT",
        "SepViT-S against Swin-S",
        "sepvit_small",
        "timm/swin_small_patch4_window7_224",
        (Published("GPU", 471, 412, caveat="Swin-S read off a figure"),),
        SEPVIT_CONDITIONS,
        "official README's table and figure (83.6 and 83.0 top-1)",
        batch=4,
    ),
    Claim(
        "sepvit-b",
        "SepViT",
        "SepViT-B against Swin-B",
        "sepvit_base",
        "timm/swin_base_patch4_window7_224",
        (Published("GPU", 302, 255, caveat="Swin-B read off a figure"),),
        SEPVIT_CONDITIONS,
        "official README's table and figure (84.2 and 83.3 top-1)",
        batch=4,
    ),
)
