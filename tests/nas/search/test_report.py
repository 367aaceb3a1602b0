"""The report of a search, from invented results: every number here is a fixture, none was measured."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import quick
from markupsafe import escape
from records import outcome_of

from nas.errors import DiskFull
from nas.export.card import CLASSIFY
from nas.search.accuracy import Accuracies
from nas.search.report import COLUMNS, REASONS_SHOWN, write_run

FILES = ["pareto.json", "pareto.png", "report.html", "result.json", "trials.csv"]
PUBLISHED = {  # name: family, latency in ms, quality in percent
    "levit_128s": ("levit", 2.4, 75.1),
    "levit_128": ("levit", 3.1, 77.0),
    "levit_256": ("levit", 6.5, 80.1),
    "efficientvit_m0": ("efficientvit", 0.9, 61.6),
    "efficientvit_m2": ("efficientvit", 1.4, 69.4),
    "efficientvit_m3": ("efficientvit", 1.75, 72.0),
    "efficientvit_m4": ("efficientvit", 1.9, 73.0),
    "efficientvit_m5": ("efficientvit", 3.0, 75.9),
    "shvit_s1": ("shvit", 1.7, 72.2),
    "shvit_s2": ("shvit", 2.3, 74.6),
    "deit_tiny": ("evit", 9.0, 70.0),
    "evit_tiny_keep50": ("evit", 5.2, 67.0),
    "evit_small_keep70_drop": ("evit", 17.0, 77.1),
    "sepvit_lite": ("sepvit", 7.0, 68.0),
}


def trial(number: int, family: str, latency: float, quality: float | None, budget: float, name: str = "") -> dict:
    error = 1.0 if name else 1.6
    return {
        "trial": number,
        "family": family,
        "name": name,
        "state": "complete",
        "error": "",
        "quality": quality,
        "quality_estimate": None if quality is None else quality + error,
        "quality_ci": None if quality is None else [quality - error, quality + 3 * error],
        "quality_how": "predicted",
        "guessed": False,
        "latency_ms": latency,
        "latency_p95_ms": latency * 1.08,
        "latency_ci_low_ms": latency * 0.99,
        "latency_ci_high_ms": latency * 1.012,
        "samples": 150,
        "reference_ms": 1.31,
        "throughput": 1000 / latency,
        "precision": "fp32",
        "params_m": 2 + 3 * latency,
        "macs_m": 160 * latency,
        "resolution": 224,
        "feasible": latency <= budget,
        "verdict": "fits" if latency <= budget else "over",
        "source": "measured",
        "arch": {"family": family},
    }


def failed(number: int, reason: str) -> dict:
    blank = trial(number, "sepvit", 1, None, 0)
    kept = {"trial": number, "family": "sepvit", "name": "", "state": "failed", "error": reason, "feasible": False}
    kept |= {"guessed": False, "quality_how": "", "source": "measured"}
    return dict.fromkeys(blank) | kept


def invent(trials: int = 100, budget: float = 2.0, seed: int = 0) -> dict[str, Any]:
    """A whole result as `nas.search.loop` hands it over, for `trials` trials of which some fail."""
    rng = random.Random(seed)
    rows = [trial(i, f, ms, q, budget, name) for i, (name, (f, ms, q)) in enumerate(PUBLISHED.items())][:trials]
    offset = {"levit": 71.5, "efficientvit": 69.5, "shvit": 70.6, "evit": 60.0, "sepvit": 59.0}
    slowness = {"levit": 2.0, "efficientvit": 1.6, "shvit": 1.7, "evit": 8.0, "sepvit": 6.0}
    while len(rows) < trials:
        number, family = len(rows), rng.choice(list(offset))
        if rng.random() < 0.06:
            rows.append(failed(number, rng.choice(["export failed: unsupported gather", "no answer in 60 s"])))
            continue
        latency = slowness[family] * math.exp(rng.gauss(0, 0.5))
        quality = offset[family] + 5 * math.log2(latency) - abs(rng.gauss(0, 2.5)) + 0.4
        rows.append(trial(number, family, latency, None if latency > 3 * budget else quality, budget))
    front: list[dict] = []
    for t in sorted((t for t in rows if t["feasible"]), key=lambda t: t["latency_ms"]):
        if not front or t["quality"] > front[-1]["quality"]:
            front.append(t)
    keys = ["arch", "family", "name", "quality", "quality_estimate", "quality_ci", "latency_ms", "verdict"]
    keys += ["precision", "throughput", "params_m", "macs_m", "trial"]
    pareto = [{"kind": None, "parent": ""} | {k: t[k] for k in keys} for t in front]
    measured = [t for t in rows if t["state"] == "complete"]
    fastest = min(measured, key=lambda t: t["latency_ms"], default=None)
    winner = front[-1] if front else None
    shown = [(winner, "winner")] if winner else []
    for family in sorted({t["family"] for t in front} - {t["family"] for t, _ in shown}):
        shown.append(([t for t in front if t["family"] == family][-1], "family winner"))
    drawn = [t["trial"] for t, _ in shown]
    shown += [(t, "published") for t in rows if t["name"] and t["feasible"] and t["trial"] not in drawn]
    stage = {"heads": 4.0, "key_dim": 16.0, "attention_share": 1.0, "ffn_ratio": 2.0, "keep_rate": 1.0}
    return {
        "study": "cpu-onnxruntime-2ms-fixture",
        "command": f"vitnas search --latency-budget {budget:g}ms --device cpu",
        "started": "2026-01-02T10:00:00+00:00",
        "finished": "2026-01-02T10:04:41+00:00",
        "interrupted": False,
        "failures": [],
        "budget_ms": budget,
        "settings": {"runtime": "onnxruntime", "device": "cpu", "threads": 2, "batch_size": 1, "precision": "fp32"},
        "num_classes": 1000,
        "seed": None,
        "sampler": "auto",
        "hardware": {
            "cpu": "Fixture CPU @ 2.45 GHz",
            "physical_cores": 2,
            "runtime_version": "1.31.0",
            "pinned": True,
            "governor": None,
            "load_average": [0.1, 0.2, 0.3],
            "packages": {"torch": "2.15.0", "onnx": "1.22.0", "optuna": None},
        },
        "quality_tier": {
            "name": "prior",
            "label": "score (prior: ImageNet top-1 predicted from size, with that family's published recipe)",
            "note": "The prior knows only size: it favours the largest network that fits the budget.",
            "trained": False,
            "held_out": None,
            "rungs": [],
        },
        "validation": None,
        "accuracy": None,
        "trials": rows,
        "pareto": pareto,
        "throughput_at": None,
        "against": [],
        "final": [
            {
                "label": t["name"] or f"trial {t['trial']}",
                "role": role,
                "published_top1": t["quality"] + 1.2 if t["name"] else None,
                "ci_low_ms": t["latency_ci_low_ms"],
                "ci_high_ms": t["latency_ci_high_ms"],
                **t,
            }
            for t, role in shown
        ],
        "winner": winner
        and {
            "label": winner["name"] or f"trial {winner['trial']}",
            "family": winner["family"],
            "trial": winner["trial"],
            "verdict": winner["verdict"],
            "ci_low_ms": winner["latency_ci_low_ms"],
            "ci_high_ms": winner["latency_ci_high_ms"],
            "arch": {"family": winner["family"]},
            **dict.fromkeys(("top1", "top1_ci", "images", "seeds")),
            "words": "",
            "latency_ms": winner["latency_ms"],
            "quality_estimate": winner["quality_estimate"],
            "quality": winner["quality"],
            "quality_ci": winner["quality_ci"],
            "summary": [
                {"embed_dim": 128, "depth": 2, **stage, "heads": 0.0, "key_dim": 0.0, "attention_share": 0.0},
                {"embed_dim": 256, "depth": 5, **stage, "attention_share": 0.6, "ffn_ratio": 2.1333333},
                {"embed_dim": 400, "depth": 3, **stage, "keep_rate": 0.7},
            ],
        },
        "fastest": fastest
        and {
            "label": fastest["name"] or f"trial {fastest['trial']}",
            "family": fastest["family"],
            "latency_ms": fastest["latency_ms"],
            "latency_ci_low_ms": fastest["latency_ci_low_ms"],
            "latency_ci_high_ms": fastest["latency_ci_high_ms"],
        },
        "notes": ["a fixture's note"],
        "ties": ["The intervals of trial 17 and levit_128s overlap: the prior cannot tell them apart (a tie)."],
        "advice": [] if front else ["a lower --resolution", "more --threads", "another --runtime or --family"],
        "skipped": [f"fixture_variant_{i}: further from the budget than those tried" for i in range(30)],
        "protocol": ["a process per network, pinned, 2 threads", "rounds interleaved with a reference model"],
        "breakdown": [
            {"phase": phase, "seconds": 281 * share, "share": share}
            for phase, share in [
                ("export", 0.52),
                ("session", 0.13),
                ("timed runs", 0.23),
                ("sampler", 0.1),
                ("rest", 0.02),
            ]
        ],
        "trials_per_minute": 21.4,
        "median_trial_s": 2.61,
        "untrained": True,
        "short_training": None,
    }


@pytest.fixture
def plots() -> None:
    """For tests that look at the plot."""


@pytest.fixture(autouse=True)
def _blank_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "plots" not in request.fixturenames:
        quick.blank_plots(monkeypatch)


class Page(HTMLParser):
    """A report's text outside its style sheet, and its tags with their attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.text, self.tags, self.open = source, "", [], []
        self.feed(source)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "


