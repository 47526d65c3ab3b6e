"""What never leaves the process: by how it is written, by its value, and in time that the text alone decides."""

from __future__ import annotations

import base64
import json
import time
from urllib.parse import quote, quote_plus

import pytest

from src.errors import Fault, InternalError, InvalidRequest, Refused
from src.redaction import MAX_REDACTED, REDACTED, cut, ends_of, hide_known_in, keep_secret, redact, secrets_among
from src.wording import show

# Texts, and the secret in each.
BY_SHAPE = [
    ("token hf_abcdefghij0123456789 refused", "hf_abcdefghij0123456789"),
    ("key rpa_ABCDEFGHIJ0123456789", "rpa_ABCDEFGHIJ0123456789"),
    ("OpenAI's sk-proj-abcdefghij_0123456789", "abcdefghij_0123456789"),
    ("ghp_abcdefghijklmnopqrstuvwxyz0123456789 of GitHub", "abcdefghijklmnopqrstuvwxyz0123456789"),
    ("github_pat_11ABCDEFG0_abcdefghijkl", "11ABCDEFG0_abcdefghijkl"),
    ("civitai says no to 0123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdef"),
    ("the token 0123456789abcdef0123456789abcdef is old", "0123456789abcdef0123456789abcdef"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "eyJzdWIiOiIxMjM0In0"),
    ("AKIAIOSFODNN7EXAMPLE is its id", "AKIAIOSFODNN7EXAMPLE"),
    ("ASIAIOSFODNN7EXAMPLE is its id", "ASIAIOSFODNN7EXAMPLE"),
    ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "wJalrXUtnFEMI"),
    ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "wJalrXUtnFEMI"),
    ("its secret key wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY is wrong", "wJalrXUtnFEMI"),
    ('{"SecretAccessKey": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"}', "wJalrXUtnFEMI"),
    ("'X-Amz-Security-Token': b'abc/geheim+1'", "geheim"),
    ("Credential=AKIAIOSFODNN7EXAMPLE/20260101/us-east-1/s3/aws4_request, Signature=deadgeheim", "deadgeheim"),
    ("Authorization: Basic dXNlcjpnZWhlaW0=", "dXNlcjpnZWhlaW0"),
    ("it sent Basic dXNlcjpnZWhlaW0=", "dXNlcjpnZWhlaW0"),
    ("{'Authorization': 'Basic dXNlcjpnZWhlaW0='}", "dXNlcjpnZWhlaW0"),
    ("Proxy-Authorization: Digest username=x, response=geheim", "geheim"),
    ("{'authorization': 'Bearer abc.geheim'}", "geheim"),
    ("Cookie: session=geheim; b=c", "geheim"),
    ("http://user:geheim@host/x", "geheim"),
    ("https://user:pa/geheim/x@host/y", "geheim"),
    ("https://user:p@geheim@host/y", "geheim"),
    ("https://user:9/geheim@host/y", "geheim"),
    ("see https://a.test/?next=https://user:geheim@host/y and others", "geheim"),
    ("https://civitai.com/api/download/models/4?type=Model&token=geheim", "geheim"),
    ("https://api.runpod.test/v2/x/job-take/1?gpu=none&key=geheim", "geheim"),
    ("GET /v2/x/job-done/1?isStream=false&key=geheim HTTP/1.1", "geheim"),
    ("https://s3.test/x?X-Amz-Signature=geheim&x=1", "geheim"),
    ("https://storage.googleapis.com/b/o?X-Goog-Algorithm=a&X-Goog-Credential=geheim%2F1&X-Goog-Date=1", "geheim"),
    ("https://storage.googleapis.com/b/o?GoogleAccessId=a&Expires=1&Signature=geheim%3D", "geheim"),
    ("https://x.blob.core.windows.net/c/b?sv=2020-08-04&se=2026&sr=b&sp=r&sig=geheim%2Bb%3D", "geheim"),
    ("sv=2020-08-04&ss=b&sig=geheim%3D", "geheim"),
    ("AccountName=x;AccountKey=geheim==;EndpointSuffix=core", "geheim"),
    ("https://p.test/?url=https%3A%2F%2Fh%2F%3Ftoken%3Dgeheim%26x%3D1", "geheim"),
    ("password='ge heim', user='x'", "ge heim"),
    ("data:image/png;base64," + "iVBORw0KGgo" * 40, "iVBORw0KGgo"),
]
PLAIN = [
    "hf_token: is not a field of a request; did you mean width?",
    "the worker has no HF_TOKEN; set CIVITAI_TOKEN on the worker",
    "a prompt has 97 tokens for CLIP, which reads the first 77",
    "could not be fetched: https://x.test/a/b.safetensors?download=true&size=5",
    "LORA_DIR=/runpod-volume/loras: no such file",
    "https://127.0.0.1:8080/owner/name@main/x.safetensors",
    "blocks.0.attn.to_k.lora_A.weight has the shape 4x8",
    "names the revision 0123456789abcdef0123456789abcdef01234567",
    "basic knowledge of keys; token: must be text, got 5",
    "KeyError: 'key'",
    "max_sequence_length=512, tokenizer=CLIPTokenizer",
]


@pytest.mark.parametrize(("text", "secret"), BY_SHAPE)
def test_secrets_are_known_by_how_they_are_written(text: str, secret: str) -> None:
    clean = redact(f"it says: {text} and no more")
    assert secret not in clean
    assert clean.startswith("it says: ")
    assert redact(clean) == clean


