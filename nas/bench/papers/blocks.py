"""Blocks and their parts as modules, Swin-T at other shares of attention, and how alike attention heads are."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_data_config
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.twins import Block as TwinsBlock
from timm.models.vision_transformer import Block as DeitBlock
from torch import Tensor, nn

from nas.export.options import OPSET
from nas.networks.build import build
from search_spaces import get_arch

TOKENS = 14 * 14
GRID, WIDTH, HEADS, WINDOW, TWINS_STRIDE = 28, 192, 6, 7, 4  # stage 2 of SepViT-T and Swin-T; its stride in Twins-SVT

Shapes = tuple[tuple[int, ...], ...]
BLOCKS: dict[str, Callable[[], tuple[nn.Module, Shapes]]] = {}
"""Builders by name: a module, and the shapes of its inputs without the batch."""

COMPUTE = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
"""Operators of PyTorch that multiply matrices or convolve; all others are bound by memory or by their own overhead."""


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class LevitBlock(nn.Module):
    """The first block of LeViT-256, BatchNorm folded: (B, 196, 256) -> same."""

    def __init__(self) -> None:
        super().__init__()
        network: Any = build(get_arch("levit_256"))
        self.block = network.stages[0].blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.block(x, None)
        return tokens


class TwinsPair(nn.Module):
    """Attention within windows, then to keys and values on a grid of stride 4: (B, N, C) -> same."""

    def __init__(self) -> None:
        super().__init__()
        self.local = TwinsBlock(WIDTH, HEADS, ws=WINDOW)
        self.sampled = TwinsBlock(WIDTH, HEADS, ws=1, sr_ratio=TWINS_STRIDE)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.sampled(self.local(x, (GRID, GRID)), (GRID, GRID))
        return tokens


def _deit_block() -> nn.Module:
    """As the LeViT paper ran it: Hardswish for GELU; attention as explicit products, as LeViT's biases need."""
    block = DeitBlock(192, 3, qkv_bias=True, act_layer=nn.Hardswish)
    _unfuse(block)
    return block


def _unfuse(block: Any) -> None:
    block.attn.fused_attn = False


def _sepvit_block() -> nn.Module:
    network: Any = build(get_arch("sepvit_tiny"))
    block: nn.Module = network.stages[1].blocks[0]
    return block


