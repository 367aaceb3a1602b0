"""PyTorch eager on CPU or CUDA: an Arch with random weights, BatchNorm folded."""

from collections.abc import Callable
from pathlib import Path

from nas.measure.runtime import Settings, register


@register("torch", devices=("cpu", "cuda"), artifact="arch")
def load(path: Path, settings: Settings) -> Callable[[], None]:
    import torch

    from search_spaces import Arch, create_model, fold

    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    arch = Arch.from_json(path.read_text())
    model = fold(create_model(arch).eval()).to(settings.device)
    shape = (settings.batch_size, 3, arch.resolution, arch.resolution)
    images = torch.randn(shape, device=settings.device)

    @torch.inference_mode()
    def infer() -> None:
        model(images)
        if settings.device == "cuda":
            torch.cuda.synchronize()

    return infer
