"""From a file to a model that answers: artifacts into compressed layers, checkpoints into dense ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

from hypersam.checkpoint import read_checkpoint
from hypersam.cores import usable_cores
from hypersam.errors import ArtifactError, InvalidOption, LayoutMismatch, NotACheckpoint, Unavailable, artifact_errors
from hypersam.sam.detect import Detected, detect
from hypersam.sam.families import family_of
from hypersam.sam.family import Family
from hypersam.sam.model import SamModel
from hypersam.sam.network import Config, SamNetwork
from hypersam.sam.predictor import SamPredictor
from kernels.artifact import Artifact, open_artifact
from kernels.codec import Encoded, LatticeTensor, OrbitTensor, decode
from kernels.errors import ArtifactCorrupt as KernelArtifactCorrupt
from kernels.hyperlinear import RESIDENT, HyperConv2d, HyperLinear

LEAST_CONVOLUTION = 1 << 14
"""Weights from which a convolution stays compressed; smaller ones are decoded."""

Residency = Literal["auto", "levels", "stream"]
"""How a ``lattice`` weight lies in memory: int8 levels, or the entropy-coded bytes of the file, which are fewer and are
decoded anew at every product (CPUs only). ``auto``: levels, unless the model would not fit the memory it is given."""


def load(
    path: Path | str,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    resident: Residency = "auto",
    memory: int | None = None,
) -> SamPredictor:
    """A predictor for a compressed model (``.hsam``) or an ordinary checkpoint.

    ``device``: ``auto`` is CUDA where there is one, else the CPU. ``dtype`` is that of the image encoder.
    ``resident``: see ``Residency``; ``memory``: the bytes of weights that ``auto`` may keep, None for any number.
    Raises ArtifactError or CheckpointError, and InvalidOption for streams on a GPU.
    """
    path = Path(path)
    if not path.is_file():
        raise NotACheckpoint(f"there is no file {path}")
    return SamPredictor(load_model(path, device=device, dtype=dtype, resident=resident, memory=memory))


def load_model(
    path: Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    resident: Residency = "auto",
    memory: int | None = None,
) -> SamModel:
    """The same, as a SamModel."""
    place = resolve_device(device)
    if resident == "stream" and place.type != "cpu":
        raise InvalidOption(f"entropy-coded weights are multiplied on the CPU only, not on {place}; take levels")
    if is_artifact(path):
        # Every stream is checked as it is read, so the file is read once.
        with artifact_errors(), open_artifact(path, verify=False) as artifact:
            fits = memory is None or _levels_bytes(artifact) <= memory
            stream = resident == "stream" or (resident == "auto" and place.type == "cpu" and not fits)
            return _from_artifact(artifact, place, dtype, stream)
    checkpoint = read_checkpoint(path)
    detected = detect(checkpoint.tensors, name=path.name)
    # A copy, so that the model does not hang on the mapped file.
    state = {key: value.clone() for key, value in checkpoint.tensors.items()}
    return dense_model(state, detected, device=place, dtype=dtype)


def dense_model(
    tensors: Mapping[str, Tensor],
    detected: Detected,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SamModel:
    """The uncompressed model of a state dict. fp32 tensors on the right device are shared, not copied."""
    network = detected.described.on_meta(detected.config)
    # Checkpoints in half precision compute in fp32 too. What the network does not have is carried for others.
    state = {key: _computed(tensors[key]) for key in network.state_dict()}
    network.load_state_dict(state, strict=True, assign=True)
    return _placed(network, detected.variant, resolve_device(device), dtype)


def is_artifact(path: Path) -> bool:
    """Whether the file says of itself that it is a compressed model (its first block names the format)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = file.read(min(length, 1 << 16))
    return b'"__metadata__"' in head and b'"hypersam"' in head


def resolve_device(device: str | torch.device) -> torch.device:
    """``auto`` to CUDA where there is one, else the CPU. Raises InvalidOption or Unavailable."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InvalidOption(f"unknown device {device!r}; give auto, cpu, cuda or cuda:N") from error
    if place.type not in ("cpu", "cuda"):
        raise InvalidOption(f"device {device!r} is not supported; give auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise Unavailable(f"there is no device {device} here ({torch.cuda.device_count()} CUDA devices found)")
    return place


def _levels_bytes(artifact: Artifact) -> int:
    """About what the model's weights take with int8 levels."""
    bits = {"lattice": 8, "birkhoff": 8, "orbit": 4}  # the others are decoded to fp32
    return sum(math.prod(r.shape) * bits.get(r.encoding, 32) for r in artifact.records) // 8


