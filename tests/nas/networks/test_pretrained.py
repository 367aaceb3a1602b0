"""Pretrained weights in folders, in caches, and downloaded from a stand-in of the Hugging Face hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import timm
from huggingface_hub import constants, file_download

from nas.data.sources import cache_folder
from nas.errors import UserError
from nas.networks.hub import Unreached
from nas.networks.pretrained import NoPretrained, find_here, find_pretrained
from nas.networks.ready import ready_networks
from nas.networks.store import Store
from nas.networks.targets import find_arch
from nas.networks.timm_network import TimmNetwork
from nas.quality.plan import TrainingPlan

NETWORK = TimmNetwork("test_vit")
HUB = "timm/test_vit.r160_in1k"
CONTENT = bytes(range(256)) * 300
DIGEST = hashlib.sha256(CONTENT).hexdigest()
DO = f"put model.safetensors of https://huggingface.co/{HUB} into a folder as test_vit.safetensors"


@dataclass
class Hub:
    """What the stand-in serves, by file name, and how: cut_after: bytes of the first answer, after which no other
    comes."""

    cache: Path
    files: dict[str, bytes] = field(default_factory=dict)
    cut_after: int | None = None
    asked: list[str] = field(default_factory=list)

    def blobs(self) -> list[Path]:
        return sorted(self.cache.rglob("blobs/*"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub(tmp_path / "cache", {"model.safetensors": CONTENT})

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            served.asked += [self.path] if HUB in self.path else []
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            body = served.files.get(self.path.removeprefix(f"/{HUB}/resolve/main/"))
            if with_body and served.cut_after == 0:
                return
            self.send_response(200 if body is not None or self.path == "/" else 404)
            if body is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", hashlib.sha256(body or b"").hexdigest())
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if with_body and body is not None:
                self.wfile.write(body[: served.cut_after])
                served.cut_after = None if served.cut_after is None else 0

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.delenv("VITNAS_WEIGHTS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", at)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(served.cache))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", at + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    yield served
    server.shutdown()
    server.server_close()


def test_weights_are_downloaded_once_and_then_in_the_cache(hub: Hub) -> None:
    told: list[tuple[int, int]] = []
    first = find_pretrained(NETWORK, progress=lambda done, total: told.append((done, total)))
    assert first.path.read_bytes() == CONTENT
    assert (first.source, first.digest, first.timm) == ("download", DIGEST[:16], "test_vit.r160_in1k")
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert first.line == (f"pretrained weights of timm/test_vit: test_vit.r160_in1k, downloaded (sha256 {DIGEST[:16]})")
    second = find_pretrained(NETWORK)
    assert (second.path, second.source, second.digest) == (first.path, "cache", first.digest)
    assert len(hub.asked) == 1


def test_what_is_here_is_found_without_a_download(hub: Hub, tmp_path: Path) -> None:
    assert find_here(NETWORK) is None
    assert hub.asked == []
    fetched = find_pretrained(NETWORK)
    here = find_here(NETWORK)
    assert here is not None
    assert (here.path, here.source, here.digest) == (fetched.path, "cache", fetched.digest)
    fetched.path.write_bytes(CONTENT[:500])
    assert find_here(NETWORK) is None
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "test_vit.pth").write_bytes(CONTENT)
    found = find_here(NETWORK, tmp_path / "weights")
    assert found is not None
    assert (found.source, found.digest) == ("folder", DIGEST[:16])


def test_a_store_looks_once_and_downloads_what_is_asked_for(hub: Hub) -> None:
    store = Store()
    assert store.here(NETWORK) is None
    assert store.digests == {}
    assert store.get(NETWORK.at(64)).source == "download"
    assert store.get(NETWORK).source == "download"
    assert store.digests == {"timm/test_vit": DIGEST[:16]}
    assert len(hub.asked) == 1


def test_other_weights_than_a_run_began_with_are_refused_before_they_are_used(hub: Hub) -> None:
    refused = r"not the weights of timm/test_vit that this study began with \(sha256 1111\): give the same"
    for look in (Store.get, Store.here):  # a download, and the cache
        store = Store()
        store.begun = {"timm/test_vit": "1111"}
        with pytest.raises(UserError, match=refused):
            look(store, NETWORK)
    store = Store()
    store.begun = {"timm/test_vit": DIGEST[:16]}
    assert store.get(NETWORK).source == "cache"


def test_one_failed_connection_ends_the_downloads_of_a_store(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    store, other = Store(say=said.append), TimmNetwork("test_vit2")
    hub.files = {}
    with pytest.raises(UserError, match=r"no model\.safetensors"):  # the hub has answered
        store.get(NETWORK)
    assert not store.offline
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Unreached):
        store.get(NETWORK)
    monkeypatch.setattr(constants, "ENDPOINT", "")
    with pytest.raises(
        UserError, match="no weights of timm/test_vit2: nothing is downloaded after a failed connection"
    ):
        store.get(other)
    assert store.offline
    assert len(said) == 1
    assert said[0].startswith("only weights on this machine are used (could not fetch test_vit.r160_in1k (http://127")
    assert not store.reach()


def test_a_store_asks_the_hub_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    store = Store(say=said.append)
    assert store.reach()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert store.reach()
    lost = Store(say=said.append)
    assert [lost.reach(), lost.reach()] == [False, False]
    assert said == [
        "only weights on this machine are used (http://127.0.0.1:1 does not answer: [Errno 111] Connection refused); "
        "--weights-from DIR names a folder of others"
    ]


def test_a_repository_without_safetensors_has_its_older_file(hub: Hub) -> None:
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    assert find_pretrained(NETWORK).path.name == "pytorch_model.bin"
    assert find_pretrained(NETWORK).source == "cache"


def test_a_download_that_is_cut_off_leaves_nothing(hub: Hub) -> None:
    hub.cut_after = 1000
    with pytest.raises(UserError, match=r"^could not fetch test_vit.r160_in1k \(") as error:
        find_pretrained(NETWORK)
    assert f"the same command tries again; or {DO}" in str(error.value)
    assert "\n" not in str(error.value)
    assert hub.blobs() == []
    hub.cut_after = None
    assert find_pretrained(NETWORK).path.read_bytes() == CONTENT


def test_a_damaged_download_leaves_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.networks.pretrained.stated", lambda *_: "another")
    with pytest.raises(UserError, match=r"\(it arrived damaged\): the same command tries again"):
        find_pretrained(NETWORK)
    assert hub.blobs() == []


def test_a_hub_without_the_file_is_told(hub: Hub) -> None:
    hub.files = {}
    with pytest.raises(UserError, match=rf"\(no model.safetensors or pytorch_model.bin there\): {DO}"):
        find_pretrained(NETWORK)


def test_a_damaged_file_in_the_cache_is_fetched_again(hub: Hub) -> None:
    path = find_pretrained(NETWORK).path
    path.write_bytes(CONTENT[:500])
    (damaged,) = hub.blobs()
    found = find_pretrained(NETWORK)
    assert (found.path, found.source, found.digest) == (path, "download", DIGEST[:16])
    assert found.line.endswith(f"{damaged} was damaged, and is replaced")
    assert path.read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache_without_internet_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    find_pretrained(NETWORK).path.write_bytes(CONTENT[:500])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (damaged,) = hub.blobs()
    with pytest.raises(UserError) as error:
        find_pretrained(NETWORK)
    assert str(error.value).startswith(
        f"{damaged} is damaged (delete it), and could not fetch test_vit.r160_in1k (HF_HUB_OFFLINE is set): {DO}"
    )


def test_without_internet_what_to_do_is_told_at_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "lcnet_050.pth").touch()
    with pytest.raises(UserError) as error:
        find_pretrained(NETWORK, tmp_path / "weights")
    assert str(error.value) == (
        f"{tmp_path}/weights holds no timm/test_vit; could not fetch test_vit.r160_in1k (http://127.0.0.1:1 does not "
        f"answer: [Errno 111] Connection refused): {DO}, and give that as --weights-from or VITNAS_WEIGHTS"
    )


def test_an_old_network_comes_through_torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("VITNAS_WEIGHTS", raising=False)
    file = tmp_path / f"gcvit_xxtiny-{DIGEST[:8]}.pth"
    config = timm.get_pretrained_cfg("gcvit_xxtiny")
    assert config is not None
    config.url = file.as_uri()
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: config)
    network = TimmNetwork("gcvit_xxtiny")
    cached = tmp_path / "torch" / "hub" / "checkpoints" / file.name
    with pytest.raises(UserError, match=r"could not fetch gcvit_xxtiny.in1k .* as gcvit_xxtiny\.pth, and give"):
        find_pretrained(network)
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="invalid hash value"):
        find_pretrained(network)
    assert not cached.exists()
    file.write_bytes(CONTENT)
    assert [find_pretrained(network).source for _ in range(2)] == ["download", "cache"]
    cached.write_bytes(b"damaged")
    assert find_pretrained(network).line.endswith(f"{cached} was damaged, and is replaced")
    assert cached.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ("deit_tiny", "deit_tiny.bin"),
        ("deit_tiny", "deit_tiny_patch16_224.fb_in1k.safetensors"),
        ("deit_tiny", "deit_tiny_patch16_224.pth"),
        ("sepvit_lite", "sepvit_lite.safetensors"),
        ("timm/test_vit", "test_vit.pth"),
        ("timm/test_vit", "test_vit.r160_in1k.pth"),
        ("timm/test_vit.r160_in1k", "test_vit.pth"),
        ("timm/deit_tiny_patch16_224", "deit_tiny.safetensors"),
    ],
)
def test_a_file_in_a_folder_is_called_as_users_call_networks(
    network: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (
        TimmNetwork(network[5:]) if network.startswith("timm/") else find_arch(network).at(64).replace(num_classes=7)
    )
    (tmp_path / name).write_bytes(CONTENT)
    monkeypatch.delenv("VITNAS_WEIGHTS", raising=False)
    found = find_pretrained(asked, tmp_path)
    assert (found.name, found.path, found.source) == (network, tmp_path / name, "folder")
    assert found.line == f"pretrained weights of {network}: from {tmp_path / name} (sha256 {DIGEST[:16]})"
    monkeypatch.setenv("VITNAS_WEIGHTS", str(tmp_path))
    assert find_pretrained(asked) == found


def test_the_given_folder_goes_before_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "test_vit.pth").write_bytes(str(folder).encode())
    monkeypatch.setenv("VITNAS_WEIGHTS", str(second))
    assert find_pretrained(NETWORK, first).path == first / "test_vit.pth"
    (first / "test_vit.pth").rename(first / "another.pth")
    found = find_pretrained(NETWORK, first)
    assert (found.path, found.remark) == (second / "test_vit.pth", f"{first} holds no timm/test_vit")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("none", "no such folder"),
        ("file", "is a file: give the folder that holds it, or --weights"),
        ("empty", "holds no file of weights"),
    ],
)
def test_a_folder_that_is_none_is_told(named: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"^--weights-from {tmp_path}/{named}:? {said}"):
        find_pretrained(NETWORK, tmp_path / named)
    monkeypatch.setenv("VITNAS_WEIGHTS", str(tmp_path / named))
    with pytest.raises(UserError, match=f"^VITNAS_WEIGHTS={tmp_path}/{named}:? {said}"):
        find_pretrained(NETWORK)


def test_the_home_of_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "~no_such_user/weights"
    with pytest.raises(UserError, match=f"^--weights-from {folder}: no such folder"):
        find_pretrained(NETWORK, Path(folder))
    monkeypatch.setenv("VITNAS_WEIGHTS", folder)
    with pytest.raises(UserError, match=f"^VITNAS_WEIGHTS={folder}: no such folder"):
        find_pretrained(NETWORK)
    monkeypatch.setenv("VITNAS_DATA", folder)
    assert cache_folder() == Path(folder)
    TrainingPlan("./images", 10_000, 9, 30, 3, 0, weights_from=Path(folder)).check()


def test_a_network_that_nobody_published_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_vit.pth").touch()
    monkeypatch.setenv("VITNAS_WEIGHTS", str(tmp_path))
    arch = find_arch("efficientvit_m0")
    narrower = arch.replace(stages=arch.stages[:2])
    for network, label in (
        (find_arch("sepvit_lite"), "sepvit_lite"),
        (TimmNetwork("botnet50ts_256"), "timm/botnet50ts_256"),
        (narrower, "this efficientvit network, which is none of the published"),
    ):
        with pytest.raises(NoPretrained, match=f"^there are no pretrained weights of {label}$"):
            find_pretrained(network)
        with pytest.raises(NoPretrained, match=f"holds no weights of {label}, and timm has none"):
            find_pretrained(network, tmp_path)


def test_ready_networks_have_weights_in_timm() -> None:
    ready = ready_networks()
    with_weights = set(timm.list_pretrained())
    assert [network.name for network in ready if network.timm not in with_weights] == []
    names = [network.name for network in ready]
    assert len(set(names)) == len(names)
    assert {"efficientvit_m0", "levit_128s", "deit_tiny", "shvit_s4", "timm/tf_efficientnet_lite0.in1k"} <= set(names)
    assert not any(name.startswith("sepvit") for name in names)
    page = (Path(__file__).parents[3] / "docs" / "guides" / "weights.md").read_text()
    assert [name for name in names if f"`{name}`" not in page] == []
