from __future__ import annotations

from hypersam.sam.registry import VARIANTS, family_row
from tests.service.running import Api


def test_every_variant_is_told_with_what_it_can_do(api: Api) -> None:
    answer = api.http.get("/variants")
    assert answer.status_code == 200
    told = {row["id"]: row for row in answer.json()["variants"]}
    assert list(told) == [row.id for row in VARIANTS]
    for row in VARIANTS:
        family, found = family_row(row.family), told[row.id]
        assert (found["file"], found["title"], found["url"]) == (row.file, row.title, row.url)
        assert found["page"] == row.page
        assert (found["mask_input"], found["background_points"]) == (family.mask_input, family.background)
        assert found["most_points"] == family.most_points
        assert found["checked_against"] == family.oracle
    large = told["sam_vit_h"]
    assert (large["parameters"], large["fp32_bytes"]) == (641_090_864, 2_564_363_456)
    assert large["url"] == "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth"
    assert large["checked_against"] == "segment-anything"
    assert set(answer.json()["other_sizes"]) >= {"sam_vit"}


def test_the_description_has_its_schema(api: Api) -> None:
    described = api.http.get("/openapi.json").json()
    answer = described["paths"]["/variants"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/Variants"}
    row = described["components"]["schemas"]["VariantBody"]
    assert {"id", "family", "file", "parameters", "mask_input", "most_points", "checked_against", "url"} <= set(
        row["required"]
    )
