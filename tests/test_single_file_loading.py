"""Models in one file: the bytes of the folder that each was made from, whatever its layout and its types of weights."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import nn

from handler import respond
from src.engine import Engine, load_engine
from src.engine.components import FolderNetworks
from src.engine.gguf_linear import GGUFLinear, GGUFParameter
from src.engine.placed_pipeline import PlacedPipeline
from src.engine.single_file import SingleFileNetworks
from src.engine.staging import Staging, mapped
from src.errors import Cancelled, InvalidSettings, ModelUnavailable
from src.job import Job, Progress
from src.request.tensor_file import TensorFile
from src.settings import Settings
from src.weights.files import Source, read_index
from src.weights.single_file import SingleFile
from tests.conftest import opened
from tests.made_files import Tensors, packed, single_file, tensors_of, transformer_of_bfl
from tests.small_models import SHAPES, all_placements, small
from tests.test_acceleration import plan
from tests.test_compiled import Backend, compiling, fresh_compiler  # noqa: F401 - a fixture
from tests.test_family import SMALL, drawn, sent_to

CPU = torch.device("cpu")
ORIGINAL = ("dev", "schnell", "fill", "flux.2-dev", "klein", "flux.3", "flux.3-base")
LAYOUTS: dict[str, dict[str, Any]] = {
    "BFL's": {},
    "Comfy's": {"prefix": "model.diffusion_model."},
    "diffusers'": {"layout": "diffusers"},
    "all in one": {"prefix": "model.diffusion_model.", "all_in_one": True},
    "diffusers' all in one": {"prefix": "transformer.", "all_in_one": True, "layout": "diffusers"},
}


def model(family: str, folder: Path, **changes: Any) -> Path:
    """A small model of `family` in whose transformer no two tensors are alike."""
    small(family, folder, **changes)
    (file,) = (folder / "transformer").glob("*.safetensors")
    torch.manual_seed(3)
    save_file({name: each + 0.02 * torch.randn_like(each) for name, each in tensors_of(file.parent).items()}, file)
    return folder


def without(folder: Path, *parts: str) -> Path:
    """A copy of `folder` without the weights of some parts, which a single file has."""
    base = folder.parent / f"{folder.name}-but-{'-'.join(parts)}"
    if base.exists():
        return base
    weights = shutil.ignore_patterns("*.safetensors*")

    def ignore(name: str, names: list[str]) -> set[str]:
        return weights(name, names) if Path(name).name in parts else set()

    return Path(shutil.copytree(folder, base, ignore=ignore, copy_function=os.link))


def engine_of(folder: Path, file: SingleFile | None = None, **fields: Any) -> Engine:
    """The model in `folder`, or the one of `file` with what it lacks from there."""
    if file:
        fields |= {"model_name": str(file.path), "base_model": str(without(folder, *file.parts))}
    return load_engine(Settings(**{"model_name": str(folder), **fields}))


def with_transformer(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of `folder` whose transformer's tensors are changed."""
    other = Path(tempfile.mkdtemp(dir=folder.parent)) / "tune"
    shutil.copytree(folder, other, copy_function=os.link)
    (file,) = (other / "transformer").glob("*.safetensors")
    tensors = tensors_of(file.parent)
    file.unlink()  # the other folder's too
    save_file(change(tensors), file)
    return other


def loaded(
    folder: Path, file: SingleFile | None = None, dtype: torch.dtype = torch.float32, *, only: str | None = None
) -> dict[str, Any]:
    """The networks of the model in `folder`, or of the one of `file` with what it lacks from there."""
    index = read_index(folder)
    assert index
    source = Source(without(folder, *file.parts) if file else folder, None, file)
    networks = SingleFileNetworks(index, source, file) if file else FolderNetworks(index, source)
    return dict(networks.load(dtype, Staging(CPU), but_for=[part for part in index if only not in (None, part)]))


