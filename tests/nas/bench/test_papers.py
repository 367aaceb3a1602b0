"""The papers' claims: the data, the steps of a measurement, verdicts, rows and tables, blocks and the profiler."""

import contextlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from nas.bench.papers import CLAIMS, papers_csv, papers_markdown, papers_table, run_papers, suite
from nas.bench.papers.blocks import (
    BLOCKS,
    build_block,
    head_similarity,
    memory_bound_share,
    photographs,
    swin_with_share,
)
from nas.bench.papers.claims import Published
from nas.bench.papers.suite import BLOCK, FINDINGS, Attempt, first_settings, further_settings, network, time_networks
from nas.bench.papers.worker import Bench
from nas.errors import UserError
from nas.machine import default_threads
from nas.measure.runtime import Settings
from nas.measure.samples import MeasureError, Measurement

ORT = Settings(threads=2)
CLAIM = {claim.id: claim for claim in CLAIMS}


def test_claims_name_things_that_exist():
    assert len(CLAIM) == len(CLAIMS)
    for claim in CLAIMS:
        names = [claim.subject, claim.baseline] if claim.id not in FINDINGS else []
        names += [name for part in claim.parts for name in (part.subject, part.baseline) if name]
        for name in names:
            if name.startswith(BLOCK):
                assert name.removeprefix(BLOCK) in BLOCKS
            else:
                network(name)
    assert network("evit_small_keep50@304").resolution == 304
    assert network("timm/efficientnet_b2@260").resolution == 260
    assert set(FINDINGS) < set(CLAIM)


@pytest.mark.parametrize(
    ("name", "settings", "ratio"),
    [
        ("levit-192", ORT, 5.0),
        ("levit-block", ORT, 2474 / 2365),
        ("efficientvit-m5-mobilenetv3", ORT, 1.45),
        ("efficientvit-m5-mobilenetv3", Settings("torch", "cuda"), 1.40),
        ("evit-keep70", ORT, 1.5),
        ("shvit-s4", Settings("torch", "cuda"), 2.9),
        ("shvit-s4", Settings("torch", "ssh://u@h/cuda"), 2.9),
        ("shvit-s4", ORT, 3.3),
        ("shvit-s1", Settings("torch"), 143 / 167),
        ("sepvit-block-twins", ORT, 1.6),
    ],
)
def test_claimed_ratio_is_that_of_the_nearest_device_and_runtime(name, settings, ratio):
    assert CLAIM[name].published_for(settings).ratio == pytest.approx(ratio, rel=0.02)


def test_parts_add_up_to_the_papers_totals():
    sums = [sum(part.published_us[i] or 0 for part in CLAIM["levit-block"].parts) for i in (0, 1)]
    assert sums == [2365, 2474]


@pytest.mark.parametrize(
    ("ratio", "interval", "claimed", "verdict"),
    [
        (1.35, (1.3, 1.4), 1.5, "holds"),
        (1.34, (1.33, 1.345), 1.5, "partly (1.34x of 1.50x)"),
        (1.34, (1.30, 1.36), 1.5, "unclear: too noisy"),
        (1.02, (0.99, 1.05), 1.5, "does not hold here"),
        (0.86, (0.855, 0.865), 0.95, "holds"),
        (0.5, (0.4, 0.6), 0.95, "does not hold here"),
        (0.97, (0.96, 0.98), 1.05, "does not hold here"),  # a gain is claimed, there is none
        (1.01, (1.005, 1.02), 1.05, "holds"),
        (0.95, (0.94, 0.96), 1.0, "holds"),  # equal
        (1.5, (1.4, 1.6), 1.0, "faster than claimed"),
    ],
)
def test_verdict(ratio, interval, claimed, verdict):
    assert Attempt(ORT, claimed, "CPU", ratio, interval).verdict == verdict


