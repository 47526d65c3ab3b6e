"""The S3 bucket that takes pictures which are better fetched than carried.

Knows nothing of pictures: files go in, signed URLs come out.
"""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from src.errors import InvalidSettings
from src.settings import Settings

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/VirtualHosting.html: bucket.s3.region.amazonaws.com
_AWS = re.compile(r"(?:(?P<name>[a-z0-9.-]+)\.)?s3[.-](?:(?P<region>[a-z0-9-]+)\.)?amazonaws\.com")


class Bucket:
    """`client` is boto3's for S3; safe to use from many threads."""

    def __init__(self, client: Any, name: str, *, prefix: str = "", cache_control: str = "", url_expiry: int) -> None:
        self._client = client
        self._name = name
        self._prefix = prefix.strip("/")
        self._cache_control = cache_control
        self._url_expiry = url_expiry

    @classmethod
    def from_settings(cls, settings: Settings) -> Bucket | None:
        """The bucket that the environment describes; None where it describes none.

        Raises InvalidSettings where neither BUCKET_NAME nor the URL names it.
        """
        if settings.bucket_endpoint_url is None:
            return None
        import boto3  # a third of a second, which only those pay who have a bucket
        from botocore.config import Config

        endpoint, named, region = _read_url(settings.bucket_endpoint_url)
        name = settings.bucket_name or named
        if name is None:
            raise InvalidSettings(
                f"BUCKET_NAME: is required where BUCKET_ENDPOINT_URL={settings.bucket_endpoint_url!r} names no bucket"
            )
        key, secret = settings.bucket_access_key_id, settings.bucket_secret_access_key
        options: dict[str, Any] = {
            "endpoint_url": endpoint,
            "region_name": settings.bucket_region or region or "us-east-1",
            "aws_access_key_id": key.get_secret_value() if key else None,
            "aws_secret_access_key": secret.get_secret_value() if secret else None,
            "config": Config(
                signature_version="s3v4",
                s3={"addressing_style": "auto" if _AWS.search(endpoint) else "path"},
                retries={"mode": "standard", "total_max_attempts": 3},
                connect_timeout=5,
                read_timeout=30,
                # Checksums in trailers are AWS's own; many stores refuse them.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        }
        try:
            client = boto3.client("s3", **options)
        except ValueError as error:
            raise InvalidSettings(f"BUCKET_ENDPOINT_URL={settings.bucket_endpoint_url!r}: {error}") from error
        return cls(
            client,
            name,
            prefix=settings.bucket_prefix,
            cache_control=settings.bucket_cache_control,
            url_expiry=settings.bucket_url_expiry,
        )

    def upload(self, file: bytes, name: str, mime: str) -> str:
        """Store `file` under a key that ends in `name`; the signed URL to fetch it by. Raises what boto3 raises."""
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
        url: str = self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self._name, "Key": key}, ExpiresIn=self._url_expiry
        )
        return url

    def check(self) -> None:
        """Store and remove a file of one byte; raises InvalidSettings with what the store answers."""
        from botocore.exceptions import BotoCoreError, ClientError

        key = "/".join(filter(None, (self._prefix, f"write-test-{secrets.token_hex(8)}")))
        try:
            self._client.put_object(Bucket=self._name, Key=key, Body=b"1")
        except (BotoCoreError, ClientError) as error:
            raise InvalidSettings(
                f"BUCKET_ENDPOINT_URL, BUCKET_NAME={self._name!r} and the keys do not let this worker upload: {error}"
            ) from error
        with suppress(BotoCoreError, ClientError):  # keys that may only write are the better ones
            self._client.delete_object(Bucket=self._name, Key=key)


def _read_url(url: str) -> tuple[str, str | None, str | None]:
    """Endpoint, bucket and region of `url`: https://host, https://host/bucket or https://bucket.s3.region.amazonaws.com."""
    parts = urlsplit(url)
    host, name = parts.netloc, parts.path.strip("/") or None
    region = None
    if aws := _AWS.fullmatch(host):
        region, name = aws["region"], aws["name"] or name
        host = host.removeprefix(f"{aws['name']}.")
    return f"{parts.scheme}://{host}", name, region
