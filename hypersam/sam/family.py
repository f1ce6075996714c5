"""A family of models: how it is recognised and what its network is made of. One module in ``families`` has one each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hypersam.sam.network import Config, SamNetwork


def _nothing(_: str) -> bool:
    return False


@dataclass(frozen=True)
class Family:
    """``id`` names its row in ``registry.FAMILIES``, which has its title and what it can do.

    ``recognises`` looks at keys alone; ``read`` takes the sizes off the shapes of a state dict and raises
    LayoutMismatch naming what does not fit. ``carries`` tells the keys of an official checkpoint that pictures do not
    need (a classifier, a video's memory): they are compressed and given back, but are in no network.
    """

    id: str
    recognises: Callable[[Collection[str]], bool]
    read: Callable[[Mapping[str, Tensor]], Config]
    config: type[Config]
    network: Callable[[Any], SamNetwork]
    carries: Callable[[str], bool] = _nothing

    def on_meta(self, config: Config) -> SamNetwork:
        """The network without storage."""
        with torch.device("meta"), _NoDraws():
            return self.network(config)

    def layout(self, config: Config) -> dict[str, torch.Size]:
        """Key to shape of every tensor that the network has."""
        return {key: value.shape for key, value in self.on_meta(config).state_dict().items()}


class _NoDraws(TorchFunctionMode):
    """Leaves tensors as they are where a network would draw their first values, and gives zeros on the CPU for the
    tables of positions that it draws: on the meta device PyTorch draws by its compiler's rules, whose import takes a
    second of every start."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.randn:
            return torch.zeros(*args, **{**given, "device": "cpu"})
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def linear_weights(model: nn.Module) -> frozenset[str]:
    """Names of the weights of linear layers."""
    return frozenset(f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear))


def batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.modules.batchnorm._NormBase]]:
    """Batch norms with their names, those that keep statistics."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None:
            yield name, module