def report(folder: Path, data: dict[str, Any]) -> Page:
    write_run(folder, outcome_of(data))
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    return page


def briefly(data: dict[str, Any]) -> dict[str, Any]:
    """The same, of too few rounds for intervals of 95%."""
    for row in [*data["trials"], *data["pareto"], *data["final"], data["winner"], data["fastest"]]:
        row |= dict.fromkeys({key for key in row if "ci_low_ms" in key or "ci_high_ms" in key})
    return data


@pytest.mark.usefixtures("plots")
@pytest.mark.parametrize(
    "data",
    [invent(), invent(40, 0.5), invent(1, 3.0), briefly(invent(1, 3.0))],
    ids=["found", "nothing fits", "one trial", "measured briefly"],
)
def test_the_files_hold_the_result(tmp_path: Path, data: dict[str, Any]) -> None:
    page = report(tmp_path, data)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES

    rows = list(csv.DictReader(io.StringIO((tmp_path / "trials.csv").read_text(encoding="utf-8"))))
    assert [int(row["trial"]) for row in rows] == [t["trial"] for t in data["trials"]]
    assert list(rows[0]) == list(COLUMNS)
    for row, t in zip(rows, data["trials"], strict=True):
        assert row["latency_ms"] == ("" if t["latency_ms"] is None else str(t["latency_ms"]))
        assert (row["state"], row["feasible"], row["error"]) == (t["state"], str(t["feasible"]), t["error"])
        assert row["n"] == ("" if t["samples"] is None else str(t["samples"]))
        assert t["state"] == "failed" or float(row["spread"]) == pytest.approx(0.08)

    assert "None" not in page.text
    assert "– to –" not in page.text
    assert json.loads((tmp_path / "pareto.json").read_text(encoding="utf-8")) == data["pareto"]
    png = (tmp_path / "pareto.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") >= 1000
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert images == ["data:image/png;base64," + base64.b64encode(png).decode()]


