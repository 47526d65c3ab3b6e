"""Where a model is found, and what is said when it cannot be loaded: a real hub client, a stand-in for the hub."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from safetensors.torch import load_file, save_file

from src.engine import load_engine
from src.errors import ModelUnavailable
from src.settings import ROOT, Settings
from src.weights.disk import keep
from src.weights.files import Files
from tests.hub import REVISION, Hub, Repo, download_into

SHIPPED = ROOT / "models" / "flux-shapes"


@pytest.fixture
def download(tmp_path: Path) -> Any:
    return download_into(tmp_path / "home")


def settings(name: str, **fields: Any) -> Settings:
    return Settings.model_validate({"model_name": name, "runpod_model_cache": "/nonexistent", **fields})


def reason(name: str, download: Any = snapshot_download, **fields: Any) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        load_engine(settings(name, **fields), download)
    text = str(caught.value)
    assert text.startswith(f"{name}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["flux-shapes", "FLUX-Shapes", "models/flux-shapes", str(SHIPPED)])
def test_the_shipped_model_goes_by_its_name_and_by_its_folder(name: str) -> None:
    engine = load_engine(settings(name))
    assert engine.model.name == "flux-shapes"
    assert engine.revision is None


def test_a_hub_model_is_downloaded_and_its_revision_known(hub: Hub, download: Any) -> None:
    hub.repos["someone/shapes"] = Repo(SHIPPED)
    engine = load_engine(settings("someone/shapes"), download)
    assert engine.revision == REVISION
    assert engine.model.name == "someone/shapes"
    assert engine.model.num_inference_steps == 4, "no guidance embedding: the schnell family"


def test_runpods_cache_asks_no_network(hub: Hub, tmp_path: Path) -> None:
    hub.repos["someone/cached"] = Repo(SHIPPED)
    snapshot_download("someone/cached", cache_dir=tmp_path)
    asked = hub.requests
    engine = load_engine(settings("someone/cached", runpod_model_cache=tmp_path))
    assert engine.revision == REVISION
    assert hub.requests == asked


@pytest.mark.parametrize("revision", [None, "main", REVISION])
def test_what_hf_home_has_whole_comes_first_and_asks_no_network(
    revision: str | None, hub: Hub, download: Any, tmp_path: Path
) -> None:
    hub.repos["someone/baked"] = Repo(SHIPPED)
    for cache in (tmp_path / "home", tmp_path / "runpod"):
        snapshot_download("someone/baked", cache_dir=cache)
    hub.repos["someone/baked"] = Repo(SHIPPED, {None: (401, "GatedRepo")})
    hub.asked.clear()
    wanted = settings("someone/baked", model_revision=revision, runpod_model_cache=tmp_path / "runpod")
    found = Files(wanted, download).find("someone/baked", "someone/baked", revision)
    assert found.revision == REVISION
    assert (tmp_path / "home") in found.folder.parents
    assert hub.asked == []


@pytest.mark.parametrize(
    "lost", ["transformer/diffusion_pytorch_model.safetensors", "tokenizer_2", "vae/config.json", "model_index.json"]
)
@pytest.mark.parametrize("listed", [True, False])
def test_what_was_cut_off_is_completed(lost: str, listed: bool, hub: Hub, download: Any) -> None:
    """`listed`: the hub's library noted what there is; older ones and other programs did not."""
    hub.repos["someone/cut"] = Repo(SHIPPED)
    files = Files(settings("someone/cut"), download)
    folder = files.find("someone/cut", "someone/cut").folder
    if not listed:
        shutil.rmtree(folder.parent.parent / "trees")
    path = folder / lost
    path.rename(folder.parent / "lost")
    hub.asked.clear()
    assert files.here("someone/cut", "someone/cut") is None
    assert hub.asked == []
    assert files.find("someone/cut", "someone/cut").folder == folder
    assert path.exists()


def test_a_part_that_is_here_asks_no_network(hub: Hub, download: Any) -> None:
    hub.repos["someone/part"] = Repo(SHIPPED / "transformer")
    files = Files(settings("flux-shapes"), download)
    assert files.find("someone/part", "someone/part", part=True).revision == REVISION
    hub.asked.clear()
    assert files.find("someone/part", "someone/part", part=True).revision == REVISION
    assert hub.asked == []


