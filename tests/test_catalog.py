"""The tables, held against the pinned diffusers."""

from __future__ import annotations

import inspect
import re

import diffusers
import pytest
from diffusers.configuration_utils import ConfigMixin

from src.catalog import (
    CONTROLNETS,
    EVERY_MODE_TAKES,
    FAMILIES,
    KLEIN_MODES,
    MODELS,
    SCHEDULERS,
    ControlNet,
    Model,
    ModeSpec,
    Scheduler,
    base_of,
    controlnets_for,
    families_like,
    find_model,
    get_model,
    settle_model,
)
from src.engine import schedulers
from src.engine.denoise import _PICTURES
from src.engine.pipelines import pipeline_class
from src.plan.plan import Sampling
from src.request.schema import PICTURES, SINGLES, Request
from src.settings import ROOT

API = (ROOT / "docs" / "api.md").read_text()

ARGUMENTS = {
    "prompt_embeds", "width", "height", "num_inference_steps", "max_sequence_length",
    "num_images_per_prompt", "generator", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "sigmas",
}  # fmt: skip
EXTRAS = {  # what a pipeline needs for a request's field
    "negative_prompt": {"negative_prompt_embeds"},
    "true_cfg_scale": {"true_cfg_scale"},
    "strength": {"strength"},
    "preserve_unmasked": {"mask_image"},
    "outpaint": {"mask_image"},
    "prompt_2": {"prompt_2", "pooled_prompt_embeds"},
    "image_prompt": {"pooled_prompt_embeds"},
    "control_type": {"control_image"},
    "preprocess": {"control_image"},
    "controlnet_conditioning_scale": {"controlnet_conditioning_scale", "control_mode"},
    "control_guidance_start": {"control_guidance_start"},
    "control_guidance_end": {"control_guidance_end"},
}
WITHOUT_USE = {("ChromaInpaintPipeline", "true_cfg_scale")}  # what a call takes and never reads
WITH = {"image_prompt_scale": "image_prompt"}  # fields that go with others
PIPELINES = {f"{model.name} {mode}": row for model in MODELS for mode, row in model.modes.items()}


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_every_pipeline_is_diffusers_own_and_takes_what_its_row_says(pipeline: ModeSpec) -> None:
    diffusers_own = pipeline_class(pipeline.class_name)
    arguments = set(inspect.signature(diffusers_own.__call__).parameters)
    assert arguments >= ARGUMENTS
    assert ("guidance_scale" in arguments) == pipeline.guidance
    steered = pipeline not in KLEIN_MODES.values()  # the class could, a distilled model cannot
    for field, needs in EXTRAS.items():
        if (pipeline.class_name, field) in WITHOUT_USE or (field == "negative_prompt" and not steered):
            continue
        assert (field in pipeline.takes) == (needs <= arguments), field
    assert ("preview" in pipeline.takes) == any(
        hasattr(diffusers_own, name) for name in ("_unpack_latents", "tokens_to_latents")
    )
    for field, other in WITH.items():
        assert (field in pipeline.takes) == (other in pipeline.takes), field
    own_parts = set(inspect.signature(diffusers_own.__init__).parameters)
    assert ("prompt_upsampling" in pipeline.takes) == ("prompt_upsampler" in own_parts)
    assert pipeline.takes - EXTRAS.keys() - WITH.keys() - {"preview", "prompt_upsampling"} <= arguments, (
        "what needs no row is called the same there"
    )
    assert arguments >= {_PICTURES[picture] for picture in pipeline.needs}
    assert ("max_area" in arguments) == ("_auto_resize" in arguments) == pipeline.own_sizes
    assert ("control_mode" in arguments) == pipeline.controlnet
    encodes = set(inspect.signature(diffusers_own.encode_prompt).parameters)
    assert encodes >= {"prompt", "max_sequence_length"}
    assert ("prompt_2" in encodes) == ("prompt_2" in pipeline.takes)
    assert "latents" in diffusers_own._callback_tensor_inputs


def test_every_field_of_a_request_is_for_some_mode_or_for_all() -> None:
    """A field that no mode takes and that is not named among those for all would be refused, always."""
    of_modes = {name for row in PIPELINES.values() for name in row.takes | row.needs}
    assert set(Request.model_fields) == EVERY_MODE_TAKES | of_modes | SINGLES.keys()
    assert set(Sampling.model_fields) == set(Request.model_fields)