transformer_of = partial(loaded, only="transformer")


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Of all networks, names, types and bytes; also that nobody trains them."""
    assert one.keys() == other.keys()
    for name, network in one.items():
        here, there = network.state_dict(), other[name].state_dict()
        assert here.keys() == there.keys()
        assert not network.training
        wrong = [key for key in here if here[key].dtype != there[key].dtype or not torch.equal(here[key], there[key])]
        assert not wrong, f"{name}: {wrong}"
        assert {key: each.shape for key, each in network.named_buffers()} == {
            key: each.shape for key, each in other[name].named_buffers()
        }
    return True


@pytest.fixture(scope="module", params=ORIGINAL)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "tune"
    if request.param == "schnell":  # the shipped model is of its kind
        return request.param, Path(shutil.copytree(SHAPES, folder))
    return request.param, model(request.param, folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_has_the_weights_of_the_folder(family: tuple[str, Path], layout: str, tmp_path: Path) -> None:
    _, folder = family
    file = single_file(folder, tmp_path / "tune.safetensors", **LAYOUTS[layout])
    assert same_weights(loaded(folder, file), loaded(folder))


def test_chromas_names_are_known(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = diffusers.ChromaTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6), approximator_num_channels=8, approximator_hidden_dim=32, approximator_layers=2,
    )  # fmt: skip
    for weight in transformer.parameters():
        nn.init.normal_(weight)
    transformer.save_pretrained(tmp_path / "transformer")
    path = tmp_path / "chroma.safetensors"
    save_file(transformer_of_bfl("ChromaTransformer2DModel", tensors_of(tmp_path / "transformer")), path)
    parts = {"transformer": ""}
    file = SingleFile(path, "chroma", "original", parts, TensorFile(path).tensors, dict(transformer.config))
    index = {"transformer": ["diffusers", "ChromaTransformer2DModel"]}
    (found,) = SingleFileNetworks(index, Source(tmp_path, None, file), file).load(torch.float32, Staging(CPU))
    assert same_weights(dict([found]), {"transformer": transformer.eval()})


def test_a_file_draws_the_pictures_of_the_folder(family: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = family
    whole = dict(LAYOUTS["all in one"])
    engine = engine_of(folder, single_file(folder, tmp_path / "tune.safetensors", **whole))
    assert engine.model.family == name
    picture = drawn(engine, **sent_to(engine, next(iter(engine.model.modes))))
    assert picture == drawn(engine, **sent_to(engine, next(iter(engine.model.modes)))), "and again"
    plain = engine_of(folder)
    assert picture == drawn(plain, **sent_to(plain, next(iter(plain.model.modes))))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of dev whose rows are whole blocks of every kind that GGUF has."""
    return model("dev", tmp_path_factory.mktemp("wide") / "tune", num_attention_heads=8)


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, *FP8], ids=str)
def test_each_type_of_weights_becomes_the_workers_own_as_a_folder_does(
    wide: Path, stored: torch.dtype, tmp_path: Path
) -> None:
    file = single_file(wide, tmp_path / "tune.safetensors", dtype=stored)
    as_stored = with_transformer(wide, lambda tensors: {name: each.to(stored) for name, each in tensors.items()})
    if stored in FP8:  # which no folder has: its values, apart
        as_stored = with_transformer(
            wide, lambda tensors: {name: each.to(stored).float() for name, each in tensors.items()}
        )
    for dtype in (torch.float32, torch.bfloat16):
        found = transformer_of(wide, file, dtype)
        assert same_weights(found, transformer_of(as_stored, dtype=dtype))
        weights = list(found["transformer"].parameters())
        swapped = 2  # norm_out's, put together anew
        assert len(mapped(weights)) == (len(weights) - swapped if stored == dtype else 0)


SCALES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scale_weight": lambda weight: weight.abs().max() / 448,
    "weight_scale": lambda weight: (weight.abs().amax(1) / 448).clamp(min=1e-6),
    "weight_scale of rows": lambda weight: (weight.abs().amax(1, keepdim=True) / 448).clamp(min=1e-6),
}


@pytest.mark.parametrize("scaled", SCALES)
def test_scaled_fp8_is_multiplied_in_float32(wide: Path, scaled: str, tmp_path: Path) -> None:
    apart: Tensors = {}

    def scale(tensors: Tensors) -> Tensors:
        found: Tensors = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
        for name, weight in tensors.items():
            apart[name] = found[name] = weight
            if weight.ndim == 2 and "blocks" in name:
                layer, scale = name.removesuffix(".weight"), SCALES[scaled](weight)
                found[name] = (weight / scale.view(-1, *[1] * (scale.ndim > 0))).to(torch.float8_e4m3fn)
                apart[name] = found[name].float() * scale.view(-1, *[1] * (scale.ndim > 0))
                found[f"{layer}.{scaled.split(maxsplit=1)[0]}"] = scale
                found[f"{layer}.scale_input"] = torch.ones(())
                found[f"{layer}.comfy_quant"] = torch.zeros(20, dtype=torch.uint8)
        return found

    file = single_file(wide, tmp_path / "tune.safetensors", change=scale)
    whole = single_file(wide, tmp_path / "apart.safetensors", change=lambda _: apart)
    for dtype in (torch.float32, torch.bfloat16):
        assert same_weights(transformer_of(wide, file, dtype), transformer_of(wide, whole, dtype))


