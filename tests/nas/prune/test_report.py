"""The report of a pruning, from invented results: every number here is a fixture, none was measured."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from markupsafe import escape
from matplotlib.colors import to_hex

import nas.prune
import nas.prune.figures
from nas.errors import DiskFull
from nas.export.card import CLASSIFY
from nas.export.options import FileOptions
from nas.measure.budget import LatencyBudget
from nas.prune.figures import BEFORE, CUT, GROWN, SAME
from nas.prune.records import PruneResult
from nas.prune.report import write_report
from nas.prune.savings import Saving

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIGITS = "digits (scikit-learn, 1,797 images of 8x8 pixels)"
FITS = {"verdict": "fits", "interval": None, "met": True}
SETTINGS = {"runtime": "onnxruntime", "device": "cpu", "threads": 2, "batch_size": 1, "precision": "fp32"}
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


def widths(embed: int, heads: int, qk: float, v: float, ffn: int) -> dict[str, float]:
    ranges = {"qk_range": [qk, qk], "v_range": [v, v]}
    return {"embed": embed, "heads": heads, "qk": qk, "v": v, **ranges, "ffn": ffn, "ratio": ffn / embed}


def network(params: int, macs: int, ms: float, stem: int, squeezed: int, embeds: tuple[int, int]) -> dict[str, Any]:
    return {
        "params": params,
        "macs": macs,
        "latency_ms": ms,
        "p95_ms": 1.1 * ms,
        "ci": [0.98 * ms, 1.02 * ms],
        "samples": 900,
        "throughput": 1000 / ms,
        "waiting": False,
        "arch": {
            "stem": [stem, 32],
            "stages": [
                {"embed_dim": embeds[0], "blocks": [{"conv": True}]},
                {"embed_dim": embeds[1], "downsample": {"squeezed": squeezed}, "blocks": [{"conv": squeezed > 32}]},
            ],
        },
    }


def knob(name: str, kind: str, units: int, importance: float, macs: float) -> dict[str, Any]:
    mean = importance / units
    return {
        "name": name,
        "kind": kind,
        "units": units,
        "importance": importance,
        "least": mean / 4,
        "most": 3 * mean,
        "macs": macs,
    }


def invent() -> dict[str, Any]:
    """A whole result as prune.json holds it: one block removed, attention of another, one thing grown."""
    return {
        "model": "efficientvit_fixture",
        "family": "efficientvit",
        "resolution": 224,
        "command": "vitnas prune --model efficientvit_fixture --data images/flowers",
        "started": "2026-01-02T10:00:00+00:00",
        "finished": "2026-01-02T10:04:41+00:00",
        "options": {
            "compensate": True,
            "unlabelled": None,
            "onnx": FileOptions().identity(),
            "reallocate": True,
            "kinds": ["ffn", "qk"],
            "criterion": "taylor",
            "multiple_of": 8,
            "rounds": 2,
            "finetune": 2.5,
            "distill": False,
            "no_distill": True,
            "data": "images/flowers",
            "seed": 7,
            "model": "efficientvit_fixture",
            "budget": {"metric": "macs", "amount": 0.5, "relative": True, "text": "0.5x"},
            "settings": SETTINGS,
            "weights": "timm",
            "num_classes": None,
        },
        "settings": SETTINGS,
        "hardware": {"cpu": "Fixture CPU @ 2.45 GHz", "pinned": True, "governor": None},
        "data": {
            "name": "images/flowers",
            "demo": False,
            "classes": 102,
            "train": 6149,
            "val": 1020,
            "evaluated": 1020,
            "calibration": 512,
            "class_names": [],
            "train_counts": [],
            "val_counts": [],
            "validation": "",
            "left_out": [],
            "notes": [],
        },
        "weights": "timm",
        "probe_images": 0,
        "trained_images": 0,
        "tuned_images": 15372,
        "budget": {"metric": "macs", "text": "0.5x", "target": 15e7, "reached": 149e6, **FITS},
        "before": network(8_800_000, 300_000_000, 2.4, 16, 64, (64, 128)),
        "after": network(5_500_000, 149_000_000, 1.5, 16, 32, (64, 144)),
        "accuracy": {
            "before": {"top1": 91.3, "top1_ci": [89.4, 92.9], "loss": 0.33, "images": 1020},
            "pruned": {"top1": 61.2, "top1_ci": [58.2, 64.1], "loss": 1.61, "images": 1020},
            "recovered": {"top1": 86.7, "top1_ci": [84.4, 88.7], "loss": 0.41, "images": 1020},
            "control": {"top1": 92.0, "top1_ci": [90.2, 93.5], "loss": 0.3, "images": 1020},
        },
        "kept": "recovered",
        "price": None,
        "tuning": None,
        "control": {"difference": -5.3, "ci": [-8.0, -2.6], "verdict": "less accurate"},
        "waiting": None,
        "seen": None,
        "rounds": [
            {
                "round": 1,
                "target": 212e6,
                "reached": 211e6,
                "reallocated": False,
                "params": 7e6,
                "macs": 211_000_000,
                "refitted": 0,
            },
            {
                "round": 2,
                "target": 15e7,
                "reached": 149e6,
                "reallocated": True,
                "params": 5.5e6,
                "macs": 149_000_000,
                "refitted": 3,
            },
        ],
        "blocks": [
            {"block": "stages.0.blocks.0", "before": widths(64, 4, 16, 16, 256), "after": widths(64, 4, 8, 24, 128)},
            {"block": "stages.0.blocks.1", "before": widths(64, 4, 16, 16, 256), "after": None},
            {"block": "stages.1.downsample", "before": widths(128, 0, 0, 0, 640), "after": widths(144, 0, 0, 0, 320)},
            {
                "block": "stages.1.blocks.0",
                "before": widths(128, 4, 16, 32, 512),
                "after": widths(144, 4, 16, 32, 512),
            },
            {"block": "stages.1.blocks.1", "before": widths(128, 4, 16, 32, 512), "after": widths(144, 0, 0, 0, 512)},
        ],
        "importance": [
            knob("stem.0", "embed", 16, 0.4, 2e6),
            knob("stages.0.embed", "embed", 32, 0.3, 1e6),
            knob("stages.0.embed[32:]", "embed", 32, 0.3, 1e6),
            knob("stages.0.blocks.0.ffn.hidden", "ffn", 256, 0.02, 4e6),
            knob("stages.0.blocks.1.ffn.hidden", "ffn", 256, 0.06, 4e6),
            knob("stages.0.blocks.0.attn.qk", "qk", 16, 0.0, 1e6),
            knob("stages.1.blocks.0.ffn.hidden", "ffn", 512, 0.1, 20e6),
        ],
        "costs": None,
        "notes": ["a fixture's note"],
        "failures": [],
        "phases": {"scoring": 100.0, "fine-tuning": 150.0, "closing run": 10.0},
    }


def demo() -> dict[str, Any]:
    data = invent() | {"weights": None, "trained_images": 4500}
    data["data"] |= {"name": DIGITS, "demo": True, "classes": 10}
    data["options"]["data"] = None
    return data


def timed(target: float, reached: float) -> dict[str, Any]:
    """As `invent`, with a latency budget."""
    data = invent()
    data["budget"] = {
        "metric": "latency",
        "text": "0.6x",
        "target": target,
        "reached": reached,
        "interval": [0.98 * reached, 1.02 * reached],
        "verdict": LatencyBudget(target).judge((0.98 * reached, 1.02 * reached)),
    }
    data["after"] |= {"latency_ms": reached, "ci": [0.98 * reached, 1.02 * reached]}
    data["costs"] = [
        saving("stages.0 embed", 4_000_000, 0.08),
        saving("stages.0 ffn", 4_000_000, 0.04),
        saving("stages.0 qk", 4_000_000, 0.04),
        saving("stages.1 ffn", 10_000_000, -0.01),
        saving("stages.1 qk", 4_000_000, -0.03),
        saving("stages.1 v", 0, 0.01),
    ]
    for row in data["rounds"]:
        row |= {"target": 2.0, "reached": 1.9}
    return data


def saving(group: str, macs: int, ms: float) -> dict[str, Any]:
    return Saving(group, macs, ms, (ms - 0.02, ms + 0.02), 10).to_json()


class Page(HTMLParser):
    """A report's text outside its style sheet, its tags with their attributes, and the cells of its table rows."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.text, self.tags, self.open, self.rows = source, "", [], [], []
        self.feed(source)
        assert not self.open
        self.text = re.sub(r"\s+", " ", self.text)
        self.rows = [[re.sub(r"\s+", " ", cell).strip() for cell in row] for row in self.rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "br":
            self.handle_data(" ")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    def row(self, *beginning: str) -> list[str]:
        """The one table row that begins so."""
        (found,) = [row for row in self.rows if row[: len(beginning)] == list(beginning)]
        return found[len(beginning) :]


Report = Callable[[dict[str, Any]], Page]


def test_what_was_chosen_of_the_file_is_read_back(tmp_path: Path) -> None:
    data, chosen = invent(), FileOptions(None, True)
    assert PruneResult.from_json(data, tmp_path).options.file == FileOptions()
    data["options"]["onnx"] = chosen.identity()
    assert PruneResult.from_json(data, tmp_path).options.file == chosen
    del data["options"]["onnx"]
    assert PruneResult.from_json(data, tmp_path).options.file == FileOptions()


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """Write a report without drawing its figures, and read it."""
    monkeypatch.setattr(nas.prune.figures, "reallocation_plot", lambda data: PIXEL)
    monkeypatch.setattr(nas.prune.figures, "importance_plot", lambda data: PIXEL)

    def write(data: dict[str, Any]) -> Page:
        write_report(tmp_path, PruneResult.from_json(data, tmp_path))
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return write


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures as drawn, in order."""
    drawn: list[Figure] = []
    draw = nas.prune.figures.png_of

    def png_of(figure: Figure) -> bytes:
        drawn.append(figure)
        return draw(figure)

    monkeypatch.setattr(nas.prune.figures, "png_of", png_of)
    return drawn


def test_a_met_budget_and_what_it_bought(report: Report, tmp_path: Path) -> None:
    text = report(invent()).text
    assert "Budget met: 149 MMACs for a budget of 150 MMACs (0.5x). 1.60x faster: 2.40 → 1.50 ms" in text
    assert (
        "95% intervals 2.35 to 2.45 and 1.47 to 1.53; one interleaved run; onnxruntime fp32, cpu, 2 threads, batch 1"
        in text
    )
    assert "before / after 1.60x, by the intervals' ends 1.54 to 1.67x" in text
    assert "beside 2.01x fewer MACs and 1.60x fewer parameters" in text
    assert (
        "1,020 images, before pruning and after fine-tuning; right after pruning 61.2%; 95% intervals 89.4 to 92.9 and "
        in text
    )
    assert "NOT" not in text
    assert "tie" not in text
    assert json.loads((tmp_path / "prune.json").read_text()) == invent()


def test_a_missed_budget(report: Report) -> None:
    data = invent()
    data["budget"] |= {"target": 12e7, "verdict": "over"}
    assert "Budget NOT met: 149 MMACs for a budget of 120 MMACs (0.5x)" in report(data).text


def test_overlapping_intervals_are_a_tie(report: Report) -> None:
    data = invent()
    data["after"] |= {"latency_ms": 2.35, "ci": [2.3, 2.36]}
    text = report(data).text
    assert "The latencies are a tie" in text
    assert "Not measurably faster (a tie): 2.40 → 2.35 ms" in text
    assert "x faster" not in text
    data["after"]["ci"] = [2.3, 2.351]  # below 2.352, where the other begins
    assert "1.02x faster" in report(data).text


def test_no_speed_up_is_drawn_from_waiting_times(report: Report) -> None:
    data = invent() | {"waiting": "other processes keep 2.0 of 2 CPUs busy"}
    page = report(data)
    assert "Waiting times, not speed: other processes keep 2.0 of 2 CPUs busy" in page.text
    assert "x faster" not in page.text
    assert "by the intervals' ends" not in page.text
    assert page.row("95th percentile, ms")[-1] == "waiting"
    data["budget"] |= {"metric": "latency", "verdict": None}
    data["costs"] = [saving("stages.0 ffn", 1_000_000, 0.5)]
    page = report(data)
    assert "Budget not judged" in page.text
    assert page.row("stages.0 ffn")[4] == "–", "the mean that it would stand beside is of waiting times"


def test_slower_and_larger_are_said(report: Report) -> None:
    data = invent()
    data["after"] |= {"latency_ms": 3.0, "ci": [2.9, 3.1], "params": 11_000_000, "macs": 300_000_000}
    text = report(data).text
    assert "1.25x slower: 2.40 → 3.00 ms" in text
    assert "beside as many MACs and 1.25x more parameters" in text


@pytest.mark.parametrize(
    ("target", "reached", "said"),
    [
        (1.6, 1.5, "Budget met: 1.50 ms for a budget of 1.60 ms (0.6x)"),
        (1.51, 1.5, "Too close to the budget to tell: 1.50 ms for a budget of 1.51 ms (0.6x)"),
        (1.49, 1.5, "Too close to the budget to tell: 1.50 ms for a budget of 1.49 ms (0.6x)"),
        (1.4, 1.5, "Budget NOT met: 1.50 ms for a budget of 1.40 ms (0.6x)"),
    ],
)
def test_a_latency_budget_is_judged_with_its_interval(report: Report, target: float, reached: float, said: str) -> None:
    text = report(timed(target, reached)).text
    assert said in text
    unsure = f"The 95% interval of the latency, 1.47 to 1.53 ms, holds the budget of {target} ms" in text
    assert unsure == ("Too close" in said)


def test_a_demo_cannot_be_mistaken(report: Report) -> None:
    page = report(demo())
    banner, _, rest = page.text.partition("Budget met")
    assert "A demo, not a result. These figures are of a network briefly trained on 4,500 images of digits" in banner
    assert "They say nothing of ImageNet" in banner
    for percent in ("91.3", "61.2", "86.7"):
        places = [match.start() for match in re.finditer(re.escape(percent), rest)]
        assert len(places) >= 2
        for at in places:
            assert DIGITS in rest[max(0, at - 300) : at + 200], rest[at - 40 : at + 40]
    for match in re.finditer("ImageNet", page.text):
        assert re.search(r"(say nothing of|is no) $", page.text[: match.start()])
    assert re.search("<title>Demo: pruning of efficientvit_fixture", page.source)
    assert "Digits need little depth" in page.text
    assert "vitnas prune --model efficientvit_fixture --data ./images" in page.text


def test_a_demo_with_weights_does_not_claim_training(report: Report) -> None:
    text = report(demo() | {"trained_images": 0, "weights": "net/model.safetensors"}).text
    assert f"These figures are of a network pruned and evaluated on {DIGITS}" in text
    assert "briefly trained" not in text


def test_a_result_has_no_banner(report: Report) -> None:
    text = report(invent()).text
    for said in ("demo", "ImageNet", "Briefly trained", "Digits"):
        assert said not in text


def test_a_network_trained_here_on_own_images_says_so(report: Report) -> None:
    text = report(invent() | {"trained_images": 4500}).text
    assert (
        "Briefly trained: the network came without weights that fit and saw only 4,500 images of images/flowers" in text
    )
    assert "demo" not in text


def test_what_was_cut_and_what_was_grown(report: Report) -> None:
    text = report(invent()).text
    cut, _, grown = text.partition("Cut ")[2].partition("Grown ")
    for said in (
        "1 of 4 blocks removed whole: stages.0.blocks.1",
        "attention removed from 1 other block: stages.1.blocks.1",
        "Q and K dims in 1 block: 64 → 32 (0.50x)",
        "FFN hidden units in 2 blocks, merges included: 896 → 448 (0.50x)",
        "squeeze-excite dims: 64 → 32",
        "depthwise convolution branches: 2 → 1",
    ):
        assert said in cut
    assert "V dims" not in cut
    assert "V dims in 1 block: 64 → 96 (1.50x)" in grown
    assert "width of stages.1: 128 → 144" in grown
    assert "width of stages.0" not in text
    assert "stem 0" not in text
    assert "1 block was removed whole. A branch is scored as if it went alone" in text
    assert "(91.3 → 61.2% on images/flowers)" in text


def test_the_blocks_before_and_after(report: Report) -> None:
    page = report(invent())
    assert page.row("stages.1 · width 128 → 144") == []
    assert page.row("stages.0 · width 64") == []
    rows = [row for row in page.rows if row[0] in ("blocks.0", "blocks.1", "downsample")]
    assert rows == [
        ["blocks.0", "4 × 16 → 4 × 8", "4 × 16 → 4 × 24", "256 → 128", "4 → 2"],
        ["blocks.1", "removed (it had Q, K 4 × 16, V 4 × 16, 256 FFN hidden units)"],
        ["downsample", "–", "–", "640 → 320", "5 → 2.22"],
        ["blocks.0", "4 × 16", "4 × 32", "512", "4 → 3.56"],
        ["blocks.1", "4 × 16 → none", "4 × 32 → none", "512", "4 → 3.56"],
    ]
    quiet = [attrs for tag, attrs in page.tags if tag == "tr" and attrs.get("class") == "over"]
    assert len(quiet) == 1


def test_without_stages(report: Report) -> None:
    data = invent()
    for which in ("before", "after"):
        data[which]["arch"] = {"embed_dim": 192, "blocks": []}
    rows = [(widths(192, 3, 64, 64, 768), widths(192, 2, 48, 80, 768)) for _ in range(3)]
    data["blocks"] = [{"block": f"blocks.{i}", "before": a, "after": b} for i, (a, b) in enumerate(rows)]
    data["importance"] = [knob("embed", "embed", 192, 0.4, 9e7)]
    data["importance"] += [knob(f"blocks.{i}.ffn.hidden", "ffn", 768, 0.1, 1e7 * (i + 1)) for i in range(3)]
    page = report(data)
    assert page.row("blocks.2", "3 × 64 → 2 × 48") == ["3 × 64 → 2 × 80", "768", "4"]
    assert page.row("whole network")[1].startswith("4.44")
    assert ["blocks.1", "5.00 100", "–"] in page.rows


def test_reallocation_that_grew_nothing(report: Report) -> None:
    data = invent()
    data["blocks"][0]["after"] |= {"v": 16}
    data["after"]["arch"]["stages"][1]["embed_dim"] = 128
    remark = "Reallocation was on, but nothing that this page shows is wider than before"
    text = report(data).text
    assert f"{remark}: by the scores, no widening was worth its cost" in text
    assert "Grown nothing" in re.sub(r"\s+", " ", text)
    data["rounds"][-1]["reallocated"] = False
    assert f"{remark}: the last round only cut" in report(data).text
    data["options"]["reallocate"] = False
    assert remark not in report(data).text
    data["blocks"][0]["after"] |= {"v": 24}
    data["options"]["reallocate"] = True
    assert remark not in report(data).text


def test_no_block_removed(report: Report) -> None:
    data = invent()
    del data["blocks"][1]
    text = report(data).text
    assert "removed whole" not in text
    assert "attention removed from 1 block: stages.1.blocks.1" in text


def test_accuracy_with_intervals_and_their_verdict(report: Report) -> None:
    data = invent()
    page = report(data)
    assert page.row("before pruning") == ["91.3%", "89.4 to 92.9%", "0.330", "1,020"]
    assert page.row("right after pruning") == ["61.2%", "58.2 to 64.1%", "1.61", "1,020"]
    assert page.row("pruned, fine-tuned") == ["86.7%", "84.4 to 88.7%", "0.410", "1,020"]
    assert page.row("unpruned, fine-tuned alike") == ["92.0%", "90.2 to 93.5%", "0.300", "1,020"]
    assert "-5.3 points (95%: -8.0 to -2.6): the pruned one is less accurate" in page.text
    assert "do not overlap: the pruned network is less accurate on this data" in page.text
    data["accuracy"]["recovered"] |= {"top1": 90.1, "top1_ci": [88.0, 91.8]}
    assert "before and after overlap: 1,020 images do not tell the two apart" in report(data).text
    data["accuracy"]["recovered"] |= {"top1": 95.1, "top1_ci": [94.0, 96.1]}
    assert "do not overlap: the pruned network is more accurate on this data" in report(data).text


def test_what_fine_tuning_did(report: Report) -> None:
    data = invent() | {"tuning": {"difference": 25.5, "ci": [22.0, 29.0], "verdict": "more accurate"}}
    assert "Fine-tuning changed it from 61.2 to 86.7%: a gain" in report(data).text


def test_without_fine_tuning(report: Report) -> None:
    data = invent() | {"tuned_images": 0}
    data["accuracy"] |= {"recovered": None, "control": None}
    data |= {"kept": "pruned", "control": None}
    page = report(data)
    assert page.row("pruned, fine-tuned") == ["not made"]
    assert "control" not in page.text.lower()
    assert page.row("fine-tuned on") == ["nothing"]
    assert "before pruning and right after it; no fine-tuning" in page.text
    assert "91.3 → 61.2%" in page.text


def test_fine_tuning_without_a_control_is_said(report: Report) -> None:
    data = invent() | {"control": None}
    data["accuracy"]["control"] = None
    assert "No control was made: how much of the accuracy is due to fine-tuning alone is unknown" in report(data).text


def test_the_accuracy_of_what_is_kept_is_the_one_shown(report: Report) -> None:
    text = report(invent() | {"kept": "pruned"}).text
    assert "91.3 → 61.2%" in text
    assert "fine-tuning lowered it to 86.7% and is not kept" in text
    assert "these images chose whether fine-tuning is kept" in text


def test_heads_of_different_widths_show_both_ends(report: Report) -> None:
    """A mean of 50 is no width that any head has."""
    data = invent()
    data["blocks"][3]["after"] |= {"v": 50, "v_range": [48, 56]}
    assert report(data).row("blocks.0", "4 × 16")[0] == "4 × 32 → 4 × 48 to 56"


def test_importance_per_mac(report: Report) -> None:
    page = report(invent())
    heading = page.row("large: importance per MMAC × 103 small: importance × 103")
    assert heading == ["FFN, merging", "Q, K", "width"]
    assert page.row("stem") == ["–", "–", "200 400"]  # 0.4 over 2 MMACs; the second figure is its importance
    assert page.row("stages.0") == ["10.0 80.0", "0 0", "300 600"]
    assert page.row("stages.1") == ["5.00 100", "–", "–"]
    assert page.row("all") == ["6.43 180", "0 0", "250 1,000"]
    assert page.row("width", "80") == ["1,000", "2.34", "12.5", "75.0"]
    assert "importance per million MACs: what has least of it goes first" in page.text


def test_importance_per_millisecond_and_measured_costs(report: Report) -> None:
    page = report(timed(1.6, 1.5))
    assert page.row("stages.0") == ["1.00 80.0", "0 0", "15.0 600"]  # 0.08 over 8 MMACs at 0.01 ms, 0.6 over 2 at 0.02
    assert page.row("stages.1") == ["– 100", "–", "–"]
    assert page.row("all") == ["1.00 180", "0 0", "15.0 1,000"]
    assert "A dash: no saving was shown as measured, so it was left alone" in page.text
    whole = page.row("stages.0 embed")  # the whole network: 2.4 ms for 300 MMACs
    assert whole[:5] == ["0.080", "0.060 to 0.100", "10", "20.0", "2.50x"]
    assert page.row("stages.1 ffn")[:5] == ["none shown", "-0.030 to 0.010", "10", "–", "–"]
    assert page.row("stages.1 qk")[0] == "slower"
    assert page.row("stages.1 v")[0] == "no MACs saved"
    assert "judged by the closing run alone" in page.text
    assert "What a MAC costs here" not in report(invent()).text


def test_a_budget_of_parameters_says_what_its_density_is(report: Report) -> None:
    data = invent()
    data["budget"] = {"metric": "params", "text": "6M", "target": 6e6, "reached": 5.5e6, **FITS}
    text = report(data).text
    assert "Budget met: 5.50 M parameters for a budget of 6.00 M parameters (6M)" in text
    assert "the allocation went by importance per parameter; shown here is importance per MMAC" in text


def test_a_run_that_refitted_nothing_says_so(report: Report) -> None:
    data = invent()
    data["options"]["compensate"] = False
    data["rounds"][1]["refitted"] = 0
    assert report(data).row("2", "150 MMACs")[-2] == "–"


def test_a_classifier_that_is_a_probe_is_told(report: Report) -> None:
    assert report(invent() | {"probe_images": 6149}).row("weights") == [
        "timm; its classifier is a linear probe on 6,149 images"
    ]


def test_without_labels_agreement_is_told_and_no_accuracy(report: Report) -> None:
    data = invent()
    data["options"] |= {"unlabelled": "photos", "data": None, "distill": True}
    page = report(data)
    assert "Agreement on images/flowers The share of images that a network answers as the unpruned one did" in page.text
    assert page.row("", "agreement on this data")[0] == "95% interval"
    assert "the pruned one is less in agreement" in page.text
    assert "do not overlap: the pruned network is less in agreement on this data" in page.text
    for said in ("top-1", "more accurate", "less accurate"):
        assert said not in page.text


def test_how_it_was_done(report: Report, tmp_path: Path) -> None:
    for name in ("arch.json", "model.onnx"):
        (tmp_path / name).touch()
    page = report(invent())
    assert page.row("1", "212 MMACs") == ["211 MMACs", "211 M", "7.00 M", "0", "no"]
    assert page.row("2", "150 MMACs") == ["149 MMACs", "149 M", "5.50 M", "3", "yes"]
    assert page.row("fine-tuning")[:2] == ["2 min 30 s", "57.7%"]
    assert "(4 min 41 s), of which 4 min 20 s in these phases" in page.text
    assert page.row("data") == ["images/flowers, 102 classes: 6,149 images to train on, 1,020 held out"]
    assert page.row("weights") == ["timm"]
    assert page.row("scored on") == ["512 images"]
    assert page.row("fine-tuned on") == ["15,372 images (2.5 epochs)"]
    assert page.row("evaluated on") == ["1,020 images"]
    assert page.row("criterion") == ["taylor, 2 rounds, multiples of 8, seed 7"]
    assert page.row("reallocation") == ["on"]
    assert page.row("axes") == ["ffn, qk"]
    assert page.row("cpu") == ["Fixture CPU @ 2.45 GHz"]
    assert page.row("governor") == ["unknown"]
    assert invent()["command"] in page.text
    assert escape(CLASSIFY) in page.source
    assert "a fixture's note" in page.text
    listed = {row[0] for row in page.rows} & {
        "arch.json",
        "model.onnx",
        "model.safetensors",
        "prune.json",
        "report.html",
    }
    assert listed == {"arch.json", "model.onnx", "prune.json", "report.html"}


def test_the_latency_settings_stand_at_every_latency(report: Report) -> None:
    source = report(timed(1.6, 1.5)).source
    sections = re.split("<h2>", source)
    with_times = [part for part in sections if re.search(r"\d&nbsp;ms|\d ms|latency, ms|µs per MMAC", part)]
    assert len(with_times) == 4
    for part in with_times:
        assert "onnxruntime fp32, cpu, 2 threads, batch 1" in part, part[:60]


@pytest.mark.parametrize("data", [invent(), demo()], ids=["own images", "demo"])
def test_the_commands_to_go_on_with_are_commands(report: Report, data: dict[str, Any]) -> None:
    import typer

    from nas.cli.app import app

    page = report(data)
    group = typer.main.get_command(app)
    lines = [line for line in re.findall(r"<code>(vitnas .*?)</code>", page.source) if line != data["command"]]
    assert len(lines) == 4
    for line in lines:
        _, verb, *words = shlex.split(line)
        group.commands[verb].make_context(verb, words)


def test_a_network_outside_the_families(report: Report) -> None:
    data = invent()
    data |= {
        "model": "timm/resnet18",
        "family": "timm/resnet18",
        "blocks": [],
        "importance": [],
        "layers": [
            {"name": "conv1", "before": [3, 64], "after": [3, 64], "removed": 0.0},
            {"name": "layer1.0.conv1", "before": [64, 64], "after": [64, 24], "removed": 0.6},
            {"name": "fc", "before": 512, "after": 256},
        ],
        "rounds": [{"round": 2, "reached": 149e6, "macs": 149_000_000, "refitted": 3}],
    }
    del data["costs"]
    for which in ("before", "after"):
        del data[which]["arch"]
    page = report(data)
    assert page.row("conv1") == ["3 × 64", "unchanged"]
    assert page.row("layer1.0.conv1") == ["64 × 64", "64 × 24"]
    assert page.row("fc") == ["512", "256"]
    assert "2 of 3 layers narrowed" in page.text
    assert "3 layers were refitted to what they wrote before the cut" in page.text
    for said in ("Reallocation was on", "Where the parameters went", "Importance", "arch.json", "Untrained copies"):
        assert said not in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert 'timm.create_model("resnet18", num_classes=102)' in page.text
    assert "Layers" not in report(invent()).text


def test_the_page_refers_to_nothing_outside_itself(report: Report) -> None:
    page = report(timed(1.6, 1.5))
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        for name in ("src", "href", "srcset", "action", "background", "poster"):
            assert attrs.get(name, "data:").startswith("data:")
    (policy,) = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    style = re.search(r"<style>(.*)</style>", page.source, re.DOTALL)[1]
    assert ".demo" in style
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in page.source.replace("http-equiv", "")


@pytest.mark.parametrize("outside", [False, True])
def test_markup_in_any_text_stays_text(report: Report, outside: bool) -> None:
    evil = "<script>alert(1)</script>\"'&"
    kept = ("started", "finished", "metric", "verdict", "kept", "name" if not outside else "", "block", "kind")

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(item, key) for item in value]
        return value + evil if isinstance(value, str) and key not in kept else value

    data = demo()
    if outside:
        data |= {"blocks": [], "importance": [], "layers": [{"name": "conv1", "before": 8, "after": 4}]}
    data = spoil(data)
    data["data"]["name"] = DIGITS + evil
    page = report(data)
    assert "script" not in {tag for tag, _ in page.tags}
    known = {"class", "style", "src", "alt", "lang", "colspan", "name", "content", "charset", "http-equiv"}
    assert {name for _, attrs in page.tags for name in attrs} <= known
    shown = [data["model"], data["command"], data["hardware"]["cpu"], data["notes"][0], data["data"]["name"]]
    for value in [*shown, *(layer["name"] for layer in data.get("layers", []))]:
        assert value.endswith(evil)
        assert value in page.text


def test_files_are_replaced_whole(report: Report, tmp_path: Path, fill_disk: Callable[[], None]) -> None:
    report(invent())
    names = ["prune.json", "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    before = {name: (tmp_path / name).read_bytes() for name in names}
    readers = {name: (tmp_path / name).open("rb") for name in names}
    report(demo())
    for name, reader in readers.items():
        with reader:
            assert reader.read() == before[name], "a reader of the old file sees it change"
        assert (tmp_path / name).read_bytes() != before[name]

    after = {name: (tmp_path / name).read_bytes() for name in names}
    fill_disk()
    with pytest.raises(DiskFull, match="no space left"):
        write_report(tmp_path, PruneResult.from_json(invent(), tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == after


def bars(panel: Any) -> list[tuple[float, str]]:
    """Heights and colours of a panel's bars, from left to right, before in front of after."""
    found = [(bar.get_x() + bar.get_width() / 2, -bar.get_width(), bar) for c in panel.containers for bar in c]
    return [(bar.get_height(), to_hex(bar.get_facecolor())) for _, _, bar in sorted(found, key=lambda f: f[:2])]


def crosses(panel: Any) -> list[float]:
    return [float(line.get_xdata()[0]) for line in panel.lines if line.get_marker() == "x"]


def test_the_reallocation_plot_shows_every_block(tmp_path: Path, figures: list[Figure]) -> None:
    write_report(tmp_path, PruneResult.from_json(invent(), tmp_path))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    images = [base64.b64decode(attrs["src"].partition(",")[2]) for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(figures) == 2
    assert all(image.startswith(b"\x89PNG") and int.from_bytes(image[16:20], "big") >= 1000 for image in images)

    before, cut, grown, same = (colour.lower() for colour in (BEFORE, CUT, GROWN, SAME))
    qk, v, ratio, width = figures[0].axes
    assert bars(qk) == [(64, before), (32, cut), (64, before), (0, before), (64, before), (64, same), (64, before)]
    assert bars(v)[:2] == [(64, before), (96, grown)]
    assert bars(ratio)[:3] == [(4, before), (2, cut), (4, before)]
    assert bars(width) == [(64, before), (64, same), (128, before), (144, grown)]
    removed, attentionless = 1.0, 4.7  # the second stage begins after a gap
    assert crosses(qk) == crosses(v) == pytest.approx([removed, attentionless])
    assert crosses(ratio) == [removed]
    for panel in (qk, v, ratio):
        (hatched,) = [patch for patch in panel.patches if patch.get_hatch()]
        assert hatched.get_x() < removed < hatched.get_x() + hatched.get_width()
    assert [label.get_text() for label in width.get_xticklabels()] == ["0", "1", "merge", "0", "1"]
    assert {text.get_text() for text in figures[0].legends[0].get_texts()} >= {"gone", "block removed"}


def test_the_importance_plot_has_a_point_for_every_knob(tmp_path: Path, figures: list[Figure]) -> None:
    write_report(tmp_path, PruneResult.from_json(invent(), tmp_path))
    (axes,) = figures[1].axes
    points = [line for line in axes.lines if line.get_linestyle() != "-" or len(line.get_xdata()) == 1]
    drawn = sorted(float(line.get_xdata()[0]) for line in points)
    least = 0.02 / 4
    assert drawn == pytest.approx([least / 3, 0.005, 0.005, 0.015, 0.2, 0.3, 0.3])
    (hollow,) = [line for line in points if line.get_markerfacecolor() == "white"]
    assert float(hollow.get_xdata()[0]) == pytest.approx(least / 3)
    assert "hollow: importance 0" in axes.get_xlabel()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["FFN, merging", "Q, K", "width"]
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == ["stem", "stages.0", "stages.1"]


def test_a_deep_network_without_stages_is_drawn_by_thirds(figures: list[Figure]) -> None:
    data = invent()
    for which in ("before", "after"):
        data[which]["arch"] = {"embed_dim": 192, "blocks": []}
    own = widths(192, 3, 64, 64, 768)
    data["blocks"] = [{"block": f"blocks.{i}", "before": own, "after": own} for i in range(24)]
    data["importance"] = [knob(f"blocks.{i}.ffn.hidden", "ffn", 768, 0.1, 1e7) for i in range(24)]
    result = PruneResult.from_json(data, Path())
    nas.prune.figures.reallocation_plot(result)
    nas.prune.figures.importance_plot(result.parts)
    ticks = [label for label in figures[0].axes[3].get_xticklabels() if label.get_text()]
    assert [label.get_text() for label in ticks] == [str(i) for i in range(24)]
    boxes = [label.get_window_extent() for label in ticks]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert [t.get_text() for t in figures[1].legends[0].get_texts()] == [
        "blocks 0 to 7",
        "blocks 8 to 15",
        "blocks 16 to 23",
    ]