def test_the_page_answers_in_its_title(tmp_path: Path) -> None:
    data = invent()
    row = data["final"][0]
    low, high = row["quality_ci"]
    title = (
        f"Within 2 ms: {row['label']}, {row['family']}, {row['latency_ms']:.2f}\xa0ms (95% interval "
        f"{row['ci_low_ms']:.2f} to {row['ci_high_ms']:.2f}), score {row['quality']:.1f} (95%: {low:.1f} to {high:.1f})"
    ).replace("\xa0", " ")
    text = report(tmp_path, data).text
    assert title in text
    assert "Classify an image" not in text
    for said in [
        "The weights are untrained",
        data["quality_tier"]["note"],
        data["quality_tier"]["label"],
        *data["ties"],
        *data["notes"],
    ]:
        assert said in text
    for line in [*data["skipped"], *data["protocol"], data["command"], data["hardware"]["cpu"], "One interleaved run"]:
        assert line in text
    assert "torch 2.15.0, onnx 1.22.0" in text
    assert "4 min 41 s" in text


def test_a_prediction_is_never_called_accuracy(tmp_path: Path) -> None:
    for data in (invent(30), invent(30, 0.5)):
        assert "accura" not in report(tmp_path, data).source.lower()


def test_a_winner_that_may_miss_the_budget_is_not_praised(tmp_path: Path) -> None:
    data = invent(30)
    data["final"][0] |= {"latency_ms": 1.9876, "ci_low_ms": 1.91, "ci_high_ms": 2.08, "verdict": "unsure"}
    data["winner"]["verdict"] = "unsure"
    text = report(tmp_path, data).text
    assert "No network surely fits 2 ms; the best of those that may: " in text
    assert "(unsure: 95% interval 1.91 to 2.08)" in text
    assert "Within 2 ms" not in text


