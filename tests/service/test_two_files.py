"""Two uploads that are one model, over HTTP."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.hypersam.test_two_files import halves
from tests.service.running import Api, assert_problem


def test_an_encoder_and_its_decoder_become_one_model(api: Api, tmp_path: Path) -> None:
    encoder, decoder = halves(tmp_path)
    sent = {"file": encoder.read_bytes(), "decoder": decoder.read_bytes()}
    files = {field: (f"{field}.pt", content) for field, content in sent.items()}
    data = {"name": "two-files", "policy": "equal_error", "fidelity": "false"}
    response = api.http.post("/compress", files=files, data=data)
    assert response.status_code == 202, response.text
    done = api.wait_job(response.json()["id"])
    assert done["state"] == "succeeded", done
    assert done["result"]["source_bytes"] == sum(map(len, sent.values()))
    assert done["result"]["variant"] == "sam_vit"
    # The same again is the same job, and without the decoder it is another, which fails with the reason.
    assert api.http.post("/compress", files=files, data=data).json()["id"] == done["id"]
    half = api.http.post("/compress", files={"file": files["file"]}, data=data | {"name": "half"}).json()
    failed = api.wait_job(half["id"])
    assert (failed["state"], failed["error"]["code"]) == ("failed", "unknown_family")
    assert "decoder" in failed["error"]["message"]


def test_uploads_that_are_held_can_be_named(api: Api, tmp_path: Path) -> None:
    encoder, _ = halves(tmp_path)
    digest = hashlib.sha256(encoder.read_bytes()).hexdigest()
    unknown = api.http.post("/compress", json={"source": {"upload": digest, "decoder": "0" * 64}})
    assert_problem(unknown, 404, "unknown_upload")


def test_errors_name_the_files_as_the_client_does(api: Api, tmp_path: Path) -> None:
    encoder, decoder = halves(tmp_path)
    files = {
        "file": ("my parts.pt", decoder.read_bytes()),
        "decoder": ("m\u00e4 encoder\u202e.pt", encoder.read_bytes()),
    }
    swapped = api.http.post("/compress", files=files, data={"name": "swapped"}).json()
    message = api.wait_job(swapped["id"])["error"]["message"]
    assert message.startswith("m\u00e4 encoder?.pt is no decoder")  # what turns the text around is not repeated
    # Of a lone file too; the decoder's name decides nothing, so it makes no other job.
    files["decoder"] = ("other.pt", encoder.read_bytes())
    assert api.http.post("/compress", files=files, data={"name": "swapped"}).json()["id"] == swapped["id"]
    broken = encoder.read_bytes().replace(b"data.pkl", b"data.pk_")
    alone = api.http.post("/compress", files={"file": ("broken.pt", broken)}, data={"name": "broken"}).json()
    assert api.wait_job(alone["id"])["error"]["message"].startswith("broken.pt is ")