def test_settings_of_a_claim_about_throughput():
    claim = CLAIM["levit-192"]
    assert first_settings(claim, ORT) == [ORT, replace(ORT, batch_size=16)]
    assert further_settings(claim, ORT) == [Settings("torch", threads=1, batch_size=16)]
    assert further_settings(claim, Settings("torch", threads=1, batch_size=16)) == []
    gpu = Settings("torch", "cuda", precision="fp16")
    assert [s.batch_size for s in first_settings(claim, gpu)] == [1, 256]
    assert further_settings(claim, gpu) == []  # fp16, as in the paper
    assert further_settings(claim, replace(gpu, precision="fp32")) == [replace(gpu, batch_size=256)]


def test_settings_of_a_claim_about_blocks():
    block, far = CLAIM["levit-block"], Settings(device="ssh://u@h", threads=2)
    assert first_settings(block, replace(ORT, batch_size=8)) == [Settings("torch", threads=1), ORT]
    assert first_settings(CLAIM["sepvit-block-swin"], Settings("torch")) == [Settings("torch")]
    assert first_settings(block, far) == [far]
    assert further_settings(block, far) == []


Fake = Callable[[str, Settings], float]


def measured(ms: float, rounds: int = 6) -> Measurement:
    return Measurement([[ms * (1 + 0.001 * i)] for i in range(rounds)])


def fake(monkeypatch: pytest.MonkeyPatch, ms: Fake) -> list[tuple[Settings, list[str]]]:
    """time_networks answers with `ms`; returns the list of its calls."""
    calls = []

    def answer(names: Sequence[str], settings: Settings, rounds: int) -> dict[str, Measurement | MeasureError]:
        calls.append((settings, list(names)))
        found = {}
        for name in names:
            try:
                found[name] = measured(ms(name, settings), rounds)
            except ValueError as error:
                found[name] = MeasureError(str(error))
        return found

    monkeypatch.setattr(suite, "time_networks", answer)
    return calls


def test_a_claim_that_fails_is_tried_as_its_paper_did_it(monkeypatch):
    def ms(name: str, settings: Settings) -> float:
        if name.startswith("timm/"):
            return 14 if "fasternet" in name else 10
        return 10 / 2.9 if settings.runtime == "torch" else 5

    calls = fake(monkeypatch, ms)
    said, done = [], []
    result = run_papers(ORT, 6, lambda *of: done.append(of), said.append, only=["shvit-s3", "shvit-s4"]).to_json()
    first, second = result["rows"]
    assert (first["id"], first["verdict"], first["measured"]) == ("shvit-s3", "holds", pytest.approx(2.8))
    assert first["claimed"] == pytest.approx(731 / 552)
    assert second["verdict"] == "partly (2.00x of 3.26x)"
    assert second["why"] == (
        "onnxruntime, batch 16, 2 threads: 2.00x of 3.26x (ONNX CPU); torch, batch 16, 1 thread: 2.90x of 3.27x (CPU)"
    )
    assert [other["verdict"] for other in second["others"]] == ["partly (2.00x of 3.26x)", "partly (2.90x of 3.27x)"]
    assert [(s.runtime, s.batch_size, s.threads, len(names)) for s, names in calls] == [
        ("onnxruntime", 1, 2, 4),
        ("onnxruntime", 16, 2, 4),
        ("torch", 16, 1, 2),
    ]
    assert len(said) == 3
    assert done == [(1, 2), (2, 2)]
    assert not result["interrupted"]
    assert json.loads(json.dumps(result)) == result


def test_ratio_above_one_means_the_subject_is_faster(monkeypatch):
    fake(monkeypatch, lambda name, settings: 2.0 if name == "levit_192" else 11.0)
    (row,) = run_papers(ORT, only=["levit-192"]).to_json()["rows"]
    assert (row["measured"], row["subject_ms"], row["baseline_ms"]) == pytest.approx((5.5, 2.005, 11.0275))
    assert row["ci"] == pytest.approx([5.5, 5.5])
    assert row["verdict"] == "holds"


