"""The S3 bucket that takes pictures which are better fetched than carried.

Knows nothing of pictures: files go in, URLs come out.
"""

from __future__ import annotations

import re
import secrets
import threading
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.client import HTTPException
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

from src.errors import Fault, InvalidSettings, Refused
from src.job import Job
from src.request.fetch import check_public
from src.response.endpoints import Endpoint, read_endpoint
from src.settings import Settings
from src.wording import show

T = TypeVar("T")

# https://docs.runpod.io/serverless/endpoints/send-requests
_S3_CONFIG = ("endpointUrl", "accessId", "accessSecret", "bucketName")
UPLOAD_SECONDS = 60  # for an upload with all that botocore tries again
_FETCH_SECONDS = 15
_LOOK_UP_SECONDS = 10
_MOST_CHARACTERS = 2_000  # of each word of s3Config
_making = threading.Lock()  # boto3's session is not for several threads at once
_TEST_FILE = b"A test of the FLUX worker, which it deletes."


class Bucket:
    """`client` is boto3's for S3; safe to use from many threads.

    `no_links` says why its files cannot be fetched; empty where they can. `brought` is one that a client pays for.
    """

    def __init__(
        self,
        client: Any,
        name: str,
        *,
        prefix: str = "",
        cache_control: str = "",
        url_expiry: int,
        public_url: str | None = None,
        brought: bool = False,
    ) -> None:
        self.no_links = ""
        self.brought = brought
        self._client = client
        self._name = name
        self._prefix = prefix.strip("/")
        self._cache_control = cache_control
        self._url_expiry = url_expiry
        self._public_url = public_url

    @classmethod
    def from_settings(cls, settings: Settings) -> Bucket | None:
        """The bucket that the environment describes; None where it describes none.

        Raises InvalidSettings where neither BUCKET_NAME nor the URL names it.
        """
        url, key, secret = (
            settings.bucket_endpoint_url,
            settings.bucket_access_key_id,
            settings.bucket_secret_access_key,
        )
        if url is None or key is None or secret is None:  # all or none
            return None
        try:
            endpoint = read_endpoint(url, settings.bucket_name)
            if endpoint.bucket is None:
                raise InvalidSettings(f"BUCKET_NAME: is required where BUCKET_ENDPOINT_URL={url!r} names no bucket")
            region, style = settings.bucket_region, settings.bucket_addressing_style
            client = _client(endpoint, key.get_secret_value(), secret.get_secret_value(), region, style)
        except (Refused, ValueError) as error:
            raise InvalidSettings(f"BUCKET_ENDPOINT_URL={url!r}: {error}") from error
        return cls(
            client,
            endpoint.bucket,
            prefix=settings.bucket_prefix,
            cache_control=settings.bucket_cache_control,
            url_expiry=settings.bucket_url_expiry,
            public_url=settings.bucket_public_url,
        )

    def upload(self, file: bytes, name: str, mime: str) -> str:
        """Store `file` under a key that ends in `name`; the URL to fetch it by. Raises what boto3 raises.

        Within `in_time` it ends in time.
        """
        folder, _, base = name.rpartition("/")
        # Nobody guesses the key, and a job that is sent again overwrites nothing.
        key = "/".join(filter(None, (self._prefix, folder, f"{secrets.token_hex(8)}-{base}")))
        self._client.put_object(
            Bucket=self._name,
            Key=key,
            Body=file,
            ContentType=mime,
            CacheControl=self._cache_control,
            ContentDisposition=f'inline; filename="{base}"',
        )
        return self._link(key)

    def check(self) -> None:
        """Store a small file, fetch it as a client would, and remove it.

        Where it cannot be fetched, `no_links` says why from now on. Raises InvalidSettings with what the store answers
        where it cannot be stored.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        from src.response.connections import in_time

        def now(work: Callable[[], T]) -> T:
            if isinstance(outcome := in_time({0: work}, UPLOAD_SECONDS)[0], Exception):
                raise outcome
            return outcome

        key = "/".join(filter(None, (self._prefix, f"write-test-{secrets.token_hex(8)}")))
        try:
            now(lambda: self._client.put_object(Bucket=self._name, Key=key, Body=_TEST_FILE))
        except (BotoCoreError, ClientError, OSError) as error:
            raise InvalidSettings(
                f"BUCKET_ENDPOINT_URL, BUCKET_NAME={self._name!r} and the keys do not let this worker upload: {error}"
                f"{_right_region(error)}"
            ) from error
        try:
            self.no_links = now(lambda: _why_not(self._link(key)))
        except TimeoutError as error:
            self.no_links = f"a GET of its address was {error}"
        finally:
            with suppress(BotoCoreError, ClientError, OSError):  # keys that may only write are the better ones
                now(lambda: self._client.delete_object(Bucket=self._name, Key=key))

    def close(self) -> None:
        """End the connections that wait for another upload."""
        self._client.close()

    def _link(self, key: str) -> str:
        """By the public address, without an end, or else signed."""
        if self._public_url:
            return f"{self._public_url.rstrip('/')}/{quote(key)}"
        url: str = self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self._name, "Key": key}, ExpiresIn=self._url_expiry
        )
        return url


class BroughtBucket(NamedTuple):
    """The bucket that an event brings along, where it does, and what is wrong of it."""

    bucket: Bucket | None = None
    faults: tuple[Fault, ...] = ()

    def close(self) -> None:
        """Nobody else will use it."""
        if self.bucket:
            self.bucket.close()


def read_bucket(event: object, settings: Settings, job: Job | None = None) -> BroughtBucket:
    """RunPod's `s3Config`, next to `input`: the bucket of this job alone. Its keys are said nowhere.

    While its host is looked up other jobs may pass `job`.
    """
    config = event.get("s3Config") if isinstance(event, Mapping) else None
    if not config:
        return BroughtBucket()
    if not isinstance(config, Mapping):
        return _wrong_bucket(f"must be an object with {', '.join(_S3_CONFIG)}, not a {type(config).__name__}")
    wrong = [
        f"{word} is {'required' if config.get(word) in (None, '') else 'no text'}"
        for word in _S3_CONFIG
        if not (isinstance(config.get(word), str) and config[word])
        and not (word == "bucketName" and config.get(word) in (None, ""))
    ]
    wrong += [
        f"{word} has {len(config[word]):,} characters, more than {_MOST_CHARACTERS:,}"
        for word in _S3_CONFIG
        if isinstance(config.get(word), str) and len(config[word]) > _MOST_CHARACTERS
    ]
    if wrong:
        return _wrong_bucket(f"cannot be used: {', '.join(wrong)}")
    url, key, secret, name = (config.get(word) for word in _S3_CONFIG)
    try:
        endpoint = read_endpoint(str(url), name or None)
        if endpoint.bucket is None:
            return _wrong_bucket("cannot be used: bucketName is required where endpointUrl names no bucket")
        _check_public(endpoint.url, job or Job())
        client = _client(endpoint, str(key), str(secret), only_public=True)
    except (Refused, ValueError) as error:
        return _wrong_bucket(f"cannot be used: endpointUrl {show(url)} {error}")
    return BroughtBucket(Bucket(client, endpoint.bucket, url_expiry=settings.bucket_url_expiry, brought=True))


def _wrong_bucket(message: str) -> BroughtBucket:
    return BroughtBucket(faults=(Fault("s3Config", message),))


def _check_public(url: str, job: Job) -> None:
    """Raise Refused where `url` leads into a private network, or its host's name server takes its time."""
    from src.response.connections import in_time

    job.step_aside()
    outcome = in_time({0: lambda: check_public(url)}, _LOOK_UP_SECONDS, job.check)[0]
    if isinstance(outcome, TimeoutError):
        raise Refused(f"could not be looked up within {_LOOK_UP_SECONDS} seconds")
    if isinstance(outcome, Exception):
        raise outcome


