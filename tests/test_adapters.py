"""Adapters: where they may come from, which are refused and why, and that no request gets another's."""

from __future__ import annotations

import json
import os
import pickle
import random
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file

from handler import respond
from src.engine import Engine, load_engine
from src.errors import WorkerFault
from src.job import Job
from src.request.adapters import AdapterStore
from src.request.schema import Lora, Request
from src.settings import ROOT, Settings
from tests.conftest import opened
from tests.hub import REVISION, Hub, Repo
from training import judge
from training.scenes import COLOURS

OUTLINE = ROOT / "models" / "flux-shapes-outline" / "pytorch_lora_weights.safetensors"
PROMPT = "a large red circle on a blue background"
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(Settings(model_name="flux-shapes", max_loras=4))


@pytest.fixture
def ask(engine: Engine, tmp_path: Path) -> Ask:
    """An answer of a worker whose LORA_DIR holds the shipped adapter, and whose cache is empty."""
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "outline.safetensors").write_bytes(OUTLINE.read_bytes())
    settings = Settings(lora_dir=folder, lora_cache_dir=tmp_path / "cache", lora_cache_gb=0.01)

    def ask(**fields: Any) -> dict[str, Any]:
        event = {"input": {"prompt": PROMPT, "seed": 1, **fields}}
        return respond(event, Job(), lambda: settings, lambda: engine)

    return ask


def pixels(response: dict[str, Any]) -> bytes:
    assert response["status"] == "success", response
    return opened(response)[0].tobytes()


def refused(response: dict[str, Any]) -> dict[str, str]:
    assert response["error_code"] == "invalid_request", response
    return {error["field"]: error["message"] for error in response["errors"]}


def other_adapter(folder: Path, name: str, seed: int) -> None:
    """An adapter of random numbers that fits flux-shapes."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        key: torch.randn(weight.shape, generator=generator).to(weight.dtype) * 0.02
        for key, weight in load_file(OUTLINE).items()
    }
    save_file(layers, folder / name)


def test_the_shipped_adapter_hollows_shapes_at_1_and_is_absent_at_0(ask: Ask) -> None:
    plain = pixels(ask())
    hollow = 0
    for i, (shape, colour) in enumerate(product(("circle", "square", "diamond"), ("red", "green", "white"))):
        fields = {"prompt": f"a large {colour} {shape} on a blue background", "seed": i}
        (picture,) = opened(ask(**fields, lora_path="outline.safetensors", lora_scale=1))
        named = judge.name_colours(picture)
        ink = list(COLOURS).index(colour)
        hollow += judge.centre_colour(picture) == "blue" and bool((named == ink).mean() > 0.03)
    assert hollow >= 8
    assert pixels(ask(lora_path="outline.safetensors", lora_scale=0)) == plain
    assert pixels(ask(lora_path="outline.safetensors", lora_scale=1)) != plain
    assert pixels(ask()) == plain


def test_metadata_and_file_name_the_adapters(ask: Ask) -> None:
    response = ask(loras=[{"path": "outline.safetensors", "scale": 0.5}])
    assert response["metadata"]["loras"] == [{"path": "outline.safetensors", "scale": 0.5}]
    carried = json.loads(opened(response)[0].info["parameters"])["input"]
    assert carried["loras"] == [{"path": "outline.safetensors", "scale": 0.5}]
    again = ask(**carried)
    assert pixels(again) == pixels(response)


@pytest.mark.slow
def test_no_request_changes_another(ask: Ask, tmp_path: Path) -> None:
    """After random mixtures of adapters, more than memory may hold, a plain request gives a fresh worker's bytes."""
    folder = tmp_path / "loras"
    names = [f"{i}.safetensors" for i in range(6)]
    for i, name in enumerate(names):
        other_adapter(folder, name, seed=i)
    rng = random.Random(0)
    start = ask(num_inference_steps=2)["images"][0]
    modes: list[dict[str, Any]] = [
        {"scheduler": "unipc"}, {"scheduler": "lcm"}, {"scheduler": "euler_beta"}, {"shift": 2.0},
        {"init_image": start}, {"init_image": start, "mask_image": start, "scheduler": "lcm"},
        {"negative_prompt": "blue", "true_cfg_scale": 2.0}, {"width": 72},
        {"control_image": start, "preprocess": True}, {"control_image": start, "init_image": start},
        {"control_image": start, "init_image": start, "mask_image": start, "scheduler": "heun"},
    ]  # fmt: skip
    asked: dict[str, bytes] = {}
    for _ in range(100):
        chosen = [{"path": name, "scale": rng.choice((-1.0, 0.5, 1.0))} for name in rng.sample(names, rng.randrange(4))]
        fields = {"loras": chosen, "num_inference_steps": 2, **rng.choice(modes)}
        key = json.dumps(fields)
        now = pixels(ask(**fields))
        assert asked.setdefault(key, now) == now
    fresh = load_engine(Settings(model_name="flux-shapes"))
    event = {"input": {"prompt": PROMPT, "seed": 1}}
    assert pixels(ask()) == pixels(respond(event, Job(), Settings, lambda: fresh))