def test_what_cannot_be_measured_is_a_row_with_its_error(monkeypatch):
    def ms(name: str, settings: Settings) -> float:
        if name == "timm/efficientnet_b2@260" and settings.batch_size == 1:
            raise ValueError("no such operator")
        return 1.0

    fake(monkeypatch, ms)
    result = run_papers(ORT, only=["levit-192"])
    (row,) = result.to_json()["rows"]
    assert row["error"] == "timm/efficientnet_b2@260: no such operator"
    assert (row["verdict"], row["measured"], row["ci"]) == ("not measured", None, None)
    assert "torch, batch 16, 1 thread: 1.00x of 4.96x" in row["why"]
    assert "no such operator" in papers_markdown(result)


def test_waiting_times_decide_no_claim(monkeypatch):
    waiting = dict.fromkeys(("block/levit_256", "block/levit_256.qk"), Measurement([[1.0, 8.0, 8.0]] * 6))
    monkeypatch.setattr(suite, "time_networks", lambda names, *_: dict.fromkeys(names, measured(1.0)) | waiting)
    (row,) = run_papers(ORT, only=["levit-block"]).to_json()["rows"]
    assert (row["verdict"], row["measured"]) == ("not measured", None)
    assert row["error"].startswith("block/levit_256: waited for CPUs that other processes use")
    parts = {part["part"]: part["measured_us"] for part in row["parts"]}
    assert parts["projection to Q and K"] == [None, 1002.5]


def test_ctrl_c_keeps_the_rows_that_are_done(monkeypatch):
    def ms(name: str, settings: Settings) -> float:
        if settings.batch_size > 1 and name.startswith("shvit"):
            raise KeyboardInterrupt
        return 1.0

    fake(monkeypatch, ms)
    result = run_papers(ORT, only=["levit-192", "shvit", "sepvit-s"]).to_json()
    assert result["interrupted"]
    assert [row["id"] for row in result["rows"]] == ["levit-192", "shvit-s1", "shvit-s3", "shvit-s4", *M_V2]
    assert result["rows"][-1]["others"] == []


M_V2 = ["shvit-s4-mobilevitv2"]


def test_on_a_remote_device_blocks_go_as_onnx_or_not_at_all(monkeypatch):
    far = Settings(device="ssh://u@h")
    calls = fake(monkeypatch, lambda name, settings: 1.0)
    block, finding = run_papers(far, only=["levit-block", "swin-mhsa-share"]).to_json()["rows"]
    assert [settings for settings, _ in calls] == [far]
    assert (block["runtime"], block["verdict"], block["parts"]) == ("onnxruntime", "holds", [])
    assert "this machine only" in finding["error"]
    (row,) = run_papers(replace(far, runtime="torch"), only=["levit-block"]).to_json()["rows"]
    assert "this machine only" in row["error"]


def test_unknown_claim():
    with pytest.raises(UserError, match="no claim or paper 'shvit-s5': did you mean shvit-s"):
        run_papers(ORT, only=["shvit-s5"])


def test_tables(monkeypatch):
    from rich.console import Console

    fake(
        monkeypatch,
        lambda name, settings: {"levit_192": 2.0, "block/levit_256": 1.5, "block/levit_256.logits": 1.2}.get(name, 1.6),
    )
    result = run_papers(ORT, only=["levit", "sepvit-s"])
    markdown = papers_markdown(result)
    assert (
        "| LeViT-192 against EfficientNet-B2 at 260 px | 4.96x (CPU) | 0.80x [0.80, 0.80] | 2.00 (1.60) |" in markdown
    )
    assert "about 1.14x (GPU)" in markdown
    assert "| product Q K^T | 159 | 1203 | 228 | 1604 |" in markdown
    assert "| LayerNorm (both); LeViT's BatchNorm is folded | - | - | 49 | 1604 |" in markdown
    assert "| whole block | 2365 | 1504 | 2474 | 1604 |" in markdown
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(papers_table(result.rows))
    shown = console.export_text()
    assert "levit-block" in shown
    assert "1.05x (CPU)  1.07x [1.07, 1.07]" in shown
    lines = papers_csv(result.rows).decode().splitlines()
    assert lines[0].startswith("id,paper,claim")
    assert len(lines) == 4


