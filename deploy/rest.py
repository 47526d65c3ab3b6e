"""RunPod's REST API: an endpoint by its name, made where there is none and changed where it differs.

Routes, bodies and answers: https://docs.runpod.io/api-reference-v2/openapi.json. Every answer that is no success, and
none at all, is one sentence: what is wrong and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import requests

from deploy.endpoint import Endpoint
from src.redaction import cut, redact

BASE = "https://api.runpod.io/v2"
_SECONDS = 30
_PATH = "/serverless"
# What UpdateEndpointRequest does not take, or what nobody wants changed.
_MADE_ONCE = ("name", "type")
_FLASH_BOOT = " -fb"  # what API v1 and the console add to the name of an endpoint with FlashBoot; of v2 nothing is said
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

    def apply(self, wanted: Endpoint) -> tuple[str, str]:
        """Let `wanted` be; the endpoint's id, and what was done, in a line.

        What stands already is changed where it differs, and by that started anew, worker by worker. Raises RunPodError.
        """
        name, body = wanted.options.name, wanted.body
        listed = self._ask("GET", _PATH)["endpoints"]
        alike = [each for each in listed if str(each.get("name", "")).removesuffix(_FLASH_BOOT) == name]
        if len(alike) > 1:
            ids = ", ".join(str(each["id"]) for each in alike)
            raise RunPodError(f"there are {len(alike)} endpoints of the name {name} ({ids}): delete all but one")
        if not alike:
            made = self._ask("POST", _PATH, body)
            return made["id"], f"endpoint {name} is made: {made['id']}"
        (found,) = alike
        kind = "CPU" if found.get("cpu") else found.get("type", "QUEUE")
        if kind != "QUEUE":
            raise RunPodError(
                f"the endpoint {name} is there, of the kind {kind}, which nobody can change: choose another --name"
            )
        differing = _differing(found, body)
        if not differing:
            return found["id"], f"endpoint {name} is as wanted: {found['id']}"
        changed = self._ask("PATCH", f"{_PATH}/{found['id']}", differing)
        # The API's description does not say that an empty list takes a volume off, nor that null takes a login off.
        cleared = {field: value for field, value in differing.items() if not value}
        if kept := _differing(changed, cleared):
            raise RunPodError(
                f"RunPod took the change of the endpoint {name} and kept its {', '.join(kept)}: change that in the "
                f"console, at https://console.runpod.io/serverless/user/endpoint/{found['id']}"
            )
        said = (f"{field} cleared" if field in cleared else field for field in differing)
        return found["id"], f"endpoint {name} is changed ({', '.join(said)}): {found['id']}"

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON: an object with a list of endpoints for GET, an object with an id for others."""
        asked = f"{method} {path}"
        try:
            answer = self._session.request(method, self._base + path, json=body, timeout=_SECONDS)
        except requests.RequestException as error:
            raise RunPodError(f"RunPod cannot be reached at {self._base}: {_short(str(error))}") from None
        if not answer.ok:
            raise RunPodError(f"RunPod {_meaning(answer, asked)} (HTTP {answer.status_code})")
        try:
            found = answer.json()
            whole = isinstance(found["endpoints"], list) if method == "GET" else isinstance(found["id"], str)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise RunPodError(f"RunPod's answer to {asked} is not what its API describes: {_short(answer.text)}")
        return found


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `wanted` that `found` has otherwise."""
    return {
        field: value
        for field, value in wanted.items()
        if field not in _MADE_ONCE and not _alike(found.get(field), value, whole=field == "env")
    }


def _alike(found: Any, wanted: Any, *, whole: bool = False) -> bool:
    """Whether they are the same, where RunPod may leave out what is empty.

    What it says of its own within an object (a pool's excluded types) does not count, unless the object is one `whole`.
    """
    if isinstance(found, Mapping) and isinstance(wanted, Mapping) and not whole:
        return all(_alike(found.get(name), value) for name, value in wanted.items())
    return bool((found or None) == (wanted or None))


def _meaning(answer: requests.Response, asked: str) -> str:
    if answer.status_code in _MEANINGS:
        return _MEANINGS[answer.status_code].format(asked)
    if answer.status_code >= 500:
        return f"fails at {asked}: nothing is wrong with what was asked; run the command again later"
    return f"refuses {asked}: {_short(_reason(answer)) or 'without a reason'}"


def _reason(answer: requests.Response) -> str:
    """What the API's description of a problem (RFC 9457) says, or the text where it is none."""
    try:
        problem = answer.json()
        return " ".join([problem["detail"], *problem.get("errors", ())])
    except (ValueError, KeyError, TypeError, AttributeError):
        return answer.text


def _short(text: str) -> str:
    return cut(redact(" ".join(text.split())), _MOST)