def test_what_cannot_be_kept_is_a_warning_but_where_there_is_no_volume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "worker")
    keep(tmp_path / "no" / "volume" / "file", "QUANTIZED_DIR", Path.touch)
    (tmp_path / "file").touch()
    keep(tmp_path / "file" / "weights", "QUANTIZED_DIR", Path.touch)
    keep(tmp_path / "kept" / "weights", "QUANTIZED_DIR", Path.touch)
    without, failed = caplog.records
    assert (without.levelname, failed.levelname) == ("INFO", "WARNING")
    assert without.getMessage().endswith(f"there is no {tmp_path / 'no'}; attach a volume, or set QUANTIZED_DIR")
    said = failed.getMessage()
    assert said.startswith("weights is not kept, and the next worker makes it anew: ")
    assert str(tmp_path / "file") in said
    assert said.endswith("or set QUANTIZED_DIR to another folder")
    assert (tmp_path / "kept" / "weights").exists()


def test_a_gated_model_without_a_token(hub: Hub, download: Any) -> None:
    hub.repos["someone/gated"] = Repo(SHIPPED, {None: (401, "GatedRepo")})
    assert f"is gated: accept its licence on {hub.url}/someone/gated and set HF_TOKEN" in reason(
        "someone/gated", download
    )


def test_a_token_without_access(hub: Hub, download: Any) -> None:
    hub.repos["someone/gated"] = Repo(SHIPPED, {"hf_stranger": (403, "GatedRepo")})
    text = reason("someone/gated", download, hf_token="hf_stranger")
    assert "the account of HF_TOKEN has no access" in text
    assert "hf_stranger" not in text


def test_a_token_with_access(hub: Hub, download: Any) -> None:
    hub.repos["someone/gated"] = Repo(SHIPPED, {None: (401, "GatedRepo")})
    assert load_engine(settings("someone/gated", hf_token="hf_friend"), download).revision == REVISION


def test_a_repo_that_is_forbidden(hub: Hub, download: Any) -> None:
    assert "HF_TOKEN has no access to this repo" in reason("someone/forbidden", download, hf_token="hf_stranger")


def test_a_revision_of_a_folder() -> None:
    assert "is a folder, which has no revisions" in reason("flux-shapes", model_revision="v9")


def test_a_wrong_token(hub: Hub, download: Any) -> None:
    hub.repos["someone/gated"] = Repo(SHIPPED)
    assert "the hub refuses HF_TOKEN" in reason("someone/gated", download, hf_token="hf_expired")


def test_an_unknown_repo(hub: Hub, download: Any) -> None:
    assert "no such repo" in reason("someone/nothing", download)
    assert "that HF_TOKEN can see" in reason("someone/nothing", download, hf_token="hf_friend")


def test_an_unknown_revision(hub: Hub, download: Any) -> None:
    hub.repos["someone/shapes"] = Repo(SHIPPED)
    assert "no revision 'v9'" in reason("someone/shapes", download, model_revision="v9")


def test_a_hub_that_is_down(hub: Hub, download: Any) -> None:
    hub.down = True
    try:
        assert "the hub answered 503" in reason("someone/shapes", download)
    finally:
        hub.down = False


def test_no_network(download: Any) -> None:
    def unplugged(**arguments: Any) -> str:
        return str(download(**arguments, endpoint="http://127.0.0.1:1"))

    assert "the hub cannot be reached (MODEL_NAME=flux-shapes" in reason("FLUX.1-dev", unplugged)


def test_a_name_that_is_nothing() -> None:
    assert "is not a folder, not a hub id (owner/name) and not one of: FLUX.1-dev" in reason("flux-9")
    assert "is not a folder, not a hub id" in reason("/no/such/folder")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "copy"))


def test_a_folder_without_a_pipeline(tmp_path: Path) -> None:
    assert "holds no model_index.json" in reason(str(tmp_path))


def test_another_kind_of_pipeline(copy: Path) -> None:
    (copy / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "is a StableDiffusionPipeline; this worker runs " in reason(str(copy))


def test_a_missing_shard(copy: Path) -> None:
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    index = {"weight_map": {f"layer{i}": f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)}}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    text = reason(str(copy))
    assert "shards are missing: transformer/diffusion_pytorch_model-00002-of-00002.safetensors" in text


