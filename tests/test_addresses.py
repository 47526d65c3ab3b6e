"""What the addresses of adapters mean, and what is told where they mean none."""

from __future__ import annotations

import pytest
from huggingface_hub import constants

from src.errors import Refused
from src.request.addresses import HubFile, WebFile, check_beginning, read_address
from src.request.schema import Lora

FILE = "owner/name/a/x.safetensors"
DOWNLOAD = "https://civitai.com/api/download/models/456"


def read(path: str, **options: str) -> HubFile | WebFile:
    return read_address(Lora(path=path, **options))


@pytest.mark.parametrize("host", ["huggingface.co", "hf.co", "www.huggingface.co", "HuggingFace.co"])
@pytest.mark.parametrize("scheme", ["", "https://", "http://", "HTTPS://"])
@pytest.mark.parametrize(
    ("rest", "meant"),
    [
        ("", (None, None, "")),
        ("/", (None, None, "")),
        ("?x=1", (None, None, "")),
        ("/tree/main", ("main", None, "")),
        ("/tree/main/", ("main", None, "")),
        ("/tree/v1/a/b", ("v1", None, "a/b")),
        ("/tree/refs%2Fpr%2F1", ("refs/pr/1", None, "")),
        ("/tree/refs/pr/1/a", ("refs/pr/1", None, "a")),
        ("/commit/0123456789abcdef", ("0123456789abcdef", None, "")),
        ("/blob/main/a/x.safetensors", ("main", "a/x.safetensors", "")),
        ("/resolve/main/a/x%20y.safetensors?download=true", ("main", "a/x y.safetensors", "")),
        ("/resolve/refs%2Fpr%2F1/x.safetensors#top", ("refs/pr/1", "x.safetensors", "")),
        ("/x.safetensors", (None, "x.safetensors", "")),
        ("@v1", ("v1", None, "")),
    ],
)
def test_the_hubs_addresses_are_repos(
    host: str, scheme: str, rest: str, meant: tuple[str | None, str | None, str]
) -> None:
    read_as = read(f" {scheme}{host}/owner/name{rest} ")
    assert isinstance(read_as, HubFile)
    assert (read_as.repo, (read_as.revision, read_as.weight_name, read_as.folder)) == ("owner/name", meant)
    again = read_address(read_as.asked)
    assert isinstance(again, HubFile)
    assert again.key == read_as.key, "what the metadata says means the same"
    assert "://" not in read_as.asked.path


@pytest.mark.parametrize(
    ("path", "revision", "weight_name"),
    [
        ("owner/name@v1", "v1", None), ("owner/name@refs/pr/2", "refs/pr/2", None),
        ("owner/name@refs%2Fpr%2F2", "refs/pr/2", None), (f"{FILE}@v1", "v1", "a/x.safetensors"),
        ("owner/name@v1/a/x.safetensors", "v1", "a/x.safetensors"), ("hf://owner/name@v1", "v1", None),
        ("owner/name/a", None, None), (FILE, None, "a/x.safetensors"),
    ],
)  # fmt: skip
def test_ids_may_hold_a_revision(path: str, revision: str | None, weight_name: str | None) -> None:
    read_as = read(path)
    assert isinstance(read_as, HubFile)
    assert (read_as.repo, read_as.revision, read_as.weight_name) == ("owner/name", revision, weight_name)


