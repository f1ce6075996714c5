"""Keys, scopes, rates and origins, at the running service; and nothing secret in its log."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from redis import Redis

from hypersam.embedded_redis import EmbeddedRedis
from hypersam.errors import BadSettings
from hypersam.keys import new_key
from hypersam.settings import Settings
from service.app import create_app
from service.guard import OPEN, scopes_of
from tests.service.running import Api, assert_problem, picture

SECRETS = {scope: new_key(f"the-{scope}", [scope]) for scope in ("compress", "segment", "admin")}
ORIGIN = "https://example.org"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(SECRETS["admin"][1].line() + "\n")
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"), port=0, workers=1, device="cpu", register_default=False,
        worker_heartbeat=2, api_keys=tuple(SECRETS[scope][1].line() for scope in ("compress", "segment")),
        api_keys_file=file, cors_origins=(ORIGIN,), log_level="debug",
    )  # fmt: skip
    service = Api(settings)
    try:
        yield service
    finally:
        service.stop()


def bearer(scope: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[scope][0]}"}


ROUTES = (
    ("GET", "/models", {"compress", "segment", "admin"}),
    ("GET", "/models/x", {"compress", "segment", "admin"}),
    ("GET", "/models/x/artifact", {"compress", "segment", "admin"}),
    ("DELETE", "/models/x", {"admin"}),
    ("POST", "/compress", {"compress", "admin"}),
    ("POST", "/plan", {"compress", "admin"}),
    ("GET", "/jobs", {"compress", "admin"}),
    ("GET", "/jobs/x", {"compress", "admin"}),
    ("GET", "/jobs/x/events", {"compress", "admin"}),
    ("DELETE", "/jobs/x", {"compress", "admin"}),
    ("POST", "/segment", {"segment", "admin"}),
    ("GET", "/metrics", {"admin"}),
    ("GET", "/no-such-route", {"admin"}),
    ("POST", "/models/x", {"admin"}),
)


@pytest.mark.parametrize(("method", "path", "allowed"), ROUTES)
def test_every_route_needs_its_scope(guarded: Api, method: str, path: str, allowed: set[str]) -> None:
    response = guarded.http.request(method, path)
    assert_problem(response, 401, "unauthorized")
    assert response.headers["www-authenticate"].startswith("Bearer")
    for scope in SECRETS:
        response = guarded.http.request(method, path, headers=bearer(scope))
        if scope in allowed:
            assert response.status_code not in (401, 403)
        else:
            assert_problem(response, 403, "forbidden")
            assert SECRETS[scope][0] not in response.text
        other = guarded.http.request(method, path, headers={"X-API-Key": SECRETS[scope][0]})
        assert other.status_code == response.status_code


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/docs", "/openapi.json"])
def test_what_is_open(guarded: Api, path: str) -> None:
    assert guarded.http.get(path).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer"}, {"Authorization": "Bearer x y"}, {"Authorization": "Basic YTpi"},
        {"Authorization": SECRETS["admin"][0]}, {"Authorization": f"Bearer {SECRETS['admin'][1].sha256}"},
        {"Authorization": f"Bearer {SECRETS['admin'][0]}x"}, {"X-API-Key": ""}, {"X-API-Key": "x" * 10_000},
        {"Authorization": "Bearer \xff\xfe"}, {"Cookie": f"key={SECRETS['admin'][0]}"},
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_key(guarded: Api, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    assert_problem(guarded.http.get("/models", headers=raw), 401, "unauthorized")
    assert_problem(guarded.http.get(f"/models?key={SECRETS['admin'][0][:8]}"), 401, "unauthorized")


def basic(credential: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(credential.encode()).decode()}"}


@pytest.mark.parametrize("path", ["/models", "/label-studio/none/health"])
def test_a_key_may_come_as_the_password_of_basic(guarded: Api, path: str) -> None:
    """Label Studio knows no other way to say who it is."""
    secret = SECRETS["segment"][0]
    wanted = guarded.http.get(path, headers=bearer("segment")).status_code
    assert wanted in (200, 404)
    for credential in (f"label-studio:{secret}", f":{secret}", f"{secret}:", secret):
        assert guarded.http.get(path, headers=basic(credential)).status_code == wanted
    assert guarded.http.get(path, auth=("Jürgen", secret)).status_code == wanted
    for headers in (
        basic(f"{secret}:wrong"), basic(f"a:{secret}x"), basic(f"a:b:{secret}"), basic(":"),
        {"Authorization": f"Basic {secret}"}, {"Authorization": "Basic /w=="}, {"Authorization": "Basic"},
    ):  # fmt: skip
        refused = guarded.http.get(path, headers=headers)
        assert_problem(refused, 401, "unauthorized")
        assert refused.headers["www-authenticate"] == (
            'Bearer realm="hypersam", Basic realm="hypersam", charset="UTF-8"'
        )
    assert_problem(guarded.http.post("/compress", headers=basic(f"a:{secret}")), 403, "forbidden")
    # Nobody else is asked for Basic, or a browser would put its own window over the page.
    assert guarded.http.get(path).headers["www-authenticate"] == 'Bearer realm="hypersam"'
    # A proxy in front may take Basic for itself.
    behind = {**basic("proxy:password"), "X-API-Key": secret}
    assert guarded.http.get(path, headers=behind).status_code == wanted


OTHERWISE = ("//models", "/models/", "/MODELS", "/%6dodels", "/./models", "/docs/../models", "/static/../models")


@pytest.mark.parametrize("path", OTHERWISE)
def test_paths_written_in_another_way_open_nothing(guarded: Api, path: str) -> None:
    request = httpx.Request("GET", httpx.URL(guarded.url).copy_with(raw_path=path.encode()))
    assert guarded.http.send(request).status_code in (401, 404)


def test_the_document_lists_no_route_that_is_open_by_mistake() -> None:
    """Whatever is documented and does not tell of the service alone needs a scope."""
    document = create_app(Settings()).openapi()
    unguarded = {
        path for path, operations in document["paths"].items() for m in operations if not scopes_of(m.upper(), path)
    }
    assert unguarded <= OPEN


def test_the_document_tells_of_keys(guarded: Api) -> None:
    document = guarded.http.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["security"] == [{"key": []}]
    assert "security" not in create_app(Settings()).openapi()


def test_no_application_is_made_without_the_keys_it_is_to_have(tmp_path: Path) -> None:
    """Whoever serves it: a middleware would only see them when the first request is there."""
    with pytest.raises(BadSettings, match="HYPERSAM_API_KEYS_FILE"):
        create_app(Settings(api_keys_file=tmp_path / "none"))


def test_compressing_and_segmenting_with_keys(guarded: Api, checkpoint: Path) -> None:
    with checkpoint.open("rb") as file:
        sent = guarded.http.post("/compress", files={"file": ("a.pth", file)}, headers=bearer("compress"),
                                 data={"name": "a", "codec": "birkhoff", "fidelity": "false"})  # fmt: skip
    assert sent.status_code == 202, sent.text
    deadline = time.monotonic() + 60
    while (job := guarded.http.get(f"/jobs/{sent.json()['id']}", headers=bearer("compress")).json())["state"] not in (
        "succeeded", "failed",
    ):  # fmt: skip
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert job["state"] == "succeeded", job
    masks = guarded.http.post("/segment", files={"image": picture()}, data={"model": "a", "points": "[[5, 5]]"},
                              headers=bearer("segment"))  # fmt: skip
    assert masks.status_code == 200


def test_other_origins(guarded: Api, api: Api) -> None:
    ask = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, range, x-request-id",
    }
    allowed = guarded.http.options("/segment", headers=ask)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert guarded.http.get("/healthz", headers={"Origin": ORIGIN}).headers["access-control-allow-origin"] == ORIGIN
    stranger = ask | {"Origin": "https://evil.example"}
    assert guarded.http.options("/segment", headers=stranger).status_code == 400
    for service, headers in ((guarded, stranger), (api, ask)):
        assert "access-control-allow-origin" not in service.http.options("/segment", headers=headers).headers
        assert "access-control-allow-origin" not in service.http.get("/healthz", headers=headers).headers


def test_no_key_is_in_the_log(guarded: Api) -> None:
    """At the most talkative level, after all of the above."""
    guarded.http.get("/models", headers=bearer("admin"))
    time.sleep(0.3)
    log = guarded.output()
    assert "/models" in log  # requests are logged at this level
    for secret, key in SECRETS.values():
        assert secret not in log
        assert key.sha256 not in log


def test_rates_are_counted_for_all_processes_together(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as redis:
        common = {
            "port": 0, "workers": 0, "device": "cpu", "register_default": False, "rate_limit": "20/minute",
            "redis_url": redis.url, "api_keys": tuple(key.line() for _, key in SECRETS.values()),
        }  # fmt: skip
        services = [Api(Settings(data_dir=tmp_path / f"data{n}", **common)) for n in range(2)]
        try:

            def ask(number: int) -> httpx.Response:
                return services[number % 2].http.get("/models", headers=bearer("segment"))

            with ThreadPoolExecutor(8) as pool:
                responses = list(pool.map(ask, range(40)))
            refused = [r for r in responses if r.status_code != 200]
            assert len(refused) == 20
            for response in refused:
                assert_problem(response, 429, "rate_limited")
                assert 1 <= int(response.headers["retry-after"]) <= 60
            # Another key has a count of its own, and what is open is not counted.
            assert services[0].http.get("/models", headers=bearer("compress")).status_code == 200
            assert all(services[0].http.get("/healthz").status_code == 200 for _ in range(30))
        finally:
            for service in services:
                service.stop()


def test_what_a_client_says_of_its_address_does_not_count(tmp_path: Path) -> None:
    """Not even on this host, where a proxy may be."""
    with EmbeddedRedis(tmp_path / "redis") as redis:
        service = Api(Settings(data_dir=tmp_path / "data", port=0, workers=0, device="cpu", register_default=False,
                               redis_url=redis.url, rate_limit="3/minute", log_level="debug"))  # fmt: skip
        try:
            statuses = []
            for number in range(6):
                address = f"203.0.113.{number}"
                said = {"X-Forwarded-For": address, "X-Real-IP": address, "Forwarded": f"for={address};proto=https"}
                statuses.append(service.http.get("/models", headers=said).status_code)
            assert statuses == [200] * 3 + [429] * 3
        finally:
            service.stop()
        assert "127.0.0.1" in service.output()
        assert "203.0.113." not in service.output()  # in the log it is who connected, too


def test_a_proxy_that_is_trusted_says_whose_request_it_is(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as redis:
        settings = Settings(data_dir=tmp_path / "data", port=0, workers=0, device="cpu", register_default=False,
                            redis_url=redis.url, rate_limit="1/minute", trusted_proxies=("127.0.0.0/8",))  # fmt: skip
        service = Api(settings)
        try:
            # The last that is not a proxy's is what the proxy saw; what stands before it is what the client wrote.
            said = ["203.0.113.1", "203.0.113.1", "203.0.113.2", "198.51.100.9, 203.0.113.2", "203.0.113.3, 127.0.0.1"]
            statuses = [service.http.get("/models", headers={"X-Forwarded-For": each}).status_code for each in said]
            assert statuses == [200, 429, 200, 429, 200]
        finally:
            service.stop()


def test_a_password_of_redis_is_not_in_the_log(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as redis:
        connection = Redis.from_url(redis.url)
        connection.config_set("requirepass", "hunter2-secret")
        path = redis.url.removeprefix("unix://")
        url = f"unix://:hunter2-secret@{path}"
        service = Api(Settings(data_dir=tmp_path / "data", port=0, workers=1, device="cpu", register_default=False,
                               redis_url=url, log_level="debug"))  # fmt: skip
        try:
            assert service.http.get("/readyz").status_code == 200
            service.wait_for("Listening on")
            assert "hunter2" not in service.output()
        finally:
            service.stop()
            connection.auth("hunter2-secret")
            connection.config_set("requirepass", "")
            connection.close()
        assert "hunter2" not in service.output()


def test_a_limit_that_cannot_be_counted_refuses(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as redis:
        service = Api(Settings(data_dir=tmp_path / "data", port=0, workers=0, device="cpu", register_default=False,
                               redis_url=redis.url, rate_limit="1000/minute"))  # fmt: skip
        assert service.http.get("/models").status_code == 200
    try:
        response = service.http.get("/models")
        assert_problem(response, 503, "unavailable")
        assert response.headers["retry-after"]
        assert service.http.get("/healthz").status_code == 200
    finally:
        service.stop()