def test_without_a_side_by_side_latency_the_winner_shows_its_trial(tmp_path: Path) -> None:
    data = invent(30)
    trial_ms = next(t["latency_ms"] for t in data["trials"] if t["trial"] == data["winner"]["trial"])
    assert data["final"][0]["role"] == "winner"
    data["final"][0] |= dict.fromkeys(["latency_ms", "latency_p95_ms", "ci_low_ms", "ci_high_ms"])
    data["final"][0]["error"] = "no answer in 60 s"
    text = report(tmp_path, data).text
    assert f"{trial_ms:.2f} ms (95% interval" in text
    assert "not measured: no answer in 60 s" in text


def test_nothing_fits(tmp_path: Path) -> None:
    data = invent(40, 0.5)
    text = report(tmp_path, data).text
    fastest = data["fastest"]
    assert "Nothing found fits 0.5 ms" in text
    assert f"{fastest['label']}, {fastest['family']}, at {fastest['latency_ms']:.3f} ms" in text
    assert all(line in text for line in data["advice"])
    assert "model.onnx" not in text


def test_no_family_is_called_infeasible_before_its_smallest_shape_was_measured(tmp_path: Path) -> None:
    data = invent(14)
    assert not any(t["feasible"] for t in data["trials"] if t["family"] in ("evit", "sepvit"))
    text = report(tmp_path, data | {"families": ["evit", "sepvit", "toy"], "ruled_out": ["sepvit"]}).text
    assert "evit 3 0 0 none tried fits 2 ms" in text
    assert "sepvit 1 0 0 none fits 2 ms" in text
    assert "toy 0 0 0 not tried –" in text


def test_published_networks_are_told_where_nothing_found_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nas.cli.display import show_result

    figures = {"latency_ms": 0.41, "latency_p95_ms": 0.45, "ci_low_ms": 0.4, "ci_high_ms": 0.42, "samples": 60}
    entry = {"label": "timm/small", "resolution": 224, "verdict": "fits", "published_top1": 60.0, "throughput": 2e3}
    data = invent(40, 0.5) | {"against": [entry | figures]}
    assert not data["final"]
    told = "A published network fits 0.5 ms, as nothing found does: timm/small, with a top-1 of 60.0% on ImageNet"
    page = report(tmp_path, data)
    assert told in re.search(r"<h1>(.*?)</h1>", page.source, re.DOTALL)[1]
    assert page.source.count("<h1>") == 1
    assert "Published networks, measured although no trial is within the budget. network px" in page.text
    show_result(outcome_of(data), tmp_path, to_stderr=False)
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert out.startswith(told)
    assert "timm/small 224 fits 60.0 0.41" in out
    assert "time of" not in out


