"""Adapters: where they may come from, which are refused and why, and that no request gets another's."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import struct
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file

from handler import respond
from src.engine import Engine, adapters, load_engine
from src.engine.lora import AdapterFile, Networks
from src.engine.lora.deltas import Kronecker
from src.errors import OutOfMemory, Refused, WorkerFault
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
    draw = engine.draw
    monkeypatch.setattr(engine, "draw", lambda *_: pytest.fail("the device was used"))
    for name, reason in bad_files(tmp_path / "loras").items():
        message = refused(ask(lora_path=name))["lora_path"]
        assert reason in message, (name, message)
        response = refused(ask(loras=[{"path": "outline.safetensors"}, {"path": name}]))
        assert list(response) == ["loras.1"]
    monkeypatch.setattr(engine, "draw", draw)
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


# What strangers send

QUERY = "transformer.transformer_blocks.0.attn.to_q"


def lora(rank: int = 4, layer: str = QUERY) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    down, up = (torch.randn(shape, generator=generator) * 0.05 for shape in ((rank, 160), (160, rank)))
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


def lokr() -> dict[str, torch.Tensor]:
    """Of two layers."""
    generator = torch.Generator().manual_seed(1)
    w1, w2 = (torch.randn(shape, generator=generator) * 0.2 for shape in ((8, 8), (20, 20)))
    names = (QUERY, QUERY.replace("to_q", "to_k"))
    return {f"{name}.{key}": w.clone() for name in names for key, w in (("lokr_w1", w1), ("lokr_w2", w2))}


def loha(rank: int) -> dict[str, torch.Tensor]:
    a, b = torch.ones(160, rank) * 0.01, torch.ones(rank, 160) * 0.01
    return {f"{QUERY}.hada_w{i}_{name}": w.clone() for i in (1, 2) for name, w in (("a", a), ("b", b))}


def sparse(file: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "F32", width: int = 4) -> None:
    """A whole file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = width
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)


def of_rank(rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter of every layer of the shipped one's."""
    return {
        name: (rank, weight.shape[1]) if "lora_A" in name else (weight.shape[0], rank)
        for name, weight in load_file(OUTLINE).items()
    }


def hostile_files(folder: Path) -> dict[str, str]:
    """Files that cost more than they may, or are odd: name -> a word of the reason."""
    saved: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "rank_0": ({f"{QUERY}.lora_A.weight": torch.zeros(0, 160), f"{QUERY}.lora_B.weight": torch.zeros(160, 0)},
                   "which is no matrix"),
        "no_dimension": ({f"{QUERY}.lora_A.weight": torch.tensor(1.0), f"{QUERY}.lora_B.weight": torch.tensor(1.0)},
                         "which is no matrix"),
        "integers": ({name: w.to(torch.int32) for name, w in lora().items()}, "holds int32 values"),
        "complex": ({name: w.to(torch.complex64) for name, w in lora().items()}, "holds C64 values"),
        "complex_alpha": ({**lora(), f"{QUERY}.alpha": torch.tensor(1 + 1j)}, "holds C64 values"),
        "empty_alpha": ({**lora(), f"{QUERY}.alpha": torch.zeros(0)}, "where only one number can be applied"),
        "large_alpha": ({**lora(), f"{QUERY}.alpha": torch.tensor(3e38, dtype=torch.float64) * 1e4},
                        "not finite"),
        "product": ({name: w * 1e30 for name, w in lora().items()} | {f"{QUERY}.alpha": torch.tensor(1e30)},
                    "that are not finite once they are multiplied"),
        "mixed": ({**lora(), f"{QUERY}.lokr_w1": torch.ones(8, 8)}, "one layer is of one kind"),
        "dora_and_bias": (
            {
                **lora(),
                f"{QUERY}.lora_magnitude_vector": torch.ones(160),
                f"{QUERY.replace('to_q', 'to_k')}.diff_b": torch.ones(160),
            },
            "is a DoRA",
        ),
        "row_and_column": ({f"{QUERY}.lokr_w1": torch.ones(1, 160), f"{QUERY}.lokr_w2": torch.ones(160, 1)},
                           "are a row and a column"),
        "loha_4000": (loha(4_000), "has the rank 4,000 in"),
    }  # fmt: skip
    for name, (tensors, _) in saved.items():
        save_file(tensors, folder / f"{name}.safetensors")
    sparse(folder / "rank_4096.safetensors", of_rank(4_096))
    sparse(folder / "rank_400000.safetensors", of_rank(400_000), "F16", 2)
    sparse(folder / "large.safetensors", {f"{QUERY}.lokr_w1": (1, 1), f"{QUERY}.lokr_w2": (160, 30_000_000)})
    sparse(folder / "factors.safetensors", {f"{QUERY}.lokr_w1_a": (160, 10**7), f"{QUERY}.lokr_w1_b": (10**7, 160),
                                            f"{QUERY}.lokr_w2": (1, 1)})  # fmt: skip
    (folder / "folder.safetensors").mkdir()
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    return {f"{name}.safetensors": reason for name, (_, reason) in saved.items()} | {
        "rank_4096.safetensors": "has the rank 4,096 in", "rank_400000.safetensors": "has the rank 400,000 in",
        "large.safetensors": "was made for another model", "factors.safetensors": "has the rank 10,000,000 in",
        "folder.safetensors": "names no .safetensors file", "loop.safetensors": "names no .safetensors file",
    }  # fmt: skip


