"""The process that times blocks in PyTorch eager, in turns, and profiles (`python -m nas.bench.papers.worker`).

Blocks that are compared live in one process: they share its one thread pool and run one after the other.
"""

import random
from typing import Any

import torch

from nas.bench.papers.blocks import build_block, memory_bound_share, swin_with_share
from nas.measure.runtime import Settings
from nas.measure.runtimes.pytorch import configure, inference
from nas.measure.worker import TimedModel
from nas.process import serve


class Bench:
    """The methods the parent calls: start, then load_blocks and time_round, or load_swins and profile_round."""

    def start(self, settings: dict[str, Any]) -> None:
        self.settings = Settings(**settings)
        self.order = random.Random(0)
        configure(self.settings)

    def load_blocks(self, names: list[str]) -> None:
        self.timed: dict[str, TimedModel] = {}
        for name in names:
            module, inputs = build_block(name, self.settings.batch_size, self.settings.device)
            self.timed[name] = TimedModel()
            self.timed[name].infer = inference(module, inputs, self.settings.device)
            self.timed[name].warm_up()

    def time_round(self) -> dict[str, Any]:
        names = self.order.sample(list(self.timed), len(self.timed))
        return {name: self.timed[name].time_slice()["samples_ms"] for name in names}

    def load_swins(self, shares: list[float]) -> dict[str, Any]:
        """Returns the shares the networks really have, in the order asked for."""
        images = torch.randn(self.settings.batch_size, 3, 224, 224).to(self.settings.device)
        self.swins, found = [], []
        for share in shares:
            model, actual = swin_with_share(share)
            self.swins.append(inference(model.to(self.settings.device), (images,), self.settings.device))
            self.swins[-1]()
            found.append(actual)
        return {"shares": found}

    def profile_round(self) -> dict[str, Any]:
        """Milliseconds and the share that is bound by memory, of each network in the order they were loaded."""
        places = self.order.sample(range(len(self.swins)), len(self.swins))
        found = {place: memory_bound_share(self.swins[place], self.settings.device) for place in places}
        return {"profiles": [found[place] for place in range(len(self.swins))]}


if __name__ == "__main__":
    bench = Bench()
    serve(
        {
            "start": bench.start,
            "load_blocks": bench.load_blocks,
            "time_round": bench.time_round,
            "load_swins": bench.load_swins,
            "profile_round": bench.profile_round,
        }
    )