def _client(
    endpoint: Endpoint,
    key: str,
    secret: str,
    region: str | None = None,
    style: str = "auto",
    *,
    only_public: bool = False,
) -> Any:
    """boto3's client for a store; raises ValueError where it takes the address for none."""
    import boto3  # a third of a second, which only those pay who have a bucket
    from botocore.config import Config

    from src.response.connections import give_connections

    if style == "auto":
        style = "virtual" if endpoint.virtual else "path"
    with _making:
        client = boto3.client(
            "s3",
            endpoint_url=endpoint.url,
            region_name=region or endpoint.region or "us-east-1",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": style},
                retries={"mode": "standard", "total_max_attempts": 3},
                connect_timeout=5,
                read_timeout=30,
                # Checksums in trailers are AWS's own; many stores refuse them.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
    give_connections(client, only_public=only_public)
    return client


def _why_not(url: str) -> str:
    """Why the test file cannot be fetched from `url`; empty where it can."""
    try:
        with urllib.request.urlopen(url, timeout=_FETCH_SECONDS) as answer:  # noqa: S310 - http(s), as settings have it
            return "" if answer.read(len(_TEST_FILE) + 1) == _TEST_FILE else "it answers with something else"
    except (OSError, HTTPException) as error:
        headers = getattr(error, "headers", None) or {}
        region = headers.get("x-amz-bucket-region")  # an upload follows to it by itself, a signed address does not
        wanted = f"; the store names its region: set BUCKET_REGION={region}" if region else ""
        return f"{urlsplit(url).netloc} answers a GET of its address with {error}{wanted}"


def _right_region(error: Exception) -> str:
    """What to set where a store says that it is in another region."""
    response = getattr(error, "response", None) or {}
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    said = re.search(r"expecting '([\w-]+)'", str(error))
    region = response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region") or (said and said[1])
    return f"; the store names its region: set BUCKET_REGION={region}" if region else ""
