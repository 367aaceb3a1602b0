"""PyTorch eager, captured once as a CUDA graph and replayed: its kernels without Python's time between them."""

from pathlib import Path

from nas.measure.runtime import Infer, Settings, register
from nas.measure.runtimes import eager

WARM_UP = 3  # runs before the capture, in which libraries choose algorithms and allocate


@register("cudagraphs", precisions={"cuda": eager.PRECISIONS["cuda"]}, artifact="module", package="torch")
def load(path: Path, settings: Settings) -> Infer:
    import torch

    from nas.measure.runtimes.pytorch import place

    model, images = place(path, settings)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.inference_mode():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                model(images)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            logits: torch.Tensor = model(images)

    def infer() -> torch.Tensor:
        graph.replay()
        torch.cuda.synchronize()
        return logits

    return infer
