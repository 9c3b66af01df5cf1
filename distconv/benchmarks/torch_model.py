"""A network of ours as PyTorch's modules, for benchmarks/torch_step.py: the same layers, shapes and parameters."""

from __future__ import annotations

import math
from typing import Any

from distconv.errors import UsageError
from distconv.nn.blocks import Branches, Residual
from distconv.nn.layers import Affine, Chain, Conv, Dropout, Layer, MaxPool, ReLU, inner_layers, is_ours, kind_of
from distconv.nn.normalization import BatchNorm, ConvNorm, Standardize
from distconv.nn.parameters import Shape
from distconv.nn.pooling import AveragePool, GlobalAveragePool


def translate(torch: Any, model: Layer, image_shape: Shape) -> Any:
    """The same network in channels_last. Raises UsageError for a layer that PyTorch has not."""
    return _translate(torch, model, image_shape).to(memory_format=torch.channels_last)


def _translate(torch: Any, layer: Layer, shape: Shape) -> Any:
    nn, modules = torch.nn, []
    if not inner_layers(layer) and not is_ours(layer):  # a user's own kind may compute something else
        raise UsageError(f"--against torch: PyTorch has nothing for {kind_of(layer)}: leave --against out")
    if isinstance(layer, MaxPool | AveragePool) and 2 * layer.pad > layer.size:
        raise UsageError(
            f"--against torch: PyTorch pads a pool by half its size at most: leave --against out for {layer}"
        )
    if isinstance(layer, Chain):
        for _, one in layer.layers:
            modules.append(_translate(torch, one, shape))
            shape, _ = one.shapes(shape)
        return nn.Sequential(*modules)
    if isinstance(layer, Residual | Branches):
        inner = [_translate(torch, one, shape) for _, one in layer.layers]
        return _residual(torch, inner, layer.relu) if isinstance(layer, Residual) else _branches(torch, inner)
    if isinstance(layer, Conv | ConvNorm):
        conv, bias = (layer, True) if isinstance(layer, Conv) else (layer.conv, False)
        modules.append(nn.Conv2d(shape[-1], conv.filters, conv.size, conv.stride, conv.margin, bias=bias))
    if isinstance(layer, ConvNorm | BatchNorm):
        norm, found = layer if isinstance(layer, BatchNorm) else layer.norm, layer.shapes(shape)[0]
        kind = nn.BatchNorm2d if len(found) == 3 else nn.BatchNorm1d
        modules.append(kind(found[-1], norm.epsilon, norm.momentum))
    elif isinstance(layer, MaxPool):
        modules.append(nn.MaxPool2d(layer.size, layer.stride, layer.pad))
    elif isinstance(layer, AveragePool):
        modules.append(nn.AvgPool2d(layer.size, layer.stride, layer.pad))
    elif isinstance(layer, GlobalAveragePool):
        modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    elif isinstance(layer, Affine):
        modules += [nn.Flatten()] * (len(shape) == 3)
        modules.append(nn.Linear(math.prod(shape), layer.outputs))
    elif isinstance(layer, Dropout):
        modules.append(nn.Dropout(layer.ratio))
    elif isinstance(layer, Standardize):
        modules.append(_standardize(torch, shape[-1]))
    if isinstance(layer, ReLU) or getattr(layer, "relu", False):
        modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


def _residual(torch: Any, inner: list[Any], relu: bool) -> Any:
    class Sum(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.shortcut = inner[0], inner[1] if inner[1:] else torch.nn.Identity()

        def forward(self, x: Any) -> Any:
            y = self.body(x) + self.shortcut(x)
            return torch.relu_(y) if relu else y

    return Sum()


def _branches(torch: Any, inner: list[Any]) -> Any:
    class SideBySide(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.branches = torch.nn.ModuleList(inner)

        def forward(self, x: Any) -> Any:
            return torch.cat([branch(x) for branch in self.branches], 1)

    return SideBySide()


def _standardize(torch: Any, channels: int) -> Any:
    class Scaled(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(channels, 1, 1))
            self.register_buffer("factor", torch.ones(channels, 1, 1))

        def forward(self, x: Any) -> Any:
            return (x - self.mean) * self.factor

    return Scaled()