@pytest.mark.parametrize("text", PLAIN)
def test_other_words_stay(text: str) -> None:
    assert redact(text) == text


SECRETS = ["Planted/Value+One=", "pl@nted:two?&#%", "quo\"ted\\three's", "abcdefgh", "~!x$y^z*(geheim)"]


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_known_by_their_value_in_every_spelling(secret: str) -> None:
    keep_secret(secret)
    spelled = [
        secret,
        quote(secret),
        quote(secret, safe=""),
        quote_plus(secret),
        quote(quote(secret, safe=""), safe=""),
    ]
    spelled += [quote(secret, safe="").lower() if secret.islower() else secret, json.dumps(secret)[1:-1], repr(secret)]
    for text in spelled:
        assert text.strip("'\"") not in redact(f"see {text} there")
    for before in ("", "u", "us", "user:"):
        for after in ("", "x", "xy"):
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                coded = encode((before + secret + after).encode()).decode()
                left = redact(f"see {coded} there").removeprefix("see ").removesuffix(" there")
                assert len(left.replace(REDACTED, "")) < len(coded) - len(secret)
    nested = {"a": [secret, {secret: (f"x{secret}x", 5, None)}]}
    assert secret not in json.dumps(hide_known_in(nested))


def test_what_is_short_is_a_word_and_no_secret() -> None:
    keep_secret("status", "", "x")
    assert redact("status x") == "status x"


def test_an_environment_tells_its_secrets() -> None:
    secrets = set(
        secrets_among(
            {
                "HF_TOKEN": "1", "RUNPOD_AI_API_KEY": "2", "AWS_ACCESS_KEY_ID": "3", "AWS_SECRET_ACCESS_KEY": "4",
                "AWS_SESSION_TOKEN": "5", "RUNPOD_SECRET_mine": "6", "DB_PASSWORD": "7",
                "RUNPOD_WEBHOOK_GET_JOB": "https://a.test/v2/$ID?gpu=none&key=8", "HTTPS_PROXY": "http://me:9@proxy:1",
                "TOKENIZERS_PARALLELISM": "no", "HF_TOKEN_PATH": "no", "KEYBOARD": "no", "HOME": "no", "X": "http://[",
            }
        )
    )  # fmt: skip
    assert secrets - {""} == set("123456789")


FLOODS = {
    "sig": "https:///?" + "sig" * 64_000,
    "more of them": "?" + "sig" * 2_000_000,
    "one word": "a" * 5_000_000,
    "key words": "token " * 500_000,
    "questions": "?sig" * 500_000,
    "schemes": "://a:" * 500_000,
    "at signs": "https://" + "a:b@" * 500_000,
    "words shorter than a picture": ("a" * 199 + " ") * 20_000,
    "assignments": "key=" * 500_000,
    "quotes": "token='" * 300_000,
    "services": "civitai " * 300_000 + "aws " * 300_000,
    "tokens": "eyJ" * 500_000 + "hf_" * 500_000 + "sk-" * 500_000,
    "headers": "authorization: " * 200_000,
    "percent": "%3Ftoken" * 300_000,
    "prose": "the quick brown fox jumps over the lazy dog\n" * 50_000,
    "surrogates": "\ud800" * 1_000_000,
}


@pytest.mark.parametrize("text", FLOODS.values(), ids=FLOODS)
def test_any_text_takes_a_moment_and_is_bounded(text: str) -> None:
    begun = time.process_time()
    clean = redact(text)
    assert time.process_time() - begun < 2
    assert len(clean) < 6 * MAX_REDACTED + 100
    clean.encode()


def test_a_long_traceback_is_redacted_whole() -> None:
    keep_secret("planted-by-value-0")
    line = '  File "x.py", line 5, in f\n    get("https://a.test/?token=geheim", "planted-by-value-0", "hf_abcdefgh")\n'
    text = f"first\n{line * 5_000}last"
    clean = redact(text)
    assert not any(secret in clean for secret in ("geheim", "planted", "abcdefgh"))
    assert clean.startswith("first\n")
    assert clean.endswith("last")
    assert "characters ..." in clean


@pytest.mark.parametrize("at", range(60, 140))
def test_no_cut_leaves_a_part_of_a_secret(at: int) -> None:
    secret = "Planted-where-texts-are-cut"
    keep_secret(secret)
    text = "." * at + secret + "." * 300
    for short in (
        cut(text, 100),
        ends_of(text, 100),
        show(text),
        show([text] * 9),
        show({text: text}),
        str(Fault("x", text * 20)),
    ):
        assert not any(part in short for part in (secret[:6], secret[-6:])) or secret in short, short
        assert "Plan" not in redact(short)


def test_what_an_error_says_is_bounded() -> None:
    long = "x " * 5_000_000
    faults = [Fault(long, long)] * 200_000
    begun = time.process_time()
    refused = InvalidRequest(faults).to_response(include_traceback=True)
    failed = InternalError(long).to_response(include_traceback=True)
    assert time.process_time() - begun < 2
    assert len(json.dumps(refused)) < 200_000
    assert len(json.dumps(failed)) < 100_000
    assert refused["errors"][-1]["message"].startswith("has 199,")
    assert len(str(Refused(long))) < 2_000


def test_a_traceback_of_a_long_cause_is_bounded() -> None:
    try:
        try:
            raise ValueError("x " * 5_000_000)
        except ValueError as cause:
            raise InternalError("the effect") from cause
    except InternalError as error:
        text = error.to_response(include_traceback=True)["traceback"]
    assert len(text) < 50_000
    assert "the effect" in text
