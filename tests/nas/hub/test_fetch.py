"""hf-hub:REPO wherever a network is named, from a stand-in of the hub."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub.stand_in import TOKEN, Files, Hub
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save
from toy_onnx import toy_card, write_toy

from nas.errors import UserError
from nas.evaluate.predict import PredictRequest, predict
from nas.export.card import Card, Preprocess
from nas.networks.build import create
from nas.networks.hub import Unreached, fetch
from nas.networks.targets import find_target
from nas.networks.timm_network import TimmNetwork
from nas.networks.weights import load

ROOT = Path(__file__).parents[3]
LCNET = TimmNetwork("lcnet_050", 32, 3)
PREPROCESS = Preprocess.own(32)
CONFIG = {
    "architecture": "lcnet_050",
    "num_classes": 3,
    "label_names": ["a", "b", "c"],
    "pretrained_cfg": {
        "input_size": [3, 32, 32],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "classifier": "classifier",
    },
}


@pytest.fixture(scope="module")
def weights() -> bytes:
    torch.manual_seed(1)
    return save({name: value.contiguous() for name, value in create(LCNET).state_dict().items()})


def of_vitnas(weights: bytes) -> Files:
    """What `vitnas push` leaves that is read."""
    return {
        "arch.json": LCNET.to_json().encode(),
        "model.safetensors": weights,
        "preprocess.json": PREPROCESS.model_dump_json().encode(),
        "labels.txt": b"a\nb\nc\n",
    }


def of_timm(weights: bytes, **changes: object) -> Files:
    return {"config.json": json.dumps(CONFIG | changes).encode(), "model.safetensors": weights}


def line_of(name: str, hub: Hub, weights: bytes, how: str) -> str:
    repository, _, revision = name.partition("@")
    commit = hub.repositories[repository].commit(revision or "main")[:7]
    return f"weights of hf-hub:{name}: commit {commit}, {how} (sha256 {hashlib.sha256(weights).hexdigest()[:16]})"


def test_a_pushed_network_is_a_run_folder(hub: Hub, weights: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "nas")
    hub.add("me/net", of_vitnas(weights))
    target = find_target("hf-hub:me/net")
    assert target.timm == LCNET
    assert target.weights is not None
    assert target.weights.read_bytes() == weights
    assert Card.read(target.weights.parent) == Card(preprocess=PREPROCESS, classes=["a", "b", "c"])
    assert load("hf-hub:me/net").untrained == []
    assert caplog.messages == [
        "downloading model.safetensors of hf-hub:me/net",
        line_of("me/net", hub, weights, "downloaded"),
    ]
    fetch.cache_clear()  # another process
    assert fetch("me/net").line == line_of("me/net", hub, weights, "from the hub's cache")
    assert sum(path.endswith("model.safetensors") for verb, path in hub.asked if verb == "GET") == 1


def test_a_revision_and_a_resolution(hub: Hub, weights: bytes) -> None:
    repository = hub.add("me/net", {})
    repository.revisions["v1"] = of_vitnas(weights)
    commit = repository.commit("v1")
    for name in ("hf-hub:me/net@v1", f"hf-hub:me/net@{commit}"):
        assert find_target(name).timm == LCNET
    asked = len(hub.asked)
    fetch.cache_clear()
    assert find_target(f"hf-hub:me/net@{commit}@64").timm == LCNET.at(64)
    assert len(hub.asked) == asked  # a commit does not change
    with pytest.raises(UserError, match="trained at 32 px"):
        find_target("hf-hub:me/net@v1@64").weights  # noqa: B018
    with pytest.raises(UserError, match=r"^could not fetch hf-hub:me/net@v2 \(no such branch, tag or commit\)$"):
        find_target("hf-hub:me/net@v2")
    with pytest.raises(UserError, match=r"could not fetch hf-hub:me/net \(no arch.json or config.json there\)"):
        find_target("hf-hub:me/net")


def test_a_repository_of_timms_has_its_own_weights_and_images(hub: Hub, weights: bytes) -> None:
    hub.add("you/lcnet", of_timm(weights))
    target = find_target("hf-hub:you/lcnet")
    assert target.timm == LCNET
    assert target.weights is not None
    model = load("hf-hub:you/lcnet")
    assert model.untrained == []
    card = Card.read(target.weights.parent)
    assert card.classes == ["a", "b", "c"]
    assert card.preprocess == Preprocess(
        resize=35, size=32, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=0.9
    )


def test_timm_reads_its_form_as_we_do(hub: Hub, weights: bytes) -> None:
    """The oracle: timm's own loader on the same repository."""
    import timm
    from timm.data.config import resolve_data_config

    hub.add("you/lcnet", of_timm(weights))
    theirs, ours = timm.create_model("hf-hub:you/lcnet", pretrained=True), load("hf-hub:you/lcnet")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(theirs.eval()(images), ours.eval()(images))
    told, card = resolve_data_config(model=theirs), Card.read(fetch("you/lcnet").document.parent)
    assert card.preprocess is not None
    pixels = card.preprocess.pixels
    assert (tuple(told["mean"]), tuple(told["std"])) == (pixels.mean, pixels.std)
    assert (told["interpolation"], told["crop_pct"]) == (pixels.interpolation, pixels.crop_pct)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "lcnet_51"}, "timm has no network 'lcnet_51': did you mean timm/lcnet_"),
        ({"architecture": None}, "names no architecture of timm's"),
        ({"model_args": {"drop_path_rate": 0.1, "embed_dim": 8}}, "is built with drop_path_rate, embed_dim: only"),
        ({"num_classes": 0}, "lcnet_050 has no classifier"),
        ({"pretrained_cfg": {"input_size": [3, 32, 64]}}, "images of 3x32x64: only square ones"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, r"is not what timm writes: pretrained_cfg.std.0: Input should be gr"),
    ],
)
def test_other_documents_are_refused_before_their_weights_are_downloaded(
    changes: dict[str, object], said: str, hub: Hub, weights: bytes
) -> None:
    hub.add("you/net", of_timm(weights, **changes))
    with pytest.raises(UserError, match=rf"^config.json of hf-hub:you/net:? .*{said}"):
        find_target("hf-hub:you/net")
    assert not any(path.endswith("model.safetensors") for _, path in hub.asked)


