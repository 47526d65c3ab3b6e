"""Where a model in one file is found, and where the rest comes from: real HTTP and HTTPS, a real hub client."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from src.errors import ModelUnavailable, Refused
from src.request.addresses import HubFile, WebFile
from src.serving import startup
from src.settings import ROOT, Settings
from src.weights import bake, web_file
from src.weights.model_files import FROM_THE_WEB, ModelFiles, place_of
from src.weights.read_ahead import files_of
from src.weights.single_file import read_single_file
from tests.headers import flux_1, gguf, safetensors
from tests.hub import REVISION, Hub, Repo, download_into
from tests.web import Page, Web, open_web

SHIPPED = ROOT / "models" / "flux-shapes"
FILE = SHIPPED / "transformer" / "diffusion_pytorch_model.safetensors"
WEIGHTS = FILE.read_bytes()


def settings(name: str, **fields: Any) -> Settings:
    return Settings.model_validate({"model_name": name, "runpod_model_cache": "/nonexistent", **fields})


def finder(folder: Path, name: str, **fields: Any) -> ModelFiles:
    """Whose caches are in `folder`."""
    home = folder / "home"
    return ModelFiles(settings(name, **fields), download_into(home), baked=folder / "baked", cache=home)


def faults(files: ModelFiles) -> list[str]:
    """What a start finds wrong before it downloads anything."""
    found = []
    for wanted in files.wanted():
        try:
            if wanted.here() is None:
                wanted.ask()
        except Exception as error:  # noqa: BLE001 - as a start does
            found.append(f"{wanted.name}: {files.files.explain(error)}")
    return found


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(web_file, "_PAUSE", 0.0)
    with open_web(tmp_path, monkeypatch, "civitai.com", "files.example") as opened:
        yield opened


@pytest.fixture
def lora(tmp_path: Path) -> bytes:
    return safetensors(tmp_path / "lora", {"transformer.x.lora_A.weight": [4, 4]}).read_bytes()


# What MODEL_NAME says

PLACES: dict[str, object] = {
    "flux-shapes": None,
    "someone/model": None,
    str(SHIPPED): None,
    str(FILE): FILE,
    "models/flux-shapes/transformer/diffusion_pytorch_model.safetensors": FILE.relative_to(ROOT),
    "~/flux.gguf": Path("~/flux.gguf").expanduser(),
    "someone/model/flux.safetensors": ("someone/model", None, "flux.safetensors"),
    "someone/model/deep/flux-Q4_K.gguf": ("someone/model", None, "deep/flux-Q4_K.gguf"),
    "someone/model@v1/flux.gguf": ("someone/model", "v1", "flux.gguf"),
    "someone/model/FLUX-Q4_K.GGUF": ("someone/model", None, "FLUX-Q4_K.GGUF"),
    "someone/model/Flux.SafeTensors@v1": ("someone/model", "v1", "Flux.SafeTensors"),
    "https://huggingface.co/someone/model/blob/main/flux.GGUF": ("someone/model", "main", "flux.GGUF"),
    "someone//flux.gguf": Path("someone//flux.gguf"),
    "https://huggingface.co/someone/model/blob/main/flux.gguf": ("someone/model", "main", "flux.gguf"),
    "https://huggingface.co/someone/model/resolve/main/a/flux.safetensors?download=true":
        ("someone/model", "main", "a/flux.safetensors"),
    "hf.co/someone/model/resolve/main/flux.gguf": ("someone/model", "main", "flux.gguf"),
    "https://civitai.com/api/download/models/5?type=Model": "https://civitai.com/api/download/models/5?type=Model",
    "civitai.com/api/download/models/5": "https://civitai.com/api/download/models/5",
    "urn:air:flux1:checkpoint:civitai:1@5": "https://civitai.com/api/download/models/5",
    "https://files.example/flux.gguf": "https://files.example/flux.gguf",
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_a_name_says_where_the_file_is(name: str) -> None:
    found = place_of(name, None)
    match found:
        case HubFile():
            assert (found.repo, found.revision, found.weight_name) == PLACES[name]
        case WebFile():
            assert found.url == PLACES[name]
        case _:
            assert found == PLACES[name]


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("https://huggingface.co/someone/model", None, "is the address of the repo someone/model: give"),
        ("https://huggingface.co/someone/model/tree/main/x", None, "someone/model and its folder x: give"),
        ("https://civitai.com/models/7?modelVersionId=5", None, "give https://civitai.com/api/download/models/5"),
        ("https://files.example/flux.ckpt", None, "which must end in .safetensors or .sft or .gguf and is a pickle"),
        ("hf.co/someone/model/blob/main/flux.pth", None, "is a pickle of PyTorch: convert it"),
        ("http://files.example/flux.gguf", None, "must be the path of a file, owner/repo/file or an https address"),
        ("s3://bucket/flux.gguf", None, "must be the path of a file, owner/repo/file or an https address"),
        ("someone/model:Q4_K_S", None, "names Q4_K_S of someone/model as other programs do: give that file, someone/"),
        ("hf.co/someone/model:Q4_0", None, "names Q4_0 of someone/model as other programs do"),
        ("~nobody-such/flux.gguf", None, "begins with ~nobody-such, and there is no such user here"),
        ("civitai:5", None, "is a model of Civitai without one of its versions: give https://civitai.com/api/download"),
        ("https://files.example/flux.gguf", "v1", "and so has no revisions: unset MODEL_REVISION=v1"),
        (str(FILE), "v1", "and so has no revisions: unset MODEL_REVISION=v1"),
        ("someone/model@v2/flux.gguf", "v1", "'v2', and beside it 'v1' is asked for"),
    ],
)  # fmt: skip
def test_a_name_that_is_nothing_says_what_to_write(name: str, revision: str | None, words: str) -> None:
    with pytest.raises(Refused) as caught:
        place_of(name, revision)
    assert words in str(caught.value)


def test_a_name_that_is_too_long_for_a_file_is_a_fault_like_another(tmp_path: Path) -> None:
    (fault,) = faults(finder(tmp_path, f"/{'a' * 300}.safetensors"))
    assert "File name too long" in fault


# On this machine


@pytest.mark.parametrize("base", [None, "flux-shapes", str(SHIPPED)])
def test_a_file_here_and_the_base_that_it_was_made_from(base: str | None, tmp_path: Path) -> None:
    copy = shutil.copy(FILE, tmp_path / "any.safetensors")
    source = finder(tmp_path, str(copy), base_model=base).find()
    assert source.single_file is not None
    assert (source.folder, source.base, source.revision) == (SHIPPED, base or "flux-shapes", None)
    assert (source.single_file.family, source.single_file.path) == ("schnell", copy)
    read = files_of(source)
    assert copy in read
    assert FILE not in read
    assert SHIPPED / "vae" / FILE.name in read


def test_a_base_decides_among_families_whose_transformers_look_the_same(tmp_path: Path) -> None:
    shapes = flux_1()
    dev = safetensors(tmp_path / "dev.safetensors", shapes)
    base = tmp_path / "base"
    (base / "transformer").mkdir(parents=True)
    config = {"guidance_embeds": True, "joint_attention_dim": 4096, "pooled_projection_dim": 768}
    for class_name, family in (("FluxPipeline", "dev"), ("FluxKontextPipeline", "kontext")):
        (base / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
        (base / "transformer" / "config.json").write_text(json.dumps(config))
        file = finder(tmp_path, str(dev), base_model=str(base)).find().single_file
        assert file is not None
        assert file.family == family
    (base / "model_index.json").write_text(json.dumps({"_class_name": "FluxFillPipeline"}))
    (fault,) = faults(finder(tmp_path, str(dev), base_model=str(base)))
    assert "is of the family fill, and the tensors of dev.safetensors are of dev or kontext: give a model" in fault
    (base / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    (base / "transformer" / "config.json").write_text(json.dumps(config | {"joint_attention_dim": 128}))
    (fault,) = faults(finder(tmp_path, str(dev), base_model=str(base)))
    assert "has a joint_attention_dim of 128, and dev.safetensors one of 4,096: they do not fit" in fault
    own = {"axes_dims_rope": [8, 12, 12]}
    (base / "transformer" / "config.json").write_text(json.dumps(config | own))
    (fault,) = faults(finder(tmp_path, str(dev), base_model=str(base)))
    assert "has axes_dims_rope of [8, 12, 12], and dev.safetensors attention heads of 128: they do not fit" in fault
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    (fault,) = faults(finder(tmp_path, str(dev), base_model=str(base)))
    assert "is a StableDiffusionXLPipeline; this worker runs" in fault
    (base / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", "vae": ["diffusers", "X"]}))
    (fault,) = faults(finder(tmp_path, str(dev), base_model=str(base)))
    assert "has no folder vae, and its index names it" in fault
    (fault,) = faults(finder(tmp_path, str(dev), base_model="FLUX.2-dev"))
    assert "is of the family flux.2-dev, and the tensors of dev.safetensors are of dev or kontext" in fault
    strange = safetensors(tmp_path / "strange.safetensors", flux_1(joint=100))
    (fault,) = faults(finder(tmp_path, str(strange)))
    assert fault.startswith("BASE_MODEL: must name the whole model that strange.safetensors was made from")


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, lora: bytes) -> None:
    found = faults(finder(tmp_path, str(tmp_path / "lora"), base_model="/no/folder"))
    assert len(found) == 2
    assert "is a LoRA: give it in a request as lora_path" in found[0]
    assert "BASE_MODEL=/no/folder: is not a folder" in found[1]
    (fault,) = faults(finder(tmp_path, "flux-shapes", base_model="FLUX.1-dev"))
    assert "is a whole model, and BASE_MODEL=FLUX.1-dev is for a model in one file: unset it" in fault


def test_the_start_says_what_the_file_is_and_where_the_rest_comes_from(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "worker")
    wanted = settings(str(FILE))
    assert list(startup.check_files(wanted)) == []
    assert startup.find_files(wanted) == 0
    assert f"{FILE.name} is schnell, diffusers names, with transformer in BF16" in caplog.messages
    assert f"what {FILE.name} lacks comes from flux-shapes, whose family and widths it has; BASE" in caplog.text
    with pytest.raises(ModelUnavailable, match=r"is a VAE: give the model that it goes with"):
        startup.find_files(settings(str(SHIPPED / "vae" / FILE.name)))


@pytest.mark.parametrize(
    ("fields", "faulty"),
    [({"quantization": "fp8"}, True), ({"memory_mode": "nf4"}, True), ({"profile": "near"}, False), ({}, False)],
)
def test_gguf_that_is_to_be_quantized_again_is_a_fault_of_the_start(
    fields: dict[str, str], faulty: bool, tmp_path: Path
) -> None:
    file = gguf(tmp_path / "flux.gguf", flux_1(guidance=False), "Q4_0")
    assert read_single_file(file).is_packed
    assert not read_single_file(gguf(tmp_path / "plain.gguf", flux_1(guidance=False), "F16")).is_packed
    found = startup.check_files(settings(str(file), base_model="/no/folder", **fields))
    again = [str(fault) for fault in found if "stay as GGUF has them: set QUANTIZATION=none" in str(fault)]
    assert len(again) == faulty


# On the hub


@pytest.fixture
def repos(hub: Hub, tmp_path: Path, lora: bytes) -> Hub:
    folder = tmp_path / "repo"
    folder.mkdir()
    shutil.copy(FILE, folder / "flux.safetensors")
    (folder / "lora.safetensors").write_bytes(lora)
    hub.repos["someone/files"] = Repo(folder)
    hub.repos["someone/base"] = Repo(SHIPPED)
    hub.asked.clear()
    return hub


def weights_asked(hub: Hub) -> set[str]:
    return {
        path.rpartition(f"{REVISION}/")[2]
        for path, _ in hub.asked
        if path.endswith(".safetensors") and REVISION in path
    }


def test_of_the_hub_the_file_is_downloaded_and_of_its_base_what_it_lacks(repos: Hub, tmp_path: Path) -> None:
    files = finder(tmp_path, "someone/files/flux.safetensors", base_model="someone/base")
    assert files.here() is None
    assert faults(files) == []
    source = files.find()
    assert source.single_file is not None
    assert source.single_file.path.read_bytes() == WEIGHTS
    assert (source.base, source.revision, source.single_file.family) == ("someone/base", REVISION, "schnell")
    there = {str(file.relative_to(source.folder)) for file in source.folder.rglob("*.safetensors")}
    assert {file.partition("/")[0] for file in there} == {"vae", "text_encoder", "text_encoder_2"}
    assert (source.folder / "transformer" / "config.json").is_file()
    repos.asked.clear()
    assert files.here() == source
    assert repos.asked == []


def test_what_is_no_flux_is_refused_before_it_is_downloaded(repos: Hub, tmp_path: Path) -> None:
    (fault,) = faults(finder(tmp_path, "someone/files/lora.safetensors"))
    assert fault == (
        "someone/files/lora.safetensors: is a LoRA: give it in a request as lora_path, and in MODEL_NAME the model"
    )
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("someone/files/other.gguf", "has not; for a model in one file give it, one of someone/files/flux"),
        ("someone/files", "is a repo without model_index.json, and so no model in diffusers' layout; for"),
        ("someone/nothing/flux.gguf", "there is no such repo on the hub"),
        ("someone/files@v9/flux.safetensors", "the repo has no revision"),
        ("someone/gated/flux.safetensors", "is gated: accept its licence"),
    ],
)  # fmt: skip
def test_what_the_hub_has_not_is_said(name: str, words: str, repos: Hub, tmp_path: Path) -> None:
    repos.repos["someone/gated"] = Repo(tmp_path / "repo", {None: (401, "GatedRepo")})
    (fault,) = faults(finder(tmp_path, name))
    assert words in fault


# On the web


def test_an_address_is_downloaded_once_and_kept_by_its_own_name(web: Web, tmp_path: Path) -> None:
    said = {"Content-Disposition": 'attachment; filename="../my flux.safetensors"'}
    url = web.put("civitai.com/api/download/models/5", Page(WEIGHTS, headers=said))
    files = finder(tmp_path, url, civitai_token="secret-token-of-mine")
    assert files.here() is None
    assert faults(files) == []
    source = files.find()
    assert source.single_file is not None
    assert source.single_file.path.name == "my flux.safetensors"
    assert source.single_file.path.read_bytes() == WEIGHTS
    assert {headers.get("Authorization") for _, headers in web.asked} == {"Bearer secret-token-of-mine"}
    web.asked.clear()
    again = finder(tmp_path, f"{url}?token=another-token-of-mine").here()
    assert again is not None
    assert again.single_file == source.single_file
    assert web.asked == []


def test_a_name_that_is_too_long_for_the_disk_keeps_its_end(web: Web, tmp_path: Path) -> None:
    said = {"Content-Disposition": f"filename={'ü' * 300}.safetensors"}
    files = finder(tmp_path, web.put("files.example/x", Page(WEIGHTS, headers=said)))
    assert faults(files) == []
    file = files.find().single_file
    assert file is not None
    assert file.path.name.endswith("ü.safetensors")


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (Page(b"<!DOCTYPE html><html>" + bytes(600)), "is an HTML page and no .safetensors or"),
        (Page(b""), "is an empty file"),
        (Page(WEIGHTS[:-1]), "is not a complete .safetensors file"),
        (Page(status=401), "HTTP 401: Civitai wants to know who asks: set CIVITAI_TOKEN"),
        (Page(status=404), "the server answered HTTP 404"),
    ],
)
def test_what_an_address_gives_instead_is_said_before_all_of_it_comes(
    page: Page, words: str, web: Web, tmp_path: Path
) -> None:
    url = web.put("civitai.com/api/download/models/5", page)
    files = finder(tmp_path, url)
    (fault,) = faults(files)
    assert words in fault
    with pytest.raises(Refused, match=re.escape(words)):
        files.find()
    assert not sum(file.stat().st_size for file in (tmp_path / "home").rglob("part"))


def test_a_file_with_no_room_is_refused(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_file, "free_bytes", lambda _: 1000)
    with pytest.raises(
        Refused, match=r"GB still to come, and 1e-06 GB are free below .*: give the container more disk"
    ):
        finder(tmp_path, web.put("files.example/flux.safetensors", WEIGHTS)).find()


@pytest.mark.parametrize("continues", [True, False])
def test_a_download_that_was_cut_off_goes_on_where_it_ended(continues: bool, web: Web, tmp_path: Path) -> None:
    """A server that has another file by then, or knows no ranges, sends it from its beginning."""
    half, asked = len(WEIGHTS) // 2, []

    def serve(line: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += line.recv(65_536)
        begin = re.search(rb"Range: bytes=(\d+)-", request)
        asked.append(int(begin[1]) if begin else 0)
        if begin and continues:
            said, body = f"206 Partial\r\nContent-Range: bytes {half}-{len(WEIGHTS) - 1}/{len(WEIGHTS)}", WEIGHTS[half:]
        else:
            said, body = "200 OK", WEIGHTS
        head = f'HTTP/1.1 {said}\r\nETag: "a"\r\nContent-Length: {len(body)}\r\n\r\n'
        line.sendall(head.encode() + (body[:half] if len(asked) == 1 else body))

    files = finder(tmp_path, web.behave("files.example/flux.safetensors", serve))
    source = files.find()
    assert source.single_file is not None
    assert source.single_file.path.read_bytes() == WEIGHTS
    assert len(asked) == 2
    assert 0 < asked[1] <= half


def test_workers_that_share_a_volume_download_a_file_once(web: Web, tmp_path: Path) -> None:
    url = web.put("files.example/flux.safetensors", WEIGHTS)
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda _: finder(tmp_path, url).find().single_file, range(3)))
    assert found[0] == found[1] == found[2]
    assert len(web.asked) == 1


def test_a_server_that_says_no_length(web: Web, tmp_path: Path) -> None:
    def serve(line: socket.socket) -> None:
        line.recv(65_536)
        line.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + WEIGHTS)

    files = finder(tmp_path, web.behave("files.example/flux.safetensors", serve))
    assert faults(files) == []
    file = files.find().single_file
    assert file is not None
    assert file.path.read_bytes() == WEIGHTS


# Into an image


def test_a_file_and_what_it_lacks_are_baked(
    repos: Hub, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BASE_MODEL", "someone/base")
    address = web.put("files.example/flux.safetensors", WEIGHTS)
    for name in ("someone/files/flux.safetensors", address):
        folder, downloads = tmp_path / f"weights{len(name)}", tmp_path / "downloads"
        monkeypatch.setenv("MODEL_NAME", name)
        assert bake.main("true", folder, downloads) is None
        shutil.rmtree(downloads)
        repos.asked.clear()
        web.asked.clear()
        found = ModelFiles(
            settings(name, base_model="someone/base"), download_into(tmp_path / "x"), folder, tmp_path / "x"
        )
        source = found.here()
        assert source is not None
        assert source.single_file is not None
        assert source.single_file.path.read_bytes() == WEIGHTS
        assert source.folder.is_relative_to(folder)
        assert not repos.asked
        assert not web.asked
    assert (folder / FROM_THE_WEB).is_dir()
    assert "is in the image" in capsys.readouterr().out
    monkeypatch.setenv("MODEL_NAME", "someone/files/lora.safetensors")
    assert "MODEL_NAME=someone/files/lora.safetensors: is a LoRA" in str(bake.main("true", folder, downloads))