def test_missing_weights(copy: Path) -> None:
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert "has no weights in transformer: no *.safetensors" in reason(str(copy))
    (copy / "text_encoder" / "model.safetensors").unlink()
    shutil.copy(SHIPPED / "transformer" / "diffusion_pytorch_model.safetensors", copy / "transformer")
    assert "model.safetensors" in reason(str(copy))


def test_damaged_weights(copy: Path) -> None:
    weights = copy / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "text_encoder/model.safetensors is damaged" in reason(str(copy))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left"), f"disk is full: .* GB free below HF_HOME={constants.HF_HOME}"),
        (MemoryError(), "not enough memory for its weights"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"), "not enough memory"),
        (ValueError("two\nlines"), "ValueError: two lines"),
    ],
    ids=lambda value: type(value).__name__,  # no folder of this process
)  # fmt: skip
def test_what_the_machine_lacks(error: Exception, words: str) -> None:
    def download(**arguments: Any) -> str:
        raise error

    with pytest.raises(ModelUnavailable, match=words):
        load_engine(settings("FLUX.1-dev"), download)


def without(file: str, *tensors: str, more: str | None = None) -> Callable[[Path], None]:
    """A change to a model's folder: `file` without some tensors, and with one `more`."""

    def change(folder: Path) -> None:
        found = {name: tensor for name, tensor in load_file(folder / file).items() if name not in tensors}
        save_file(found | ({more: torch.zeros(2)} if more else {}), folder / file, metadata={"format": "pt"})

    return change


def cut_vocabulary(folder: Path) -> None:
    """As a file of another model, with a tenth of the words."""
    file = folder / "tokenizer_2" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] = tokenizer["model"]["vocab"][:40]
    file.write_text(json.dumps(tokenizer))


TRANSFORMER, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae"))
CLIP, T5 = (f"{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2"))
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "vocabulary": (lambda m: (m / "tokenizer_2/tokenizer.json").unlink(), "no vocabulary in tokenizer_2: none of"),
    "CLIP's vocabulary": (lambda m: (m / "tokenizer/tokenizer.json").unlink(), "no vocabulary in tokenizer: none"),
    "most words": (cut_vocabulary, "the vocabulary in tokenizer_2 has"),
    "T5": (without(T5, "shared.weight"), "text_encoder_2 lack encoder.embed_tokens.weight, shared.weight"),
    "CLIP": (without(CLIP, "encoder.layers.0.layer_norm1.weight"), "text_encoder lack encoder.layers.0.layer_norm1"),
    "transformer": (without(TRANSFORMER, "proj_out.weight"), "the weights of transformer lack proj_out.weight"),
    "VAE": (without(VAE, "decoder.conv_out.bias"), "the weights of vae lack decoder.conv_out.bias"),
    "scaled fp8": (without(TRANSFORMER, more="x_embedder.weight_scale"), "are scaled fp8 (x_embedder.weight_scale)"),
    "a tensor too many": (without(VAE, more="what.bias"), "vae hold what its configuration has no place for: what"),
    "folder": (lambda m: shutil.rmtree(m / "text_encoder"), "has no folder text_encoder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_whole_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    change, named = FAULTS[fault]
    folder = tmp_path / "m"
    shutil.copytree(SHIPPED, folder)
    change(folder)
    assert named in reason(str(folder))


def test_what_old_files_hold_too_many_is_harmless(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(SHIPPED, folder)
    without(CLIP, more="text_model.embeddings.position_ids")(folder)
    tied = load_file(folder / T5)
    tied["encoder.embed_tokens.weight"] = tied["shared.weight"].clone()
    save_file(tied, folder / T5, metadata={"format": "pt"})
    assert load_engine(Settings(model_name=str(folder))).model.family == "schnell"


@pytest.mark.parametrize("name", ["/models/flux.safetensors", "flux.GGUF"])
def test_a_model_in_one_file_that_is_not_there(name: str) -> None:
    assert f"{name}: is not there: no such file" in reason(name)
    assert f"{name}.ckpt: is a .ckpt file: give the folder or hub id of a whole model" in reason(f"{name}.ckpt")
