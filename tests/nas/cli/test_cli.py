"""The command line as a user meets it: bad input, the small verbs, and what they print."""

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from nas.errors import UserError
from nas.files import tell
from search_spaces import get_arch


@pytest.fixture
def arch_file(tmp_path: Path):
    """Write a changed arch.json and return its path."""

    def write(change=lambda doc: doc) -> str:
        path = tmp_path / "arch.json"
        document = change(json.loads(get_arch("efficientvit_m0").to_json()))
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return str(path)

    return write


@pytest.mark.parametrize("budget", ["2", "-1ms", "2mss", "0ms", "", "ms", "nan ms", "1e3ms", "two"])
def test_bad_budget(vitnas, tmp_path, budget):
    vitnas.refused(vitnas("search", "--out", str(tmp_path / "runs"), f"--latency-budget={budget}"), "budget", "ms")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--family", "levitt", ("levit",)),
        ("--family", "resnet", ("unknown family",)),
        ("--device", "tpu", ("unknown device",)),
        ("--device", "cuda", ("cpu",)),
        ("--runtime", "onnxruntimes", ("onnxruntime",)),
        ("--sampler", "tpee", ("tpe",)),
        ("--threads", "0", ("threads",)),
        ("--threads", "4096", ("threads",)),
        ("--batch-size", "0", ("batch",)),
        ("--trials", "0", ("trials",)),
        ("--trials", "many", ("trials",)),
        ("--num-classes", "0", ("num-classes",)),
        ("--timeout", "soon", ("10m",)),
        ("--study", "../elsewhere", ("study",)),
        ("--quality", "x", ("quality",)),
        ("--storage", "postgresql://me:secret@127.0.0.1:1/none", ("127.0.0.1",)),
        ("--storage", "nonsense://x", ("nonsense",)),
    ],
)
def test_bad_search_option(vitnas, tmp_path, option, value, words):
    if (option, value) == ("--device", "cuda"):
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
    result = vitnas("search", "--out", str(tmp_path / "runs"), "--latency-budget", "2ms", option, value)
    vitnas.refused(result, *words)
    assert "secret" not in result[2]
    assert not list((tmp_path / "runs").rglob("study.journal"))


def test_the_environment_names_a_storage_whose_password_is_not_told(vitnas, tmp_path, monkeypatch):
    monkeypatch.setenv("VITNAS_STORAGE", "postgresql://me:secret@127.0.0.1:1/none")
    result = vitnas("search", "--out", str(tmp_path / "runs"), "--latency-budget", "2ms")
    vitnas.refused(result, "postgresql://me:***@127.0.0.1:1/none")
    assert "secret" not in result[2]


def test_a_folder_of_weights_is_for_pretrained_networks(vitnas, tmp_path):
    words = ("search", "--latency-budget", "2ms", "--out", str(tmp_path / "runs"), "--weights-from", str(tmp_path))
    vitnas.refused(vitnas(*words), "--weights-from", "--data")
    vitnas.refused(vitnas(*words, "--data", "x", "--from-scratch"), "--weights-from", "--from-scratch")
    vitnas.refused(vitnas("search", "--latency-budget", "2ms", "--teacher", "levit_128s"), "--teacher", "--data")


def test_unwritable_out(vitnas, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("kept")
    vitnas.refused(vitnas("search", "--latency-budget", "2ms", "--out", str(blocker)), "--out")
    assert blocker.read_text() == "kept"


@pytest.mark.parametrize("verb", [("show",), ("bench",), ("export", "--out", "x")])
def test_unknown_model_names_near_ones(vitnas, verb):
    vitnas.refused(vitnas(*verb, "efficientvit_m9"), "efficientvit_m")


def test_unknown_verb_and_missing_option(vitnas):
    vitnas.refused(vitnas("serch"), "search")
    vitnas.refused(vitnas("search"), "--latency-budget")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda doc: json.dumps(doc)[:200], "JSON"),
        (lambda doc: {**doc, "stages": 3}, "stages"),
        (lambda doc: {**doc, "extra": 1}, "extra"),
        (lambda doc: {**doc, "stem": [-8, 16, 32]}, "stem"),
        (lambda doc: {**doc, "stem": [8, 16, 10**9]}, "stem"),
        (lambda doc: {**doc, "resolution": 10**6}, "resolution"),
        (lambda doc: {**doc, "family": "vgg"}, "vgg"),
        (lambda doc: {**doc, "version": 2}, "version"),
        (lambda doc: {**doc, "stages": [{**doc["stages"][0], "downsample": doc["stages"][1]["downsample"]}]}, "first"),
        (lambda doc: [doc], "object"),
        (lambda doc: "\x00\xff", "JSON"),
    ],
)
@pytest.mark.parametrize("verb", [("show",), ("bench",), ("export", "--out", "{out}")])
def test_bad_arch_file(vitnas, arch_file, tmp_path, verb, change, word):
    verb = [part.format(out=tmp_path / "exported") for part in verb]
    vitnas.refused(vitnas(*verb, arch_file(change)), "arch.json", word)
    assert not (tmp_path / "exported").exists()