def _from_artifact(artifact: Artifact, device: torch.device, dtype: torch.dtype, stream: bool) -> SamModel:
    """Build on the meta device and fill: a coded linear layer goes from its stream straight to indices."""
    model = artifact.model
    try:
        family = family_of(str(model.get("family")))
    except KeyError:
        raise ArtifactError(f"the artifact holds a model of family {model.get('family')!r}, unknown here") from None
    try:
        config = family.config.from_dict(model["config"])
        # Before anything is built of the sizes that the configuration claims.
        shown = family.read({r.name: torch.empty(r.shape, device="meta") for r in artifact.records})
        if shown != config:
            raise ValueError("it is of other sizes than the tensors")
        expected = {key: tuple(shape) for key, shape in family.layout(config).items()}
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError, LayoutMismatch) as error:
        raise ArtifactError(
            f"the artifact's model configuration is unusable ({error}); if another version made it, compress its "
            "checkpoint again"
        ) from error
    odd = [name for name in artifact.names() if name not in expected and not family.carries(name)]
    if odd := sorted({*odd, *(set(expected) - set(artifact.names()))}):
        raise ArtifactError(f"the artifact's tensors are not those of its model: {', '.join(odd[:5])}")
    for record in artifact.records:
        if record.name in expected and record.shape != expected[record.name]:
            raise ArtifactError(f"{record.name} has shape {record.shape}, should be {expected[record.name]}")
    variant = str(model.get("variant", family.id))
    for name in artifact.names():
        if name not in expected:  # carried, in no network, and to be whole all the same
            artifact.encoded(name)
    return compressed_model(artifact.encoded, family, config, variant, device=device, dtype=dtype, stream=stream)


def compressed_model(
    encoded: Callable[[str], Encoded],
    family: Family,
    config: Config,
    variant: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    stream: bool = False,
) -> SamModel:
    """A model with compressed layers.

    ``encoded`` gives a tensor by its name. Each is asked for once, by several threads. ``stream``: see ``Residency``.
    Built on the meta device and filled: the weight of a linear layer, or of a convolution that is one on patches, goes
    from its stream straight to its resident form. Raises ArtifactError, naming the tensor, for one that does not fit.
    """
    network = family.on_meta(config)
    linears = {f"{name}.weight": name for name, m in network.named_modules() if isinstance(m, nn.Linear)}

    convolutions = {
        f"{name}.weight": m for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and HyperConv2d.fits(m)
    }

    def one(key: str) -> HyperLinear | HyperConv2d | Tensor:
        given = encoded(key)
        try:
            if key in linears and isinstance(given, RESIDENT):
                return HyperLinear.from_encoded(given, None, stream=stream)
            if key in convolutions and _stays_coded(given):
                return HyperConv2d.from_encoded(given, None, convolutions[key].kernel_size, stream=stream)
            return _computed(decode(given))
        except (ValueError, KernelArtifactCorrupt) as error:
            raise ArtifactError(f"{key}: {error}") from error

    names = list(network.state_dict())
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="load") as pool:
        filled = dict(zip(names, pool.map(one, names), strict=True))
    state = {key: made for key, made in filled.items() if isinstance(made, Tensor)}
    layers = {key: made for key, made in filled.items() if not isinstance(made, Tensor)}
    for key, layer in layers.items():
        name = key.removesuffix(".weight")
        linear = layer if isinstance(layer, HyperLinear) else layer.linear
        linear.bias = state.pop(f"{name}.bias", None)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer)
    missing, unexpected = network.load_state_dict(state, strict=False, assign=True)
    left = [k for k in missing if not _inside_hyperlinear(network, k)]
    if left or unexpected:
        raise ArtifactError(f"the artifact does not fill its model: {', '.join([*left, *unexpected][:5])}")
    return _placed(network, variant, resolve_device(device), dtype)


def _stays_coded(encoded: Encoded) -> TypeGuard[LatticeTensor | OrbitTensor]:
    """Whether a convolution's tensor is coded as a matrix of its output channels, and large enough to matter."""
    rows = encoded.shape[0] if encoded.shape else 0
    match encoded:
        case LatticeTensor():
            whole = not encoded.offset and encoded.columns % (math.prod(encoded.shape) // rows) == 0
        case OrbitTensor():
            whole = encoded.rows == rows
        case _:
            whole = False
    return whole and math.prod(encoded.shape) >= LEAST_CONVOLUTION


def _inside_hyperlinear(network: nn.Module, key: str) -> bool:
    return isinstance(network.get_submodule(key.rpartition(".")[0]), (HyperLinear, HyperConv2d))


def _computed(tensor: Tensor) -> Tensor:
    """A tensor as networks compute with it: fp32, but for counters and the like."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _placed(network: SamNetwork, variant: str, device: torch.device, dtype: torch.dtype) -> SamModel:
    network.to(device)
    if dtype != torch.float32:
        network.image_encoder.to(dtype)
    return SamModel(network, variant=variant, device=device, dtype=dtype)
