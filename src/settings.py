"""The environment, read once into one frozen `Settings`; the only file that knows of os.environ."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from dotenv import dotenv_values
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from src.errors import InvalidSettings

ROOT = Path(__file__).resolve().parent.parent


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class Settings(BaseModel):
    """Each field is the environment variable of the same name in capitals; an empty variable counts as unset."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_name: str = Field("FLUX.1-dev", description="a row of the catalog, a hub id or a local folder")
    model_revision: str | None = Field(None, description="branch, tag or commit on the hub; the newest by default")
    hf_token: SecretStr | None = Field(None, description="Hugging Face access token; gated models need one")
    runpod_model_cache: Path = Field(
        Path("/runpod-volume/huggingface-cache/hub"),
        description="where RunPod keeps cached models, in the hub's layout",
    )
    max_pixels: int = Field(2048 * 2048, ge=64 * 64, description="the most pixels of one picture, width times height")
    batch_size: int = Field(
        1, ge=1, le=4, description="pictures denoised at once; above 1 the bytes depend on the batch"
    )
    include_traceback: bool = Field(True, description="send tracebacks to the client, not to the log alone")
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = Field(
        "INFO", description="of this worker's own log"
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read `environment`; without it, os.environ and the file .env, where os.environ wins.

        Raises InvalidSettings naming every variable that is wrong, what it holds and what it may hold.
        """
        if environment is None:
            for name, value in dotenv_values(ROOT / ".env").items():
                if value:  # into os.environ, where huggingface_hub and CUDA look for HF_HOME and others
                    os.environ.setdefault(name, value)
            environment = os.environ
        values = {name: environment.get(name.upper(), "").strip() for name in cls.model_fields}
        try:
            return cls.model_validate({name: value for name, value in values.items() if value})
        except ValidationError as error:
            faults = (
                f"{str(fault['loc'][0]).upper()}={fault['input']!r}: {fault['msg'].lower()}" for fault in error.errors()
            )
            raise InvalidSettings("; ".join(faults)) from None
