"""`vitnas push`, to a stand-in of the hub."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hub.stand_in import TOKEN, Hub
from huggingface_hub import HfApi, ModelCard, constants
from PIL import Image
from toy_onnx import write_toy

from nas.errors import UserError
from nas.export.card import Accuracy, Card, Latency, Preprocess
from nas.export.folder import save_model, save_onnx
from nas.export.options import FileOptions
from nas.export.quantize import quantize
from nas.hub.facts import RunFacts, public_name
from nas.hub.folder import write_to
from nas.hub.page import _of_run, _run_table
from nas.hub.push import push
from nas.hub.request import Plan, PushRequest
from nas.networks.build import create, for_inference, randomise
from nas.networks.targets import find_target
from nas.networks.timm_network import TimmNetwork
from nas.networks.weights import load

LCNET = TimmNetwork("lcnet_050", 32, 3)
CLASSES = ["an_owl", "b|at", "ca\nt"]
SETTINGS = {"device": "ssh://someone@board:22", "runtime": "onnxruntime", "precision": "fp32", "threads": 1}
MACHINE = SETTINGS | {"batch_size": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search's folder, whose files name folders, a user and a host of this machine."""
    run = tmp_path_factory.mktemp("someones") / "run"
    best, data = run / "best", str(run.parent / "tin20")
    torch.manual_seed(1)
    model = create(LCNET)
    randomise(model)
    card = Card(
        preprocess=Preprocess.own(32),
        classes=CLASSES,
        accuracy=Accuracy.counted(61.0, 200, f"{data}, held out"),
        latency=Latency(ms=1.5, ci=(1.4, 1.6), cpu="Chip 9", **MACHINE),
    )
    save_model(model, best)
    save_onnx(model, best, FileOptions(), trained=True, card=card)
    (best / "model.seen.npy").write_bytes(b"digests")
    closing = [
        {"label": "trial 5", "latency_ms": 1.5, "ci_low_ms": 1.4, "ci_high_ms": 1.6, "accuracy": {"mean": 61.0}},
        {"label": f"{run.parent}/other", "latency_ms": 2.5, "ci_low_ms": None, "ci_high_ms": None, "accuracy": None},
    ]
    found = {"data": {"name": data, "train": 900, "val": 200}, "final": closing, "winner": {"label": "trial 5"}}
    found |= {"settings": MACHINE}
    (run / "result.json").write_text(json.dumps(found))
    return run


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def of(run: Path, **changes: object) -> PushRequest:
    return PushRequest(str(run), "me/net", **changes)


def test_a_push_is_one_commit_of_a_network_that_every_command_takes(hub: Hub, known: None, made: Path) -> None:
    result = push(of(made))
    assert result is not None
    (repository,) = hub.repositories.values()
    files = repository.revisions["main"]
    assert sorted(files) == [
        *("README.md", "arch.json", "config.json", "labels.txt"),
        *("model.onnx", "model.safetensors", "preprocess.json"),
    ]
    assert [(file.name, file.bytes) for file in result.files] == [(n, len(c)) for n, c in sorted(files.items())]
    assert (result.url, result.commit, result.made) == (f"{hub.url}/me/net", repository.commit("main"), True)
    assert len(repository.messages) == 1
    assert not repository.private
    target, ours, theirs = find_target("hf-hub:me/net"), load(str(made)), load("hf-hub:me/net")
    assert target.timm == LCNET
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert target.folder is not None
    assert Card.read(target.folder).preprocess == Preprocess.own(32)


def test_nothing_of_this_machine_is_uploaded(hub: Hub, known: None, made: Path) -> None:
    push(of(made))
    content = b"".join(hub.repositories["me/net"].revisions["main"].values())
    for private in (str(made.parent), made.parent.name, "someone", "board", "digests"):
        assert private.encode() not in content, private
    onnx = made.parent / "uploaded.onnx"
    onnx.write_bytes(hub.repositories["me/net"].revisions["main"]["model.onnx"])
    card = Card.read(onnx)
    assert card.accuracy is not None
    assert card.latency is not None
    assert (card.accuracy.data, card.latency.device, card.latency.cpu) == ("tin20, held out", "cpu", "Chip 9")
    assert card.classes == CLASSES


def test_timm_loads_what_was_pushed(hub: Hub, known: None, made: Path) -> None:
    """The oracle: timm's own loader."""
    import timm
    from timm.data.config import resolve_data_config

    push(of(made))
    theirs, ours = timm.create_model("hf-hub:me/net", pretrained=True), load(str(made))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(theirs.eval()(images), ours.eval()(images))
    told = resolve_data_config(model=theirs)
    assert tuple(told["input_size"]) == (3, 32, 32)
    assert (told["interpolation"], told["crop_pct"]) == ("bicubic", 0.875)