@pytest.mark.parametrize("net", CONTROLNETS, ids=lambda net: net.name)
def test_every_controlnet_can_be_asked_for_and_preferred(net: ControlNet) -> None:
    model = next(model for model in MODELS if model.architecture == net.architecture)
    assert net.types
    assert controlnets_for(model, [net.name.lower()])[0] is net
    assert controlnets_for(model, [net.repo])[0] is net
    numbers = [defaults.control_mode for defaults in net.types.values() if defaults.control_mode is not None]
    assert len(numbers) in (0, len(net.types))


def test_the_first_controlnet_of_a_type_counts() -> None:
    model = get_model("FLUX.1-dev")
    assert next(net.name for net in controlnets_for(model) if "canny" in net.types) == "Union-Pro"
    assert [net.name for net in controlnets_for(model, ["Depth", "Canny"])][:3] == ["Depth", "Canny", "Union-Pro"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_mode_of_a_model_is_asked_for_by_its_own_pictures(model: Model) -> None:
    needs = [pipeline.needs for pipeline in model.modes.values()]
    assert len(set(needs)) == len(needs)
    assert frozenset().union(*needs) <= set(PICTURES) - {"image_prompt"}


@pytest.mark.parametrize("row", SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_scheduler_is_diffusers_own_and_knows_its_options(row: Scheduler) -> None:
    scheduler: type[ConfigMixin] = getattr(schedulers, row.class_name, None) or getattr(diffusers, row.class_name)
    options = set(inspect.signature(scheduler.__init__).parameters)
    assert options >= set(row.config)
    assert "mu" in inspect.signature(scheduler.set_timesteps).parameters
    assert ("use_flow_sigmas" in options) != row.flow_match
    assert "use_dynamic_shifting" in options or row.order == 2  # the engine registers it
    assert hasattr(scheduler, "scale_noise") == row.starts_midway


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_has_defaults_that_it_can_draw(model: Model) -> None:
    assert model.width % model.side_multiple == model.height % model.side_multiple == 0
    assert model.family in FAMILIES
    assert find_model(model.name) is model
    assert find_model(model.repo) is model


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "length"),
    [
        ("black-forest-labs/FLUX.1-dev", 50, 7.5, 512),
        ("black-forest-labs/FLUX.1-schnell", 4, 3.5, 256),
        ("FLUX.1-schnell", 4, 3.5, 256),
        ("flux.1-DEV", 50, 7.5, 512),
        ("someone/My-Schnell-Tune", 4, 3.5, 256),
        ("someone/my-tune", 50, 7.5, 512),
    ],
)
def test_a_name_gives_the_specifications_defaults(name: str, steps: int, guidance: float, length: int) -> None:
    model = settle_model(name, class_name="FluxPipeline", guided="schnell" not in name.lower())
    assert (model.num_inference_steps, model.guidance_scale, model.max_sequence_length) == (steps, guidance, length)


def test_a_copy_of_a_known_model_keeps_its_own_place() -> None:
    model = get_model("mirror/FLUX.1-dev")
    assert (model.name, model.repo) == ("FLUX.1-dev", "mirror/FLUX.1-dev")
    assert find_model("/volume/FLUX.1-dev/") is not None


def test_a_loaded_fine_tune_goes_by_its_configuration_not_by_its_name() -> None:
    def settled(name: str, class_name: str = "FluxPipeline", guidance: bool = True) -> Model:
        return settle_model(name, class_name=class_name, guided=guidance)

    assert settled("someone/schnell-to-dev").num_inference_steps == 50
    assert settled("someone/tune", guidance=False).num_inference_steps == 4
    assert settled("someone/tune", guidance=False).name == "someone/tune"
    assert settled("someone/FLUX.1-schnell").num_inference_steps == 50
    assert settled("FLUX.1-Krea-dev").num_inference_steps == 28
    assert settled("someone/edits", "FluxKontextPipeline").family == "kontext"
    assert settled("someone/fills", "FluxFillPipeline").guidance_scale == 30
    assert settled("someone/strange-schnell", "OtherPipeline").num_inference_steps == 4
    assert settled("someone/chroma", "ChromaPipeline").family == "chroma"
    assert settled("someone/kv", "Flux2KleinKVPipeline", guidance=False).family == "klein-kv"


