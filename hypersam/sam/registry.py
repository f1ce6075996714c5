"""One row a variant, one row a family, as data. No torch here: the API's process reads this without paying for it."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyRow:
    """What is said of a family: its title, that of sizes nobody published ("" where only published ones can be read),
    and what it cannot be asked.

    ``mask_input``: whether it takes logits of an earlier answer; ``background``: points with label 0;
    ``most_points``: of one prompt, a box counted as two, None for any number. ``oracle``: the package whose
    network gives the same answers on the same weights; where there is none, ``unchecked`` says why.
    """

    id: str
    title: str
    other_sizes: str
    mask_input: bool = True
    background: bool = True
    most_points: int | None = None
    oracle: str | None = None
    unchecked: str | None = None

    def refusal(self, *, points: int, background: bool, box: bool, mask: bool) -> tuple[str, str] | None:
        """Which part of a prompt the family does not take (``mask_input``, ``point_labels`` or ``points``), and why in
        words; None where it takes all. ``points``: how many; ``background``: whether any has label 0."""
        if mask and not self.mask_input:
            return "mask_input", f"{self.title} takes no mask input; give points or a box"
        if background and not self.background:
            why = f"{self.title} takes no background points (label 0); give points inside or a box"
            return "point_labels", why
        count = points + (2 if box else 0)
        if self.most_points is not None and count > self.most_points:
            why = f"{self.title} takes at most {self.most_points} points (a box counts as two), got {count}"
            return "points", why
        return None


@dataclass(frozen=True)
class Variant:
    """A published model.

    ``file``: its official name; ``names``: parts of a file's name, in lower case without punctuation, that tell it
    from variants of the same shapes; ``two_files``: it is published as an encoder and a decoder; ``marks``: values of
    the configuration by which its checkpoint is told from its family's others. ``always_multimask``: it has three masks
    for every prompt, whatever is asked. ``parameters``: values in the official file's tensors. ``url``: its official
    address, None where it is not known for certain or the file comes in an archive; ``page`` is then the project that
    offers it.
    """

    id: str
    family: str
    title: str
    file: str
    marks: tuple[tuple[str, int | tuple[int, ...]], ...]
    sha256: str | None = None
    names: tuple[str, ...] = ()
    two_files: bool = False
    always_multimask: bool = False
    parameters: int | None = None
    url: str | None = None
    page: str | None = None


FAMILIES: tuple[FamilyRow, ...] = (
    FamilyRow("sam_vit", "SAM ViT", "SAM with a ViT encoder of any other size", oracle="segment-anything"),
    FamilyRow("sam_hq_vit", "SAM-HQ", "SAM-HQ with a ViT encoder of any other size", oracle="segment-anything-hq"),
    FamilyRow("sam2_hiera", "SAM 2", "", oracle="sam2"),
    FamilyRow(
        "sam_tiny_vit", "MobileSAM or TinySAM", "SAM with a TinyViT encoder of any other size", oracle="mobile_sam",
    ),
    FamilyRow(
        "sam_hq_tiny_vit", "SAM-HQ-Tiny", "SAM-HQ with a TinyViT encoder of any other size",
        oracle="segment-anything-hq",
    ),
    FamilyRow(
        "edge_sam", "EdgeSAM", "EdgeSAM of any other width",
        unchecked="written from its paper and its keys, as the official code is for non-commercial use",
    ),
    FamilyRow(
        "efficient_sam", "EfficientSAM", "EfficientSAM of any other size",
        mask_input=False, background=False, most_points=6, oracle="efficient_sam",
    ),
)  # fmt: skip
"""The id of a family is also the variant of a size that nobody published."""

_META = "https://dl.fbaipublicfiles.com"
_HQ = "https://huggingface.co/lkeab/hq-sam/resolve/main"
_TINY_VIT_5M = (
    ("image_size", 1024), ("widths", (64, 128, 160, 320)), ("depths", (2, 2, 6, 2)),
    ("heads", (4, 5, 10)), ("windows", (7, 14, 7)),
)  # fmt: skip

VARIANTS: tuple[Variant, ...] = (
    Variant(
        "sam_vit_b", "sam_vit", "SAM ViT-B", "sam_vit_b_01ec64.pth",
        (("image_size", 1024), ("embed_dim", 768), ("depth", 12), ("heads", 12)),
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        parameters=93_735_728, url=f"{_META}/segment_anything/sam_vit_b_01ec64.pth",
    ),
    Variant(
        "sam_vit_l", "sam_vit", "SAM ViT-L", "sam_vit_l_0b3195.pth",
        (("image_size", 1024), ("embed_dim", 1024), ("depth", 24), ("heads", 16)),
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        parameters=312_343_088, url=f"{_META}/segment_anything/sam_vit_l_0b3195.pth",
    ),
    Variant(
        "sam_vit_h", "sam_vit", "SAM ViT-H", "sam_vit_h_4b8939.pth",
        (("image_size", 1024), ("embed_dim", 1280), ("depth", 32), ("heads", 16)),
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        names=("samvith",),
        parameters=641_090_864, url=f"{_META}/segment_anything/sam_vit_h_4b8939.pth",
    ),
    Variant(
        "mobile_sam_v2", "sam_vit", "MobileSAMv2 (ViT-H)", "mobile_sam_v2_vit_h.pth",
        (("image_size", 1024), ("embed_dim", 1280), ("depth", 32), ("heads", 16)),
        names=("mobilesamv2", "promptguided"), two_files=True,
        parameters=641_090_864, page="https://github.com/ChaoningZhang/MobileSAM",
    ),
    Variant(
        "sam_hq_vit_b", "sam_hq_vit", "SAM-HQ ViT-B", "sam_hq_vit_b.pth",
        (("image_size", 1024), ("embed_dim", 768), ("depth", 12), ("heads", 12)),
        parameters=94_806_832, url=f"{_HQ}/sam_hq_vit_b.pth",
    ),
    Variant(
        "sam_hq_vit_l", "sam_hq_vit", "SAM-HQ ViT-L", "sam_hq_vit_l.pth",
        (("image_size", 1024), ("embed_dim", 1024), ("depth", 24), ("heads", 16)),
        parameters=313_676_336, url=f"{_HQ}/sam_hq_vit_l.pth",
    ),
    Variant(
        "sam_hq_vit_h", "sam_hq_vit", "SAM-HQ ViT-H", "sam_hq_vit_h.pth",
        (("image_size", 1024), ("embed_dim", 1280), ("depth", 32), ("heads", 16)),
        parameters=642_686_256, url=f"{_HQ}/sam_hq_vit_h.pth",
    ),
    Variant(
        "sam2_hiera_tiny", "sam2_hiera", "SAM 2 Tiny", "sam2_hiera_tiny.pt",
        (("may_be_first", 1), ("embed_dim", 96), ("stages", (1, 2, 7, 2))),
        names=("sam2",), parameters=38_946_242, url=f"{_META}/segment_anything_2/072824/sam2_hiera_tiny.pt",
    ),
    Variant(
        "sam2_hiera_small", "sam2_hiera", "SAM 2 Small", "sam2_hiera_small.pt",
        (("may_be_first", 1), ("embed_dim", 96), ("stages", (1, 2, 11, 2))),
        names=("sam2",), parameters=46_044_098, url=f"{_META}/segment_anything_2/072824/sam2_hiera_small.pt",
    ),
    Variant(
        "sam2_hiera_base_plus", "sam2_hiera", "SAM 2 Base+", "sam2_hiera_base_plus.pt",
        (("may_be_first", 1), ("embed_dim", 112), ("stages", (2, 3, 16, 3))),
        names=("sam2",), parameters=80_833_922, url=f"{_META}/segment_anything_2/072824/sam2_hiera_base_plus.pt",
    ),
    Variant(
        "sam2_hiera_large", "sam2_hiera", "SAM 2 Large", "sam2_hiera_large.pt",
        (("may_be_first", 1), ("embed_dim", 144), ("stages", (2, 6, 36, 4))),
        names=("sam2",), parameters=224_430_386, url=f"{_META}/segment_anything_2/072824/sam2_hiera_large.pt",
    ),
    Variant(
        "sam2.1_hiera_tiny", "sam2_hiera", "SAM 2.1 Tiny", "sam2.1_hiera_tiny.pt",
        (("may_be_later", 1), ("embed_dim", 96), ("stages", (1, 2, 7, 2))),
        "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
        names=("sam21",), parameters=38_962_754, url=f"{_META}/segment_anything_2/092824/sam2.1_hiera_tiny.pt",
    ),
    Variant(
        "sam2.1_hiera_small", "sam2_hiera", "SAM 2.1 Small", "sam2.1_hiera_small.pt",
        (("may_be_later", 1), ("embed_dim", 96), ("stages", (1, 2, 11, 2))),
        names=("sam21",), parameters=46_060_610, url=f"{_META}/segment_anything_2/092824/sam2.1_hiera_small.pt",
    ),
    Variant(
        "sam2.1_hiera_base_plus", "sam2_hiera", "SAM 2.1 Base+", "sam2.1_hiera_base_plus.pt",
        (("may_be_later", 1), ("embed_dim", 112), ("stages", (2, 3, 16, 3))),
        names=("sam21",), parameters=80_850_434, url=f"{_META}/segment_anything_2/092824/sam2.1_hiera_base_plus.pt",
    ),
    Variant(
        "sam2.1_hiera_large", "sam2_hiera", "SAM 2.1 Large", "sam2.1_hiera_large.pt",
        (("may_be_later", 1), ("embed_dim", 144), ("stages", (2, 6, 36, 4))),
        names=("sam21",), parameters=224_446_898, url=f"{_META}/segment_anything_2/092824/sam2.1_hiera_large.pt",
    ),
    Variant(
        "mobile_sam", "sam_tiny_vit", "MobileSAM", "mobile_sam.pt", _TINY_VIT_5M,
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        names=("mobilesam",),
        parameters=10_140_231,
        url="https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
    ),
    Variant(
        "tiny_sam", "sam_tiny_vit", "TinySAM", "tinysam_42.3.pth", _TINY_VIT_5M,
        names=("tinysam",), always_multimask=True,
        parameters=10_140_231,
        url="https://github.com/xinghaochen/TinySAM/releases/download/3.0/tinysam_42.3.pth",
    ),
    Variant(
        "sam_hq_vit_tiny", "sam_hq_tiny_vit", "SAM-HQ-Tiny", "sam_hq_vit_tiny.pth", _TINY_VIT_5M,
        parameters=10_588_743, url=f"{_HQ}/sam_hq_vit_tiny.pth",
    ),
    Variant(
        "edge_sam", "edge_sam", "EdgeSAM", "edge_sam.pth",
        (("image_size", 1024), ("stem", 24), ("widths", (48, 96, 192, 384)), ("depths", (3, 3, 15, 2))),
        names=("edgesam",),
        parameters=9_629_466, page="https://github.com/chongzhou96/EdgeSAM",
    ),
    Variant(
        "edge_sam_3x", "edge_sam", "EdgeSAM-RPN", "edge_sam_3x.pth",
        (("image_size", 1024), ("stem", 24), ("widths", (48, 96, 192, 384)), ("depths", (3, 3, 15, 2))),
        names=("edgesam3x", "edgesamrpn"),
        parameters=9_629_466, page="https://github.com/chongzhou96/EdgeSAM",
    ),
    Variant(
        "efficient_sam_ti", "efficient_sam", "EfficientSAM-Ti", "efficient_sam_vitt.pt",
        (("image_size", 1024), ("patch", 16), ("embed_dim", 192), ("depth", 12), ("mlp_dim", 768)),
        url="https://github.com/yformer/EfficientSAM/raw/main/weights/efficient_sam_vitt.pt",
        parameters=10_223_460,
    ),
    Variant(
        "efficient_sam_s", "efficient_sam", "EfficientSAM-S", "efficient_sam_vits.pt",
        (("image_size", 1024), ("patch", 16), ("embed_dim", 384), ("depth", 12), ("mlp_dim", 1536)),
        parameters=26_413_284, page="https://github.com/yformer/EfficientSAM",
    ),
)  # fmt: skip
"""Of variants that nothing but a name or a hash tells apart, the first is taken where neither is known."""


def known_variants() -> tuple[str, ...]:
    """Every variant id that may be named."""
    return tuple(v.id for v in VARIANTS) + tuple(f.id for f in FAMILIES)


def named_by(file_name: str) -> tuple[Variant, ...]:
    """The variants that a file's name may mean, the likeliest first: edge_sam_3x also contains edge_sam, so the longest
    part of a name wins."""
    plain = re.sub(r"[^a-z0-9]", "", file_name.lower())
    found = [(max(map(len, parts)), row) for row in VARIANTS if (parts := [p for p in row.names if p in plain])]
    return tuple(row for _, row in sorted(found, key=lambda each: -each[0]))


def family_row(family: str) -> FamilyRow:
    """A family's row. Raises KeyError."""
    return {row.id: row for row in FAMILIES}[family]
