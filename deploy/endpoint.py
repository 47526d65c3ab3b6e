"""An endpoint before it is made: what RunPod's endpoint is set to, and the commands that make it.

Shape of the body: CreateEndpointRequest of https://docs.runpod.io/api-reference-v2/openapi.json.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from deploy.plan import Estimate, disk_gb, execution_seconds, init_seconds, volume_gb
from src.errors import Refused
from src.settings import Settings

MIN_CUDA = "13.0"  # of the host's driver: what torch 2.13 from PyPI is built with, and tests hold against locked/
# Variables of an endpoint that are none of Settings, but of Hugging Face's library, of CUDA and of RunPod: what each is
# by default, and what it does.
OTHER_VARIABLES: Mapping[str, tuple[str, str]] = {
    "HF_HOME": ("`~/.cache/huggingface`; in the image `/home/worker/huggingface`", "where downloads are kept"),
    "HF_HUB_CACHE": ("`hub` in `HF_HOME`", "where downloaded models are kept, if elsewhere"),
    "HF_ENDPOINT": ("`https://huggingface.co`", "the hub, or a mirror of it, that models and adapters come from"),
    "HF_HUB_OFFLINE": ("none", "1: nothing is asked of the hub; what is not there already ends the start"),
    "CUDA_VISIBLE_DEVICES": ("all", "which cards"),
    "RUNPOD_INIT_TIMEOUT": (
        "`420`; `python -m deploy` and the Hub set it by the model's size",
        "seconds that RunPod gives a start, download and all, before it starts the worker anew",
    ),
}
# Folders that all workers of a network volume share.
_ON_THE_VOLUME = {"HF_HOME": "/runpod-volume/huggingface", "LORA_CACHE_DIR": "/runpod-volume/lora-cache"}
_QUEUE_DELAY = 4  # seconds that a job waits before RunPod starts another worker; RunPod's own default
_REFERENCE = "{{ RUNPOD_SECRET_%s }}"  # RunPod puts the value of the account's secret there


@dataclass(frozen=True)
class Options:
    """What an operator chooses beside model, card and settings."""

    name: str
    image: str
    workers_min: int = 0
    workers_max: int = 3
    idle_seconds: int = 60
    flash_boot: bool = True
    network_volume: str | None = None  # id
    registry_auth: str | None = None  # id, for an image that is not public
    gpus: int = 1  # of a worker


def read_settings(pairs: Mapping[str, str]) -> Settings:
    """The worker's settings with `pairs` of the environment, MODEL_NAME aside.

    Raises Refused for a variable that nobody reads, and InvalidSettings for a value that the worker would refuse.
    """
    known = [*(name.upper() for name in Settings.model_fields), *OTHER_VARIABLES]
    for name in pairs:
        if name == "MODEL_NAME":
            raise Refused("--set MODEL_NAME is what --model says: leave it out")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            meant = f"; the nearest is {close[0]}" if close else ""
            raise Refused(f"--set {name} is no setting of this worker{meant}")
    secret = {name.upper() for name, field in Settings.model_fields.items() if "Secret" in str(field.annotation)}
    stand_ins = {name: "secret" for name, value in pairs.items() if name in secret and _is_reference(value)}
    return Settings.from_environment({**pairs, **stand_ins})


def _is_reference(value: str) -> bool:
    before, _, after = _REFERENCE.partition("%s")
    return value.startswith(before) and value.endswith(after)


@dataclass(frozen=True)
class Endpoint:
    """What is to be made: `pairs` are the variables that the operator sets, checked by `read_settings`."""

    estimate: Estimate
    settings: Settings
    pairs: Mapping[str, str]
    options: Options

    @property
    def env(self) -> dict[str, str]:
        """The worker's environment. A gated model's token is RunPod's secret HF_TOKEN, unless it is given."""
        model, options = self.estimate.model, self.options
        variables = {"MODEL_NAME": model.repo if model.download_gb else model.name}
        if model.gated:
            variables["HF_TOKEN"] = _REFERENCE % "HF_TOKEN"
        if model.download_gb:
            variables["RUNPOD_INIT_TIMEOUT"] = str(init_seconds([model], self.settings))
        if options.network_volume:
            variables |= _ON_THE_VOLUME
        return variables | dict(self.pairs)

    @property
    def disk_gb(self) -> int:
        """Of the container."""
        return disk_gb([self.estimate.model], self.settings, on_a_volume=self.options.network_volume is not None)

    @property
    def volume_gb(self) -> int | None:
        """What the network volume has to hold at least; None without one."""
        return volume_gb(self.estimate, self.settings) if self.options.network_volume else None

    @property
    def execution_seconds(self) -> int:
        """A job's time-out."""
        return execution_seconds(self.estimate.seconds)

    @property
    def model_reference(self) -> str | None:
        """What RunPod is to keep on its hosts for this endpoint; None for a folder, as of the model that is shipped."""
        repo, revision = self.estimate.model.repo, self.settings.model_revision or "main"
        on_the_hub = self.estimate.model.download_gb and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo)
        return f"https://huggingface.co/{repo}:{revision}" if on_the_hub else None

    @property
    def body(self) -> dict[str, Any]:
        """What POST /v2/serverless takes. What is not wanted is said too, so that a change clears it.

        minCudaVersion and a list of allowedCudaVersions exclude each other: the list is said to be empty.
        """
        options = self.options
        return {
            "name": options.name,
            "type": "QUEUE",
            "image": options.image,
            "registry": options.registry_auth,
            "disk": self.disk_gb,
            "env": self.env,
            "gpu": {
                "pools": [self.estimate.card.pool],
                "count": options.gpus,
                "minCudaVersion": MIN_CUDA,
                "allowedCudaVersions": [],
            },
            "workers": {
                "min": options.workers_min,
                "max": options.workers_max,
                "idleTimeout": options.idle_seconds,
            },
            "scaling": {"type": "QUEUE_DELAY", "queueDelay": _QUEUE_DELAY},
            "networkVolumes": [options.network_volume] if options.network_volume else [],
            "timeout": 1000 * self.execution_seconds,
            "flashboot": "FLASHBOOT" if options.flash_boot else "OFF",
        }

    @property
    def commands(self) -> list[str]:
        """The same by runpodctl, and the cached model, which the REST API has no field for."""
        options, card = self.options, self.estimate.card
        template = {
            "name": options.name,
            "image": options.image,
            "container-disk-in-gb": self.disk_gb,
            "env": json.dumps(self.env),
            "registry-auth-id": options.registry_auth,
        }
        endpoint = {
            "name": options.name,
            "template-id": "TEMPLATE_ID",
            "gpu-id": card.pool,
            "gpu-count": options.gpus,
            "min-cuda-version": MIN_CUDA,
            "workers-min": options.workers_min,
            "workers-max": options.workers_max,
            "idle-timeout": options.idle_seconds,
            "execution-timeout": self.execution_seconds,
            "scaler-type": "QUEUE_DELAY",
            "scaler-value": _QUEUE_DELAY,
            "network-volume-id": options.network_volume,
            "model-reference": self.model_reference,
        }
        flash_boot = f" --flash-boot={str(options.flash_boot).lower()}"
        return [
            f"runpodctl template create --serverless{_flags(template)}",
            f"runpodctl serverless create{_flags(endpoint)}{flash_boot}",
        ]


def _flags(values: Mapping[str, object]) -> str:
    return "".join(f" --{name} {shlex.quote(str(value))}" for name, value in values.items() if value is not None)
