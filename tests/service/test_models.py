from __future__ import annotations

import hashlib
from pathlib import Path

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