KINDS = [
    *(Kind.Q8_0, Kind.Q6_K, Kind.Q5_K, Kind.Q5_1, Kind.Q5_0, Kind.Q4_K, Kind.Q4_1, Kind.Q4_0, Kind.Q3_K, Kind.Q2_K),
    *(Kind.IQ4_NL, Kind.IQ4_XS, Kind.F16, Kind.BF16, Kind.F32),
]


def of_kind(kind: Kind) -> Callable[[Tensors], Tensors]:
    """As quantizers of FLUX write: matrices in blocks of `kind`, the rest in 16 bits; rows need not be whole blocks."""
    block = gguf.GGML_QUANT_SIZES[kind][0]

    def change(tensors: Tensors) -> Tensors:
        return {
            name: packed(each, kind) if each.ndim == 2 and not each.numel() % block else each.to(torch.float16)
            for name, each in tensors.items()
        }

    return change


def gguf_file(folder: Path, kind: Kind, path: Path, **how: Any) -> tuple[SingleFile, Path]:
    """A GGUF file of `kind`, and the folder of the values that the gguf package reads in it."""
    file = single_file(folder, path, change=of_kind(kind), **how)
    apart = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
        apart[tensor.name] = torch.from_numpy(values).view(file.tensors[tensor.name].shape)
    of_values = single_file(folder, path.with_suffix(".safetensors"), change=lambda _: apart)
    weights = transformer_of(folder, of_values)["transformer"].state_dict()
    return file, with_transformer(folder, lambda _: weights)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_gguf_computes_with_the_very_values_that_the_format_says(wide: Path, kind: Kind, tmp_path: Path) -> None:
    file, apart = gguf_file(wide, kind, tmp_path / "tune.gguf")
    for dtype in (torch.float32, torch.bfloat16):
        here, there = (
            each["transformer"] for each in (transformer_of(wide, file, dtype), transformer_of(apart, dtype=dtype))
        )
        small_ones = 0
        for name, layer in there.named_modules():
            if isinstance(layer, nn.Linear):
                ours = here.get_submodule(name)
                rows = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
                assert torch.equal(ours(rows), layer(rows)), name
                small_ones += isinstance(ours, GGUFLinear)
                assert ours.weight.nbytes <= layer.weight.nbytes
        plain = {Kind.F16, Kind.BF16, Kind.F32}
        assert (small_ones > 10) == (kind not in plain)
        others = {name: weight for name, weight in here.state_dict().items() if weight.dtype != torch.uint8}
        assert all(torch.equal(weight, there.state_dict()[name]) for name, weight in others.items())


@pytest.fixture(scope="module")
def small_card(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SingleFile, Path]:
    """A file of Q4_K, in which some rows are no whole blocks, and the folder of its values."""
    return gguf_file(wide, Kind.Q4_K, tmp_path_factory.mktemp("gguf") / "tune.gguf")