@pytest.mark.parametrize("name", ["deit_tiny", "swin_pair", "twins_pair", "levit_256.proj", "deit_tiny.mlp"])
def test_blocks_keep_the_shape_of_their_input(name):
    module, (tokens,) = build_block(name, 2)
    assert module(tokens).shape[:-1] == tokens.shape[:-1]
    assert tokens.shape[0] == 2


def test_attention_costs_a_levit_block_fewer_products_for_qk_and_more_for_av():
    def macs(name: str) -> int:
        a, b = build_block(name, 1)[1]
        return math.prod(a.shape) * b.shape[-1]

    assert macs("levit_256.logits") / macs("deit_tiny.logits") == pytest.approx(4 * 32 / (3 * 64))
    assert macs("levit_256.mix") / macs("deit_tiny.mix") == pytest.approx(4 * 64 / (3 * 64))


def small_swin() -> SwinTransformer:
    torch.manual_seed(0)
    return SwinTransformer(56, num_classes=3, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=7).eval()


def test_swin_at_half_attention_is_swin():
    images = torch.randn(1, 3, 56, 56)
    with torch.inference_mode():
        expected = small_swin()(images)
        model, share = swin_with_share(0.5, small_swin())
        assert share == 0.5
        assert torch.allclose(model(images), expected, atol=1e-5)
        fewer, share = swin_with_share(0.25, small_swin())
        assert share == 0.25
        assert fewer(images).shape == (1, 3)
    assert [len(stage.blocks) for stage in fewer.layers] == [4, 4]


def test_memory_bound_share():
    a = torch.randn(400, 400)
    assert memory_bound_share(lambda: a @ a)[1] < 0.2
    assert memory_bound_share(lambda: a + a)[1] == 1
    ms, share = memory_bound_share(lambda: (a @ a).softmax(-1).contiguous() + a)
    assert 0 < share < 1
    assert ms > 0


@pytest.mark.parametrize(
    ("few", "verdict"),
    [((0.4, 0.41), "holds"), ((0.4, 0.55), "unclear: too noisy"), ((0.6, 0.55), "does not hold here")],
)
def test_verdict_on_memory_bound_time(monkeypatch, few, verdict):
    rounds = iter([{"profiles": [[200.0, 0.5], [190.0, 0.45], [180.0, few[i % 2]]]} for i in range(6)])
    bench = SimpleNamespace(
        call=lambda method, *_, **__: {"shares": [0.5, 0.3, 0.2]} if "load" in method else next(rounds)
    )
    asked = []
    monkeypatch.setattr(suite, "_bench", lambda settings: asked.append(settings) or contextlib.nullcontext(bench))
    (row,) = run_papers(ORT, only=["swin-mhsa-share"]).to_json()["rows"]
    assert row["verdict"] == verdict
    assert row["measured"] == pytest.approx(statistics.median([0.5 / share for share in few] * 3))
    assert (row["subject_ms"], row["baseline_ms"]) == (180, 200)
    assert "50% MHSA: 50.0% of 200 ms; 30% MHSA: 45.0% of 190 ms" in row["why"]
    assert asked == [Settings("torch", threads=1, batch_size=4)]
    assert json.loads(json.dumps(row)) == row


