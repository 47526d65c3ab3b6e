"""The environment, read once into one frozen `Settings`; the only file that knows of os.environ."""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails

from src.catalog import MEMORY_MODES, PROFILES, QUANTIZATIONS
from src.errors import InvalidSettings
from src.redaction import keep_secret, secrets_among

MAX_PREFETCH = 32
# pydantic's words -> an operator's
_WORDS = {
    "^Input should be": "must be",
    "^(String should match pattern|Field required).*": "is not written as it must be",
}

ROOT = Path(__file__).resolve().parent.parent
_QUANTIZATION = "/opt/quantization"  # where the image has what requirements-quantization.txt wants


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _row_of(rows: Iterable[str]) -> Callable[[object], object]:
    """A name of `rows`, in any case."""

    def read(value: object) -> object:
        name = str(value).lower()
        if name not in rows:
            raise ValueError(f"must be one of {', '.join(rows)}")
        return name

    return read


def _options(rows: Iterable[str]) -> WithJsonSchema:
    """What `_row_of` takes, for whoever reads the schema: the docs."""
    return WithJsonSchema({"type": "string", "enum": list(rows)})


def _names(value: object) -> object:
    """Read "one, two" as a list."""
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def _repos(names: tuple[str, ...]) -> tuple[str, ...]:
    if odd := [name for name in names if not re.fullmatch(r"public|\*|[\w.-]+/(\*|[\w.-]+)", name)]:
        raise ValueError(f"must be a list of public, owner/name, owner/* or *, got {odd[0]!r}")
    return names


def _or_none(value: object) -> object:
    """Read "none" as nothing."""
    return None if isinstance(value, str) and value.lower() == "none" else value


def _sizes(value: object) -> object:
    """Read "512x512,1024x768" as numbers, and "none" as no size at all."""
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return ()
    return tuple(tuple(size.split("x")) for size in value.lower().replace(" ", "").split(","))


def _ranks(value: object) -> object:
    """Read "32,128" as numbers, and "none" as no rank at all."""
    if not isinstance(value, str):
        return value
    return () if value.lower() == "none" else tuple(rank.strip() for rank in value.split(","))


def _kept(value: SecretStr) -> SecretStr:
    """What is secret leaves the process nowhere, and not as what is wrong of it either."""
    keep_secret(value.get_secret_value())
    return value


def _sendable(value: SecretStr) -> SecretStr:
    """A token or a key, which travels in a header: https://www.rfc-editor.org/rfc/rfc9110#section-5.5."""
    text = value.get_secret_value()
    odd = next(((i, character) for i, character in enumerate(text, 1) if not "!" <= character <= "~"), None)
    if odd:
        raise ValueError(
            f"holds the character U+{ord(odd[1]):04X} in place {odd[0]} of {len(text)}, which no HTTP header can "
            "carry: copy it anew"
        )
    return value


Secret = Annotated[SecretStr, AfterValidator(_kept), AfterValidator(_sendable)]
Sizes = Annotated[tuple[tuple[int, int], ...] | None, BeforeValidator(_sizes)]
Ranks = Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], BeforeValidator(_ranks)]


_SMALLER = ("auto", "none", *QUANTIZATIONS)
_BUCKET = ("bucket_endpoint_url", "bucket_access_key_id", "bucket_secret_access_key")


