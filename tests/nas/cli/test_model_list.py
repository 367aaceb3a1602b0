"""`vitnas models`: the published networks, with latencies from this machine's cache."""

import json

import pytest

from nas.cli import model_list
from nas.measure.samples import Measurement


@pytest.fixture
def latencies(monkeypatch):
    """What the cache knows, by the network's name; measuring adds to it."""
    names = {arch: name for name, arch in model_list.archs().items()}
    found: dict[str, Measurement] = {}

    def known(arch, settings):
        result = found.get(names[arch])
        return result and ("2026-11-29T12:00:00+01:00", result)

    monkeypatch.setattr("nas.measure.cache.known", known)
    return found


def timed(ms: float) -> Measurement:
    return Measurement([[ms / 1e3 * 1e3] * 3] * 8)


def test_json(vitnas, latencies):
    latencies["efficientvit_m0"] = timed(1.25)
    code, out, _ = vitnas("models", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert len(rows) == 52
    m0 = rows["efficientvit_m0"]
    assert m0["params"] == 2_349_436
    assert isinstance(m0["macs"], int)
    assert (m0["latency_ms"], m0["ci_ms"], m0["measured"]) == (1.25, [1.25, 1.25], "2026-11-29T12:00:00+01:00")
    assert rows["shvit_s1"]["latency_ms"] is None


@pytest.mark.parametrize("width", ["60", "80", "120"])
def test_the_table_fits(vitnas, latencies, monkeypatch, width):
    from nas.report.tables import console_of

    def narrow():
        console = console_of()
        console.width = int(width)
        return console

    monkeypatch.setattr("nas.cli.model_list.console_of", narrow)
    latencies["efficientvit_m0"] = timed(1.25)
    code, out, _ = vitnas("models")
    assert code == 0
    lines = out.splitlines()
    assert all(len(line.rstrip()) <= int(width) for line in lines)
    row = next(line for line in lines if line.startswith("efficientvit_m0"))
    assert lines[0].split()[0] == "name", "headings take one line"
    assert sum(line.split()[:1] == ["evit_tiny_keep90_drop"] for line in lines) == 1
    assert ("CVPR" in out) == (width == "120")
    assert all(figure in row.split() for figure in ("2.35", "224", "63.2", "1.25"))
    text = " ".join(out.split())
    assert ("Columns left out at" in text) == (width != "120")
    assert "1 of 52 networks" in text
    assert "`vitnas models --measure` measures the others" in text


def test_measure_fills_what_is_not_known(vitnas, latencies, monkeypatch):
    latencies["efficientvit_m0"] = timed(1.25)
    asked = []

    def fill(archs, settings, progress):
        asked.extend(archs)
        progress("shvit_s1", 0, 51)
        latencies["shvit_s1"] = timed(2.0)
        return {"levit_128s": "no answer", "levit_128": "no answer"}

    monkeypatch.setattr("nas.bench.known.fill", fill)
    code, out, err = vitnas("models", "--measure", "--json")
    assert code == 1
    assert "efficientvit_m0" not in asked
    assert len(asked) == 51
    assert {row["name"] for row in json.loads(out) if row["latency_ms"]} == {"efficientvit_m0", "shvit_s1"}
    assert "measuring shvit_s1 0/51" in err
    assert "levit_128s, levit_128 could not be measured: no answer" in err


def test_ctrl_c_while_measuring(vitnas, latencies, monkeypatch):
    def fill(archs, settings, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr("nas.bench.known.fill", fill)
    assert vitnas("models", "--measure")[::2] == (130, "interrupted\n")


def test_a_file_that_is_no_cache(vitnas, monkeypatch, tmp_path):
    monkeypatch.setenv("VITNAS_CACHE", str(tmp_path))
    (tmp_path / "latency.sqlite").write_text("nonsense " * 100)
    for words in (["models"], ["models", "--measure"]):
        vitnas.refused(vitnas(*words), "latency.sqlite", "remove it, and latencies are measured again")
    (tmp_path / "latency.sqlite").unlink()
    (tmp_path / "latency.sqlite").mkdir()
    vitnas.refused(vitnas("models", "--measure"), "latency.sqlite: unable to open database file\n")
