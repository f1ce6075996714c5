"""The errors of this room. Each has a stable ``code``; the message names what was wrong.

They derive from Exception alone because this room knows no other. The library above makes its own errors
of the same names derive from these as well, so that one ``except`` catches both.
"""

from __future__ import annotations


class ArtifactError(Exception):
    """A compressed model that cannot be read or written."""

    code = "bad_artifact"


class ArtifactCorrupt(ArtifactError):
    """A checksum, a length or a value does not agree with the header. The message names the tensor."""

    code = "artifact_corrupt"


class ArtifactVersion(ArtifactError):
    """Written in a version of the format, or with an encoding, that this release does not read."""

    code = "artifact_version"