@pytest.mark.parametrize("endpoint", ["https://mirror.test", "http://mirror.test:8080", "https://mirror.test/hub/"])
def test_a_mirrors_addresses_are_the_hubs(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for address in (f"{endpoint.rstrip('/')}", "https://huggingface.co", "https://huggingface.co:443"):
        read_as = read(f"{address}/owner/name/blob/main/x.safetensors")
        assert isinstance(read_as, HubFile)
        assert (read_as.repo, read_as.revision, read_as.weight_name) == ("owner/name", "main", "x.safetensors")


def test_weight_name_and_revision_may_say_the_same_again_or_more() -> None:
    address = "https://huggingface.co/owner/name/blob/main/a/x.safetensors"
    for path, options in (
        (address, {"revision": "main", "weight_name": "x.safetensors"}),
        (FILE, {"revision": "main", "weight_name": "a/x.safetensors"}),
        ("owner/name/a@main", {"weight_name": "x.safetensors"}),
        ("hf.co/owner/name/tree/main/a", {"weight_name": "x.safetensors"}),
    ):
        read_as = read(path, **options)
        assert isinstance(read_as, HubFile)
        assert (read_as.revision, read_as.weight_name) == ("main", "a/x.safetensors")
    for path, options, named in (
        (address, {"revision": "v1"}, "names the revision 'main', and beside it 'v1' is asked for"),
        ("owner/name@v1", {"revision": "v2"}, "names the revision 'v1', and beside it 'v2' is asked for"),
        ("hf.co/owner/name@v1/tree/v2", {}, "names the revision 'v1', and beside it 'v2'"),
        (FILE, {"weight_name": "y.safetensors"}, "names the file 'a/x.safetensors', and beside it 'y.safetensors'"),
        ("owner/name", {"weight_name": "x.bin"}, "is a pickle of PyTorch: convert it to .safetensors"),
        ("owner/name", {"weight_name": "x"}, "must end in .safetensors"),
        ("https://example.com/x.safetensors", {"revision": "v1"}, "weight_name and revision need one"),
        (DOWNLOAD, {"weight_name": "x.safetensors"}, "weight_name and revision need one"),
    ):
        with pytest.raises(Refused) as refused:
            read(path, **options)
        assert named in str(refused.value)


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("https://huggingface.co/datasets/a/b", "is the address of a dataset"),
        ("huggingface.co/spaces/a/b", "is the address of a space"),
        ("https://huggingface.co", "is a page of the hub and no repo"),
        ("https://huggingface.co/owner", "is a page of the hub and no repo"),
        ("https://huggingface.co/models?other=lora", "is a page of the hub and no repo"),
        ("https://huggingface.co/docs/diffusers/index", "is a page of the hub and no repo"),
        ("https://huggingface.co/a/b/discussions/3", "is a page of the repo a/b"),
        ("https://huggingface.co/a/b/blob/main/x.ckpt", "is a pickle of PyTorch: convert it"),
        ("https://huggingface.co/a/b/blob/main/LICENSE", "must end in .safetensors"),
        ("https://civitai.com/models/123/some-name", "give https://civitai.com/api/download/models/<version id>"),
        ("https://civitai.com/models/123/some-name?modelVersionId=456", f"give {DOWNLOAD}"),
        ("civitai.com/models/123?modelVersionId=456", f"give {DOWNLOAD}"),
        ("https://civitai.red/models/123?x=1&modelVersionId=456#top", f"give {DOWNLOAD}"),
        ("https://civitai.green/user/somebody", "is a page of Civitai"),
        ("https://civitai.com/api/download/models/", "is no file of Civitai"),
        ("https://github.com/o/r/blob/main/a/x.safetensors", "give https://github.com/o/r/raw/main/a/x.safetensors"),
        ("https://gitlab.com/g/o/r/-/blob/main/x.safetensors", "give https://gitlab.com/g/o/r/-/raw/main/x.safeten"),
        ("https://drive.google.com/file/d/1_A-b/view?usp=sharing", "drive.usercontent.google.com/download?id=1_A-b&"),
        ("https://drive.google.com/uc?export=download&id=1_A-b", "drive.usercontent.google.com/download?id=1_A-b&"),
        ("https://drive.google.com/drive/my-drive", "is a page of Google Drive"),
        ("https://www.dropbox.com/s/abc/x.safetensors?dl=0", "write dl=1"),
        ("https://www.dropbox.com/scl/fi/abc/x.safetensors?rlkey=secret", "write dl=1"),
        ("https://mega.nz/file/abc#key", "is a page of a service for sharing files"),
        ("https://replicate.com/someone/model", "is a page of Replicate"),
        ("https://replicate.delivery/yhqm/abc/trained_model.tar", "is a tar archive: unpack it"),
        ("https://example.com/x.zip?download=1", "is a zip archive: unpack it"),
        ("https://example.com/x.PT", "is a pickle of PyTorch: convert it"),
        ("https://example.com/x.gguf", "is GGUF"),
        ("owner/name/../../x.safetensors", "leads out of the repo"),
        ("ftp://example.com/x.safetensors", "must be a hub id"),
        ("http://example.com/x.safetensors", "must be a hub id"),
        ("sha256:0123", "is the digest of an address"),
        ("name", "is no hub id (owner/name)"),
    ],
)
def test_what_gives_no_file_says_what_to_give_instead(path: str, advice: str) -> None:
    with pytest.raises(Refused) as refused:
        read(path)
    assert advice in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("path", "url", "host", "has_token"),
    [
        (DOWNLOAD, DOWNLOAD, "Civitai", False),
        ("civitai.com/api/download/models/456", DOWNLOAD, "Civitai", False),
        ("http://civitai.com/api/download/models/456", DOWNLOAD, "Civitai", False),
        ("urn:air:flux1:lora:civitai:123@456", DOWNLOAD, "Civitai", False),
        ("civitai:123@456", DOWNLOAD, "Civitai", False),
        (f"{DOWNLOAD}?type=Model&token=x", f"{DOWNLOAD}?type=Model&token=x", "Civitai", True),
        ("https://civitai.red/api/download/models/4", "https://civitai.red/api/download/models/4", "Civitai", False),
        ("https://www.dropbox.com/s/x?dl=1", "https://www.dropbox.com/s/x?dl=1", None, False),
        ("https://example.com/x?token=y", "https://example.com/x?token=y", None, False),
        ("https://civitai.com.evil.test/api/download/models/4", None, None, False),
        ("https://civitai.com@evil.test/api/download/models/4", None, None, False),
        ("https://evil.test\\@civitai.com/api/download/models/4", None, None, False),
        ("https://evil.test/civitai.com/api/download/models/4", None, None, False),
    ],
)
def test_a_file_on_the_web_knows_whose_it_is(path: str, url: str | None, host: str | None, has_token: bool) -> None:
    read_as = read(path)
    assert isinstance(read_as, WebFile)
    found = read_as.host.name if read_as.host else None
    assert (read_as.url, found, read_as.has_token) == (url or path, host, has_token)


