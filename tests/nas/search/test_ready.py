"""Which ready networks race, at which resolutions, and how few measurements show it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nas.errors import UserError
from nas.networks.build import create
from nas.networks.store import Store
from nas.networks.timm_network import TimmNetwork
from nas.quality.candidate import Kind
from nas.search import ready
from nas.search.ready import Entrant, Field, find_entrants
from search_spaces import create_model, get_arch

REFERENCE = (300e6, 4.0)
SIZES = (64, 96, 128, 160, 192, 224)


def entrant(name: str, mmacs: float, group: str = "cnn", sizes: tuple[int, ...] = SIZES) -> Entrant:
    """mmacs: at 224 px."""
    made = Entrant(name, group, TimmNetwork("lcnet_050"), sizes)
    made.__dict__["_macs_per_pixel"] = mmacs * 1e6 / 224**2
    return made


def true_ms(one: Entrant, px: int) -> float:
    """About linear in pixels, with a part that is not."""
    return 0.1 + 4e-9 * one.macs(px)


def race(entrants: list[Entrant], budget_ms: float) -> tuple[list[str], dict[str, float]]:
    """What is measured, in order, and what it takes."""
    field, latencies, tried = Field(entrants, budget_ms, REFERENCE), {}, []
    while found := field.next(latencies, tried):
        label = found[0].entrant.label(found[0].px)
        assert label not in tried
        tried.append(label)
        latencies[label] = true_ms(found[0].entrant, found[0].px)
    return tried, latencies


@pytest.mark.parametrize("budget_ms", [0.12, 0.2, 0.35, 0.6, 1.0])
def test_the_highest_resolution_within_the_budget_is_found_with_few_measurements(budget_ms: float) -> None:
    one = entrant("one", 150)
    tried, latencies = race([one], budget_ms)
    fitting = [px for px in SIZES if true_ms(one, px) <= budget_ms]
    assert len(tried) <= 3
    if fitting:
        assert one.label(max(fitting)) in latencies
    else:
        assert tried == ["one@64"]


def test_a_network_that_hardly_fits_is_offered_at_a_lower_resolution_too_but_last() -> None:
    """In the closing run it may be over the budget."""
    one, other = entrant("one", 150, sizes=(64, 96, 128)), entrant("other", 120, sizes=(96,))
    field = Field([one, other], 1.0, REFERENCE)
    hardly = {"one@128": 0.95}
    opened = field.next(hardly, ["one@128"])
    assert [(each.entrant.label(each.px), each.urgent) for each in opened] == [("other@96", False), ("one@96", False)]
    assert [each.entrant.name for each in field.next({"one@128": 0.85}, ["one@128"])] == ["other"]
    tried = ["one@128", "other@96"]
    assert [each.px for each in field.next(hardly | {"one@96": 0.92}, [*tried, "one@96"])] == [64], "hardly fits too"
    assert not field.next(hardly | {"one@96": 0.6}, [*tried, "one@96"])
    assert not field.next(hardly, [*tried, "one@96"]), "being measured"


def test_a_network_that_surely_cannot_fit_is_not_measured_but_listed() -> None:
    small, large = entrant("small", 100), entrant("large", 4000, "another")
    field = Field([small, large], 0.15, REFERENCE)
    tried, latencies = race([small, large], 0.15)
    assert {label.partition("@")[0] for label in tried} == {"small"}
    assert "large@64 and more" in field.over(latencies)
    assert any(line.startswith("small@") for line in field.over(latencies)), "its higher resolutions"
    assert set(field.over({})) == {"large@64 and more", "small@96 and more"}


def test_every_group_comes_first_then_what_its_networks_need_then_the_others() -> None:
    networks = [entrant("a1", 100, "a"), entrant("a2", 300, "a"), entrant("b1", 10, "b"), entrant("c1", 30, "c")]
    field = Field(networks, 0.4, REFERENCE)
    opened = field.next({}, [])
    assert {each.entrant.group for each in opened[:3]} == {"a", "b", "c"}
    assert [each.urgent for each in opened] == [True, True, True, False]
    first = opened[0]
    label = first.entrant.label(first.px)
    after = field.next({label: 10.0}, [label])
    assert after[0].entrant.group in {"a", "b", "c"} - ({first.entrant.group} if first.entrant.group != "a" else set())
    tried, _ = race(networks, 0.4)
    assert {label.partition("@")[0] for label in tried} == {"a1", "a2", "b1", "c1"}


def test_a_group_whose_first_network_is_over_the_budget_sends_another() -> None:
    larger, smaller = entrant("larger", 100, sizes=(64,)), entrant("smaller", 20, sizes=(64,))
    field = Field([larger, smaller], 0.4, REFERENCE)
    assert [(each.entrant.name, each.urgent) for each in field.next({}, [])] == [("larger", True), ("smaller", False)]
    label = larger.label(64)
    (then,) = field.next({label: 0.5}, [label])
    assert (then.entrant.name, then.urgent) == ("smaller", True)
    (then,) = field.next({}, [label], failed=[label])
    assert (then.entrant.name, then.urgent) == ("smaller", True)
    (then,) = field.next({label: 0.3}, [label])
    assert (then.entrant.name, then.urgent) == ("smaller", False)


def test_two_resolutions_foretell_a_third_on_a_line() -> None:
    one = entrant("one", 100)
    found = one.forecast(192, {64: 0.3, 128: 0.6})
    assert found.likely == pytest.approx(0.3 + 0.3 * (192**2 - 64**2) / (128**2 - 64**2))
    assert (found.low, found.high) == pytest.approx((found.likely / ready.LINE, found.likely * ready.LINE))
    assert one.forecast(128, {64: 0.3, 128: 0.6}).low == 0.6
    wide = one.forecast(128, {64: 0.3})
    assert 0.6 < wide.low < wide.likely < 1.2 < wide.high
    falling = one.forecast(192, {64: 0.6, 128: 0.5})
    assert falling.low < falling.likely, "noise gives no line"


def zoo(folder: Path, *names: str) -> Store:
    from safetensors.torch import save_file

    folder.mkdir()
    for name in names:
        path = folder / f"{name}.safetensors"
        if name == "lcnet_050":
            save_file(create(TimmNetwork(name)).state_dict(), path)
        else:
            arch = get_arch(name)
            save_file(create_model(arch.at(96) if arch.family == "levit" else arch).state_dict(), path)
    return Store(folder, lambda _: None)


def test_networks_whose_weights_are_here_race_at_their_checkpoints_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.connection.unreachable", lambda: "no internet")
    monkeypatch.delenv("VITNAS_WEIGHTS", raising=False)
    monkeypatch.setattr("nas.networks.pretrained.cached", lambda *_: None)
    store = zoo(tmp_path / "zoo", "levit_128s", "lcnet_050", "sepvit_lite")
    found, lacking = find_entrants(["levit", "sepvit"], None, 7, store)
    by_name = {each.name: each for each in found}
    assert set(by_name) == {"levit_128s", "timm/lcnet_050", "sepvit_lite"}
    assert {"levit_192", "timm/efficientnet_b0"} <= set(lacking)
    assert not any(name.startswith("shvit") for name in lacking), "its family is not searched"
    assert by_name["levit_128s"].sizes == (64, 96), "its position biases are those of 96 px"
    assert by_name["timm/lcnet_050"].sizes == SIZES
    assert (by_name["levit_128s"].group, by_name["timm/lcnet_050"].group) == ("levit", "PP-LCNet (arXiv 2109.15099)")
    made = by_name["timm/lcnet_050"].at(96)
    assert (made.kind, made.name, made.network.resolution) == (Kind.READY, "timm/lcnet_050@96", 96)
    assert made.network.num_classes == 7
    fixed, _ = find_entrants(["levit"], 32, 7, store)
    assert {each.sizes for each in fixed} == {(32,)}
    monkeypatch.setattr("nas.connection.unreachable", lambda: None)
    reached, lacking = find_entrants(["levit", "sepvit"], None, 7, Store(tmp_path / "zoo", lambda _: None))
    assert "levit_192" in {each.name for each in reached}
    assert lacking == ["sepvit_tiny", "sepvit_small", "sepvit_base"], "nobody published any"


@pytest.mark.parametrize("resolution", [None, 64])
def test_a_damaged_file_of_weights_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolution: int | None
) -> None:
    from safetensors.torch import load_file, save_file

    from search_spaces import create_model as create

    monkeypatch.setattr("nas.connection.unreachable", lambda: "no internet")
    monkeypatch.delenv("VITNAS_WEIGHTS", raising=False)
    monkeypatch.setattr("nas.networks.pretrained.cached", lambda *_: None)
    store = zoo(tmp_path / "zoo", "shvit_s1", "levit_128s")
    file = tmp_path / "zoo" / "shvit_s1.safetensors"
    weights = load_file(file)
    next(value for value in weights.values() if value.is_floating_point()).fill_(torch.nan)
    save_file(weights, file)
    built: list[str] = []
    monkeypatch.setattr(
        "search_spaces.create_model", lambda arch, **options: built.append(arch.family) or create(arch, **options)
    )
    found, lacking = find_entrants(["levit", "shvit"], resolution, 7, store)
    assert ([each.name for each in found], "shvit_s1" in lacking) == (["levit_128s"], False)
    assert store.digests.keys() == {"levit_128s"}, "a study does not begin with it"
    assert sorted(built) == ["levit", "shvit"], "each file is loaded once"
    assert list(store.left_out) == ["shvit_s1"]
    assert f"{file}: the weights are not finite" in store.left_out["shvit_s1"]
    with pytest.raises(UserError, match="the weights are not finite"):
        store.get(get_arch("shvit_s1"))
    file.write_bytes(b"weights")
    (tmp_path / "zoo" / "shvit_s2.safetensors").write_bytes(b"weights")
    with pytest.raises(
        UserError, match=r"neither .* \(nor can the weights of shvit_s2 be used\): replace or remove them$"
    ):
        find_entrants(["shvit"], resolution, 7, Store(tmp_path / "zoo", lambda _: None))
    (tmp_path / "zoo" / "shvit_s2.safetensors").unlink()
    with pytest.raises(UserError, match=r"shvit_s1\.safetensors: neither .*: replace or remove it"):
        find_entrants(["shvit"], resolution, 7, Store(tmp_path / "zoo", lambda _: None))
