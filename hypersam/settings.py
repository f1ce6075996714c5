"""Every setting of the service, the workers and the engine, in one frozen class.

Values come from keyword arguments, else from the environment (``HYPERSAM_DATA_DIR``, ``HYPERSAM_PORT`` …; an empty
variable is none), else from the defaults below. Besides, a process that another of ours starts finds in its environment
who started it and which job it is for (``workers/__main__.py``, ``workers/horse.py``): no settings, and none of an
operator's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from hypersam.errors import BadSettings
from hypersam.keys import ApiKey, parse_line, parse_lines

PREFIX = "HYPERSAM_"
MIB = 1 << 20
GIB = 1 << 30
DAY = 24 * 3600

PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Texts = Annotated[tuple[str, ...], NoDecode]  # decoded below, where what is wrong can be said

_RATE = re.compile(r"[1-9][0-9]{0,8}/(second|minute|hour|day)")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]+)?")
# None has room for a user and a password, also where the password has a slash.
_BUCKET = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]*(/.*)?")
_ENDPOINT = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?(/[A-Za-z0-9._~/-]*)?")
_CREDENTIALS = "credentials go into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class Settings(BaseSettings):
    """What an operator can choose. Sizes are bytes, times are seconds."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    data_dir: Path = Field(Path("hypersam-data"), description="uploads, artifacts, models, Redis's file")
    store_url: str = Field("", description="s3://bucket/prefix that hosts share; empty: all is kept in data_dir")
    store_endpoint: str | None = Field(None, description="address of an S3-compatible server; none: AWS")
    store_region: str | None = None
    store_allow_http: bool = Field(False, description="let store_endpoint be http://, for a server next door")
    cache_bytes: PositiveInt = Field(
        50 * GIB, description="artifacts of the object store that this host keeps a copy of"
    )
    redis_url: str | None = Field(None, description="redis://…, rediss://… or unix://…; none: start one")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    workers: int = Field(1, ge=0, description="worker processes that `hypersam serve` keeps running")

    max_upload_bytes: PositiveInt = 8 * GIB
    max_image_bytes: PositiveInt = 64 * MIB
    max_image_pixels: PositiveInt = 64_000_000
    max_prompts: PositiveInt = 64
    max_points: PositiveInt = Field(1024, description="points of one prompt")
    max_waiting_jobs: PositiveInt = Field(1000, description="queued jobs before POST /compress answers 503")

    max_images: PositiveInt = Field(16, description="pictures of one /segment request")
    max_grid: PositiveInt = Field(64, description="points a side that /segment/everything may be asked for")
    embedding_cache_bytes: int = Field(512 * MIB, ge=0)
    embedding_ttl: PositiveInt = Field(3600, description="an embedding is kept so long after it was last used")
    max_batch: PositiveInt | None = Field(
        None,
        description="pictures that one call of an encoder takes; none: 8 on a GPU, and on a CPU as many of those 8 as "
        "have a million pixels together, which is one for a SAM of 1024 x 1024",
    )
    resident_bytes: PositiveInt = Field(4 * GIB, description="what all models in memory may hold together")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the image encoder")
    resident: Literal["auto", "levels", "stream"] = Field(
        "auto",
        description="lattice weights in memory: int8 levels, or the file's entropy-coded bytes, decoded at every use "
        "(CPU only); auto: levels, unless one model alone would take more than resident_bytes",
    )
    max_waiting: PositiveInt = Field(64, description="waiting /segment requests before the next gets 503")
    drain_seconds: PositiveInt = Field(30, description="what runs when the service is told to stop has so long to end")

    header_timeout: PositiveFloat = Field(20, description="a request's line and headers must be here within so long")
    body_timeout: PositiveFloat = Field(60, description="longest silence in the middle of a request's body")
    body_window: PositiveFloat = Field(60, description="a body's rate is measured over so long")
    send_timeout: PositiveFloat = Field(60, description="longest time in which an answer that waits is not taken")
    min_rate: int = Field(
        4096, ge=0, description="bytes a second that a body must bring, and of an answer that a client must take"
    )

    api_keys: Texts = Field((), description="lines of `hypersam keys new`; none here and no file: all is open")
    api_keys_file: Path | None = Field(None, description="such lines, one key each")
    rate_limit: str | None = Field(None, description="by key or address, such as 5/second or 120/minute")
    trusted_proxies: Texts = Field(
        (), description="addresses or networks of proxies whose X-Forwarded-For tells a client's address"
    )
    cors_origins: Texts = Field((), description="pages of these origins may call; none may by default")

    job_timeout: PositiveInt = 6 * 3600
    job_retention: PositiveInt = Field(7 * DAY, description="how long a finished job can be asked for")
    job_retries: int = Field(2, ge=0, description="new tries after a worker was lost")
    worker_heartbeat: PositiveInt = Field(10, description="a job is lost after three of these in silence")
    keep_uploads: bool = False
    upload_retention: PositiveInt = Field(DAY, description="age at which an upload that no job wants goes")

    default_model: Name = Field("small_sam", description="the name of the small SAM that the package carries")
    register_default: bool = Field(True, description="queue that model's compression at the first start")
    label_studio_url: str | None = Field(None, description="the Label Studio whose pictures may be fetched")
    label_studio_token: str | None = Field(
        None, repr=False, description="its API token, sent to it with those requests"
    )
    label_studio_stores: Texts = Field(
        (), description="origins besides it that pictures may come from: the object store behind its redirects"
    )

    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info"
    log_format: Literal["text", "json"] = Field("text", description="json: one object a line")

    @field_validator("port", mode="before")
    @classmethod
    def _port_of_this_process(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith("tcp://"):
            raise ValueError(
                "an address is no port; Kubernetes sets this variable for a Service named hypersam, unless the pod has "
                "enableServiceLinks: false"
            )
        return value

    @field_validator("store_url")
    @classmethod
    def _store_is_a_bucket(cls, url: str) -> str:
        if url and not _BUCKET.fullmatch(url):
            raise ValueError(f"a store is s3://bucket or s3://bucket/prefix; {_CREDENTIALS}")
        return url

    @field_validator("store_endpoint")
    @classmethod
    def _endpoint_is_an_address(cls, url: str | None) -> str | None:
        if url is not None and not _ENDPOINT.fullmatch(url):
            raise ValueError(f"an endpoint is https://host or https://host:port; {_CREDENTIALS}")
        return url

    @field_validator("label_studio_url")
    @classmethod
    def _label_studio_is_an_address(cls, url: str | None) -> str | None:
        if url is not None and not _ENDPOINT.fullmatch(url):  # clients are told which it is
            raise ValueError("an address is https://host or https://host:port; its token goes into "
                             f"{PREFIX}LABEL_STUDIO_TOKEN")  # fmt: skip
        return url

    @field_validator("api_keys", "cors_origins", "label_studio_stores", "trusted_proxies", mode="before")
    @classmethod
    def _list_in_json(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            read = json.loads(value)
        except ValueError:
            read = None
        if not isinstance(read, list):
            raise ValueError('a JSON list is expected, such as ["one", "two"]')
        return read

    @field_validator("api_keys")
    @classmethod
    def _keys_parse(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for line in lines:
            parse_line(line)
        return lines

    @field_validator("rate_limit")
    @classmethod
    def _rate_parses(cls, text: str | None) -> str | None:
        if text is not None and not _RATE.fullmatch(text):
            raise ValueError("a rate is a number and a time: 5/second, 120/minute, 1000/hour or 10000/day")
        return text

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_addresses(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            try:
                ip_network(proxy)
            except ValueError:
                raise ValueError(f"{proxy!r} is neither an address nor a network such as 10.0.0.0/8") from None
        return proxies

    @field_validator("cors_origins", "label_studio_stores")
    @classmethod
    def _origins_are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin such as https://example.org; a wildcard is not taken")
        return origins

    def keys(self) -> tuple[ApiKey, ...]:
        """The configured keys. Raises BadSettings for a file that cannot be read, or of which a line is no key."""
        try:
            kept = parse_lines(self.api_keys_file.read_text("utf-8")) if self.api_keys_file is not None else ()
        except (OSError, ValueError) as error:
            raise BadSettings(f"{PREFIX}API_KEYS_FILE cannot be used: {error}") from None
        if self.api_keys_file is not None and not kept:
            raise BadSettings(
                f"{PREFIX}API_KEYS_FILE has no key; make one with `hypersam keys new`, or do not name the file"
            )
        return (*map(parse_line, self.api_keys), *kept)

    def environment(self) -> dict[str, str]:
        """Return the variables from which a child process makes an equal ``Settings()``."""
        values: dict[str, str] = {}
        for name, value in self.model_dump(mode="json").items():
            # Empty is none, also where this process's own environment has a value.
            text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
            values[PREFIX + name.upper()] = text
        values[PREFIX + "DATA_DIR"] = str(self.data_dir.absolute())
        return values


def load(**given: Any) -> Settings:
    """Return the settings of a process that starts, ``given`` being what its command line says.

    Raises BadSettings, one line that names every variable or option that is wrong and what would be right.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        wrong = [_in_words(str(each["loc"][0]), each["msg"], given) for each in error.errors()]
        raise BadSettings("; ".join(wrong)) from None


def _in_words(name: str, message: str, given: Mapping[str, object]) -> str:
    called = f"--{name.replace('_', '-')}" if name in given else PREFIX + name.upper()
    ours = message.removeprefix("Value error, ")
    if ours != message:
        return f"{called}: {ours}"
    field = Settings.model_fields.get(name)
    described = f" ({field.description})" if field is not None and field.description else ""
    return f"{called}: {message[0].lower()}{message[1:]}{described}"