def test_trials_fit_but_nothing_does_when_measured_again(tmp_path: Path) -> None:
    data = invent(30) | {"winner": None}
    for row in data["final"]:
        row |= {"role": "published", "verdict": "over"}
    text = report(tmp_path, data).text
    assert "Nothing found stays within 2 ms when measured again; the fastest was" in text
    assert "model.onnx" not in text


def test_the_closing_run_names_the_family_winners(tmp_path: Path) -> None:
    data = invent()
    family, ranked = "efficientvit", sorted(PUBLISHED, key=lambda name: PUBLISHED[name][2])
    fitting = [name for name in ranked if PUBLISHED[name][0] == family and PUBLISHED[name][1] <= 2]
    data["final"] = [row | {"role": "published"} for row in data["final"] if row["label"] in fitting]
    cell = "{0} {1} 10 0 "  # family, tried, fitting, failed
    tried = sum(t["family"] == family for t in data["trials"])
    assert cell.format(family, tried) + fitting[-1] in report(tmp_path, data).text
    next(row for row in data["final"] if row["label"] == fitting[0])["role"] = "family winner"
    assert cell.format(family, tried) + fitting[0] in report(tmp_path, data).text


def test_an_interrupted_search_says_so(tmp_path: Path) -> None:
    assert "interrupted" not in report(tmp_path, invent(20)).text
    assert (
        "The search was interrupted; this page covers the 20 trials"
        in report(tmp_path, invent(20) | {"interrupted": True}).text
    )


def test_what_failed_at_the_end_is_said(tmp_path: Path) -> None:
    line = "best/model.onnx failed: the exported network disagrees with PyTorch by 2.0e-04 of its largest logit"
    assert line in report(tmp_path, invent(20) | {"failures": [line]}).text


def test_failed_trials_are_grouped_by_reason(tmp_path: Path) -> None:
    data = invent(20)
    reasons = [f"reason {i}" for i in range(REASONS_SHOWN + 3) for _ in range(REASONS_SHOWN + 5 - i)]
    data["trials"] += [failed(100 + i, reason) for i, reason in enumerate(reasons)]
    text = report(tmp_path, data).text
    assert f"{REASONS_SHOWN + 5} reason 0 " in text
    assert f"6 reason {REASONS_SHOWN - 1} " in text
    assert f"{5 + 4 + 3} 3 other reasons, in trials.csv" in text


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    page = report(tmp_path, invent())
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        for name in ("src", "href", "srcset", "action", "background", "poster"):
            assert attrs.get(name, "data:").startswith("data:")
    style = re.search(r"<style>(.*)</style>", page.source, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in page.source.replace("http-equiv", "")


def test_markup_in_any_text_stays_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    data = invent(30)

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(item, key) for item in value]
        kept = key in ("started", "finished", "state", "role", "source", "verdict")
        return value + evil if isinstance(value, str) and value and not kept else value

    page = report(tmp_path, spoil(data))
    assert "script" not in {tag for tag, _ in page.tags}
    known = {"class", "style", "src", "alt", "lang", "colspan", "name", "content", "charset", "http-equiv"}
    assert {name for _, attrs in page.tags for name in attrs} <= known
    for value in [data["study"], data["command"], data["skipped"][0], data["winner"]["label"], data["hardware"]["cpu"]]:
        assert value + evil in page.text


def test_a_password_in_a_url_is_never_written(tmp_path: Path) -> None:
    url = "postgresql://someone:hunter2%2F@db.example/vitnas?password=hunter3"
    data = invent(20)
    data |= {"command": f"vitnas search --storage {url}", "storage": url, "protocol": [f"kept in {url}"]}
    data["hardware"]["note"] = url
    data["trials"].append(failed(20, f"lost {url}"))
    report(tmp_path, data)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"postgresql://someone:***@" in written
    assert b"hunter" not in written


