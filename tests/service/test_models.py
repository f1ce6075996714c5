from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from service.ranges import ranges_of
from tests.service.running import Api, assert_problem


def test_the_artifact_is_sent_with_digest_and_ranges(api: Api, model: str) -> None:
    told = api.http.get(f"/models/{model}").json()
    url = f"/models/{model}/artifact"
    whole = api.http.get(url)
    assert hashlib.sha256(whole.content).hexdigest() == told["artifact_sha256"]
    assert len(whole.content) == told["artifact_bytes"]
    assert whole.headers["etag"] == f'"{told["artifact_sha256"]}"'
    part = api.http.get(url, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole.content[100:200])
    assert api.http.get(url, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
    assert api.http.get(url, headers={"Range": f"bytes={10**12}-"}).status_code == 416


WHOLE = (
    "bytes=", "bytes", "bytes=-", "bytes=a-b", "bytes=5-1", "bytes=1_0-2_0", "bytes=+1-+5", "bytes=0x1-2",
    "bytes=1-2-3", "bytes=\xb2-5", "bytes=--1", "bytes=,", "bytes=0-1,a", "bytes=0-0,5-1", "items=0-1", "=0-1", "x",
    "bytes=0-" + "9" * 5000, "bytes=" + "0-0," * 101,
)  # fmt: skip
PARTS = {
    "bytes=0-0": [(0, 0)], "bytes=2-": [(2, 9)], "bytes=-3": [(7, 9)], "bytes=-99": [(0, 9)], "bytes=8-99": [(8, 9)],
    "bytes= 1-2 ,\t4-5 , ,": [(1, 2), (4, 5)], "BYTES=1-2": [(1, 2)], "bytes=1-2,50-60": [(1, 2)],
    "bytes=10-": [], "bytes=99-100,-0": [], "bytes=-0": [],
}  # fmt: skip


def test_ranges_that_mean_nothing_are_passed_over() -> None:
    assert {header: ranges_of(header, 10) for header in WHOLE} == dict.fromkeys(WHOLE)
    assert {header: ranges_of(header, 10) for header in PARTS} == PARTS
    assert ranges_of("bytes=0-", 0) == []


@pytest.mark.parametrize("url", ["/models/tiny/artifact", "/static/assets/scenes/scene_0.png"])
def test_parts_of_files(api: Api, model: str, url: str) -> None:
    whole = api.http.get(url)
    size, etag = len(whole.content), whole.headers["etag"]
    for header in WHOLE:
        response = api.http.get(url, headers=[(b"Range", header.encode("latin-1"))])
        assert response.status_code == 200, header
        assert response.content == whole.content
    for header in (f"bytes={size}-", "bytes=99999999999-", "bytes=-0", f"bytes={size}-{size + 1},{size + 5}-"):
        response = api.http.get(url, headers={"Range": header})
        assert_problem(response, 416, "range_not_satisfiable")
        assert response.headers["content-range"] == f"bytes */{size}"
    part = api.http.get(url, headers={"Range": f"bytes=5-8,{size}-"})
    assert (part.status_code, part.content) == (206, whole.content[5:9])
    assert part.headers["content-range"] == f"bytes 5-8/{size}"
    several = api.http.get(url, headers={"Range": "bytes=0-1,4-5"})
    assert several.status_code == 206
    assert several.headers["content-type"].startswith("multipart/byteranges")
    assert whole.content[4:6] in several.content

    def asked(**headers: str) -> int:
        return api.http.get(url, headers={name.replace("_", "-"): value for name, value in headers.items()}).status_code

    # Whether the file is still the same is asked before what part of it is wanted.
    assert asked(If_None_Match=etag, Range="bytes=99999999999-") == 304
    assert asked(If_None_Match='"another"', Range="bytes=0-1") == 206
    for current in (etag, whole.headers["last-modified"]):
        assert asked(If_Range=current, Range="bytes=0-1") == 206
        assert asked(If_Range=current, Range="bytes=99999999999-") == 416
    for other in ('"another"', f"W/{etag}", "x"):
        assert asked(If_Range=other, Range="bytes=0-1") == 200
        assert asked(If_Range=other, Range="bytes=99999999999-") == 200


def test_unknown_models(api: Api) -> None:
    for path in ("/models/none", "/models/none/artifact", "/models/..%2F..%2Fetc", "/models/none.json"):
        assert api.http.get(path).status_code == 404
    assert_problem(api.http.get("/models/none"), 404, "unknown_model")
    assert_problem(api.http.get("/models/none/artifact"), 404, "unknown_model")
    assert_problem(api.http.delete("/models/none"), 404, "unknown_model")


def test_two_names_share_one_artifact(api: Api, checkpoint: Path) -> None:
    first, second = api.make_model(checkpoint, "twin-a"), api.make_model(checkpoint, "twin-b")
    digest = first["result"]["artifact_sha256"]
    assert digest == second["result"]["artifact_sha256"]
    path = api.settings.data_dir / "artifacts" / f"{digest}.hsam"
    assert api.http.delete("/models/twin-a").status_code == 204
    assert path.is_file()
    assert api.http.get("/models/twin-b/artifact").status_code == 200


def test_errors_of_the_framework_are_problems_too(api: Api) -> None:
    assert_problem(api.http.get("/nowhere"), 404, "not_found")
    assert_problem(api.http.put("/models"), 405, "method_not_allowed")
    assert_problem(api.http.get("/jobs?limit=many"), 422, "invalid_request")
    assert_problem(api.http.get("/jobs/none"), 404, "unknown_job")