def test_the_page_says_what_the_run_found(hub: Hub, known: None, made: Path) -> None:
    push(of(made))
    page = hub.repositories["me/net"].revisions["main"]["README.md"].decode()
    card = ModelCard(page).data
    assert (card.library_name, card.pipeline_tag) == ("timm", "image-classification")
    assert card.eval_results is not None
    assert (card.eval_results[0].metric_value, card.eval_results[0].dataset_name) == (61.0, "tin20, held out")
    assert "timm/lcnet_050, 32 px, 3 classes" in page
    assert r"Classes: an\_owl, b\|at, ca\\nt." in page
    assert re.search(
        r"\| model.onnx \| \d+.\d\d MB \| 61.0% top-1 \(95%: 54.1 to 67.5, 200 images\), tin20, held out \| "
        r"1.50 ms \(95%: 1.40 to 1.60\) \| Chip 9, onnxruntime fp32, 1 thread, batch 1 \|",
        page,
    )
    assert "| trial 5 (this network) | 61.0% | 1.50 ms (95%: 1.40 to 1.60) |" in page
    assert "| other |  | 2.50 ms |" in page
    assert "Trained on tin20 (900 for training, 200 for validation)." in page


def test_the_page_classifies_a_photo_with_and_without_vitnas(
    hub: Hub, known: None, made: Path, tmp_path: Path, vitnas, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(of(made))
    files = hub.repositories["me/net"].revisions["main"]
    (tmp_path / "model.onnx").write_bytes(files["model.onnx"])
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg", quality=100)
    (snippet,) = re.findall(r"^```python\n(.*?)^```", files["README.md"].decode(), re.M | re.S)
    ran = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stderr == ""
    from nas.data.images import plain_transform

    with torch.inference_mode():
        pixels = plain_transform(32)(Image.open(tmp_path / "photo.jpg"))
        logits = for_inference(load(str(made)))(pixels[None])
    best = CLASSES[int(logits.argmax())]
    assert ran.stdout == f"{best}\n"
    (words,) = re.findall(r"^vitnas (predict .*)$", files["README.md"].decode(), re.M)
    monkeypatch.chdir(tmp_path)
    code, out, _ = vitnas(*words.split(), "--json")
    assert code == 0
    assert json.loads(out)["predictions"][0]["classes"][0]["class"] == best


def test_the_page_s_code_is_right_for_a_file_that_normalises_itself(made: Path, tmp_path: Path) -> None:
    run, look = tmp_path / "run", tmp_path / "look"
    model = load(str(made))
    save_model(model, run)
    card = Card(preprocess=Preprocess.own(32), classes=CLASSES)
    save_onnx(model, run, FileOptions(batch_size=None, in_graph=True), trained=True, card=card)
    lower = write_toy(run / "model.int8.onnx", card=card, softmax=True)
    quantize(lower)
    write_to(of(run), look)
    assert "\n\nmodel.int8.onnx is int8; in float: 1 x softmax.\n\n" in (look / "README.md").read_text()
    Image.new("RGB", (40, 50), (200, 30, 90)).save(look / "photo.jpg")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (look / "README.md").read_text(), re.M | re.S)
    ran = subprocess.run([sys.executable, "-c", snippet], cwd=look, capture_output=True, text=True)
    assert (ran.stdout.rstrip("\n") in CLASSES, ran.stderr) == (True, "")


def test_a_later_push_replaces_and_removes_what_it_says(hub: Hub, known: None, made: Path) -> None:
    push(of(made))
    repository = hub.repositories["me/net"]
    repository.revisions["main"] |= {"model.int8.onnx": b"older", "notes.md": b"of the user"}
    plans: list[Plan] = []

    def refuse(plan: Plan) -> bool:
        plans.append(plan)
        return False

    assert push(of(made), refuse) is None
    assert len(repository.messages) == 1
    (plan,) = plans
    assert not plan.made
    assert plan.removed == ("model.int8.onnx",)
    assert plan.lines[0].startswith("me/net: a commit to a public repository, 7 files, ")
    assert plan.lines[-1] == "it removes model.int8.onnx"
    result = push(of(made))
    assert result is not None
    assert not result.made
    assert "model.int8.onnx" not in repository.revisions["main"]
    assert "notes.md" in repository.revisions["main"]
    assert len(repository.messages) == 2


def test_a_branch_and_a_private_repository(hub: Hub, known: None, made: Path) -> None:
    push(of(made, private=True, revision="v1"))
    repository = hub.repositories["me/net"]
    assert repository.private
    assert repository.revisions["main"] == {}
    assert b"hf download me/net --revision v1 --local-dir net" in repository.revisions["v1"]["README.md"]
    assert find_target("hf-hub:me/net@v1").timm == LCNET