def _swin_pair() -> nn.Module:
    shifts = (0, WINDOW // 2)
    return nn.Sequential(
        *(SwinTransformerBlock(WIDTH, (GRID, GRID), HEADS, window_size=WINDOW, shift_size=shift) for shift in shifts)
    )


def _add_parts(name: str, width: int, heads: int, key_dim: int, value_dim: int, hidden: int) -> None:
    """The parts of a block at 14 x 14 tokens, as the LeViT paper's table has them."""
    inner, tokens = heads * value_dim, ((TOKENS, width),)
    activation = [nn.Hardswish()] if name == "levit_256" else []  # LeViT's stands before the output projection
    BLOCKS[f"{name}.qk"] = lambda: (nn.Linear(width, 2 * heads * key_dim), tokens)
    BLOCKS[f"{name}.v"] = lambda: (nn.Linear(width, inner), tokens)
    BLOCKS[f"{name}.logits"] = lambda: (Product(), ((heads, TOKENS, key_dim), (heads, key_dim, TOKENS)))
    BLOCKS[f"{name}.mix"] = lambda: (Product(), ((heads, TOKENS, TOKENS), (heads, TOKENS, value_dim)))
    BLOCKS[f"{name}.proj"] = lambda: (nn.Sequential(*activation, nn.Linear(inner, width)), ((TOKENS, inner),))
    BLOCKS[f"{name}.mlp"] = lambda: (
        nn.Sequential(nn.Linear(width, hidden), nn.Hardswish(), nn.Linear(hidden, width)),
        tokens,
    )


BLOCKS["levit_256"] = lambda: (LevitBlock(), ((TOKENS, 256),))
BLOCKS["deit_tiny"] = lambda: (_deit_block(), ((TOKENS, 192),))
BLOCKS["deit_tiny.norms"] = lambda: (nn.Sequential(nn.LayerNorm(192), nn.LayerNorm(192)), ((TOKENS, 192),))
_add_parts("levit_256", 256, 4, 32, 64, 512)
_add_parts("deit_tiny", 192, 3, 64, 64, 768)
BLOCKS["sepvit"] = lambda: (_sepvit_block(), ((GRID, GRID, WIDTH),))
BLOCKS["swin_pair"] = lambda: (_swin_pair(), ((GRID, GRID, WIDTH),))
BLOCKS["twins_pair"] = lambda: (TwinsPair(), ((GRID * GRID, WIDTH),))


def build_block(name: str, batch_size: int, device: str = "cpu") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A block of BLOCKS for inference with random weights, and random inputs for it, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, shapes = BLOCKS[name]()
        inputs = tuple(torch.randn(batch_size, *shape).to(device) for shape in shapes)
    return module.eval().requires_grad_(False).to(device), inputs


def export_block(name: str, path: Path, batch_size: int) -> None:
    """A block of one input as ONNX, with a static batch."""
    module, inputs = build_block(name, batch_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, inputs, str(path), input_names=["tokens"], opset_version=OPSET, dynamo=False)


class AttentionHalf(nn.Module):
    """Residual window attention of a Swin block: (B, H, W, C) -> same."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        block.mlp = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.block._attn(self.block.norm1(x))
        return x + attended


class FfnHalf(nn.Module):
    """Residual FFN of a Swin block: (B, H, W, C) -> same."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.mlp = copy.deepcopy((block.norm2, block.mlp))

    def forward(self, x: Tensor) -> Tensor:
        widened: Tensor = self.mlp(self.norm(x))
        return x + widened


def swin_with_share(share: float, given: SwinTransformer | None = None) -> tuple[nn.Module, float]:
    """Swin-T whose stages keep their number of layers, `share` of them attention, spread evenly among the FFNs.

    Returns:
        The network, changed in place where one is given, and the share it really has (each stage has at least one).
    """
    swin: Any = given
    if swin is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            swin = timm.create_model("swin_tiny_patch4_window7_224")
    attention = layers = 0
    for stage in swin.layers:
        blocks = list(stage.blocks)
        total = 2 * len(blocks)
        count = min(len(blocks), max(1, round(share * total)))
        ffns = [FfnHalf(blocks[i % len(blocks)]) for i in range(total - count)]
        halves: list[nn.Module] = []
        for i in range(count):
            _unfuse(blocks[i])
            halves += [AttentionHalf(blocks[i]), *ffns[len(ffns) * i // count : len(ffns) * (i + 1) // count]]
        stage.blocks = nn.Sequential(*halves)
        attention, layers = attention + count, layers + total
    return swin.eval().requires_grad_(False), attention / layers


def memory_bound_share(infer: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
    """Profiles one inference: milliseconds in all operators, and the share of those that are not of COMPUTE."""
    from torch.profiler import ProfilerActivity, profile

    gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiled:
        infer()
    events = [event for event in profiled.key_averages() if event.key.startswith("aten::")]
    times = {event.key: event.self_device_time_total if gpu else event.self_cpu_time_total for event in events}
    total = sum(times.values())
    compute = sum(time for key, time in times.items() if key.removeprefix("aten::") in COMPUTE)
    return total / 1000, 1 - compute / total


def head_similarity(model: nn.Module, images: Tensor) -> list[float]:
    """For each block, the cosine similarity of a head's attention map to the most similar other head's, on average.

    model: timm's VisionTransformer. images: (B, 3, R, R), normalised. The mean is over images and heads.
    """
    inputs: list[Tensor] = []
    transformer: Any = model
    attentions: list[nn.Module] = [block.attn for block in transformer.blocks]
    hooks = [attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for attn in attentions]
    with torch.inference_mode():
        model(images)
        for hook in hooks:
            hook.remove()
        return [_similarity(_maps(attn, x)) for attn, x in zip(attentions, inputs, strict=True)]


def _maps(attn: Any, x: Tensor) -> Tensor:
    """Attention after softmax: (B, N, C) -> (B, heads, N, N)."""
    q, k, _ = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits: Tensor = (q @ k.transpose(-2, -1)) * attn.scale
    return logits.softmax(-1)


def _similarity(maps: Tensor) -> float:
    flat = F.normalize(maps.flatten(2), dim=2)
    pairs = flat @ flat.transpose(1, 2)
    pairs.diagonal(dim1=1, dim2=2).fill_(-1)
    return float(pairs.amax(2).mean())


def photographs(model: nn.Module) -> Tensor:
    """scikit-learn's two photographs, each cut into three squares, as (6, 3, R, R) images for a timm model."""
    from sklearn.datasets import load_sample_images

    config = resolve_data_config({}, model=model)
    side = config["input_size"][-1]
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    squares = [square for image in load_sample_images().images for square in _squares(torch.tensor(image), side)]
    return torch.stack([(square - mean) / std for square in squares])


def _squares(image: Tensor, side: int) -> Sequence[Tensor]:
    """Left, middle and right square of an (H, W, 3) image of bytes, W > H, as (3, side, side) in 0 to 1."""
    height, width, _ = image.shape
    starts = (0, (width - height) // 2, width - height)
    pixels = image.permute(2, 0, 1).float()[None] / 255
    cuts = [pixels[..., start : start + height] for start in starts]
    return [F.interpolate(cut, (side, side), mode="bicubic", antialias=True)[0].clamp(0, 1) for cut in cuts]
