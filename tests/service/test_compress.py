from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from tests.service.running import Api, assert_problem, picture


def test_a_job_from_the_request_to_the_model(api: Api, checkpoint: Path) -> None:
    response = api.compress(checkpoint, "way.pth")
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert job["name"] == "way"  # the file's stem
    assert job["source_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    done = api.wait_job(job["id"])
    assert done["state"] == "succeeded", done
    assert done["progress"] == 1.0
    assert done["result"]["model"] == "way"
    assert done["result"]["source_sha256"] == job["source_sha256"]
    model = api.http.get("/models/way").json()
    assert model["report"]["ratio"] == done["result"]["ratio"] > 1
    assert model["report"]["tensors"]
    assert [m["id"] for m in api.http.get("/models").json()["models"]].count("way") == 1
    assert job["id"] in [j["id"] for j in api.http.get("/jobs").json()["jobs"]]
    assert not list((api.settings.data_dir / "work").iterdir())


def test_the_same_request_is_the_same_job(api: Api, checkpoint: Path) -> None:
    first = api.compress(checkpoint, name="same").json()
    second = api.compress(checkpoint, name="same").json()
    assert second["id"] == first["id"]
    api.wait_job(first["id"])
    third = api.compress(checkpoint, name="same").json()
    assert (third["id"], third["state"], third["attempt"]) == (first["id"], "succeeded", 1)


def test_the_same_request_many_times_at_once_is_one_job(api: Api, checkpoint: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: api.compress(checkpoint, name="at-once"), range(8)))
    assert {a.status_code for a in answers} == {202}
    ids = {a.json()["id"] for a in answers}
    assert len(ids) == 1
    assert api.wait_job(ids.pop())["attempt"] == 1


def test_one_name_for_two_contents(api: Api, checkpoint: Path, other_checkpoint: Path) -> None:
    job = api.compress(checkpoint, name="taken").json()
    assert_problem(api.compress(other_checkpoint, name="taken"), 409, "name_taken")  # while the job waits or runs
    api.wait_job(job["id"])
    assert_problem(api.compress(other_checkpoint, name="taken"), 409, "name_taken")
    other_options = api.compress(checkpoint, name="taken", options='{"side": 0.2}')
    assert_problem(other_options, 409, "name_taken")


def test_after_deletion_of_the_model_a_new_job_runs(api: Api, checkpoint: Path) -> None:
    first = api.make_model(checkpoint, "again")
    assert api.http.delete("/models/again").status_code == 204
    assert_problem(api.http.get("/models/again"), 404, "unknown_model")
    second = api.make_model(checkpoint, "again")
    assert second["id"] == first["id"]
    assert second["ended_at"] > first["ended_at"]
    assert api.http.get("/models/again").status_code == 200


def test_a_target_ratio_and_its_plan(api: Api, checkpoint: Path) -> None:
    """A plan is a job too; the model that is then made has the size that was asked for."""
    fields = {"codec": "lattice", "target_ratio": "6"}
    files = {"file": ("planned.pth", checkpoint.read_bytes())}
    response = api.http.post("/plan", files=files, data=fields)
    assert response.status_code == 202
    planned = api.wait_job(response.json()["id"])
    assert planned["state"] == "succeeded", (planned, api.output())
    plan = planned["result"]
    assert {t["encoding"] for t in plan["tensors"]} >= {"lattice"}
    assert "planned" not in [m["id"] for m in api.http.get("/models").json()["models"]]
    job = api.compress(checkpoint, "planned.pth", **fields, fidelity="true").json()
    assert job["id"] != planned["id"]
    done = api.wait_job(job["id"])
    assert done["state"] == "succeeded", (done, api.output())
    result = done["result"]
    assert 0.99 * result["fp32_bytes"] / 6 <= result["artifact_bytes"] <= result["fp32_bytes"] / 6
    assert abs(plan["artifact_bytes"] / result["artifact_bytes"] - 1) < 0.02
    assert set(result["stage_seconds"]) >= {"measuring", "planning", "encoding", "comparing"}
    report = api.http.get("/models/planned").json()["report"]
    assert report["fidelity"]["models"]["compressed"]["mask_iou"] > 0
    assert {"int8", "int4"} <= set(report["fidelity"]["models"])
    image = {"image": ("a.png", picture(), "image/png")}
    answer = api.http.post("/segment", files=image, data={"model": "planned", "points": "[[20, 30]]", "labels": "[1]"})
    assert answer.status_code == 200
    assert len(answer.json()["masks"]) == 1


