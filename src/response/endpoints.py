"""The address of a bucket as people copy it from their store -> what boto3 wants to know of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from src.errors import Refused

# How stores write hosts: what stands before the store's own host is the bucket, what is in it the region.
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/VirtualHosting.html, dual-stack-endpoints.html,
# transfer-acceleration-getting-started.html; the other stores' own documentation.
_STORES = (
    r"s3-accelerate(?:\.dualstack)?\.amazonaws\.com",
    r"s3(?:-fips)?(?:\.dualstack)?[.-](?P<region>[a-z0-9-]+)\.amazonaws\.com(?:\.cn)?",
    r"s3\.amazonaws\.com",
    r"s3\.(?P<region>[a-z0-9-]+)\.(?:backblazeb2|wasabisys)\.com",
    r"(?P<region>[a-z]+\d)\.digitaloceanspaces\.com",
    r"s3\.(?P<region>[a-z0-9-]+)\.scw\.cloud",
    r"s3\.(?P<region>[a-z0-9-]+)\.(?:io\.|perf\.)?cloud\.ovh\.(?:net|us)",
    r"(?P<region>[a-z]+\d)\.your-objectstorage\.com",
    r"(?P<region>[a-z0-9-]+)\.(?:linode|vultr)objects\.com",
    r"s3api-(?P<region>[a-z0-9-]+)\.runpod\.io",
    r"[0-9a-f]{32}(?:\.[a-z]+)?\.r2\.cloudflarestorage\.com",
    r"storage\.googleapis\.com",
)
_ACCELERATED = "s3-accelerate"
_WRITTEN = (
    "https://host, https://host/bucket, https://bucket.s3.region.amazonaws.com, or https://host/path with the bucket's "
    "name beside it"
)


@dataclass(frozen=True)
class Endpoint:
    """Where a store is, and what its address says of the bucket; `virtual` where the bucket must stand in the host."""

    url: str
    bucket: str | None
    region: str | None
    virtual: bool


def read_endpoint(url: str, bucket: str | None) -> Endpoint:
    """What `url` says, and `bucket`, which is what was named beside it. Raises Refused where it is no such address."""
    try:
        parts = urlsplit(url.strip())
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    if parts.scheme.lower() not in ("http", "https") or not host or parts.username or parts.query or parts.fragment:
        raise Refused(f"must be the address of a store, such as {_WRITTEN}; without a user, a query or a fragment")
    path = [segment for segment in parts.path.split("/") if segment]
    bucket_there = region = None
    for store in _STORES:
        if found := re.fullmatch(rf"(?:(?P<bucket>[a-z0-9][a-z0-9._-]*)\.)?(?P<host>{store})", host):
            bucket_there, host, region = found["bucket"], found["host"], found.groupdict().get("region")
            break
    if bucket_there:
        if bucket not in (None, bucket_there):
            raise Refused(f"names the bucket {bucket_there!r}, and beside it {bucket!r} is named: name one")
    elif path and bucket in (None, path[-1]) and (len(path) == 1 or bucket):
        bucket_there = path.pop()
    where = f"{host}:{port}" if port else host
    endpoint = "/".join((f"{parts.scheme.lower()}://{where}", *path))
    if region and host.endswith(".runpod.io"):
        region = region.upper()  # as RunPod writes its datacentres
    return Endpoint(endpoint, bucket or bucket_there, region, _ACCELERATED in host)