def test_a_strangers_arch_is_checked(hub: Hub, weights: bytes) -> None:
    hub.add("you/net", of_vitnas(weights) | {"arch.json": b'{"version": 1, "family": "levit", "stages": []}'})
    with pytest.raises(UserError, match=r"^arch.json of hf-hub:you/net: ") as error:
        find_target("hf-hub:you/net")
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(hub: Hub, weights: bytes) -> None:
    files = of_timm(weights)
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    hub.add("you/net", files)
    with pytest.raises(UserError, match=r"^could not fetch hf-hub:you/net \(no model.safetensors there\)$"):
        find_target("hf-hub:you/net")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("me/none", r"could not fetch hf-hub:me/none \(no such repository, or a private one: log in with `hf auth"),
        ("me/private", r"could not fetch hf-hub:me/private \(no such repository, or a private one: log in"),
        ("me/gated", r"could not fetch hf-hub:me/gated \(its owner grants access: ask for it on the repository's"),
        ("a b/c", "hf-hub:a b/c: Repo id must use alphanumeric chars"),
        ("me/net@", "hf-hub:me/net@: give a branch, a tag or a commit after the @, as in hf-hub:me/net@main"),
    ],
)
def test_what_cannot_be_had_is_one_line(name: str, said: str, hub: Hub, weights: bytes, vitnas) -> None:
    hub.add("me/private", of_vitnas(weights), private=True)
    hub.add("me/gated", of_vitnas(weights), gated=True)
    code, out, err = vitnas("show", f"hf-hub:{name}")
    assert (code, out) == (2, "")
    assert err.startswith("vitnas: ")
    assert err.count("\n") == 1
    with pytest.raises(UserError, match=f"^{said}"):
        find_target(f"hf-hub:{name}")