def test_birkhoff_has_no_plan(api: Api, checkpoint: Path) -> None:
    files = {"file": ("x.pth", checkpoint.read_bytes())}
    assert_problem(api.http.post("/plan", files=files, data={"codec": "birkhoff"}), 422, "invalid_option")


def test_json_names_an_upload(api: Api, checkpoint: Path) -> None:
    digest = api.make_model(checkpoint, "sent")["source_sha256"]
    response = api.http.post(
        "/compress", json={"source": {"upload": digest}, "name": "by-digest", "codec": "birkhoff", "fidelity": False}
    )
    assert response.status_code == 202
    job = api.wait_job(response.json()["id"])
    assert job["state"] == "succeeded"
    assert job["result"]["artifact_sha256"] == api.http.get("/models/sent").json()["artifact_sha256"]


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ({"upload": "0" * 64}, 404, "unknown_upload"),
        ({"upload": "../etc/passwd"}, 422, "invalid_request"),
        ({"url": "http://169.254.169.254/x"}, 403, "source_not_allowed"),
        ({"known": "sam_vit_b"}, 403, "source_not_allowed"),
        ({}, 422, "invalid_request"),
        ({"upload": "0" * 64, "url": "http://a"}, 422, "invalid_request"),
    ],
)
def test_json_sources_that_are_refused(api: Api, source: dict[str, str], status: int, code: str) -> None:
    assert_problem(api.http.post("/compress", json={"source": source}), status, code)


def test_fields_may_come_before_or_after_the_file(api: Api, checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    files = [("file", ("x.pth", content)), ("name", (None, "order")), ("options", (None, '{"side": 0.1}'))]
    files.append(("codec", (None, "birkhoff")))
    first = api.http.post("/compress", files=files)
    second = api.http.post("/compress", files=files[::-1])
    assert first.status_code == second.status_code == 202, first.text + second.text
    assert first.json()["id"] == second.json()["id"]


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"codec": "zstd"}, "invalid_option", "birkhoff"),
        ({"options": '{"colour": 1}'}, "invalid_option", "max_classes"),
        ({"options": '{"side": -1}'}, "invalid_option", "side"),
        ({"options": "{"}, "invalid_request", "options"),
        ({"options": "[1]"}, "invalid_request", "options"),
        ({"options": "[" * 100_000}, "invalid_request", "options"),
        ({"target_ratio": "8"}, "invalid_option", "target_ratio"),
        ({"codec": "lattice", "target_ratio": "0.5"}, "invalid_option", "target_ratio"),
        ({"codec": "lattice", "target_ratio": "nan"}, "invalid_option", "target_ratio"),
        ({"codec": "lattice", "target_ratio": "6", "preset": "5x"}, "invalid_option", "one of"),
        ({"codec": "orbit", "preset": "9x"}, "invalid_option", "6.5x"),
        ({"codec": "orbit", "max_error": "2"}, "invalid_option", "max_error"),
        ({"codec": "lattice", "policy": "fair"}, "invalid_option", "equal_error"),
        (
            {"codec": "lattice", "policy": "equal_bits", "options": '{"policy": "equal_bits"}'},
            "invalid_option",
            "twice",
        ),
        ({"codec": "lattice", "options": '{"side": 1}'}, "invalid_option", "side"),
        ({"preset": "small"}, "invalid_option", "preset"),
        ({"codec": "lattice", "options": '{"\\ud800": 1}'}, "invalid_option", "ud800"),
        ({"codec": "lattice", "options": '{"policy": "\\ud800"}'}, "invalid_option", "ud800"),
        ({"codec": "lattice", "options": '{"preset": ["5x"]}'}, "invalid_option", "preset"),
        ({"codec": "lattice", "options": f'{{"target_mb": 1{"0" * 4000}}}'}, "invalid_option", "at most 1e+06"),
        ({"codec": "lattice", "options": f'{{"max_error": {"[" * 900}{"]" * 900}}}'}, "invalid_option", "number"),
        ({"options": f'{{"side": {"[" * 900}{"]" * 900}}}'}, "invalid_option", "birkhoff"),
        ({"options": f'{{"nodes": "{"x" * 100_000}"}}'}, "invalid_option", "nodes"),
        ({"max_error": "0.1"}, "invalid_option", "max_error"),
        ({"variant": "sam_vit_x"}, "invalid_option", "sam_vit_h"),
        ({"name": "../up"}, "invalid_request", "name"),
        ({"name": "a" * 200}, "invalid_request", "name"),
        ({"colour": "red"}, "invalid_request", "codec"),
    ],
)
def test_bad_fields(api: Api, checkpoint: Path, fields: dict[str, str], code: str, says: str) -> None:
    detail = assert_problem(api.compress(checkpoint, **fields), 422, code)["detail"]
    assert says in detail
    assert len(detail) < 1000


