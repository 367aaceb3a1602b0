"""A first attempt at pruning a timm model, in a child process under a time limit.

Nothing is taken for granted about a model nobody here wrote: torch-pruning can hang on it, fail, or couple the wrong
channels and still run. So a probe builds the graph, cuts a step, compares the cut network with the masked one, and cuts
down to the smallest widths, before the caller's model is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import search_spaces  # noqa: F401  (registers the families)
from pruning.outside_graph import REASON_LENGTH, CutNetwork, OutsideError, first_line
from search_spaces.registry import FAMILIES

PROBE = [sys.executable, "-P", "-c", "from pruning.outside_probe import answer_probe; answer_probe()"]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
TOLERANCE = 1e-6  # of the largest logit, in double precision


@dataclass(frozen=True)
class Probe:
    """What a probe found."""

    minimum_macs: int
    """The fewest MACs that can be reached."""
    inner_only: str | None
    """None where every width can be cut; else why only those with a single producing layer can (FFN hidden dims, head
    dims), and not the residual streams."""


def run_probe(name: str, resolution: int, num_classes: int, multiple_of: int, time_limit_s: float) -> Probe:
    """Try to prune timm/NAME in a child process.

    Raises:
        OutsideError: it took longer, failed, or gave a network that does not compute what the masked one computes.
    """
    own = next((ours for f in FAMILIES.values() for ours, v in f.variants.items() if v.timm == name), None)
    hint = f"; our own {own} can be pruned: vitnas prune --model {own}" if own else ""
    request = {
        "name": name,
        "resolution": resolution,
        "num_classes": num_classes,
        "multiple_of": multiple_of,
        "time_limit_s": time_limit_s,
        "fallback": own is None,
        "parent": os.getpid(),
    }
    try:
        child = subprocess.run(
            PROBE,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=time_limit_s,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
    except subprocess.TimeoutExpired as late:
        stage = _last_line((late.stdout or b"").decode()) or "load"
        raise OutsideError(f"torch-pruning could not {stage} timm/{name} within {time_limit_s:g} s{hint}") from None
    answer = _last_line(child.stdout)
    if child.returncode == 0:
        return Probe(**json.loads(answer))
    if child.returncode < 0:
        reason = f"killed by {signal.Signals(-child.returncode).name}, often for want of memory"
    else:
        reason = _last_line(child.stderr)[:REASON_LENGTH]
    raise OutsideError(f"torch-pruning could not {answer or 'load'} timm/{name} ({reason}){hint}")


def answer_probe() -> None:
    """Answer `run_probe` from the child process: stages on stdout, one a line, then the Probe; an error ends it.

    With `fallback` a model that fails is tried again with its inner widths only.
    """
    request = json.loads(sys.stdin.read())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request.pop("parent"):
        sys.exit("the parent died")
    signal.alarm(math.ceil(request.pop("time_limit_s")) + 1)  # elsewhere than on Linux it dies this late
    with contextlib.suppress(OSError):  # a graph that never ends takes 100 MB a second: this process is to die of it
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(1)  # on a busy machine its small convolutions wait fifty times as long for a second
    failed: str | None = None
    fallback, answers = request.pop("fallback"), sys.stdout
    for inner in (False, True) if fallback else (False,):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                minimum = _attempt(**request, inner=inner, stage=lambda text: print(text, file=answers, flush=True))
            print(json.dumps({"minimum_macs": minimum, "inner_only": failed}))
            return
        except Exception as error:
            failed = failed or (
                str(error) if isinstance(error, OutsideError) else f"{type(error).__name__}: {first_line(error)}"
            )
    sys.exit(failed)


def _attempt(
    name: str, resolution: int, num_classes: int, multiple_of: int, inner: bool, stage: Callable[[str], None]
) -> int:
    """Cut a step off every group and compare with the masked network, then cut to the floor; returns MACs there."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes).double()
    _randomise(model)
    images = torch.randn(1, 3, resolution, resolution, dtype=torch.double)
    stage("build the graph of")
    network = CutNetwork(model, images, multiple_of, inner)
    stage("cut")
    cuts = [(g, torch.randperm(g.size)[: g.bundles()[0]].tolist()) for g in network.groups() if g.bundles()]
    if not cuts:
        raise OutsideError(f"no width can be cut to a smaller multiple of {multiple_of}")
    with _without_statistics(), torch.no_grad():
        expected = network.masked(images, cuts)
        for group, units in cuts:
            network.cut(group, units)
        got = model(images)
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    if not difference < TOLERANCE:
        raise OutsideError(
            f"the cut network differs from the masked one by {difference:.2g} of its largest logit: the graph couples "
            "the wrong channels, or statistics run over the channels cut"
        )
    for group in network.groups():
        if group.bundles():
            network.cut(group, torch.randperm(group.size)[: sum(group.bundles())].tolist())
    return network.macs()


@contextlib.contextmanager
def _without_statistics() -> Iterator[None]:
    """Reduce layer and group normalisation to their scale and bias: statistics over cut channels cannot agree."""

    def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return x if weight is None else x * weight + (0 if bias is None else bias)

    def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        channels = (-1, *[1] * (x.ndim - 2))
        return x if weight is None else x * weight.view(channels) + (0 if bias is None else bias.view(channels))

    with mock.patch.object(F, "layer_norm", layer_norm), mock.patch.object(F, "group_norm", group_norm):
        yield


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Make scales, biases and running statistics ordinary: as built, zero scales would hide whole branches."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim <= 1:
            if name.endswith(("bias", "running_mean")):
                tensor.normal_(0, 0.1)
            else:
                tensor.uniform_(0.5, 1.5)


def _last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
