"""`python -m deploy`: what is to be done for a paid endpoint, what it costs, and with --apply its doing.

python -m deploy --model FLUX.1-dev --gpu H100
python -m deploy --model FLUX.2-klein-4B --gpu 4090 --image ghcr.io/you/flux2-endpoint:1.0 --apply
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deploy.cards import CARDS, Card, find_card
from deploy.endpoint import Endpoint, Options, read_settings
from deploy.plan import Estimate, estimate, nearest, two_digits, weights_gb
from deploy.rest import BASE, RunPod, RunPodError
from src import __version__
from src.catalog import MODELS, UPSAMPLER_GB, Model, find_model, no_use_for_upsampler
from src.errors import InvalidSettings, Refused
from src.redaction import hide_known
from src.settings import Settings, runpod_api_key
from src.weights.placement import GB, DoesNotFit

_NO_IMAGE = f"REGISTRY/flux2-endpoint:{__version__}"
_TEST_INPUT, _ANSWER = "test_input.json", "answer.json"
INTO_A_FILE = (
    "python -c 'import base64, json; "
    'open("picture.png", "wb").write(base64.b64decode(json.load(open("answer.json"))["output"]["images"][0]))'
    "'"
)


@dataclass(frozen=True)
class _Asked:
    """The command line, read."""

    endpoint: Endpoint
    apply: bool
    api: str


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 with one sentence on stderr."""
    try:
        asked = _read(_parser().parse_args(arguments))
        _say(_described(asked.endpoint))
        _say(_applied(asked) if asked.apply else _to_do(asked))
    except (Refused, InvalidSettings, DoesNotFit, RunPodError) as error:
        print(hide_known(f"{error}."), file=sys.stderr)
        return 1
    return 0


def _say(lines: Iterator[str]) -> None:
    for line in lines:
        print(hide_known(line), flush=True)


def _parser() -> argparse.ArgumentParser:
    defaults = Options("", "")
    parser = argparse.ArgumentParser(
        prog="python -m deploy", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a row of the catalog: FLUX.1-dev, FLUX.2-klein-4B, flux-shapes ...")
    add("--gpu", required=True, help=f"one of {', '.join(card.name for card in CARDS)}")
    add("--gpus", type=_cards, default=defaults.gpus, help="of a worker (%(default)s); PARALLEL is what they do")
    add("--image", default=_NO_IMAGE, help="as RunPod is to pull it; needed with --apply")
    add("--name", help="of the endpoint; by default the model's")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="pairs",
        help="a setting of docs/settings.md; again for more",
    )
    add("--workers-min", type=_count, default=defaults.workers_min, help="that run and are paid always (%(default)s)")
    add("--workers-max", type=_count, default=defaults.workers_max, help="at a time (%(default)s)")
    add(
        "--idle-timeout",
        type=_idle,
        default=defaults.idle_seconds,
        help="seconds that a worker without a job stays warm (%(default)s)",
    )
    add(
        "--flash-boot",
        action=argparse.BooleanOptionalAction,
        default=defaults.flash_boot,
        help="workers come back from a snapshot",
    )
    add("--network-volume", metavar="ID", help="keeps what was downloaded, quantized and compiled for all workers")
    add("--registry-auth", metavar="ID", help="for an image that is not public")
    add("--apply", action="store_true", help="do it, by RUNPOD_API_KEY of the environment; without it nothing is sent")
    add("--api", default=BASE, metavar="URL", help="RunPod's REST API (%(default)s)")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return number


def _cards(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return number


def _idle(text: str) -> int:
    seconds = int(text)
    if not 1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"must be 1 to 3600 seconds, which RunPod allows, got {text}")
    return seconds


def _read(given: argparse.Namespace) -> _Asked:
    model, card = _model(given.model), _card(given.gpu)
    pairs = dict(_pair(text) for text in given.pairs)
    settings = read_settings(pairs)
    if settings.base_model:
        raise Refused("--set BASE_MODEL is for a model in one file, and --model names a whole one: leave it out")
    if settings.prompt_upsampler and not model.upsamples:
        raise Refused(f"--set PROMPT_UPSAMPLER {no_use_for_upsampler(settings.prompt_upsampler, model)}")
    if given.apply and given.image == _NO_IMAGE:
        raise Refused("--apply wants --image, which RunPod is to pull: docs/deploy.md says how to push one")
    if given.workers_max < max(1, given.workers_min):
        raise Refused(f"--workers-max must be at least 1 and --workers-min, got {given.workers_max}")
    options = Options(
        given.name or re.sub(r"[^a-z0-9]+", "-", model.name.lower()),
        given.image,
        given.workers_min,
        given.workers_max,
        given.idle_timeout,
        given.flash_boot,
        given.network_volume,
        given.registry_auth,
        given.gpus,
    )
    found = _estimate(model, card, settings.for_several_cards() if options.gpus > 1 else settings)
    return _Asked(Endpoint(found, settings, pairs, options), given.apply, given.api)


