"""osam's own server with an EfficientSAM from files given. Runs in an environment of its own, see ``beside_osam``.

    python -P osam_worker.py ENCODER.onnx DECODER.onnx PORT

osam downloads its models and checks their hashes; here the class ``efficientsam:10m`` is told these files' own hashes,
and they lie where it would have put its downloads. All else is osam's, run as ``osam serve`` runs it, on another port.
HOME must be a folder for this run: osam's cache is in it.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import uvicorn
from osam import types
from osam._models import EfficientSam10m


def blob(path: Path) -> types.Blob:
    """The file as one that osam has downloaded."""
    made = types.Blob(url=path.resolve().as_uri(), hash=f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")
    Path(made.path).parent.mkdir(parents=True, exist_ok=True)
    Path(made.path).write_bytes(path.read_bytes())
    return made


if __name__ == "__main__":
    EfficientSam10m._blobs = {"encoder": blob(Path(sys.argv[1])), "decoder": blob(Path(sys.argv[2]))}
    uvicorn.run("osam._server:app", host="127.0.0.1", port=int(sys.argv[3]), log_level="warning")