def _safetensors_cut() -> bytes:
    from safetensors.torch import save

    return save({"a": torch.zeros(100)})[:-40]


def test_uploads_that_are_no_checkpoints(api: Api, checkpoint: Path) -> None:
    before = set((api.settings.data_dir / "uploads").iterdir())
    assert_problem(api.compress(b""), 422, "empty_checkpoint")
    assert_problem(api.compress(b"GIF89a" + bytes(1000)), 422, "not_a_checkpoint")
    assert_problem(api.compress(b"\xff" * (9 << 20)), 422, "not_a_checkpoint")
    body = assert_problem(api.compress(checkpoint.read_bytes()[:-5000]), 422, "not_a_checkpoint")
    assert "truncated" in body["detail"]
    # an archive that says it lies on nine disks
    end = b"PK\x06\x07" + struct.pack("<IQI", 0, 0, 9) + b"PK\x05\x06" + bytes(18)
    assert_problem(api.compress(b"PK\x03\x04" + bytes(100) + end), 422, "not_a_checkpoint")
    assert_problem(api.http.post("/compress", data={"name": "x"}, files={"name2": (None, "y")}), 422, "invalid_request")
    assert_problem(api.http.post("/compress", files={"name": (None, "y")}), 422, "empty_checkpoint")
    assert set((api.settings.data_dir / "uploads").iterdir()) == before


@pytest.mark.parametrize("known_length", [True, False])
def test_too_large(api: Api, known_length: bool) -> None:
    size = 48 << 20
    boundary = "b0undary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.pth"\r\n\r\n'.encode()

    def body() -> object:
        yield head + b"PK\x03\x04"
        for _ in range(size >> 20):
            yield bytes(1 << 20)
        yield f"\r\n--{boundary}--\r\n".encode()

    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    if known_length:
        headers["Content-Length"] = str(len(head) + 4 + size + len(boundary) + 8)
    response = api.http.post("/compress", content=body(), headers=headers)  # type: ignore[arg-type]
    assert_problem(response, 413, "upload_too_large")
    assert not list((api.settings.data_dir / "uploads").glob("*.part"))


def test_broken_bodies(api: Api) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    start = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nPK\x03\x04'
    assert_problem(api.http.post("/compress", content=start, headers=kind), 400, "bad_multipart")
    assert_problem(api.http.post("/compress", content=b"hello", headers=kind), 400, "bad_multipart")
    assert_problem(
        api.http.post("/compress", content=b"x", headers={"Content-Type": "multipart/form-data"}), 400, "bad_multipart"
    )
    assert_problem(api.http.post("/compress", content=b"x", headers={"Content-Type": "text/plain"}), 415,
                   "unsupported_media_type")  # fmt: skip
    assert_problem(
        api.http.post("/compress", content=b"{", headers={"Content-Type": "application/json"}), 422, "invalid_request"
    )