def test_what_would_cost_too_much_is_refused_from_the_header(ask: Ask, tmp_path: Path) -> None:
    before = pixels(ask())
    for name, reason in hostile_files(tmp_path / "loras").items():
        began = time.perf_counter()
        message = refused(ask(lora_path=name, lora_scale=1))["lora_path"]
        assert reason in message, (name, message)
        assert time.perf_counter() - began < 5, name
        assert len(message) < 400
    assert pixels(ask()) == before


def test_the_settings_say_how_large_an_adapter_may_be(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(lora(rank=9), file)
    engine._adapters.use(())  # or its layers have other names
    for settings, reason in (
        ({"max_lora_rank": 8}, "has the rank 9 in"),
        ({"max_lora_gb": 0.00001}, "has 11,520 bytes once it is read in float32, more than the 1e-05 GB"),
    ):
        with pytest.raises(Refused, match=reason):
            AdapterFile(file, Networks(engine._pipeline, Settings(**settings)))
    assert AdapterFile(file, Networks(engine._pipeline, Settings(max_lora_rank=9))).size == 11_520


def test_a_header_with_many_patterns_or_prefixes_takes_no_time(ask: Ask, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    many = {f"x{i}": 1 for i in range(60_000)}
    for name, config in {
        "patterns": {"transformer.lora_alpha": 4, "transformer.alpha_pattern": many},
        "long": {"a": "x" * 1_000_001},
        "number": {"transformer.lora_alpha": 10**400},
        "nothing": {"transformer.lora_alpha": float("nan")},
    }.items():
        save_file(load_file(OUTLINE), folder / f"{name}.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    prefixed = {f"text_encoder_2.{'module.' * 30}{i}.lora_A.weight": torch.zeros(0) for i in range(9_000)}
    save_file({**prefixed, **lora()}, folder / "prefixes.safetensors")
    began = time.perf_counter()
    assert ask(lora_path="patterns.safetensors", dry_run=True)["status"] == "success"
    assert ask(lora_path="prefixes.safetensors", dry_run=True)["status"] == "success"
    for name, reason in (("long", "at most 1,000,000 are read"), ("number", "which must be"), ("nothing", "must be")):
        assert reason in refused(ask(lora_path=f"{name}.safetensors"))["lora_path"]
    assert time.perf_counter() - began < 20


def state(engine: Engine) -> dict[str, object]:
    """The model's own parameters."""
    found: dict[str, object] = {}
    for part in ("transformer", "text_encoder"):
        for name, parameter in getattr(engine._pipeline, part).named_parameters():
            own = f"{part}.{name.replace('base_layer.', '')}"
            if ".lora_" not in name:
                found[own] = (id(parameter), parameter.dtype, parameter.is_meta, tuple(parameter.shape))
    return found


def failing(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, *, after: int = 0, first: bool = False
) -> list[int]:
    """Let the call of `owner`'s `name` after so many others fail once, before or after it did its work."""
    real, calls = getattr(owner, name), [0]

    def call(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        failed = calls[0] == after + 1
        if failed and first:
            raise KeyError(name)
        result = real(*arguments, **options)
        if failed:
            raise RuntimeError(name)
        return result

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "step",
    ["read", "load_lora_weights", "inject_adapter_in_model", "set_peft_model_state_dict", "load_lora_into_text_encoder",
     "put_into", "put_into again", "set_adapters", "forward", "text forward"],
)  # fmt: skip
def test_whatever_fails_the_next_pictures_are_right(
    step: str, *, first: bool, ask: Ask, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pipeline = tmp_path / "loras", engine._pipeline
    engine._adapters._make_room(0, keep=set())
    clip = "text_encoder.encoder.layers.0.self_attn.q_proj"
    words = pipeline.text_encoder.get_submodule(clip.removeprefix("text_encoder.")).weight.shape
    both = {f"{clip}.lora_A.weight": torch.ones(2, words[1]), f"{clip}.lora_B.weight": torch.ones(words[0], 2)}
    save_file({**both, **lokr(), **lora(layer=QUERY.replace("to_q", "to_v"))}, folder / "x.safetensors")
    short = {"num_inference_steps": 2}
    plain, outline = pixels(ask(**short)), pixels(ask(**short, lora_path="outline.safetensors", lora_scale=1))
    before = state(engine)
    owners: dict[str, tuple[Any, str, int]] = {
        "read": (AdapterFile, "read", 0),
        "load_lora_weights": (pipeline, "load_lora_weights", 0),
        "inject_adapter_in_model": (peft, "inject_adapter_in_model", 0),
        "set_peft_model_state_dict": (peft, "set_peft_model_state_dict", 0),
        "load_lora_into_text_encoder": (pipeline, "load_lora_into_text_encoder", 0),
        "put_into": (Kronecker, "put_into", 0),
        "put_into again": (Kronecker, "put_into", 1),
        "set_adapters": (pipeline, "set_adapters", 0),
        "forward": (pipeline.transformer.transformer_blocks[1], "forward", 1),
        "text forward": (pipeline.text_encoder.encoder.layers[0].mlp, "forward", 0),
    }
    with monkeypatch.context() as patch:
        if step == "read":  # on the device's thread, where it was not handed over
            patch.setattr(adapters, "_HANDED_OVER", 0)
        calls = failing(*owners[step][:2], patch, after=owners[step][2], first=first)
        failed = ask(**short, lora_path="x.safetensors", lora_scale=1)
    assert calls[0] > owners[step][2]
    assert failed["error_code"] in ("generation_failed", "internal_error"), failed
    assert (failed["error_code"] == "generation_failed") or "forward" in step, "what no model raises"
    assert "x.safetensors" not in engine.loaded().adapters
    engine._prompts._remembered.clear()
    assert pixels(ask(**short)) == plain
    assert state(engine) == before
    assert pixels(ask(**short, lora_path="outline.safetensors", lora_scale=1)) == outline
    styled = pixels(ask(**short, lora_path="x.safetensors", lora_scale=1))
    assert styled not in (plain, outline)
    engine._adapters._forget(next(name for name, path in engine._adapters._loaded.items() if path == "x.safetensors"))
    assert pixels(ask(**short, lora_path="x.safetensors", lora_scale=1)) == styled
    assert pixels(ask(**short)) == plain


@pytest.mark.parametrize("change", ["meta", "dtype", "replaced", "added on meta"])
def test_loading_that_changes_the_model_itself_is_undone(
    change: str, ask: Ask, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = engine._pipeline.transformer
    plain, before = pixels(ask()), state(engine)
    load = engine._pipeline.load_lora_weights

    def changing(*arguments: Any, **options: Any) -> None:
        load(*arguments, **options)
        layer = transformer.time_text_embed.timestep_embedder.linear_1
        if change == "meta":
            layer.weight = torch.nn.Parameter(layer.weight.to("meta"))
        elif change == "dtype":
            layer.bias = torch.nn.Parameter(layer.bias.half())
        elif change == "replaced":
            wider = torch.nn.Linear(layer.in_features, layer.out_features, dtype=torch.float16)
            transformer.time_text_embed.timestep_embedder.linear_1 = wider
            layer.weight = torch.nn.Parameter(layer.weight.half())
        else:
            name = options["adapter_name"]
            tuner: Any = next(module for module in transformer.modules() if isinstance(module, BaseTunerLayer))
            tuner.lora_A[name].to("meta")

    with monkeypatch.context() as patch:
        patch.setattr(engine._pipeline, "load_lora_weights", changing)
        failed = ask(lora_path="outline.safetensors", lora_scale=1)
    assert failed["error_code"] == "generation_failed", failed
    assert "could not be loaded: it" in failed["error"]
    assert pixels(ask()) == plain
    assert state(engine) == before
    assert pixels(ask(lora_path="outline.safetensors", lora_scale=1)) != plain


def test_an_adapter_whose_picture_fails_is_forgotten_and_one_whose_job_ends_is_not(
    ask: Ask, engine: Engine, tmp_path: Path
) -> None:
    plain = pixels(ask())
    broken = {name: w * 1e25 for name, w in lora().items()}
    save_file(broken, tmp_path / "loras" / "broken.safetensors")
    failed = ask(lora_path="broken.safetensors", lora_scale=4)
    assert failed["error_code"] == "generation_failed"
    assert "broken.safetensors" not in engine.loaded().adapters
    assert pixels(ask()) == plain
    styled = pixels(ask(lora_path="outline.safetensors", lora_scale=1))
    settings = Settings(lora_dir=tmp_path / "loras")
    job = Job(on_progress=lambda progress: job.cancel() if progress.phase == "denoise" else None)
    event = {"input": {"prompt": PROMPT, "lora_path": "outline.safetensors"}}
    assert respond(event, job, lambda: settings, lambda: engine)["error_code"] == "cancelled"
    assert "outline.safetensors" in engine.loaded().adapters
    assert pixels(ask(lora_path="outline.safetensors", lora_scale=1)) == styled


def test_the_device_reads_no_file_that_a_job_has_read(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    save_file(lora(), folder / "x.safetensors")
    library = AdapterStore(Settings(lora_dir=folder))
    loaded = library.load(asking("x.safetensors"), Job()).adapters
    assert engine.check_adapters(loaded) == ([], [])
    (folder / "x.safetensors").unlink()
    engine._adapters.use(loaded)
    assert "x.safetensors" in engine.loaded().adapters
    assert not engine._adapters._checked.read
    engine._adapters.forget_used()
    save_file(lora(), folder / "x.safetensors")
    loaded = library.load(asking("x.safetensors"), Job()).adapters
    engine.check_adapters(loaded)
    assert engine._adapters._checked.read
    del loaded
    assert not engine._adapters._checked.read, "it waits for as long as its request"
    loaded = library.load(asking("x.safetensors"), Job()).adapters
    engine.check_adapters(loaded)
    (folder / "x.safetensors").unlink()
    again = library.load(asking("x.safetensors"), Job())
    assert again.faults
    job = Job(on_progress=lambda progress: (folder / "y.safetensors").unlink(missing_ok=True))
    save_file(lora(3), folder / "y.safetensors")
    event = {"input": {"prompt": PROMPT, "lora_path": "y.safetensors"}}
    assert respond(event, job, lambda: Settings(lora_dir=folder), lambda: engine)["status"] == "success"
    assert not (folder / "y.safetensors").exists()


def test_what_is_remembered_of_files_is_bounded(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_REMEMBERED", 3)
    engine._adapters._checked.fitting.clear()
    library = AdapterStore(Settings(lora_dir=tmp_path))
    for i in range(6):
        save_file(lora(), tmp_path / f"{i}.safetensors")
        assert engine.check_adapters(library.load(asking(f"{i}.safetensors"), Job()).adapters) == ([], [])
    assert len(engine._adapters._checked.fitting) == 3
    file = tmp_path / "5.safetensors"
    stat = file.stat()
    broken = file.read_bytes()[:-4] + struct.pack("<f", float("nan"))
    file.write_bytes(broken)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (fault,), _ = engine.check_adapters(library.load(asking("5.safetensors"), Job()).adapters)
    assert "not finite" in fault.message


def test_whose_trouble_it_is_that_an_adapter_cannot_be_read(
    ask: Ask, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def short(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(AdapterFile, "read", broken)
    answer = ask(lora_path="outline.safetensors")
    assert answer["error"] == ("adapter_unavailable: lora_path: could not be read on this worker: input/output error")
    assert {record.levelname for record in caplog.records} == {"ERROR"}
    monkeypatch.setattr(adapters, "_HANDED_OVER", 0)
    answer = ask(lora_path="outline.safetensors")
    assert answer["error_code"] == "adapter_unavailable", "on the device's thread too"
    monkeypatch.setattr(AdapterFile, "check", short)
    engine._adapters._checked.fitting.clear()
    answer = ask(lora_path="outline.safetensors")
    assert answer["error_code"] == OutOfMemory.code


def mutated(folder: Path, rng: random.Random) -> None:
    """x.safetensors, a small adapter in which something is another."""
    tensors = {**rng.choice([lora(), lokr(), loha(2)]), f"{QUERY}.alpha": torch.tensor(2.0)}
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(list(tensors))
        weight = tensors.pop(name)
        match rng.randrange(5):
            case 0:
                weight = weight.flatten()[: rng.choice([0, 1, 160])].clone()
            case 1 if not weight.is_complex():
                types = [torch.int8, torch.float16, torch.float8_e5m2, torch.complex64, torch.bool]
                weight = weight.to(rng.choice(types))
            case 2:
                weight = torch.full_like(weight, rng.choice([float("nan"), float("inf"), 3e38, 0.0]))
            case 3:
                layer = rng.choice(
                    ["", "a", QUERY, QUERY.replace("to_q", "to_out.0"), "text_encoder_2.x", "lora_unet_"]
                )
                end = rng.choice(
                    ["lora_A", "lora_mid", "alpha", "bias", "diff_b", "lokr_w1", "hada_w1_a", "dora_scale"]
                )
                name = f"{layer}.{end}" + rng.choice(["", ".weight"])
            case _ if weight.ndim:
                weight = weight.reshape(*weight.shape, *rng.choice([[1], [1, 1], []])).transpose(0, -1).contiguous()
            case _:
                weight = weight.reshape(1, 1)
        tensors[name] = weight
    save_file(tensors, folder / "x.safetensors")
    if rng.random() < 0.5:
        data = bytearray((folder / "x.safetensors").read_bytes())
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
        (folder / "x.safetensors").write_bytes(data)


def test_mutated_adapters_are_read_or_refused(engine: Engine, tmp_path: Path) -> None:
    rng, networks, read = random.Random(13), engine._adapters._networks, 0
    for _ in range(600):
        mutated(tmp_path, rng)
        began = time.perf_counter()
        try:
            weights = AdapterFile(tmp_path / "x.safetensors", networks).read()
        except Refused as error:
            str(error).encode()
        else:
            read += 1
            assert all(tensor.isfinite().all() for tensor in weights.lora.values())
            assert all(name.partition(".lora_")[2] in ("A.weight", "B.weight", "B.bias", "magnitude_vector")
                       for name in weights.lora)  # fmt: skip
        assert time.perf_counter() - began < 5
    assert read > 20


def test_after_mutated_adapters_the_plain_picture_is_the_same(ask: Ask, tmp_path: Path) -> None:
    rng, short = random.Random(14), {"num_inference_steps": 1}
    plain, codes = pixels(ask(**short)), set()
    for _ in range(60):
        mutated(tmp_path / "loras", rng)
        answer = ask(**short, lora_path="x.safetensors", lora_scale=1)
        codes.add(answer.get("error_code", "success"))
        if answer.get("error_code") != "invalid_request":
            assert pixels(ask(**short)) == plain
    assert codes <= {"success", "invalid_request", "generation_failed"}
    assert {"success", "invalid_request"} <= codes