@pytest.mark.parametrize(
    ("dynamic_shift", "family", "steps", "scale"),
    [(None, "schnell", 4, 1.0), (False, "schnell", 4, 1.0), (True, "de-distilled", 28, 3.5)],
)
def test_without_guidance_the_scheduler_tells_few_steps_from_a_model_that_is_steered_from_outside(
    dynamic_shift: bool | None, family: str, steps: int, scale: float
) -> None:
    model = settle_model("someone/tune", class_name="FluxPipeline", guided=False, dynamic_shift=dynamic_shift)
    assert (model.family, model.num_inference_steps, model.true_cfg_scale) == (family, steps, scale)
    known = settle_model(
        "shuttleai/shuttle-3-diffusion", class_name="FluxPipeline", guided=False, dynamic_shift=dynamic_shift
    )
    assert known.num_inference_steps == 4


def test_a_model_in_one_file_has_the_row_of_its_base_by_its_own_name() -> None:
    summary = {"file": "flux.gguf"}
    model = settle_model(
        "a/b/flux.gguf", class_name="FluxPipeline", guided=True, base="FLUX.1-Krea-dev", single_file=summary
    )
    assert (model.name, model.num_inference_steps, model.gated) == ("a/b/flux.gguf", 28, False)
    assert (model.base_model, model.single_file) == ("FLUX.1-Krea-dev", summary)
    other = settle_model(
        "a/b/flux.gguf", class_name="FluxPipeline", guided=False, base="someone/base", single_file=summary
    )
    assert (other.family, other.base_model, other.single_file) == ("schnell", "someone/base", summary)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_what_tells_families_apart_is_what_their_models_have(model: Model) -> None:
    """The transformer of each row, by its published configuration's words."""
    row = FAMILIES[model.family]
    channels = {"in_channels": row.in_channels(16), "out_channels": 4 * 16}
    assert model.family in families_like({**row.transformer, **channels})
    base = base_of(model.family, {"joint_attention_dim": model.joint_attention_dim})
    assert base is not None
    assert base.family == model.family


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_docs_show_every_row_as_it_is(model: Model) -> None:
    (line,) = [line for line in API.splitlines() if line.startswith(f"| `{model.name}`")]
    name, licence, size, steps, guidance, tokens = (cell.strip() for cell in line.strip("|").split("|"))
    assert ("(gated)" in name) == model.gated
    assert model.licence.startswith(licence)
    assert size == f"{model.width}x{model.height}"
    assert (steps, tokens) == (str(model.num_inference_steps), str(model.max_sequence_length))
    assert guidance.partition(",")[0] == str(model.guidance_scale)
    assert ("without effect" in guidance) != FAMILIES[model.family].guided


def test_the_docs_name_every_scheduler() -> None:
    shown = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (yes|no) \|", API, re.MULTILINE)
    assert shown == [(name, row.class_name, "yes" if row.flow_match else "no") for name, row in SCHEDULERS.items()]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_model_can_what_its_family_can(model: Model) -> None:
    head = get_model(FAMILIES[model.family].model)
    assert model.modes == head.modes


LABELS = {
    "kontext": "Kontext",
    "fill": "Fill",
    "control": "Canny, Depth",
    "flux.2-dev": "FLUX.2-dev",
    "flux.3": "FLUX.3",
    "flux.3-base": "FLUX.3 base",
    "chroma": "Chroma",
}


def test_the_readme_says_which_mode_works_with_which_model() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index("| mode | `init_image` | `mask_image` | `control_image` | works with |") + 2
    shown = {}
    for line in lines[start : lines.index("<!-- end -->", start)]:
        mode, *cells, works = (cell.strip() for cell in line.strip("|").split("|"))
        shown[mode] = ([cell == "x" for cell in cells], works)
    held: dict[str, tuple[list[bool], str]] = {}
    for family, row in FAMILIES.items():
        model = get_model(row.model)
        for mode, pipeline in model.modes.items():
            needs = [name in pipeline.needs for name in ("init_image", "mask_image", "control_image")]
            before = held.get(mode, (needs, ""))[1]
            held[mode] = (needs, f"{before}, {LABELS.get(family, family)}".lstrip(", "))
    assert shown == held


@pytest.mark.parametrize("net", CONTROLNETS, ids=lambda net: net.name)
def test_the_docs_name_every_controlnet_and_what_it_reads(net: ControlNet) -> None:
    (line,) = [line for line in API.splitlines() if line.startswith(f"| `{net.name}`")]
    assert all(kind in line for kind in net.types)