class Settings(BaseModel):
    """Each field is the environment variable of the same name in capitals; an empty variable counts as unset."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_name: str = Field(
        "FLUX.1-dev",
        description="a row of the catalog, a hub id or a local folder in diffusers' layout; or a model in one "
        ".safetensors or .gguf file: its path, owner/repo/file, or its https address",
    )
    base_model: str | None = Field(
        None,
        description="where a model in one file takes from what the file lacks: a row of the catalog, a hub id or a "
        "folder; by default the model whose family and widths the file has",
    )
    model_revision: str | None = Field(
        None, description="branch, tag or commit on the hub; by default what is here, or else the newest"
    )
    hf_token: Secret | None = Field(None, description="Hugging Face access token; gated models need one")
    civitai_token: Secret | None = Field(
        None, description="Civitai's API key; some of its files need one, and it is sent to Civitai alone"
    )
    controlnets: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (), description="ControlNets to load at the start and to prefer, by name; others load when first asked for"
    )
    redux_model: str = Field(
        "black-forest-labs/FLUX.1-Redux-dev", description="what reads image_prompt: a hub id or a local folder"
    )
    prompt_upsampler: Annotated[str | None, BeforeValidator(_or_none)] = Field(
        None,
        description="what writes prompts out where a request says prompt_upsampling: a hub id or a local folder, for "
        "FLUX.3 black-forest-labs/flux-3-image-klein-pup (19 GB); none by default",
    )
    lora_dir: Path = Field(Path("/runpod-volume/loras"), description="the only folder whose adapters may be used")
    lora_cache_dir: Path = Field(Path("/tmp/loras"), description="where downloaded adapters are kept")  # noqa: S108
    lora_cache_gb: float = Field(
        20, gt=0, description="gigabytes (10^9) of LORA_CACHE_DIR; the least recently used goes first"
    )
    max_loras: int = Field(8, ge=4, le=64, description="adapters held in memory; the least recently used goes first")
    max_lora_rank: int = Field(512, ge=1, description="the highest rank of an adapter's layers")
    max_lora_gb: float = Field(8, gt=0, description="gigabytes (10^9) of one adapter, in its file or read in float32")
    lora_target_ranks: Ranks = Field(
        (32, 128),
        description="ranks of the slots for adapters in compiled blocks: a request takes the smallest that holds the "
        "ranks of its adapters together, and above the largest its blocks run uncompiled; none: no slots",
    )
    lora_hub_allow: Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_repos)] = Field(
        (),
        description="repos of the hub whose adapters may be used: a list of owner/name, owner/*, public for those that "
        "are not private, or * for all that HF_TOKEN sees; public by default",
    )
    runpod_model_cache: Path = Field(
        Path("/runpod-volume/huggingface-cache/hub"),
        description="where RunPod keeps cached models, in the hub's layout",
    )
    memory_mode: Annotated[str, BeforeValidator(_row_of(MEMORY_MODES)), _options(MEMORY_MODES)] = Field(
        "auto", description="where weights live; auto is the fastest exact way that fits"
    )
    memory_limit_gb: float | None = Field(
        None, gt=0, description="gigabytes (10^9) of the card to use at most; all that is free by default"
    )
    profile: Annotated[str, BeforeValidator(_row_of(PROFILES)), _options(PROFILES)] = Field(
        "exact",
        description="exact, near (fp8 weights) or fast (also the fastest attention kernel that is installed, guessed "
        "steps where a request says no speed, and graphs for each warm-up size); QUANTIZATION, MEMORY_MODE, "
        "ATTENTION_BACKEND and a request's speed count first",
    )
    quantization: Annotated[str, BeforeValidator(_row_of(_SMALLER)), _options(_SMALLER)] = Field(
        "auto", description="fp8 or nf4: smaller, and not exact; the metadata says so. auto is what PROFILE says"
    )
    parallel: Annotated[Literal["jobs", "picture"], BeforeValidator(_lower)] = Field(
        "jobs",
        description="what several cards do: jobs is a picture on each, picture is all of them on one picture at a time",
    )
    quantized_dir: Path = Field(
        Path("/runpod-volume/quantized"), description="where quantized weights are kept for the next worker"
    )
    attention_backend: str = Field(
        "auto",
        description="a name of diffusers' attention backends; auto is the fastest for the card that needs no package",
    )
    compile: bool | None = Field(
        None, description="compile the transformer's blocks before the first job; on cards by default"
    )
    compile_cache_dir: Path = Field(
        Path("/runpod-volume/compile-cache"), description="where what was compiled is kept for the next worker"
    )
    max_pixels: int = Field(2048 * 2048, ge=64 * 64, description="the most pixels of one picture, width times height")
    batch_size: int = Field(
        1,
        ge=1,
        le=4,
        description="pictures denoised at once; above 1 is faster on large cards, and bytes depend on the batch",
    )
    request_timeout: float | None = Field(
        None, gt=0, description="seconds from a job's arrival on the worker until it is given up; no limit by default"
    )
    prefetch_jobs: int | None = Field(
        None,
        ge=1,
        le=MAX_PREFETCH,
        description="jobs held at once for each device, the running one among them; by default as many as keep it busy",
    )
    progress_interval: float = Field(1.0, ge=0.1, description="seconds between two progress updates of a job")
    warmup_sizes: Sizes = Field(
        None,
        description='drawn before the first job: "1024x1024,768x1344" or "none"; the model\'s own size by default',
    )
    max_response_mb: float = Field(
        10, gt=0, description="megabytes (10^6) of one response; RunPod carries 10 for /run, 20 for /runsync"
    )
    bucket_endpoint_url: str | None = Field(
        None,
        pattern=r"^(?i:https?)://[^/\s@]+(/\S*)?$",
        description="of the S3 bucket that takes the pictures, https://host/bucket say",
    )
    bucket_access_key_id: Secret | None = Field(None, description="of a key that may write to the bucket")
    bucket_secret_access_key: Secret | None = Field(None, description="of the same key")
    bucket_name: str | None = Field(None, description="by default the one that BUCKET_ENDPOINT_URL names")
    bucket_region: str | None = Field(None, description="by default the one that BUCKET_ENDPOINT_URL names")
    bucket_addressing_style: Annotated[Literal["auto", "path", "virtual"], BeforeValidator(_lower)] = Field(
        "auto",
        description="whether the bucket stands in the path or in the host; auto is path but for AWS's acceleration",
    )
    bucket_public_url: str | None = Field(
        None,
        pattern=r"^(?i:https?)://[^/\s@?#]+(/[^\s?#]*)?$",
        description="where everybody may fetch the bucket's files, of a CDN say: links without an end, not signed ones",
    )
    bucket_prefix: str = Field("", description="what the pictures' keys begin with")
    bucket_cache_control: str = Field("private, max-age=31536000, immutable", description="header of the pictures")
    bucket_url_expiry: int = Field(
        7 * 24 * 3600, ge=1, le=7 * 24 * 3600, description="seconds that the signed URLs work; S3 allows 7 days"
    )
    include_traceback: bool = Field(True, description="send tracebacks to the client, not to the log alone")
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = Field(
        "INFO", description="of this worker's log, and of the SDK's, which is never below INFO"
    )
    runpod_endpoint_id: str | None = Field(None, description="set by RunPod; the log is then in lines of JSON")
    runpod_realtime_port: int = Field(0, description="set by RunPod where the SDK is to serve HTTP by itself")

    @model_validator(mode="after")
    def _whole_bucket(self) -> Settings:
        parts = {name: getattr(self, name) for name in _BUCKET}
        missing = [name.upper() for name, value in parts.items() if value is None]
        if missing and len(missing) < len(parts):
            raise ValueError(
                f"{', '.join(name.upper() for name in parts)} must be set together, and {', '.join(missing)} is missing"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_quantize(self) -> Settings:
        asked = MEMORY_MODES[self.memory_mode].quantization
        if self.quantization not in ("auto", "none", asked) and self.memory_mode != "auto":
            both = f"MEMORY_MODE={self.memory_mode} and QUANTIZATION={self.quantization}"
            raise ValueError(f"{both} contradict each other: set one of them")
        return self

    @model_validator(mode="after")
    def _whole_model_on_each_card(self) -> Settings:
        if self.parallel == "picture":
            row = MEMORY_MODES[self.memory_mode]
            if self.memory_mode not in ("auto", "full") and not row.quantization:
                raise ValueError(
                    f"MEMORY_MODE={self.memory_mode} and PARALLEL=picture contradict each other: cards that share a "
                    "picture have the whole model each; allowed: auto, full, fp8 and nf4"
                )
            if self.compile:
                raise ValueError(
                    "COMPILE=true and PARALLEL=picture contradict each other: cards that share a picture run their "
                    "blocks as they are; allowed: COMPILE=false"
                )
        return self

    @property
    def placement_mode(self) -> str:
        """The row of MEMORY_MODES that is asked for, also by `quantization`."""
        asked = self.quantization
        if asked == "auto" and self.memory_mode == "auto":
            asked = PROFILES[self.profile].quantization
        return self.memory_mode if asked in ("auto", "none") else asked

    def for_several_cards(self) -> Settings:
        """As they are for each of several: cards that share a picture have the whole model, and compile nothing."""
        if self.parallel == "jobs":
            return self
        whole = {"memory_mode": "full"} if self.placement_mode == "auto" else {}
        return self.model_copy(update={"compile": False, **whole})

    def add_packages(self) -> None:
        """Let Python find what quantizes, where that is asked for: diffusers imports it wherever it can, for 1.6 s."""
        if self.placement_mode in QUANTIZATIONS and _QUANTIZATION not in sys.path:
            sys.path.append(_QUANTIZATION)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read `environment`; without it, os.environ and the file .env, where os.environ wins.

        Raises InvalidSettings naming every variable that is wrong, what it holds and what it may hold.
        """
        if environment is None:
            read_dotenv()
            environment = os.environ
        keep_secret(*secrets_among(environment))
        values = {name: _plain(environment.get(name.upper(), "")) for name in cls.model_fields}
        try:
            return cls.model_validate({name: value for name, value in values.items() if value})
        except ValidationError as error:
            found = {details["loc"][:1]: _fault(details, values) for details in error.errors()}
            raise InvalidSettings("; ".join(found.values())) from None