def _model(name: str) -> Model:
    if found := find_model(name):
        return found
    if name.lower().endswith((".safetensors", ".gguf")) or "://" in name:
        raise Refused(
            f"--model {name} is a model in one file, whose sizes are not known here: give the model that it was made "
            "from, and once there is an endpoint set its MODEL_NAME to the file"
        )
    raise Refused(f"--model {name} is none of {', '.join(model.name for model in MODELS)}")


def _card(name: str) -> Card:
    if found := find_card(name):
        return found
    raise Refused(f"--gpu {name} is none of {', '.join(card.name for card in CARDS)}")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise Refused(f"--set wants KEY=VALUE, got {text!r}")
    return name.upper(), value


def _estimate(model: Model, card: Card, settings: Settings) -> Estimate:
    try:
        return estimate(model, card, settings)
    except DoesNotFit as error:
        instead = nearest(model, card, settings)
        if instead:
            exact = "exact" if instead.exact else "not exact"
            more = f"it fits with --set MEMORY_MODE={instead.placement.mode} ({exact})"
        else:
            more = "no memory mode fits"
        raise DoesNotFit(
            f"{model.name} does not fit {card.name} with MEMORY_MODE={settings.placement_mode}, {more}: {error}"
        ) from None


def _described(endpoint: Endpoint) -> Iterator[str]:
    found, options = endpoint.estimate, endpoint.options
    model, card, placement = found.model, found.card, found.placement
    where = f"{placement.peak / GB:.1f} of {placement.machine.memory / GB:.0f} GB at the peak"
    host = f", {placement.offloaded / GB:.1f} GB in the host's memory" if placement.offloaded else ""
    size = f"{model.width}x{model.height}, {model.num_inference_steps} steps"
    yield f"{model.name} on {card.name} ({card.pool}), endpoint {options.name}"
    yield f"  memory        {placement.mode}: {where}{host}; {'exact' if found.exact else 'not exact'}"
    if found.is_meaningful:
        yield f"  one picture   {two_digits(found.seconds)} s {found.source} ({size})"
        yield f"  1000 pictures ${two_digits(found.dollars)} {found.source}, at ${card.dollars:.5f} a second"
    else:
        yield f"  one picture   is too small for the model of cost ({size})"
    if options.gpus > 1:
        each = "a picture on each of them" if endpoint.settings.parallel == "jobs" else "all of them on one picture"
        yield f"  cards         {options.gpus} a worker, ${options.gpus * card.dollars:.5f} a second: {each}"
        yield "                (the lines above are of one card; of several they are not measured yet)"
    if endpoint.settings.prompt_upsampler:
        yield f"  upsampler     not in the lines above: {UPSAMPLER_GB} GB on the card while it writes, else the host's"
    kept = f"{weights_gb(model, endpoint.settings):g} GB of weights, adapters and room"
    if endpoint.volume_gb is None:
        yield f"  disk          {endpoint.disk_gb} GB: the image, {kept}"
    else:
        yield f"  disk          {endpoint.disk_gb} GB: the image and room"
        yield f"  volume        at least {endpoint.volume_gb} GB: {kept}"
    yield f"  time-outs     a job {endpoint.execution_seconds} s, an idle worker {options.idle_seconds} s"
    yield f"  workers       {options.workers_min} to {options.workers_max}"
    yield f"  cached model  {endpoint.model_reference or 'none: it ships with the image'}"
    if model.gated:
        yield f"First accept the licence at https://huggingface.co/{model.repo}; the worker's HF_TOKEN must be of that"
        yield "account: keep it as the secret HF_TOKEN at https://console.runpod.io/user/secrets, or --set HF_TOKEN=..."
    yield ""


def _to_do(asked: _Asked) -> Iterator[str]:
    endpoint = asked.endpoint
    yield "By runpodctl (TEMPLATE_ID is what the first command answers):"
    yield from endpoint.commands
    yield ""
    yield "Or by the REST API, which --apply does (all but the cached model, for which it has no field):"
    yield f"POST {asked.api}/serverless"
    yield json.dumps(endpoint.body, indent=2)
    yield ""
    yield from _first_picture("ENDPOINT_ID")


def _applied(asked: _Asked) -> Iterator[str]:
    key = runpod_api_key()
    if key is None:
        raise Refused(
            "--apply wants RUNPOD_API_KEY in the environment: make one at https://console.runpod.io/user/settings"
        )
    endpoint_id, done = RunPod(key, asked.api).apply(asked.endpoint)
    yield done
    if asked.endpoint.model_reference:
        yield "The REST API has no field for the cached model: set it once in the console, by Edit Endpoint."
        yield f"  https://console.runpod.io/serverless/user/endpoint/{endpoint_id}"
        yield f"  Model: {asked.endpoint.model_reference}"
    yield ""
    yield from _first_picture(endpoint_id)


def _first_picture(endpoint_id: str) -> Iterator[str]:
    yield "The first picture:"
    yield f"curl -X POST https://api.runpod.ai/v2/{endpoint_id}/runsync \\"
    yield f'  -H "Authorization: Bearer $RUNPOD_API_KEY" -H "Content-Type: application/json" -d @{_TEST_INPUT} \\'
    yield f"  -o {_ANSWER}"
    yield INTO_A_FILE


if __name__ == "__main__":
    sys.exit(main())
