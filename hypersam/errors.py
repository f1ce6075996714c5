"""The errors a user can meet, free of HTTP and of the command line.

Every error has a stable ``code``, which the service puts into its problem documents and the command line
prints. The message names what was wrong and what would be right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kernels import errors as kernel_errors


class HypersamError(Exception):
    """Base of every error that a user's input or environment can cause."""

    code = "error"


class CheckpointError(HypersamError):
    """The file given as a checkpoint cannot be used as one."""

    code = "bad_checkpoint"


class NotACheckpoint(CheckpointError):
    """Neither a PyTorch archive nor a safetensors file, or a damaged one."""

    code = "not_a_checkpoint"


class EmptyCheckpoint(CheckpointError):
    """A file of no bytes, or a state dict without tensors."""

    code = "empty_checkpoint"


class UnsafeCheckpoint(CheckpointError):
    """A pickle that asks for anything but tensors and plain containers. Nothing of it was executed."""

    code = "unsafe_checkpoint"


class UnknownFamily(CheckpointError):
    """A state dict of no family that is known, or of one that cannot be compressed yet."""

    code = "unknown_family"


class LayoutMismatch(CheckpointError):
    """A known family, but keys are missing, unexpected or of the wrong shape."""

    code = "layout_mismatch"


class VariantMismatch(CheckpointError):
    """The caller named another variant than the one that the tensors show."""

    code = "variant_mismatch"


class NotFinite(CheckpointError):
    """The network's answers are no finite numbers, so they cannot be measured."""

    code = "not_finite"


class ArtifactError(HypersamError, kernel_errors.ArtifactError):
    """A compressed model that cannot be read."""

    code = "bad_artifact"


class ArtifactCorrupt(ArtifactError, kernel_errors.ArtifactCorrupt):
    """A checksum does not match. The message names the tensor."""

    code = "artifact_corrupt"


class ArtifactVersion(ArtifactError, kernel_errors.ArtifactVersion):
    """Written in a version of the format that this release does not read."""

    code = "artifact_version"


class InvalidOption(HypersamError):
    """An unknown codec, or an option outside its range."""

    code = "invalid_option"


class BadSettings(InvalidOption):
    """A setting of the operator's that nothing can be started with. The message repeats no value: it may be secret."""


class TargetUnreachable(InvalidOption):
    """No coding of these tensors is as small, or as exact, as was asked for."""

    code = "target_unreachable"


class ImageError(HypersamError):
    """The picture cannot be decoded or is outside the limits."""

    code = "bad_image"
    field = "image"


class ImageTooLarge(ImageError):
    """More bytes or pixels than the service accepts."""

    code = "image_too_large"


class PromptError(HypersamError):
    """Points, labels, boxes or mask inputs that do not fit the picture, each other or the model."""

    code = "bad_prompt"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        """Where in the request the fault lies, such as ``prompts.0.box``."""


class UnsupportedPrompt(PromptError):
    """A prompt that fits the picture, but that the model's family cannot be asked."""

    code = "unsupported_prompt"


class UnknownModel(HypersamError):
    """No compressed model has that name."""

    code = "unknown_model"


class UnknownJob(HypersamError):
    """No job has that id."""

    code = "unknown_job"


class UnknownImage(HypersamError):
    """No embedding is held for that image id; send the picture again."""

    code = "unknown_image"


class UnknownUpload(HypersamError):
    """No upload has that digest."""

    code = "unknown_upload"


class NameTaken(HypersamError):
    """The name belongs to a model with other content."""

    code = "name_taken"


class InvalidName(HypersamError):
    """The name cannot name a model."""

    code = "invalid_name"


class SourceNotAllowed(HypersamError):
    """A checkpoint was asked for from a place that the operator does not allow."""

    code = "source_not_allowed"


class UploadTooLarge(HypersamError):
    """The checkpoint is larger than the service accepts."""

    code = "upload_too_large"


class StoreFull(HypersamError):
    """The data folder has no room."""

    code = "store_full"


class FetchError(HypersamError):
    """A file cannot be had from its address."""

    code = "fetch_failed"


class WrongHash(FetchError):
    """A fetched file is not the one whose SHA-256 is known."""

    code = "wrong_hash"


class JobCancelled(HypersamError):
    """The job was cancelled while it ran."""

    code = "cancelled"


class Unavailable(HypersamError):
    """Redis, a worker or the device cannot be reached; trying again later may help."""

    code = "unavailable"


class StoreUnavailable(Unavailable):
    """The object store does not answer, or not as it should."""

    code = "store_unavailable"


class Overloaded(Unavailable):
    """More requests wait than the service lets wait."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which there may be room."""


@contextmanager
def artifact_errors() -> Iterator[None]:
    """Give the errors of the kernels room their place in this tree."""
    try:
        yield
    except HypersamError:
        raise
    except kernel_errors.ArtifactCorrupt as error:
        raise ArtifactCorrupt(str(error)) from error
    except kernel_errors.ArtifactVersion as error:
        raise ArtifactVersion(str(error)) from error
    except kernel_errors.ArtifactError as error:
        raise ArtifactError(str(error)) from error