@pytest.fixture(scope="module")
def adapter(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes every linear of the transformer."""
    generator, layers = torch.Generator().manual_seed(0), {}
    for name, layer in transformer_of(wide)["transformer"].named_modules():
        if isinstance(layer, nn.Linear):
            for half, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
                layers[f"transformer.{name}.lora_{half}.weight"] = 0.05 * torch.randn(shape, generator=generator)
    file = tmp_path_factory.mktemp("loras") / "everywhere.safetensors"
    save_file(layers, file)
    return file


ADAPTED = {"lora_path": "everywhere.safetensors", "lora_scale": 0.8}


def ask(engine: Engine, adapter: Path, **fields: Any) -> dict[str, Any]:
    settings = Settings(lora_dir=adapter.parent, lora_cache_dir=adapter.parent / "cache")
    sent = {"prompt": "a red circle", "seed": 1, **SMALL, **fields}
    response: dict[str, Any] = respond({"input": sent}, Job(), lambda: settings, lambda: engine)
    assert response["status"] == "success", response
    return response


def cancel(engine: Engine) -> None:
    """A picture, after its first step."""

    def stop(progress: Progress) -> None:
        if progress.step:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        engine.run(plan(engine, **SMALL), stop)


def pixels(answer: dict[str, Any]) -> list[bytes]:
    """A file also holds its request."""
    return [picture.convert("RGB").tobytes() for picture in opened(answer)]


def test_gguf_draws_what_its_values_draw_wherever_they_live(
    small_card: tuple[SingleFile, Path], adapter: Path, wide: Path
) -> None:
    file, apart = small_card
    plain = engine_of(apart)
    wishes: tuple[dict[str, Any], ...] = ({}, ADAPTED, {**ADAPTED, "lora_scale": 0})
    wanted = [pixels(ask(plain, adapter, **wish)) for wish in wishes]
    assert wanted[0] != wanted[1]
    assert wanted[0] == wanted[2]
    for mode in ("full", "stream", "modulation_cache", "model_offload", "sequential_offload"):
        engine = engine_of(wide, file, memory_mode=mode)
        asked = wishes[: 1 if mode == "model_offload" else None]  # diffusers' own wants a card once there is an adapter
        answers = [ask(engine, adapter, **wish) for wish in asked]
        assert [pixels(answer) for answer in answers] == wanted[: len(asked)], mode
        assert {answer["metadata"]["quantization"] for answer in answers} == {"Q4_K"}
        assert engine.loaded().placement["quantization"] == "Q4_K"


def test_everything_away_that_can_be(small_card: tuple[SingleFile, Path], adapter: Path, wide: Path) -> None:
    """Adaptive norms ahead and every block streamed, as small as they are in the file."""
    file, _ = small_card
    plain, thrifty = engine_of(wide, file), engine_of(wide, file)
    choice = plain._ledger._choice
    assert choice
    weights = choice.weights
    least = min(all_placements(weights), key=lambda found: found.resident)
    thrifty._placed_pipeline = PlacedPipeline(thrifty._pipeline, least, CPU)
    for wish in (ADAPTED, {"num_images": 2, "scheduler": "heun"}):
        before = ask(thrifty, adapter, **wish)["images"]
        assert before == ask(plain, adapter, **wish)["images"]
        cancel(thrifty)
        assert ask(thrifty, adapter, **wish)["images"] == before
    here, away = (list(each._pipeline.transformer.parameters()) for each in (plain, thrifty))
    own = [weight for name, weight in plain.transformer.named_parameters() if "lora" not in name]
    assert weights.transformer.size == sum(weight.nbytes for weight in own)
    assert sum(isinstance(weight, GGUFParameter) for weight in here) == sum(isinstance(w, GGUFParameter) for w in away)
    gone = [weight for weight in away if weight.untyped_storage().nbytes() <= weight.itemsize < weight.nbytes]
    assert sum(weight.nbytes for weight in gone) == weights.transformer.size - weights.transformer.outside


def test_an_adapter_on_gguf_is_the_merged_truth(small_card: tuple[SingleFile, Path], adapter: Path, wide: Path) -> None:
    file, apart = small_card
    added = load_file(adapter)

    def merge(tensors: Tensors) -> Tensors:
        merged = dict(tensors)
        for name in (name for name in added if name.endswith("lora_A.weight")):
            layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            delta = added[name.replace("lora_A", "lora_B")].double() @ added[name].double()
            merged[f"{layer}.weight"] = (tensors[f"{layer}.weight"].double() + 0.8 * delta).float()
        return merged

    engines = engine_of(wide, file), engine_of(with_transformer(apart, merge))
    wishes = zip(engines, (ADAPTED, {}), strict=True)
    here, there = (np.asarray(opened(ask(engine, adapter, **wish))[0], int) for engine, wish in wishes)
    assert abs(here - there).max() <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_gguf_linears_are_compiled_with_their_blocks(adapter: Path, wide: Path, tmp_path: Path) -> None:
    file, _ = gguf_file(wide, Kind.Q8_0, tmp_path / "tune.gguf")  # of the kinds the one whose graphs are the smallest
    plain, held, backend = engine_of(wide, file), engine_of(wide, file), Backend()
    engine = compiling(held, tmp_path / "kept.bin", backend, ranks=(2,))
    engine.warm_up(plan(engine, num_inference_steps=2), 8)
    for wish in ({}, ADAPTED):
        ran = backend.run
        answer = ask(engine, adapter, **wish)
        assert backend.run - ran == SMALL["num_inference_steps"] * 4, answer.get("warnings")
        here, there = (np.asarray(opened(each)[0], int) for each in (answer, ask(plain, adapter, **wish)))
        assert abs(here - there).max() <= 1


@pytest.mark.parametrize(
    "asked", [{"quantization": "fp8"}, {"memory_mode": "nf4"}, {"profile": "fast", "quantization": "fp8"}]
)
def test_gguf_is_not_quantized_again(asked: dict[str, str], small_card: tuple[SingleFile, Path], wide: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"\w+ is asked for, and the weights of .*tune\.gguf stay as GGUF has"):
        engine_of(wide, small_card[0], **asked)


def test_of_a_profile_that_would_quantize_gguf_the_rest_is_kept(
    small_card: tuple[SingleFile, Path], wide: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(wide, small_card[0], profile="fast")
    assert engine.loaded().placement["quantization"] == "Q4_K"
    assert "PROFILE=fast asks for fp8, and the weights of" in caplog.text


WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "lacks a tensor": (
        lambda tensors: {name: each for name, each in tensors.items() if name != "vector_in.out_layer.bias"},
        r"the weights of transformer lack vector_in\.out_layer\.bias; download it again",
    ),
    "has one more": (
        lambda tensors: tensors | {"img_in.gate.weight": torch.zeros(2, 2)},
        r"the weights of transformer hold what its configuration has no place for: img_in\.gate",
    ),
    "has another size": (
        lambda tensors: tensors | {"vector_in.out_layer.weight": torch.zeros(8, 8)},
        r"vector_in\.out_layer\.weight of the transformer is 8 x 8, and time_text_embed\.text_embedder\.linear_2",
    ),
    "has rows that cannot be shared out": (
        lambda tensors: tensors | {"final_layer.adaLN_modulation.1.bias": torch.zeros(5)},
        r"final_layer\.adaLN_modulation\.1\.bias of the transformer has 5 rows, which cannot be shared out",
    ),
    "has scales of blocks": (
        lambda tensors: tensors | {"double_blocks.1.img_mlp.0.weight_scale": torch.ones(2, 2)},
        r"double_blocks\.1\.img_mlp\.0\.weight_scale of the transformer has 4 numbers for 1,024 rows",
    ),
    "has scales that are no numbers": (
        lambda tensors: tensors | {"double_blocks.1.img_mlp.0.weight_scale": torch.ones((), dtype=torch.uint8)},
        r"the scales of transformer are U8, and what is read is F32, F16, BF16",
    ),
    "has two scales of one weight": (
        lambda tensors: (
            tensors | {f"double_blocks.1.img_mlp.0.{each}": torch.ones(()) for each in ("weight_scale", "scale_weight")}
        ),
        r"weights of transformer have two scales each, and it is not known which counts: double_blocks\.1\.img_mlp",
    ),
    "has scales of nothing": (
        lambda tensors: tensors | {"double_blocks.1.other.scale_weight": torch.ones(())},
        r"the weights of transformer hold scales of nothing: double_blocks\.1\.other\.scale_weight",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_file_that_is_not_what_it_seems_is_refused_by_the_tensor(fault: str, wide: Path, tmp_path: Path) -> None:
    change, said = WRONG[fault]
    file = single_file(wide, tmp_path / "tune.safetensors", change=change)
    with pytest.raises(ModelUnavailable, match=said):
        engine_of(wide, file)


def test_quantized_weights_of_single_files_are_kept_apart(wide: Path, tmp_path: Path) -> None:
    """By what is kept of their quantized weights, also once a file was written anew."""
    index = read_index(wide) or {}
    files = [single_file(wide, tmp_path / f"{name}.safetensors") for name in ("one", "other")]

    def seen(file: SingleFile) -> list[str]:
        return SingleFileNetworks(index, Source(wide, "a revision", file), file).fingerprint

    first = [seen(file) for file in files]
    os.utime(files[0].path, ns=(1, 1))
    assert first[0] != first[1] != seen(files[0]) != first[0]