def _job_error(api: Api, content: bytes, name: str) -> dict[str, str]:
    response = api.compress(content, name=name)
    assert response.status_code == 202, response.text
    job = api.wait_job(response.json()["id"])
    assert job["state"] == "failed", job
    assert_problem(api.http.get(f"/models/{name}"), 404, "unknown_model")
    error: dict[str, str] = job["error"]
    return error


def test_a_state_dict_of_no_known_family(api: Api) -> None:
    buffer = io.BytesIO()
    torch.save({"layer.weight": torch.zeros(10, 10)}, buffer)
    first = _job_error(api, buffer.getvalue(), "unknown")
    assert first["code"] == "unknown_family"
    assert first["message"]
    again = _job_error(api, buffer.getvalue(), "unknown")  # after a failure the same request runs anew
    assert again == first


def test_a_truncated_safetensors_file(api: Api) -> None:
    assert _job_error(api, _safetensors_cut(), "cut")["code"] == "not_a_checkpoint"


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_code_does_not(api: Api, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    plain = pickle.dumps({"weight": Evil(witness)})
    zipped = io.BytesIO()
    torch.save({"weight": Evil(witness)}, zipped)
    for number, content in enumerate((plain, zipped.getvalue())):
        assert _job_error(api, content, f"evil-{number}")["code"] in ("unsafe_checkpoint", "not_a_checkpoint")
    assert not witness.exists()
    pickle.loads(plain)  # the proof that it is a real one
    assert witness.exists()


def test_events_tell_the_way_of_a_job(api: Api, checkpoint: Path) -> None:
    job = api.compress(checkpoint, name="watched").json()
    events: list[tuple[str, dict[str, object]]] = []
    with api.http.stream("GET", f"/jobs/{job['id']}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        number = ""
        for line in stream.iter_lines():
            if line.startswith("id: "):
                number = line[4:]
            if line.startswith("data: "):
                events.append((number, json.loads(line[6:])))
    assert events[-1][1]["state"] == "succeeded"
    assert len({number for number, _ in events}) == len(events)
    progress = [float(str(event["progress"])) for _, event in events]
    assert progress == sorted(progress)
    url = f"/jobs/{job['id']}/events"
    assert api.http.get(url, headers={"Last-Event-ID": events[-1][0]}).status_code == 204
    again = api.http.get(url, headers={"Last-Event-ID": "something-else"})
    assert again.text.count("data: ") == 1
    assert_problem(api.http.get("/jobs/none/events"), 404, "unknown_job")


def test_an_ended_job_can_be_forgotten(api: Api, checkpoint: Path) -> None:
    job = api.make_model(checkpoint, "forget")
    assert api.http.delete(f"/jobs/{job['id']}").status_code == 204
    assert_problem(api.http.get(f"/jobs/{job['id']}"), 404, "unknown_job")
    assert_problem(api.http.delete(f"/jobs/{job['id']}"), 404, "unknown_job")
    assert api.http.get("/models/forget").status_code == 200
    again = api.make_model(checkpoint, "forget")  # the same content again is the same model
    assert again["result"]["artifact_sha256"] == job["result"]["artifact_sha256"]


def test_a_client_that_goes_away_leaves_nothing(api: Api) -> None:
    sent = threading.Event()

    def body() -> object:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nPK\x03\x04' + bytes(9 << 20)
        sent.set()
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        httpx.post(f"{api.url}/compress", content=body(),  # type: ignore[arg-type]
                   headers={"Content-Type": "multipart/form-data; boundary=b"})  # fmt: skip
    assert sent.is_set()
    for _ in range(100):
        if not list((api.settings.data_dir / "uploads").glob("*.part")):
            break
        threading.Event().wait(0.05)
    assert not list((api.settings.data_dir / "uploads").glob("*.part"))