def test_broken_onnx_file(vitnas, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a network")
    vitnas.refused(vitnas("bench", str(path)), "model.onnx")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: fetch or export it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"\x08\x08broken", "is no ONNX file, or a damaged one"),
    ],
)
def test_show_tells_what_a_file_is_that_is_no_network(vitnas, tmp_path, content, said):
    (tmp_path / "broken.onnx").write_bytes(content)
    vitnas.refused(vitnas("show", str(tmp_path / "broken.onnx")), "broken.onnx", said)


def test_export_weights_that_do_not_fit(vitnas, tmp_path):
    import torch

    path, out = tmp_path / "weights.pth", tmp_path / "exported"
    torch.save({"stem.0.linear.weight": torch.zeros(1)}, path)
    vitnas.refused(
        vitnas("export", "efficientvit_m0", "--weights", str(path), "--out", str(out)), "lack 692 of the 693 tensors"
    )
    vitnas.refused(
        vitnas("export", "efficientvit_m0", "--weights", str(tmp_path / "none.pth"), "--out", str(out)), "no such file"
    )


class Exploding:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_export_refuses_a_pickle_with_code(vitnas, tmp_path, monkeypatch):
    import pickle

    monkeypatch.chdir(tmp_path)
    Path("weights.pth").write_bytes(pickle.dumps({"a": Exploding()}))
    vitnas.refused(vitnas("export", "efficientvit_m0", "--weights", "weights.pth", "--out", "out"), "state dict")
    assert not Path("exploded").exists()


def test_show(vitnas, arch_file):
    code, out, _ = vitnas("show", arch_file())
    assert code == 0
    assert "2.35 M parameters" in out
    assert "prior" in out
    assert "accuracy" not in out
    code, out, _ = vitnas("show", "shvit_s1", "--json")
    assert json.loads(out)["params"] == 6_330_808


def test_bench_json_is_to_the_first_row(vitnas, exports_here, monkeypatch):
    from nas.measure.device import compare

    def without_waiting(*args):
        """Each network's fastest inference in place of all: other processes only add to it."""
        return {
            name: replace(found, rounds_ms=[[min(map(min, found.rounds_ms))] * len(each) for each in found.rounds_ms])
            for name, found in compare(*args).items()
        }

    monkeypatch.setattr("nas.export.side_by_side.compare", without_waiting)
    code, out, _ = vitnas("bench", "efficientvit_m0", "shvit_s1", "--rounds", "6", "--threads", "1", "--json")
    rows = json.loads(out)["results"]
    assert code == 0
    assert [row["model"] for row in rows] == ["efficientvit_m0", "shvit_s1"]
    assert rows[0]["ratio"] == 1
    assert rows[1]["ratio"] == pytest.approx(rows[1]["latency_ms"] / rows[0]["latency_ms"], rel=0.5)
    assert rows[0]["ci"][0] <= rows[0]["latency_ms"] <= rows[0]["ci"][1]


def test_export_folder(vitnas, tmp_path):
    import onnx

    out = tmp_path / "exported"
    code, text, _ = vitnas("export", "efficientvit_m0", "--out", str(out), "--num-classes", "7")
    assert code == 0
    assert "untrained" in text
    model = onnx.load(out / "model.onnx")
    props = {p.key: p.value for p in model.metadata_props}
    assert props["vitnas.weights"] == "untrained"
    assert json.loads(props["vitnas.arch"])["num_classes"] == 7
    assert not (out / "model.safetensors").exists()
    assert {path.name for path in out.iterdir()} == {"arch.json", "model.onnx", "preprocess.json"}


def test_help_is_fast_and_has_examples():
    command = [sys.executable, "-m", "nas.cli", "--help"]
    for _ in range(20):  # other programs can only add
        before = seconds_of_children()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        fast = seconds_of_children() - before < 0.5
        assert "vitnas search --latency-budget 2ms --device cpu" in done.stdout
        if fast:
            return
    pytest.fail("--help takes 0.5 s of a CPU or more, every time")


