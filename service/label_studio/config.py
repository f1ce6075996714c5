"""A project's labelling configuration: which tag takes the answer, which picture it is for, and what labels are called.

Tags are read in any case, as Label Studio's editor reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from service.errors import RequestError

KINDS = ("brushlabels", "brush", "polygonlabels", "polygon")
"""Tags that can take a mask, in the order in which they are chosen: only brushes hold every pixel."""
NEEDED = "a BrushLabels or PolygonLabels tag (or Brush or Polygon) whose toName is the name of an Image tag"
DEFAULT = '<View><Image name="image" value="$image"/><BrushLabels name="tag" toName="image"/></View>'
"""For a request that brings no configuration."""


@dataclass(frozen=True)
class Control:
    """A tag by which something is marked. ``labels``: by the name under which a label is saved, its value."""

    kind: str
    name: str
    objects: tuple[str, ...]
    labels: dict[str, str]


@dataclass(frozen=True)
class Config:
    """``images``: by the name of an Image tag, the task's field with its address, or its list of them."""

    images: dict[str, str]
    controls: tuple[Control, ...]

    def control(
        self, image: str | None, labels: Sequence[str] = (), drawn_by: str | None = None
    ) -> tuple[Control, str]:
        """The tag that takes the mask of something drawn on ``image``, and that image's name.

        Of several of the same kind the one that has the ``labels`` of the tag ``drawn_by``. Without ``image``, the
        first that is for any. Raises RequestError where there is none.
        """
        fit = [
            (control, name)
            for kind in KINDS
            for control in self.controls
            for name in control.objects
            if control.kind == kind and name in self.images and image in (None, name)
        ]
        if not fit:
            raise RequestError(f"label_config: it needs {NEEDED}{f', here {image!r}' if image is not None else ''}")
        alike = [(control, name) for control, name in fit if control.kind == fit[0][0].kind]
        return next((each for each in alike if labels and self._has(each[0], drawn_by, labels)), fit[0])

    def label_in(self, control: Control, drawn_by: str | None, label: str) -> str:
        """What ``control`` calls the label that the tag ``drawn_by`` calls ``label``: one of them may have an alias.

        A label that it does not have stays as it is: some labels come from the task.
        """
        if label in control.labels:
            return label
        drawing = next((each for each in self.controls if each.name == drawn_by), None)
        value = drawing.labels.get(label, label) if drawing else label
        return next((saved for saved, own in control.labels.items() if own == value), label)

    def companion(self, control: Control, image: str) -> Control | None:
        """The Labels tag that says of a brush or polygon without labels of its own what it shows."""
        if control.kind.endswith("labels"):
            return None
        return next((each for each in self.controls if each.kind == "labels" and image in each.objects), None)

    def _has(self, control: Control, drawn_by: str | None, labels: Sequence[str]) -> bool:
        return all(self.label_in(control, drawn_by, label) in control.labels for label in labels)


def parse(text: str | None) -> Config:
    """Read a labelling configuration; ``DEFAULT`` where there is none. Raises RequestError for what is no XML."""
    try:
        root = ElementTree.fromstring(text or DEFAULT)
    except ElementTree.ParseError as error:
        raise RequestError(f"label_config: no XML: {error}") from error
    images: dict[str, str] = {}
    controls = []
    for tag in root.iter():
        kind, name = str(tag.tag).lower(), tag.get("name")
        if name is None:
            continue
        if kind == "image":
            images[name] = (tag.get("valueList") or tag.get("value") or "").removeprefix("$")
        elif objects := tag.get("toName"):
            controls.append(Control(kind, name, tuple(objects.split(",")), _labels(tag)))
    return Config(images, tuple(controls))


def _labels(tag: Any) -> dict[str, str]:
    """By what is saved, which is a label's alias where it has one."""
    found = [each for each in tag.iter() if str(each.tag).lower() == "label" and each.get("value")]
    return {each.get("alias") or each.get("value"): each.get("value") for each in found}