@pytest.mark.parametrize(
    ("begins", "name"),
    [
        (b"", "an empty file"), (b"<!DOCTYPE html><p>", "an HTML page"), (b"\n <html lang=en>", "an HTML page"),
        (b"\xef\xbb\xbf<!-- x --><HTML>", "an HTML page"), (b'<?xml version="1.0"?><Error>', "XML"),
        (b'{"error": "Unauthorized"}', "JSON"), (b"[1]", "JSON"), (bytes(257) + b"ustar\x0000", "a tar archive"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "a pickle of PyTorch"), (b"\x80\x02}q\x00", "a pickle"),
        (b"PK\x03\x04" + bytes(26) + b"lora.safetensors", "a zip archive"), (b"GGUF\x03", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"), (b"Not Found: no such file", "text"),
        (b"\x1f\x8b\x08", "compressed"), (b"\x89PNG\r\n", "a picture"),
    ],
)  # fmt: skip
def test_other_formats_are_known_by_their_first_bytes(begins: bytes, name: str) -> None:
    with pytest.raises(Refused, match=f"is not a complete .safetensors file but {name}"):
        check_beginning(begins)


def test_a_header_of_any_length_is_no_other_format() -> None:
    for length in range(2, 70_000):
        check_beginning(length.to_bytes(8, "little") + b'{"a":{}}')
