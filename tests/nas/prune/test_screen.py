"""The end of a pruning in terminals of several widths and in a pipe, from an invented result."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import nas.prune.screen
from nas.prune.records import PruneResult
from nas.prune.savings import Saving
from nas.prune.screen import change, count_rows, grown_line, headline, show_prune, width
from nas.prune.widths import BlockWidths
from nas.prune.words import tuning_words


def row(block: str, v_range: tuple[int, int], ffn: int) -> dict[str, Any]:
    def widths(**other: Any) -> dict[str, Any]:
        common = {"embed": 320, "heads": 4, "qk": 16, "qk_range": [16, 16], "v": 32, "v_range": [32, 32]}
        return common | {"ffn": 1_150, "ratio": 3.59} | other

    after = widths(v=sum(v_range) / 2, v_range=list(v_range), ffn=ffn, ratio=ffn / 320)
    return {"block": block, "before": widths(), "after": after}


def network(params: int, macs: int, ms: float) -> dict[str, Any]:
    return {"params": params, "macs": macs, "latency_ms": ms, "ci": [0.98 * ms, 1.02 * ms]}


def invent(**budget: Any) -> dict[str, Any]:
    accuracy = {"top1": 56.0, "top1_ci": [48.7, 63.1], "loss": 1.0, "images": 1_180}
    return {
        "model": "efficientvit_m4",
        "family": "efficientvit",
        "resolution": 64,
        "command": "vitnas prune",
        "started": "2026-01-02T10:00:00+00:00",
        "finished": "2026-01-02T10:04:41+00:00",
        "data": {
            **{"name": "images/flowers", "demo": False, "classes": 102, "train": 6149, "val": 1180},
            **{"evaluated": 1180, "calibration": 512},
        },
        "options": {
            "model": "efficientvit_m4",
            "budget": {"metric": "latency", "amount": 9.5, "relative": False, "text": "9.5ms"},
            "settings": {},
            "data": "images/flowers",
        },
        "settings": {"device": "cpu", "runtime": "onnxruntime", "threads": 1, "batch_size": 1},
        "hardware": {},
        "weights": None,
        "trained_images": 0,
        "tuned_images": 6149,
        "kept": "recovered",
        "rounds": [],
        "notes": [],
        "phases": {},
        "importance": [],
        "blocks": [row("stages.0.blocks.0", (32, 32), 904), row("stages.2.blocks.11", (48, 56), 1_200)],
        "before": network(8_800_000, 1_150_000_000, 12.4),
        "after": network(5_500_000, 904_000_000, 9.51),
        "costs": [
            Saving("stages.0 ffn", 1_000_000, 0.5, (0.4, 0.6), 10).to_json(),
            Saving("stages.1 blocks attn", 1_000_000, 0.01, (-0.123, 0.2), 40).to_json(),
        ],
        "budget": {
            "metric": "latency",
            "text": "9.5ms",
            "target": 9.5,
            "reached": 9.51,
            "interval": [9.32, 9.7],
            "verdict": "unsure",
            **budget,
        },
        "accuracy": {"before": accuracy, "pruned": accuracy, "recovered": accuracy, "control": accuracy},
        "control": {"difference": -2.1, "ci": [-9.8, 5.5], "verdict": "tie"},
        "failures": [],
    }


def result_of(data: dict[str, Any]) -> PruneResult:
    return PruneResult.from_json(data, Path())


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def show(data: dict[str, Any], columns: int, terminal: bool) -> str:
        out = io.StringIO()
        console = Console(
            file=out, width=columns, force_terminal=terminal, color_system=None, highlight=False, soft_wrap=True
        )
        monkeypatch.setattr(nas.prune.screen, "console_of", lambda to_stderr: console)
        for name in ("model.onnx", "report.html"):
            (tmp_path / name).touch()
        show_prune(result_of(data), tmp_path, False)
        return out.getvalue()

    return show


@pytest.mark.parametrize(("columns", "terminal"), [(60, True), (80, True), (120, True), (10_000, False)])
def test_no_figure_is_cut_at_any_width(shown, tmp_path: Path, columns: int, terminal: bool) -> None:
    text = shown(invent(), columns, terminal)
    for figure in ("1,150 -> 904", "32 -> 48..56", "none shown", "-0.123..0.200", "1,150", "9.51", "unsure"):
        assert figure in text
    assert "…" not in text
    assert "e+03" not in text
    paths = [str(tmp_path), "--weights", "vitnas bench"]
    lines = [line for line in text.splitlines() if not any(part in line for part in paths)]
    assert max(map(len, lines)) <= columns
    next_line = (
        f"Train it further: vitnas train {tmp_path} --weights {tmp_path}/model.safetensors --data images/flowers"
    )
    assert next_line in text  # on one line, to be copied
    words = " ".join(text.split())
    assert "unpruned, fine-tuned alike: 56.0% top-1 (95%: 48.7 to 63.1, 1,180 images)" in words
    assert "pruned minus unpruned, fine-tuned alike: -2.1 points (95%: -9.8 to +5.5): a tie" in words
    assert f"Network: {tmp_path} (model.onnx)" in words
    assert f"Report: {tmp_path}/report.html" in words
    assert f"vitnas bench efficientvit_m4 {tmp_path}" in words


def test_the_headline_follows_the_verdict() -> None:
    data = invent()
    assert "may be met or not, too close to tell (9.51 ms for 9.50 ms, 95%: 9.32 to 9.70 ms" in headline(
        result_of(data).budget
    )
    assert "9.5ms: met (" in headline(result_of(invent(verdict="fits")).budget)
    assert "9.5ms: NOT met (" in headline(result_of(invent(verdict="over")).budget)
    assert headline(result_of(invent(reached=None, verdict=None)).budget).endswith("not measured")
    assert [row[-1] for row in count_rows(result_of(data))] == ["", "", "unsure", ""]
    price = {"top1": 40.0, "top1_ci": [37.0, 43.0], "float_top1": 56.0, "drop": 16.0, "drop_ci": [12.0, 20.0]}
    price |= {"precision": "int8", "max_drop": 1.0, "images": 1180}
    for refusal in ("", "int8 costs 16.0 points"):
        found = result_of(invent(verdict="fits") | {"price": price | {"refusal": refusal}})
        assert found.met != bool(refusal)
        assert headline(found.budget, found.price).startswith(f"Infeasible: {refusal}. Budget" if refusal else "Budget")


def test_widths() -> None:
    """Of heads that differ both ends are shown: a mean is no width that any of them has."""
    widths = BlockWidths(embed=320, heads=4, qk=16, v=50, ffn=1_150, ratio=3.59, v_range=(48, 56))
    assert width(widths, "v") == "48..56"
    assert width(replace(widths, v_range=None), "v") == "50"
    assert change("1,150", "904") == "1,150 -> 904"
    assert change("16", "16") == "16"


def test_waiting_times_are_no_result(shown) -> None:
    """The note stands first, and neither a ratio nor a tie is drawn from them."""
    data = invent(verdict=None, interval=None)
    assert "a tie: their 95% intervals" not in " ".join(shown(data, 120, False).split())  # 12.4 and 9.51 ms
    data["after"] = data["before"] | {"waiting": True}
    assert "The latencies are a tie" in shown(data, 120, False)
    text = shown(data | {"waiting": "other processes keep 2.0 of 2 CPUs busy"}, 120, False)
    assert text.startswith("Other processes keep 2.0 of 2 CPUs busy.")
    assert "The latencies are a tie" not in text
    assert count_rows(result_of(data | {"waiting": "busy"}))[2] == ("ms", "12.4", "12.4", "waiting", "not judged")
    assert headline(result_of(data).budget).endswith("not judged, the latencies are waiting times")


@pytest.mark.parametrize(
    ("verdict", "said"), [("tie", "a tie"), ("more accurate", "a gain"), ("less accurate", "a loss")]
)
def test_what_fine_tuning_did_is_said(shown, verdict: str, said: str) -> None:
    data = invent() | {"tuning": {"difference": -4.2, "ci": [-9.0, 0.6], "verdict": verdict}}
    accuracy = data["accuracy"]
    data["accuracy"] = accuracy | {
        which: accuracy[which] | {"top1": top1} for which, top1 in (("pruned", 54.2), ("recovered", 50.0))
    }
    line = f"fine-tuning changed it from 54.2 to 50.0%: {said} (-4.2 points, 95%: -9.0 to +0.6)"
    assert tuning_words(result_of(data)) == line
    assert line in " ".join(shown(data, 60, True).split())


def test_without_labels_agreement_is_told(shown) -> None:
    data = invent()
    data["options"] = data["options"] | {"data": None, "unlabelled": "photos"}
    text = " ".join(shown(data, 120, False).split())
    assert "right after pruning: 56.0% agreement (95%: 48.7 to 63.1, 1,180 images)" in text
    assert "top-1" not in text


def test_widths_that_grew_are_named(shown) -> None:
    data = invent()
    line = "Parameters were reallocated: v, FFN grew; --no-reallocate leaves that out."
    assert line in " ".join(shown(data, 60, True).split())
    assert grown_line(result_of(data).parts.blocks[:1]) is None


def test_a_result_of_an_earlier_version_is_told(shown) -> None:
    """It lacks what later versions added."""
    data = invent()
    for row in data["blocks"]:
        for widths in (row["before"], row["after"]):
            del widths["qk_range"], widths["v_range"]
    for name in ("failures", "control"):
        del data[name]
    text = shown(data, 120, False)
    assert "32 -> 52" in text
    assert "pruned minus unpruned" not in text
    assert "Budget latency 9.5ms" in text
    with pytest.raises(ValueError, match="verdict"):
        result_of(invent(verdict="perhaps"))