def seconds_of_children() -> float:
    """CPU time of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("verb", ["search", "models", "show", "bench", "export", "predict", "dashboard"])
def test_every_verb_has_help_with_an_example(vitnas, verb):
    code, out, _ = vitnas(verb, "--help")
    assert code == 0
    assert f"Example:  vitnas {verb}" in out


def test_dashboard_bad_input(vitnas, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vitnas.refused(vitnas("dashboard"), "runs/")
    vitnas.refused(vitnas("dashboard", "nowhere"), "nowhere")


def test_no_arguments_prints_the_help(vitnas):
    code, out, _ = vitnas()
    assert code == 2
    assert "\n  search " in out


def test_paths_that_cannot_be_looked_up(vitnas):
    vitnas.refused(vitnas("show", "x" * 300), "unknown model")
    vitnas.refused(vitnas("show", "y/" + "x" * 300 + "/arch.json"), "no such file")


def test_batch_larger_than_memory(vitnas, tmp_path):
    vitnas.refused(
        vitnas("export", "shvit_s1", "--batch-size", "100000000", "--out", str(tmp_path / "out")), "cannot be exported"
    )


def test_a_classifier_left_random_is_not_exported(vitnas, tmp_path):
    import onnx
    from safetensors.torch import save_file

    from search_spaces import create_model

    save_file(create_model("shvit_s1").state_dict(), tmp_path / "weights.safetensors")
    words = ("export", "shvit_s1", "--weights", str(tmp_path / "weights.safetensors"), "--out", str(tmp_path / "out"))
    vitnas.refused(vitnas(*words, "--num-classes", "7"), "add --num-classes 1000")
    assert not (tmp_path / "out").exists()
    code, out, _ = vitnas(*words)
    assert code == 0
    assert "untrained" not in out
    props = {p.key: p.value for p in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert props["vitnas.weights"] != "untrained"
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_full_disk_anywhere_has_its_exit_code(vitnas, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nas.networks.targets.find_target", full)
    assert vitnas("show", "x") == (1, "", "vitnas: input or output: No space left on device\n")


def test_sigterm_ends_a_command_as_ctrl_c_does(vitnas, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("nas.networks.targets.find_target", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert vitnas("show", "efficientvit_m0") == (130, "", "interrupted\n")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupt_that_python_ignores_is_raised_again(vitnas, monkeypatch):
    def interrupted_in_a_callback(_):
        def callback(_):
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))  # the handler runs here

        thing = threading.Event()
        seen = weakref.ref(thing, callback)
        del thing
        assert seen() is None
        time.sleep(5)
        raise AssertionError("the interrupt was lost")

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr("nas.networks.targets.find_target", interrupted_in_a_callback)
    assert vitnas("show", "efficientvit_m0") == (130, "", "interrupted\n")


VERBS = ("search", "runs", "models", "show", "bench", "prune", "train", "export", "predict", "evaluate", "dashboard")


@pytest.mark.parametrize("verb", VERBS)
def test_help_at_80_columns(vitnas, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = vitnas(verb, "-h")
    assert code == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    for word in ("Exit codes:", "-v, --verbose", "-q, --quiet", "-h, --help", f"  vitnas {verb}"):
        assert word in out
    assert "130 Ctrl-C" in " ".join(out.split()) or verb in ("runs", "show", "export", "dashboard")


def test_the_list_of_verbs_is_not_cut(vitnas, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = vitnas("--help")
    assert "..." not in out.partition("\n")[2]
    assert "--install-completion" in out


def test_version(vitnas, monkeypatch):
    code, out, _ = vitnas("--version")
    assert code == 0
    assert len(out.splitlines()) == 1
    assert all(f"{name} " in out for name in ("vitnas", "torch", "onnxruntime", "optuna", "Python"))
    whole = metadata.version

    def for_gpus(name):
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError
        return "1.9" if name == "onnxruntime-gpu" else whole(name)

    monkeypatch.setattr(metadata, "version", for_gpus)
    assert ", onnxruntime-gpu 1.9, optuna " in vitnas("--version")[1]


def test_an_unknown_option_names_the_near_one(vitnas):
    vitnas.refused(vitnas("search", "--latency-bugdet", "2ms"), "--latency-budget")


def test_quiet_tells_errors_only(vitnas, monkeypatch):
    def refuse(_):
        tell("waiting for somebody")
        raise UserError("no such network")

    monkeypatch.setattr("nas.export.folder.find_target", refuse)
    assert vitnas("export", "x", "--out", "y")[2] == "waiting for somebody\nvitnas: no such network\n"
    assert vitnas("export", "x", "--out", "y", "-q")[2] == "vitnas: no such network\n"


def test_verbose_tells_tracebacks(vitnas, monkeypatch, caplog):
    def refuse(_):
        raise UserError("no such network") from ValueError("because of this")

    monkeypatch.setattr("nas.networks.targets.find_target", refuse)
    vitnas.refused(vitnas("show", "x"), "no such network")
    log = logging.getLogger("nas")
    try:
        code, _, err = vitnas("show", "x", "-v")
        assert code == 2
        assert "because of this" in err
        assert "Traceback" in err
    finally:
        log.handlers.clear()
        log.setLevel(logging.NOTSET)