def read_dotenv() -> None:
    """Put the file .env into os.environ, where huggingface_hub and CUDA look for HF_HOME and others; os.environ wins.

    Raises InvalidSettings where the file is no text.
    """
    file = ROOT / ".env"
    if not file.is_file():
        return
    written = file.read_bytes()
    utf_16 = written.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # PowerShell's > writes it
    try:
        text = written.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidSettings(f"the file .env is no text in UTF-8 or UTF-16 ({error}): save it as UTF-8") from None
    for name, value in dotenv_values(stream=io.StringIO(text)).items():
        if value:
            os.environ.setdefault(name, value)


# What no operator sets, by how its description begins.
SET_BY_RUNPOD = frozenset(
    name for name, field in Settings.model_fields.items() if str(field.description).startswith("set by RunPod")
)


def runpod_api_key(environment: Mapping[str, str] | None = None) -> str | None:
    """RUNPOD_API_KEY, by which `python -m deploy` and client/ speak to RunPod; a worker has no use for it.

    Raises InvalidSettings where no header can carry it.
    """
    return _key("RUNPOD_API_KEY", environment)


def web_token(environment: Mapping[str, str] | None = None) -> str | None:
    """WEB_TOKEN, which whoever asks `python web.py` must have; None where there is none.

    Raises InvalidSettings where no header can carry it.
    """
    return _key("WEB_TOKEN", environment)


def _key(name: str, environment: Mapping[str, str] | None) -> str | None:
    key = SecretStr(_plain((os.environ if environment is None else environment).get(name, "")))
    try:
        return _sendable(_kept(key)).get_secret_value() or None
    except ValueError as error:
        raise InvalidSettings(f"{name} {error}") from None


def _plain(value: str) -> str:
    """Without blanks and line ends around it, and without the quotes that docker's --env-file leaves."""
    value = value.strip()
    return value[1:-1].strip() if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def _fault(details: ErrorDetails, values: Mapping[str, str]) -> str:
    """One variable: what it holds, what is wrong with that, what it is."""
    message = details["msg"].removeprefix("Value error, ")
    if not details["loc"]:
        return message
    name = str(details["loc"][0])
    for theirs, ours in _WORDS.items():
        message = re.sub(theirs, ours, message)
    field = Settings.model_fields[name]
    if "Secret" in str(field.annotation):
        return f"{name.upper()}: {message}"
    return f"{name.upper()}={values[name]!r}: {message}; it is: {field.description}"


with suppress(InvalidSettings):  # from_environment says it
    read_dotenv()
keep_secret(*secrets_among(os.environ))