def test_a_token_opens_what_is_private_and_is_not_shown(
    hub: Hub, weights: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("me/private", of_vitnas(weights), private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="private one: log in") as error:
        find_target("hf-hub:me/private")
    assert "hf_wrong" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find_target("hf-hub:me/private").timm == LCNET
    assert TOKEN not in caplog.text


def test_without_a_connection_the_cache_is_used_and_said(
    hub: Hub, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/net", of_vitnas(weights))
    online = fetch("me/net")
    fetch.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = fetch("me/net")
    assert offline.document == online.document
    assert offline.line == (
        line_of("me/net", hub, weights, "from the hub's cache")
        + "; whether it is the newest is unknown (HF_HUB_OFFLINE is set)"
    )
    with pytest.raises(Unreached, match=r"^could not fetch hf-hub:me/other \(HF_HUB_OFFLINE is set\)$"):
        fetch("me/other")


def test_a_password_in_the_hubs_address_is_not_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:secret@127.0.0.1:1")
    with pytest.raises(Unreached, match=r"\(http://me:\*\*\*@127.0.0.1:1 does not answer") as error:
        fetch("me/none")
    assert "secret" not in str(error.value)


def test_a_download_that_breaks_off_leaves_nothing(hub: Hub, weights: bytes) -> None:
    hub.add("me/net", of_vitnas(weights))
    hub.cut_after = 1000
    with pytest.raises(UserError, match=r"^could not fetch hf-hub:me/net \(.*\): the same command tries again$"):
        fetch("me/net")
    assert not any(path.stat().st_size == 1000 for path in hub.cache.rglob("blobs/*"))
    hub.cut_after = None
    assert fetch("me/net").document.with_name("model.safetensors").read_bytes() == weights


def test_damaged_weights_in_the_cache_are_removed(hub: Hub, weights: bytes) -> None:
    hub.add("me/net", of_vitnas(weights))
    path = fetch("me/net").document.with_name("model.safetensors")
    path.write_bytes(weights[:1000])
    fetch.cache_clear()
    with pytest.raises(UserError, match=r", of hf-hub:me/net, was damaged and is removed: the same command downloads"):
        fetch("me/net")
    assert fetch("me/net").line.startswith(line_of("me/net", hub, weights, "downloaded"))


def test_another_crop_than_ours_is_told(hub: Hub, weights: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "nas")
    hub.add("you/net", of_timm(weights, pretrained_cfg=CONFIG["pretrained_cfg"] | {"crop_mode": "squash"}))
    fetch("you/net")
    told = "hf-hub:you/net was judged on images of crop mode 'squash': vitnas cuts out the middle instead"
    assert told in caplog.messages


def test_an_interpolation_that_nobody_has_is_named(hub: Hub, weights: bytes) -> None:
    hub.add("you/net", of_timm(weights, pretrained_cfg=CONFIG["pretrained_cfg"] | {"interpolation": "random"}))
    with pytest.raises(UserError, match=r"^config.json: interpolation 'random': Input should be 'nearest'"):
        Card.read(fetch("you/net").document.parent)


def test_weights_that_do_not_fit_are_refused(hub: Hub, weights: bytes) -> None:
    hub.add("you/net", of_timm(weights, architecture="lcnet_075"))
    with pytest.raises(UserError, match=r"^hf-hub:you/net: ") as error:
        load("hf-hub:you/net")
    assert "\n" not in str(error.value)


def test_export_takes_the_classes_and_images_of_the_repository(
    hub: Hub, weights: bytes, vitnas, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "nas")
    hub.add("you/lcnet", of_timm(weights))
    code, _, _ = vitnas("export", "hf-hub:you/lcnet", "--out", str(tmp_path / "out"))
    assert code == 0
    assert line_of("you/lcnet", hub, weights, "downloaded") in caplog.messages
    card = Card.read(tmp_path / "out" / "model.onnx")
    assert card.classes == ["a", "b", "c"]
    assert card.preprocess is not None
    assert card.preprocess.interpolation == "bilinear"


def test_predict_takes_the_file_of_a_repository(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "nas")
    repository = hub.add("me/net", {"model.onnx": write_toy(tmp_path / "model.onnx", card=toy_card()).read_bytes()})
    image = tmp_path / "image.png"
    Image.new("RGB", (20, 20), "red").save(image)

    def answers(name: str = "hf-hub:me/net") -> list[str]:
        caplog.clear()
        (found,) = predict(PredictRequest(name, [image], top_k=3)).predictions
        return [guess.label for guess in found.guesses]

    wanted = answers(str(tmp_path / "model.onnx"))
    assert answers() == wanted
    assert caplog.messages == [
        "downloading model.onnx of hf-hub:me/net",
        f"downloaded model.onnx of hf-hub:me/net, commit {repository.commit('main')[:7]}",
    ]
    assert answers() == wanted
    assert caplog.messages == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert answers() == wanted
    assert caplog.messages == [
        "hf-hub:me/net is from the hub's cache; whether it is the newest is unknown (HF_HUB_OFFLINE is set)"
    ]
    with pytest.raises(Unreached, match=r"could not fetch hf-hub:me/other \(HF_HUB_OFFLINE is set\)"):
        answers("hf-hub:me/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.add("me/weights", {"model.safetensors": b""})
    with pytest.raises(
        UserError, match="has no model.onnx: `vitnas export hf-hub:me/weights --out".replace(".", r"\.")
    ):
        answers("hf-hub:me/weights")


def test_the_process_that_predicts_asks_the_hub_without_torch(hub: Hub, tmp_path: Path) -> None:
    """Also where there is no such repository, and where the hub cannot be asked."""
    hub.add("me/net", {"model.onnx": write_toy(tmp_path / "model.onnx", card=toy_card()).read_bytes()})
    image = tmp_path / "image.png"
    Image.new("RGB", (20, 20), "red").save(image)
    code = (
        "import sys; from huggingface_hub import constants\n"
        "from nas.cli.app import app; from nas.errors import UserError\n"
        "def classify(name):\n"
        f"    app(['predict', name, {str(image)!r}, '-q'], standalone_mode=False)\n"
        "classify('hf-hub:me/net')\n"
        "try: classify('hf-hub:me/none')\n"
        "except UserError as error: assert 'no such repository' in str(error), error\n"
        "constants.HF_HUB_OFFLINE = True\n"
        "classify('hf-hub:me/net')\n"
        "loaded = {'torch', 'torchvision', 'timm', 'onnx', 'search_spaces'} & set(sys.modules)\n"
        "sys.exit(', '.join(loaded) or 0)"
    )
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(hub.cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | own | {"HF_TOKEN_PATH": str(tmp_path / "token")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    assert sum(verb == "GET" and path.endswith("/model.onnx") for verb, path in hub.asked) == 1
