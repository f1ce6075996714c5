"""An EfficientSAM with random weights as the two ONNX files that osam's class for it runs.

    python -m benchmarks.osam_export CHECKPOINT ENCODER.onnx DECODER.onnx SITE_PACKAGES

``SITE_PACKAGES``: where the package onnx is, which this project does not depend on. The graphs are traced from the
same network, dense, in fp32, and take and give what osam passes and reads: pictures of any size from 0 to 1, points
in their pixels, masks of their size as logits.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersam.loading import load_model
from hypersam.sam.model import SamModel
from hypersam.sam.network import Prompts


class Encoder(nn.Module):
    """Pictures (1, 3, h, w) to embeddings (1, C, g, g)."""

    def __init__(self, model: SamModel) -> None:
        super().__init__()
        self.network, self.rules, self.side = model.network, model.rules, model.image_size

    def forward(self, batched_images: Tensor) -> Tensor:
        """Resize, normalise, encode."""
        square = F.interpolate(batched_images, (self.side, self.side), mode="bilinear", align_corners=False)
        return self.network.encode(self.rules.normalised(square, self.side))[0]


class Decoder(nn.Module):
    """Points (1, 1, N, 2) with labels (1, 1, N) to masks (1, 1, 3, h, w), their IoU, and low-resolution logits."""

    def __init__(self, model: SamModel) -> None:
        super().__init__()
        self.network, self.side = model.network, model.image_size

    def forward(
        self, image_embeddings: Tensor, batched_point_coords: Tensor, batched_point_labels: Tensor, orig_im_size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scale the points, decode, bring the masks to the picture's size."""
        points = batched_point_coords[0] * (self.side / torch.flip(orig_im_size, (0,)))
        prompts = Prompts((points, batched_point_labels[0]), None, None)
        masks, iou = self.network.decode((image_embeddings,), prompts, multimask=True)
        height, width = orig_im_size[0], orig_im_size[1]
        full = F.interpolate(masks, (height, width), mode="bicubic", align_corners=False)
        return full[None], iou[None], masks[None]


def main() -> None:
    """Write both files."""
    checkpoint, encoder, decoder, packages = sys.argv[1:]
    sys.path.append(packages)  # at the end: all other packages stay this environment's own
    model = load_model(Path(checkpoint), device="cpu", dtype=torch.float32)
    grid = model.network.encode(torch.zeros(1, 3, model.image_size, model.image_size))[0]
    warnings.simplefilter("ignore")  # of tracing: sizes that are constants here
    torch.onnx.export(
        Encoder(model), (torch.zeros(1, 3, 300, 400),), encoder, dynamo=False, opset_version=17,
        input_names=["batched_images"], output_names=["image_embeddings"],
        dynamic_axes={"batched_images": {2: "height", 3: "width"}},
    )  # fmt: skip
    prompt = (torch.full((1, 1, 2, 2), 100.0), torch.ones(1, 1, 2), torch.tensor([300, 400]))
    torch.onnx.export(
        Decoder(model), (grid, *prompt), decoder, dynamo=False, opset_version=17,
        input_names=["image_embeddings", "batched_point_coords", "batched_point_labels", "orig_im_size"],
        output_names=["output_masks", "iou_predictions", "low_res_masks"],
        dynamic_axes={"batched_point_coords": {2: "points"}, "batched_point_labels": {2: "points"}},
    )  # fmt: skip


if __name__ == "__main__":
    with torch.inference_mode():
        main()
