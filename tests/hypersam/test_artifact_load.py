"""Loading compressed models that were damaged or whose configuration lies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hypersam
from hypersam.errors import ArtifactCorrupt, ArtifactError
from kernels.artifact import open_artifact
from tests.kernels.test_artifact import damage, rewrite
from tests.models import save_checkpoint


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("artifact")
    source = save_checkpoint(folder / "a.pth")
    hypersam.compress(source, folder / "a.hsam", codec="birkhoff", options={"fidelity": False})
    return (folder / "a.hsam").read_bytes()


def test_a_flipped_bit_in_any_stream_is_found_at_load(compressed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.hsam"
    path.write_bytes(compressed)
    with open_artifact(path) as artifact:
        names = artifact.names()
    for name in names[:: max(1, len(names) // 40)]:
        path.write_bytes(compressed)
        damage(path, name)
        with pytest.raises(ArtifactCorrupt, match=f"^{name}: the checksum"):
            hypersam.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 1 << 40}, {"embed_dim": 1 << 40}, {"patch": 0}, {"patch": 1}, {"windows": [0] * 1_000_000},
        {"windows": []}, {"heads": 3}, {"mlp_dim": 1 << 62}, {"decoder": {}}, {"decoder": None}, {"more": 1},
        {"windows": [1 << 40, 0]},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_that_lies_is_refused_before_anything_is_built(
    compressed: bytes, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "a.hsam"
    path.write_bytes(compressed)
    rewrite(path, lambda metadata, header: header["model"]["config"].update(change))
    with pytest.raises(ArtifactError, match="configuration is unusable"):
        hypersam.load(path)


_FIRST_MASK = """
import sys
import numpy as np
import hypersam
predictor = hypersam.load(sys.argv[1])
predictor.set_image(np.zeros((40, 50, 3), np.uint8))
predictor.predict(np.array([[20, 20]]), np.array([1]), multimask_output=False)
print(sorted({"torch._dynamo", "torchvision", "matplotlib"} & set(sys.modules)))
import segment_anything
print(len(segment_anything.sam_model_registry), segment_anything.modeling.MaskDecoder.__name__)
"""


def test_the_first_mask_needs_neither_compiler_nor_torchvision(compressed: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.hsam"
    path.write_bytes(compressed)
    done = subprocess.run([sys.executable, "-c", _FIRST_MASK, path], capture_output=True, text=True, check=False)
    # And who imports segment-anything then gets all of it.
    assert done.stdout.splitlines() == ["[]", "4 MaskDecoder"], done.stderr
