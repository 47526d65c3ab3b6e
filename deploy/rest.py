"""RunPod's REST API: a template and an endpoint by their name, made where there are none and changed where they differ.

Every answer that is no success, and none at all, is one sentence: what is wrong and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import requests

from deploy.endpoint import MADE_ONCE, Endpoint
from src.redaction import cut, redact

BASE = "https://rest.runpod.io/v1"
_SECONDS = 30
_FLASH_BOOT = " -fb"  # RunPod's own suffix to the name of an endpoint with flash boot
_MOST = 300  # characters of an answer that are repeated
_KEYS = "https://console.runpod.io/user/settings"
# What a status means; `{}` is what was asked.
_MEANINGS: Mapping[int, str] = {
    401: f"does not know RUNPOD_API_KEY: make a new one at {_KEYS}",
    402: "has too little credit for {} on this account: add some at https://console.runpod.io/user/billing",
    403: f"does not allow {{}} to RUNPOD_API_KEY: give the key the right to read and write at {_KEYS}",
    404: "has nothing at {}: it was deleted meanwhile, or --api is not the API's address; run the command again",
    409: "has one of this name already, which {} may not replace: choose another --name",
    429: "had too many requests before {}: wait a minute and run the command again",
}


class RunPodError(Exception):
    """Why RunPod did not do what was asked, in one sentence."""


class RunPod:
    """RunPod's REST API at `base`, by the key of one account."""

    def __init__(self, key: str, base: str = BASE) -> None:
        self._base = base.rstrip("/")
        self._session = requests.Session()

        def with_key(request: requests.PreparedRequest) -> requests.PreparedRequest:  # a header would lose to ~/.netrc
            request.headers["Authorization"] = f"Bearer {key}"
            return request

        self._session.auth = with_key

    def apply(self, wanted: Endpoint) -> tuple[str, list[str]]:
        """Let `wanted` be; the endpoint's id, and what was done, line by line.

        What stands already is changed where it differs, and by that started anew, worker by worker. Raises RunPodError;
        what was done before it stays, and another call goes on from there.
        """
        name = wanted.options.name
        template_id, template = self._settle("templates", name, wanted.template)
        endpoint_id, endpoint = self._settle("endpoints", name, wanted.endpoint(template_id))
        return endpoint_id, [template, endpoint]

    def _settle(self, kind: str, name: str, body: Mapping[str, Any]) -> tuple[str, str]:
        noun = kind.removesuffix("s")
        listed = self._ask("GET", f"/{kind}")
        alike = [each for each in listed if str(each.get("name", "")).removesuffix(_FLASH_BOOT) == name]
        if len(alike) > 1:
            ids = ", ".join(str(each["id"]) for each in alike)
            raise RunPodError(f"there are {len(alike)} {kind} of the name {name} ({ids}): delete all but one")
        if not alike:
            made = self._ask("POST", f"/{kind}", body)
            return made["id"], f"{noun} {name} is made: {made['id']}"
        found = alike[0]
        for field in MADE_ONCE & body.keys() & found.keys():
            if found[field] != body[field]:
                raise RunPodError(
                    f"the {noun} {name} is there with {field}={found[field]}, which nobody can change: choose another "
                    "--name"
                )
        differs = {
            field: value
            for field, value in body.items()
            if field not in MADE_ONCE and field != "name" and found.get(field) != value
        }
        if not differs:
            return found["id"], f"{noun} {name} is as wanted: {found['id']}"
        self._ask("PATCH", f"/{kind}/{found['id']}", differs)
        return found["id"], f"{noun} {name} is changed ({', '.join(differs)}): {found['id']}"

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON: a list of objects for GET, an object with an id for others."""
        asked = f"{method} {path}"
        try:
            answer = self._session.request(method, self._base + path, json=body, timeout=_SECONDS)
        except requests.RequestException as error:
            raise RunPodError(f"RunPod cannot be reached at {self._base}: {_short(str(error))}") from None
        if not answer.ok:
            raise RunPodError(f"RunPod {_meaning(answer, asked)} (HTTP {answer.status_code})")
        try:
            found = answer.json()
            whole = isinstance(found, list) if method == "GET" else isinstance(found["id"], str)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise RunPodError(f"RunPod's answer to {asked} is not what its API describes: {_short(answer.text)}")
        return found


def _meaning(answer: requests.Response, asked: str) -> str:
    if answer.status_code in _MEANINGS:
        return _MEANINGS[answer.status_code].format(asked)
    if answer.status_code >= 500:
        return f"fails at {asked}: nothing is wrong with what was asked; run the command again later"
    return f"refuses {asked}: {_short(answer.text) or 'without a reason'}"


def _short(text: str) -> str:
    return cut(redact(" ".join(text.split())), _MOST)