def test_empty_lists(tmp_path: Path) -> None:
    lists = ["pareto", "final", "notes", "ties", "advice", "skipped", "protocol", "breakdown"]
    data = invent(0) | {name: [] for name in lists} | {"hardware": {}}
    text = report(tmp_path, data).text
    assert "Nothing found fits 2 ms: no network could be measured" in text
    assert (tmp_path / "trials.csv").read_text(encoding="utf-8") == ",".join(COLUMNS) + "\n"
    for heading in ("Side by side", "The front", "Failed trials", "Not tried", "What would help"):
        assert heading not in text
    found = invent(20)
    assert "Within 2 ms" in report(tmp_path, found | {name: [] for name in lists if name != "pareto"}).text


def test_only_failed_trials(tmp_path: Path) -> None:
    data = invent(0) | {"trials": [failed(0, "out of memory")]}
    text = report(tmp_path, data).text
    assert "1 trial, 0 within 2 ms" in text
    assert "1 out of memory" in text


@pytest.mark.usefixtures("plots")
def test_files_are_replaced_whole(tmp_path: Path, fill_disk: Callable[[], None]) -> None:
    write_run(tmp_path, outcome_of(invent(20)))
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    readers = {name: (tmp_path / name).open("rb") for name in FILES}
    write_run(tmp_path, outcome_of(invent(40, seed=1)))
    for name, reader in readers.items():
        with reader:
            assert reader.read() == before[name], "a reader of the old file sees it change"
        assert (tmp_path / name).read_bytes() != before[name]

    after = {name: (tmp_path / name).read_bytes() for name in FILES}
    fill_disk()
    with pytest.raises(DiskFull, match="no space left"):
        write_run(tmp_path, outcome_of(invent(20)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == after


@pytest.mark.usefixtures("plots")
@pytest.mark.parametrize(("count", "budget"), [(1, 3.0), (100, 3.0), (500, 3.0), (1, 20.0)])
def test_labels_in_the_plot_do_not_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, budget: float
) -> None:
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    write_run(tmp_path, outcome_of(invent(count, budget)))
    texts = figures[0].axes[0].texts
    words = [text.get_text() for text in texts]
    assert any(word.startswith("winner: ") for word in words)
    assert f"budget {budget:g} ms" in words
    if count > 1:
        assert {"levit_128s", "shvit_s1", "efficientvit_m0"} <= {word.removeprefix("winner: ") for word in words}
    boxes = [text.get_window_extent() for text in texts]
    assert not [(a, b) for a, b in itertools.combinations(range(len(boxes)), 2) if boxes[a].overlaps(boxes[b])]
    frame = figures[0].axes[0].bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_importing_the_report_imports_no_heavy_package() -> None:
    heavy = "{'matplotlib', 'jinja2', 'torch', 'optuna', 'numpy'}"
    code = f"import sys, nas.search.report; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def trained(data: dict, **more) -> dict:
    """An invented run as a trained search leaves it."""
    tier = data["quality_tier"] | {
        "name": "train",
        "label": "score (train: top-1 estimated on your images)",
        "trained": True,
    }
    rows = [Accuracies(entry["label"], [70.0, 71.0], 500, 9.0).to_json() for entry in data["final"][:2]]
    told = {key: rows[0][key] for key in ("top1_ci", "images", "seeds")}
    winner = data["winner"] | told | {"top1": 70.5, "words": rows[0]["words"]}
    accuracy = {"rows": rows, "epochs": 30, "recipe": "quick", "verdict": "a tie <of> two"}
    rung = {"epochs": 0, "networks": 5, "tau": {"tau": 0.6, "ci": [0.1, 0.9]}, "regret": 1.5}
    tier |= {"held_out": [1.25, 0.5], "rungs": [rung, rung | {"epochs": 1}]}
    return data | {"quality_tier": tier, "accuracy": accuracy, "winner": winner, "untrained": False} | more


def test_final_trainings_and_the_tier_s_worth_are_told(tmp_path: Path) -> None:
    data = trained(invent(20))
    write_run(tmp_path, outcome_of(data))
    page = (tmp_path / "report.html").read_text()
    assert "Trained fully" in page
    assert "70.5" in page
    assert "a tie &lt;of&gt; two" in page
    assert "not been validated" in page
    assert "1.2 points" in page or "1.3 points" in page
    assert "before any epoch tau 0.60, regret 1.5 points (5 networks); after 1 epoch tau 0.60" in page
    assert "untrained" not in page.lower()
    assert escape(CLASSIFY) in page
    taus = {"estimate": {"tau": 0.6, "ci": [0.2, 0.9]}, "params": {"tau": None, "ci": None}}
    write_run(tmp_path, outcome_of(trained(invent(20), validation={"networks": 8, "tau": taus, "selects": True})))
    page = (tmp_path / "report.html").read_text()
    assert "estimate 0.60 (0.20 to 0.90)" in page
    assert "8 full trainings" in page
    unknown = {"networks": 8, "tau": {"params": taus["params"]}, "selects": False}
    text = report(tmp_path, trained(invent(20), validation=unknown)).text
    assert "Kendall's tau with 8 full trainings is not known: all ended with the same top-1." in text


def test_the_trained_accuracy_is_the_headline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nas.cli.display import show_result
    from nas.search.words import winner_line

    data = trained(invent(20))
    words = data["winner"]["words"]
    assert words.startswith("70.5% top-1 (95%: ")
    assert words.endswith(", 500 images, 2 seeds)")
    page = report(tmp_path, data)
    assert words in re.search(r"<h1>(.*?)</h1>", page.source, re.DOTALL)[1]
    assert "70.5% top-1 after full training" in page.text
    show_result(outcome_of(data), tmp_path, to_stderr=False)
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert words in out.partition(".\n")[0]
    assert out.index(words) < out.index("score (train)")
    assert words in winner_line(outcome_of(data))
    data["final"][1]["guessed"] = True
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors").touch()
    for family, then in (
        ("levit", f"prune --model {tmp_path / 'best'} --data FOLDER_OF_IMAGES"),
        ("timm", f"predict {tmp_path} IMAGE"),
    ):
        data["winner"]["family"] = family
        show_result(outcome_of(data), tmp_path, to_stderr=False)
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == f"Next: vitnas {then}"
        assert "not trained" in out


@pytest.mark.parametrize("begun", [1, 2])
def test_a_network_that_had_no_epoch_is_not_told_as_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], begun: int
) -> None:
    from nas.cli.display import show_result

    data = trained(invent(20))
    rows = [row | {"epochs": 0 if i < begun else 30} for i, row in enumerate(data["accuracy"]["rows"])]
    data["accuracy"]["rows"] = rows
    first, other = (row["label"] for row in rows)
    final = next(row for row in data["final"] if row["role"] == "winner")
    final["accuracy"] = rows[0]
    outcome = outcome_of(data)
    page = report(tmp_path, data)
    assert "top-1 after full training" not in page.text
    assert ("Trained fully" in page.text) == (begun == 1)
    show_result(outcome, tmp_path, to_stderr=False)
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"Trained fully, {first}" not in out
    assert f"Not trained, {first} as it begins (a linear probe on pretrained weights; tuning did not" in out
    assert (f"Trained fully, {other}: {rows[1]['words']}" in out) == (begun == 1)
    told = f"30 epochs of the recipe quick ({first} had none)" if begun == 1 else "No epoch of training"
    assert told in out
    assert told in page.text
    written = json.loads((tmp_path / "result.json").read_text())["accuracy"]["rows"]
    assert [row["epochs"] for row in written] == [row["epochs"] for row in rows]