def test_without_a_token_and_with_a_wrong_one(hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^could not push to me/net \(there is no token: log in with `hf auth login`"):
        push(of(made))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"^could not push to me/net \(the hub does not know this token: ") as error:
        push(of(made))
    assert "hf_wrong" not in str(error.value)
    assert hub.repositories == {}


def test_a_hub_that_does_not_answer(hub: Hub, known: None, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"^could not push to me/net \(.*refused\): the same command tries again$"):
        push(of(made))


def test_a_repository_that_was_made_for_a_commit_that_fails_is_told(
    hub: Hub, known: None, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the connection was lost")

    monkeypatch.setattr(HfApi, "create_commit", fail)
    with pytest.raises(UserError, match=r"lost\); the repository was made, and is empty: the same"):
        push(of(made))


def test_a_hub_without_xet_is_not_waited_for(
    hub: Hub, known: None, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("huggingface_hub._commit_api._upload_xet_files", lambda **_: pytest.fail("it waits"))
    assert push(of(made)) is not None
    assert constants.HF_HUB_DISABLE_XET is False


def test_ctrl_c_ends_an_upload(hub: Hub, known: None, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the main thread alone."""

    def interrupted(**_: object) -> None:
        assert threading.current_thread() is threading.main_thread()
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub._commit_api.lfs_upload", interrupted)
    with pytest.raises(KeyboardInterrupt):
        push(of(made))
    assert hub.repositories["me/net"].messages == []


def test_a_folder_that_cannot_be_written_holds_nothing_afterwards(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copyfile

    def full(source: Path, path: Path) -> None:
        copied(source, path)
        if Path(path).parent == tmp_path / "look" and Path(path).name == "model.onnx":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="no space left in"):
        write_to(of(made), tmp_path / "look")
    assert not (tmp_path / "look").exists()


def test_a_public_repository_is_not_made_private(hub: Hub, known: None, made: Path) -> None:
    hub.add("me/net", {})
    with pytest.raises(UserError, match=r"^me/net is public already: make it private on its page, or leave out --priv"):
        push(of(made, private=True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{run}", "net"), "net: give the repository with its owner, as in OWNER/net"),
        (("{run}", "hf-hub:me/net"), "hf-hub:me/net: give the repository as me/net"),
        (("{run}", "me/a b"), "me/a b: Repo id must use alphanumeric chars"),
        (("{run}", "me/net", "--revision", ""), "--revision '': give the name of a branch, such as v1"),
        (("{run}", "me/net"), "nobody can be asked whether to upload: add --yes, or look first with --out DIR"),
        (("{run}", "me/net", "--out", "{run}"), "is not an empty folder: give a new one"),
        (("levit_128s", "me/net", "--yes"), "levit_128s: give the folder of a run"),
        (("{bare}", "me/net", "--yes"), "has no trained weights: `vitnas train` makes some"),
        (("{no_onnx}", "me/net", "--yes"), "has no model.onnx: `vitnas export"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(
    words: tuple[str, ...], said: str, hub: Hub, known: None, made: Path, tmp_path: Path, vitnas
) -> None:
    for name in ("bare", "no_onnx"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "arch.json").write_text(LCNET.to_json())
    (tmp_path / "no_onnx" / "model.safetensors").touch()
    places = {"run": made, "bare": tmp_path / "bare", "no_onnx": tmp_path / "no_onnx"}
    code, out, err = vitnas("push", *(word.format(**places) for word in words))
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert hub.repositories == {}


def test_the_command_pushes(hub: Hub, known: None, made: Path, tmp_path: Path, vitnas) -> None:
    code, out, err = vitnas("push", str(made), "me/net", "--yes", "--json")
    assert code == 0
    assert TOKEN not in out + err
    assert "me/net: a new public repository, 7 files, " in err
    found = json.loads(out)
    assert found["repository"] == "me/net"
    assert {"name", "bytes"} == set(found["files"][0])
    code, out, err = vitnas("push", str(made), "me/net", "--out", str(tmp_path / "look"))
    assert (code, err) == (0, "")
    assert out.endswith("7 files as `vitnas push` would upload them; nothing was uploaded\n")
    files = hub.repositories["me/net"].revisions["main"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "look").iterdir()} == files
    assert len(hub.repositories["me/net"].messages) == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/home/me/tin20", "tin20"),
        ("./images/", "images"),
        ("/data, private/anna/pets", "pets"),
        ("/data, private/anna/pets, held out", "pets, held out"),
        ("hfds/uoft-cs/cifar10", "hfds/uoft-cs/cifar10"),
        ("hfds//home/me/data", "data"),
        ("torch/CIFAR10, held out", "torch/CIFAR10, held out"),
        ("wds//mnt/me/train-{0000..0127}.tar, held out", "train-{0000..0127}.tar, held out"),
    ],
)
def test_images_are_named_without_their_place(name: str, told: str) -> None:
    assert public_name(name) == told


def test_what_a_pruning_says(tmp_path: Path) -> None:
    fields = {
        "data": {"name": "/home/me/pets", "train": 5, "val": 3},
        "settings": MACHINE,
        "hardware": {"cpu": "Chip 9"},
        "before": {"latency_ms": 2.0, "ci": [1.9, 2.1]},
        "after": {"latency_ms": 1.0, "ci": [0.9, 1.1]},
        "accuracy": {
            "before": {"top1": 70.0, "top1_ci": [60, 80]},
            "pruned": {"top1": 50.0},
            "recovered": {"top1": 69.0},
        },
        "kept": "recovered",
    }
    (tmp_path / "prune.json").write_text(json.dumps(fields))
    found = RunFacts.of(tmp_path)
    assert [(row.name, row.top1, row.latency_ms) for row in found.rows] == [
        ("before pruning", 70.0, 2.0),
        ("this network", 69.0, 1.0),
    ]
    assert found.latency is not None
    assert (found.latency.ms, found.latency.device, found.latency.cpu) == (1.0, "cpu", "Chip 9")
    assert found.data == "pets (5 for training, 3 for validation)"
    assert found.title == "Before and after pruning"
    assert _run_table(found).startswith("| network | top-1 | latency |")
    (tmp_path / "prune.json").write_text(json.dumps(fields | {"options": {"unlabelled": "/home/me/photos"}}))
    assert _run_table(RunFacts.of(tmp_path)).startswith("| network | agreement with the unpruned network | latency |")
    assert _of_run(found.latency, "model.onnx") == found.latency
    assert " in fp32" not in _run_table(found)
    lower = fields | {"settings": MACHINE | {"precision": "int8"}}
    (tmp_path / "prune.json").write_text(json.dumps(lower))
    found = RunFacts.of(tmp_path)
    assert "| this network | 69.0% in fp32 | 1.00 ms in int8 (95%: 0.90 to 1.10) |" in _run_table(found)
    assert _of_run(found.latency, "model.onnx") is None
    assert _of_run(found.latency, "model.int8.onnx") == found.latency
    (tmp_path / "prune.json").write_text(json.dumps(lower | {"price": {"top1": 68.0, "top1_ci": [58, 78]}}))
    table = _run_table(RunFacts.of(tmp_path))
    assert "| before pruning | 70.0% in fp32 (95%: 60.0 to 80.0) | 2.00 ms in int8 (95%: 1.90 to 2.10) |" in table
    assert "| this network | 68.0% in int8 (95%: 58.0 to 78.0) | 1.00 ms in int8 (95%: 0.90 to 1.10) |" in table
    (tmp_path / "prune.json").write_text(json.dumps(fields | {"settings": MACHINE | {"precision": "bf16"}}))
    found = RunFacts.of(tmp_path)
    assert "| this network | 69.0% in fp32 | 1.00 ms in bf16 (95%: 0.90 to 1.10) |" in _run_table(found)
    assert _of_run(found.latency, "model.onnx") is None, "its accuracy is of fp32"
    (tmp_path / "prune.json").write_text("{}")
    with pytest.raises(UserError, match=r"prune.json is damaged: it is not what vitnas wrote"):
        RunFacts.of(tmp_path)


def test_what_a_search_of_several_precisions_says(tmp_path: Path) -> None:
    closing = [
        {"label": "trial 5", "latency_ms": 1.5, "precision": "int8", "accuracy": {"mean": 61.0, "precision": "int8"}},
        {"label": "trial 7", "latency_ms": 1.6, "precision": "bf16", "accuracy": {"mean": 60.0}},
        {"label": "trial 9", "latency_ms": 1.7, "accuracy": None},
    ]
    found = {"data": None, "settings": MACHINE, "final": closing, "winner": {"label": "trial 5"}}
    (tmp_path / "result.json").write_text(json.dumps(found))
    facts = RunFacts.of(tmp_path / "best")
    assert facts.title == "The search's closing table"
    assert _run_table(facts).splitlines()[2:] == [
        "| trial 5 (this network) | 61.0% in int8 | 1.50 ms in int8 |",
        "| trial 7 | 60.0% in fp32 | 1.60 ms in bf16 |",
        "| trial 9 |  | 1.70 ms in fp32 |",
    ]