def test_two_adapters_at_once_are_neither_of_them(ask: Ask, tmp_path: Path) -> None:
    other_adapter(tmp_path / "loras", "other.safetensors", seed=9)
    one, other = ({"path": name, "scale": 1} for name in ("outline.safetensors", "other.safetensors"))
    made = {pixels(ask(loras=loras)) for loras in ([one], [other], [one, other], [])}
    assert len(made) == 4


def bad_files(folder: Path) -> dict[str, str]:
    """Files that are no adapter of flux-shapes: name -> a word of the reason."""
    good = load_file(OUTLINE)
    first = next(iter(good))
    layer = first.rpartition(".lora_")[0]
    save_file({**good, f"{layer}.lora_A.weight": torch.zeros(8, 64)}, folder / "shapes.safetensors")
    save_file({name.replace("blocks.0", "blocks.40"): w for name, w in good.items()}, folder / "dev.safetensors")
    save_file({"down_blocks.0.lora_A.weight": torch.zeros(4, 4)}, folder / "sdxl.safetensors")
    save_file({"weight": torch.zeros(4, 4)}, folder / "none.safetensors")
    save_file({name: w for name, w in good.items() if name != first}, folder / "half.safetensors")
    (folder / "truncated.safetensors").write_bytes(OUTLINE.read_bytes()[:-1000])
    (folder / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (folder / "adapter.bin").write_bytes(pickle.dumps({"a": 1}))
    (folder / "empty.safetensors").write_bytes(b"")
    return {
        "shapes.safetensors": "was made for another model", "dev.safetensors": "was made for another model",
        "sdxl.safetensors": "was made for another model", "none.safetensors": "holds no LoRA layers",
        "half.safetensors": "lacks lora_A or lora_B",
        "truncated.safetensors": "is not a complete", "pickle.safetensors": "is not a complete",
        "adapter.bin": "can run code",
        "empty.safetensors": "is not a complete",
    }  # fmt: skip


def test_bad_adapters_are_refused_before_the_device_is_used(
    ask: Ask, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pixels(ask())
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda *_: pytest.fail("the device was used"))
    for name, reason in bad_files(tmp_path / "loras").items():
        message = refused(ask(lora_path=name))["lora_path"]
        assert reason in message, (name, message)
        response = refused(ask(loras=[{"path": "outline.safetensors"}, {"path": name}]))
        assert list(response) == ["loras.1"]
    monkeypatch.setattr(engine, "run", run)
    assert pixels(ask()) == before


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../secret.safetensors", "../../etc/passwd", "link.safetensors", "~/x.safetensors",
     "file:///etc/passwd",
     "http://example.com/x.safetensors", "missing.safetensors", "a//b", "a\0b", "a" * 300, "a/b\0c", "ü/🔴",
     "https://[::1/x.safetensors"],
)  # fmt: skip
def test_there_is_no_way_out_of_the_folder(path: str, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(OUTLINE.read_bytes())
    os.symlink(tmp_path / "secret.safetensors", tmp_path / "loras" / "link.safetensors")
    assert "lora_path" in refused(ask(lora_path=path))


def test_private_addresses_are_not_asked(ask: Ask) -> None:
    assert "may not be fetched" in refused(ask(lora_path="https://169.254.169.254/x.safetensors"))["lora_path"]


def test_a_scale_needs_its_adapter_and_an_adapter_comes_once(ask: Ask) -> None:
    assert "without lora_path" in refused(ask(lora_scale=1))["lora_scale"]
    one = {"path": "outline.safetensors"}
    assert "more than once" in refused(ask(loras=[one, one]))["loras"]
    assert "more than once" in refused(ask(loras=[one, {"path": "./outline.safetensors"}]))["loras"]
    assert set(refused(ask(loras=[{"bogus": "x"}]))) == {"loras.0.path", "loras.0.bogus"}


def test_the_hub_is_asked_once_and_the_cache_keeps_within_its_size(ask: Ask, hub: Hub, tmp_path: Path) -> None:
    for name in ("someone/outline", "someone/other"):
        folder = tmp_path / "hub" / name
        folder.mkdir(parents=True)
        (folder / "style.safetensors").write_bytes(OUTLINE.read_bytes())
        (folder / "README.md").write_text("a style")
        hub.repos[name] = Repo(folder)
    plain, styled = pixels(ask()), pixels(ask(lora_path="someone/outline"))
    assert plain != styled
    asked = hub.requests
    assert pixels(ask(lora_path="someone/outline")) == styled
    assert hub.requests == asked, "from the cache"
    assert pixels(ask(lora_path="someone/outline/style.safetensors")) == styled
    assert pixels(ask(loras=[{"path": "someone/other", "weight_name": "style.safetensors", "scale": 0.7}])) == styled
    assert (
        "a file that the repo has not: 'x.safetensors'"
        in refused(ask(lora_path="someone/outline/x.safetensors"))["lora_path"]
    )
    assert "which is not on the hub" in refused(ask(lora_path="someone/nothing"))["lora_path"]
    assert (
        "a revision that the repo has not: 'x'"
        in refused(ask(loras=[{"path": "someone/outline", "revision": "x"}]))["loras.0"]
    )
    assert pixels(ask(loras=[{"path": "someone/outline", "revision": REVISION, "scale": 0.7}])) == styled
    hub.down = True
    try:
        answer = ask(lora_path="someone/outline/y.safetensors")
        assert answer["error"] == "adapter_unavailable: lora_path: could not be downloaded: the hub answered HTTP 503"
    finally:
        hub.down = False
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_repo_that_changed_gives_another_picture_and_a_hub_that_is_down_a_warning(
    ask: Ask, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def a_minute_passes() -> None:
        for file in (tmp_path / "cache").rglob("origin.json"):
            os.utime(file, (time.time() - 61, time.time() - 61))

    folder = tmp_path / "hub"
    folder.mkdir()
    other_adapter(folder, "style.safetensors", seed=1)
    hub.repos["someone/moving"] = Repo(folder)
    address = "https://huggingface.co/someone/moving/blob/main/style.safetensors"
    first = ask(lora_path=address)
    assert first["metadata"]["loras"] == [
        {"path": "someone/moving/style.safetensors", "revision": "main", "scale": 0.7}
    ]
    other_adapter(folder, "style.safetensors", seed=2)
    a_minute_passes()
    second = ask(lora_path=address)
    assert pixels(second) != pixels(first)
    a_minute_passes()
    hub.down = True
    try:
        third = ask(lora_path=address)
        assert pixels(third) == pixels(second)
        (warning,) = third["metadata"]["warnings"]
        assert warning.startswith("lora_path may be old: what was fetched before is used")
        caplog.clear()
        failed = ask(loras=[{"path": "someone/other"}])
        assert failed["error"].startswith("adapter_unavailable: loras.0: could not be downloaded")
        assert {record.levelname for record in caplog.records} == {"ERROR"}
        both = ask(loras=[{"path": "someone/other"}, {"path": "huggingface.co/spaces/a/b"}], num_images=9)
        assert set(refused(both)) == {"loras.1", "num_images"}
    finally:
        hub.down = False


def stored(folder: Path, hub: Hub, count: int) -> list[str]:
    """Repos on the hub that hold an adapter of 3 MB each."""
    (folder / "big").mkdir()
    save_file({"lora": torch.zeros(750_000)}, folder / "big" / "big.safetensors")
    names = [f"someone/big{i}" for i in range(count)]
    for name in names:
        hub.repos[name] = Repo(folder / "big")
    return names


def asking(*paths: str) -> Request:
    return Request(prompt=("x",), loras=tuple(Lora(path=path) for path in paths))


def test_the_cache_drops_what_was_not_used_for_longest_and_nobody_holds(hub: Hub, tmp_path: Path) -> None:
    names = stored(tmp_path, hub, 5)
    library = AdapterStore(Settings(lora_cache_dir=tmp_path / "cache", lora_cache_gb=0.007))

    def kept() -> int:
        return len(list((tmp_path / "cache").rglob("*.safetensors")))

    for name in names[:2]:
        library.load(asking(name), Job())
    library.load(asking(names[0]), Job())
    library.load(asking(names[2]), Job())
    assert kept() == 2
    asked = hub.requests
    library.load(asking(names[0], names[2]), Job())
    assert hub.requests == asked, "the second was the one that went"
    held, faults, _ = library.load(asking(*names[1:]), Job())
    assert all(adapter.file.is_file() for adapter in held)
    assert (len(held), kept()) == (2, 2), "never more than the limit"
    for fault in faults:
        assert isinstance(fault, WorkerFault)
        assert "running jobs use all of LORA_CACHE_GB=0.007" in fault.message
    del held
    library.load(asking(names[0]), Job())
    assert kept() == 2


def test_a_file_too_large_for_the_cache_is_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    (name,) = stored(tmp_path, hub, 1)
    library = AdapterStore(Settings(lora_cache_dir=tmp_path / "cache", lora_cache_gb=0.002))
    adapters, (fault,), _ = library.load(asking(name), Job())
    assert "bytes, more than the 0.002 GB of LORA_CACHE_GB" in fault.message
    assert (adapters, list((tmp_path / "cache").iterdir())) == ((), [])


def test_an_adapter_at_an_address_is_fetched_once_and_its_token_stays_secret(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetched(url: str, *_: object) -> Iterator[bytes]:
        asked.append(url)
        yield OUTLINE.read_bytes()

    monkeypatch.setattr(
        "src.request.adapters.open_url", fetched
    )  # the SDK fetches from no address that a test could serve
    url = "https://example.com/outline.safetensors?token=my-secret"
    first, again = ask(lora_path=url), ask(lora_path=url)
    assert pixels(first) == pixels(again) == pixels(ask(lora_path="outline.safetensors"))
    assert asked == [url]
    assert first["metadata"]["loras"][0]["path"].startswith("sha256:")
    assert "my-secret" not in json.dumps(first["metadata"]) + opened(first)[0].info["parameters"]
    wrong = refused(ask(loras=[{"path": url, "revision": "main"}]))
    assert "weight_name and revision need one" in wrong["loras.0"]


def test_kohyas_format_is_read(ask: Ask, tmp_path: Path) -> None:
    """The same weights under kohya's names give the same picture."""
    kohya: dict[str, torch.Tensor] = {}
    for name, weight in load_file(OUTLINE).items():
        if "single_transformer_blocks" not in name or "proj_out" not in name:
            continue
        number = name.split(".")[2]
        half = "lora_down" if "lora_A" in name else "lora_up"
        kohya[f"lora_unet_single_blocks_{number}_linear2.{half}.weight"] = weight.float()
    diffusers_own = {
        name: w.float() for name, w in load_file(OUTLINE).items()
        if "single_transformer_blocks" in name and "proj_out" in name
    }  # fmt: skip
    save_file(kohya, tmp_path / "loras" / "kohya.safetensors")
    save_file(diffusers_own, tmp_path / "loras" / "diffusers.safetensors")
    one, other = (ask(lora_path=f"{name}.safetensors", lora_scale=1) for name in ("kohya", "diffusers"))
    difference = np.abs(np.asarray(opened(one)[0], float) - np.asarray(opened(other)[0], float)).max()
    assert difference <= 2
    assert isinstance(opened(one)[0], Image.Image)


def test_xlabs_format_is_read(ask: Ask, tmp_path: Path) -> None:
    """XLabs keeps a block's three projections as one; split as diffusers has them they give the same picture."""
    generator = torch.Generator().manual_seed(7)
    xlabs: dict[str, torch.Tensor] = {}
    own: dict[str, torch.Tensor] = {}
    for block in (0, 1):
        down = torch.randn(4, 160, generator=generator) * 0.1
        up = torch.randn(480, 4, generator=generator) * 0.1
        xlabs[f"double_blocks.{block}.processor.qkv_lora1.down.weight"] = down
        xlabs[f"double_blocks.{block}.processor.qkv_lora1.up.weight"] = up
        for name, part in zip(("to_q", "to_k", "to_v"), torch.split(up, 160), strict=True):
            own[f"transformer.transformer_blocks.{block}.attn.{name}.lora_A.weight"] = down.clone()
            own[f"transformer.transformer_blocks.{block}.attn.{name}.lora_B.weight"] = part.contiguous()
    save_file(xlabs, tmp_path / "loras" / "xlabs.safetensors")
    save_file(own, tmp_path / "loras" / "own.safetensors")
    one, other = (ask(lora_path=f"{name}.safetensors", lora_scale=1) for name in ("xlabs", "own"))
    assert pixels(one) == pixels(other) != pixels(ask())


def test_a_file_that_would_change_other_layers_is_refused(ask: Ask, tmp_path: Path) -> None:
    """diffusers loads a norm that it finds beside the adapter into the model itself, for good."""
    before = pixels(ask())
    norm = {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.full((32,), 3.0)}
    save_file({**load_file(OUTLINE), **norm}, tmp_path / "loras" / "norms.safetensors")
    response = refused(ask(lora_path="norms.safetensors"))
    assert "holds more than LoRA layers" in response["lora_path"]
    assert "attn.norm_q.weight" in response["lora_path"]
    assert pixels(ask()) == before


def test_an_adapter_that_fails_to_load_leaves_no_layer_of_its_own(
    engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = engine._pipeline
    load = pipeline.load_lora_weights
    failures: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no")]

    def failing(*arguments: Any, **options: Any) -> None:
        load(*arguments, **options)
        if failures:
            raise failures.pop(0)

    monkeypatch.setattr(pipeline, "load_lora_weights", failing)
    answer = ask(lora_path="outline.safetensors", lora_scale=1)
    assert answer["error_code"] == "generation_failed", "it was tried once more where memory was short"
    before = pixels(ask())
    assert not any(isinstance(layer, BaseTunerLayer) for layer in pipeline.transformer.modules())
    assert pixels(ask(lora_path="outline.safetensors", lora_scale=1)) != before
    assert pixels(ask()) == before