def test_a_refused_network_has_no_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nas.cli.display import show_result

    entry = {"label": "timm/no@7", "resolution": None, "error": "no multiple of 32", "ratio": None, "verdict": None}
    data = trained(invent(20)) | {"against": [entry]}
    data["accuracy"]["epochs"] = 1
    page = report(tmp_path, data)
    assert "timm/no@7" in page.text
    assert "None px" not in page.text
    show_result(outcome_of(data), tmp_path, to_stderr=False)
    out = capsys.readouterr().out
    assert "timm/no@7 failed: no multiple of 32" in out
    assert "run at" not in out
    assert "1 epoch of the recipe" in out


def test_a_size_stands_once(tmp_path: Path) -> None:
    figures = {"latency_ms": 2.0, "latency_p95_ms": 2.1, "ci_low_ms": 1.9, "ci_high_ms": 2.1, "samples": 60}
    other = {"ratio": None, "throughput": 500.0, "verdict": "over"}
    entry = {"label": "timm/odd", "resolution": 1_056, "error": "", **figures, **other}
    assert report(tmp_path, invent(20) | {"against": [entry]}).source.count("1056") == 1


def test_a_ratio_is_told_of_the_network_that_it_is_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which is not the first of the table any more where the first turned out to lose too much in its precision."""
    from nas.cli.display import show_result

    data = invent(20)
    other = data["final"][1]["label"]
    figures = {"latency_ms": 2.0, "latency_p95_ms": 2.1, "ci_low_ms": 1.9, "ci_high_ms": 2.1, "samples": 60}
    ratio = {"ratio": 1.5, "ratio_low": 1.4, "ratio_high": 1.6, "beside": other}
    entry = {"label": "timm/odd", "resolution": 64, "throughput": 500.0, "verdict": "over", "precision": "fp32"}
    data |= {"against": [{"label": "timm/no", "error": "it is no network"}, entry | figures | ratio]}
    assert f"ratios of latency to {other}, from pairs of rounds." in report(tmp_path, data).text
    show_result(outcome_of(data), tmp_path, to_stderr=False)
    out = capsys.readouterr().out
    assert f"time of {other}'s" in out
    assert "measured in None" not in out


@pytest.mark.usefixtures("plots")
def test_what_was_not_trained_has_no_height_in_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such trials stand hollow at the foot, whatever the surrogate guessed of them."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    data = trained(invent(40))
    guessed = [t for t in data["trials"] if t["state"] == "complete" and not t["feasible"]]
    assert guessed
    for t in guessed:
        t |= {"quality": 97.0, "quality_estimate": 99.0, "quality_ci": [60.0, 100.0], "guessed": True}
    page = report(tmp_path, data)
    axes = figures[0].axes[0]
    for t in guessed:
        (mark,) = [line for line in axes.lines if list(line.get_xdata()) == [t["latency_ms"]]]
        assert mark.get_transform() == axes.get_xaxis_transform()
        assert mark.get_markerfacecolor() == "none"
    assert axes.get_ylim()[1] < 97
    assert "97.0" not in page.text
    assert "not trained" in page.text
    labels = figures[0].legends[0].get_texts()
    assert "not trained" in {text.get_text() for text in labels}
    assert len(labels) == 9, "with every family, and all that may stand there"
    assert all(text.get_window_extent().x1 < figures[0].bbox.x1 for text in labels), "none is cut off"


def test_memory_size_and_energy_are_told_where_they_are_known(tmp_path: Path) -> None:
    data = invent() | {"limits": {"memory_mb": 64.0, "file_mb": None}}
    assert "mJ an image" not in report(tmp_path, data).text
    data["final"][0] |= {"memory_mb": 38.25, "file_mb": 11.5, "energy_mj": 2.75}
    data["final"][1] |= {"verdict": "over", "over": ["memory"]}
    data["trials"][0] |= {"memory_mb": 38.5}
    text = report(tmp_path, data).text
    assert "Within 2 ms, 64 MB of memory: " in text
    assert "38.2 MB of memory at most above the runtime; a file of 11.5 MB; 2.75 mJ an image" in text
    assert "mJ an image" in text
    assert "over memory" in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "trials.csv").read_text(encoding="utf-8"))))
    assert [row["memory_mb"] for row in rows[:2]] == ["38.5", ""]


@pytest.mark.usefixtures("plots")
def test_the_plot_ends_at_0_and_100_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older studies hold scores and intervals beyond."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    data = invent(4, 3.0)
    for t, quality in zip(data["trials"], (-60.0, 199.0, 50.0, 40.0), strict=True):
        t |= {"quality": quality, "quality_ci": [quality - 20, quality + 20]}
    write_run(tmp_path, outcome_of(data))
    assert figures[0].axes[0].get_ylim() == (0.0, 100.0)