def test_head_similarity_against_a_plain_loop():
    torch.manual_seed(0)
    model = VisionTransformer(32, 16, num_classes=2, embed_dim=12, depth=2, num_heads=3).eval().requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv.weight.mul_(20)  # attention that is far from uniform
    images = torch.randn(2, 3, 32, 32)
    found = head_similarity(model, images)
    x = model._pos_embed(model.patch_embed(images))
    for block, similarity in zip(model.blocks, found, strict=True):
        qkv = block.attn.qkv(block.norm1(x)).view(2, 5, 3, 3, 4)
        best = []
        for b in range(2):
            maps = [((qkv[b, :, 0, h] @ qkv[b, :, 1, h].T) / 2).softmax(-1).flatten() for h in range(3)]
            for h in range(3):
                best.append(max(float(torch.cosine_similarity(maps[h], maps[o], 0)) for o in range(3) if o != h))
        assert similarity == pytest.approx(sum(best) / 6, abs=1e-5)
        assert similarity < 0.99
        x = block(x)


def test_head_similarity_needs_weights(monkeypatch, tmp_path):
    monkeypatch.setattr("nas.connection.unreachable", lambda: "no connection")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    (row,) = run_papers(ORT, only=["deit-head-similarity"]).to_json()["rows"]
    assert row["error"] == "needs timm's trained deit_tiny_patch16_224, which could not be downloaded"
    model = timm.create_model("deit_tiny_patch16_224")
    save_file(model.state_dict(), tmp_path / "deit_tiny_patch16_224.safetensors")
    monkeypatch.setenv("VITNAS_WEIGHTS", str(tmp_path))
    result = run_papers(ORT, only=["deit-head-similarity"])
    (row,) = result.to_json()["rows"]
    assert row["error"] is None
    assert len(row["parts"]) == 12
    assert 0.9 < row["measured"] <= 1  # untrained attention is nearly uniform
    assert "[" not in papers_markdown(result)


def test_photographs_are_normalised_squares():
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    images = photographs(SimpleNamespace(pretrained_cfg=config))
    assert images.shape == (6, 3, 32, 32)
    assert -1 <= images.min() < -0.5
    assert 0.5 < images.max() <= 1
    assert not torch.equal(images[0], images[1])


def test_the_process_of_blocks_times_and_profiles():
    bench = Bench()
    bench.start({"runtime": "torch", "threads": 1, "batch_size": 2})
    bench.load_blocks(["levit_256.logits", "deit_tiny.norms"])
    samples = bench.time_round()
    assert set(samples) == {"levit_256.logits", "deit_tiny.norms"}
    assert all(ms > 0 for times in samples.values() for ms in times)
    bench.swins = [lambda: torch.ones(9) + 1, lambda: torch.ones(99, 99) @ torch.ones(99, 99)]
    first, second = bench.profile_round()["profiles"]
    assert first[1] == 1 > second[1]


def test_blocks_are_measured_as_onnx():
    names = ["block/deit_tiny", "block/twins_pair", "block/none"]
    found = time_networks(names, Settings(threads=1), 2)
    assert isinstance(found["block/none"], MeasureError)
    small, large = (min(map(min, found[name].rounds_ms)) for name in names[:2])  # other programs can only add
    assert small < large


@pytest.mark.slow
def test_a_claim_in_earnest():
    (row,) = run_papers(Settings(threads=default_threads()), 3, only=["levit-block"]).to_json()["rows"]
    assert row["error"] is None
    assert (row["runtime"], row["threads"], row["others"][0]["runtime"]) == ("torch", 1, "onnxruntime")
    assert 0.3 < row["measured"] < 3
    assert all(us > 0 for part in row["parts"] for us in part["measured_us"][1:])


@pytest.mark.slow
def test_swin_at_a_fifth_attention_in_earnest():
    (row,) = run_papers(Settings(threads=default_threads()), only=["swin-mhsa-share"]).to_json()["rows"]
    assert row["error"] is None
    assert [round(part["mhsa_share"], 2) for part in row["parts"]] == [0.5, 0.29, 0.21]
    assert all(0 < part["memory_bound_share"] < 1 for part in row["parts"])


def test_importing_the_suite_imports_no_torch():
    code = "import sys, nas.bench.papers; sys.exit(bool({'torch', 'timm', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_published_units():
    assert Published("CPU", 2000, 3000, "us").ratio == 1.5
    assert Published("CPU", 3000, 2000).ratio == 1.5
