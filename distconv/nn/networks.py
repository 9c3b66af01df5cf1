"""The networks that have a name, and the road to a user's own.

A factory takes the number of classes and returns a layer, usually a Chain. `--model package.module:factory` names one.
The two networks of the source are for MNIST; the others are the families that made deep learning, sized for colour
pictures of 32 x 32 pixels: CIFAR-10's. In them, every convolution is followed by batch normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence

from distconv.errors import UsageError
from distconv.factory import call_factory, is_factory
from distconv.nn.blocks import Branches, Residual
from distconv.nn.layers import Affine, Chain, Conv, Dropout, Layer, MaxPool, is_layer, kind_of, shapes_of
from distconv.nn.normalization import ConvNorm, Standardize
from distconv.nn.parameters import Shape, Specs, count
from distconv.nn.pooling import GlobalAveragePool


def deepconvnet(classes: int) -> Layer:
    """Six convolutions and two affine layers; 123,552 parameters for 28 x 28 x 1 images and 10 classes."""
    return Chain(
        Conv(16, pad=1, relu=True),  # 28, 28, 16 for MNIST
        Conv(16, pad=1, relu=True),
        MaxPool(),  # 14, 14, 16
        Conv(32, pad=1, relu=True),
        Conv(32, pad=2, relu=True),  # 16, 16, 32
        MaxPool(),  # 8, 8, 32
        Conv(64, pad=1, relu=True),
        Conv(64, pad=1, relu=True),
        MaxPool(),  # 4, 4, 64
        Affine(50, relu=True),
        Dropout(0.5),
        Affine(classes),
        Dropout(0.5),  # on the scores, as in the source
    )


def simpleconvnet(classes: int) -> Layer:
    """One convolution and two affine layers, initial weights of standard deviation 0.01."""
    return Chain(
        Conv(30, size=5, relu=True, deviation=0.01),
        MaxPool(),
        Affine(100, relu=True, deviation=0.01),
        Affine(classes, deviation=0.01),
    )


def vgg11(classes: int) -> Layer:
    """Configuration A of Simonyan and Zisserman 2015 (arXiv 1409.1556), table 1, with one affine layer for three.

    9,228,362 parameters for 10 classes.
    """
    return _vgg([64], [128], [256, 256], [512, 512], [512, 512], classes=classes)


def vgg16(classes: int) -> Layer:
    """Configuration D of the same table, likewise; 14,724,042 parameters for 10 classes."""
    return _vgg([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3, classes=classes)


def _vgg(*stages: Sequence[int], classes: int) -> Layer:
    layers: list[Layer] = [Standardize()]
    for filters in stages:
        layers += [*map(ConvNorm, filters), MaxPool()]
    return Chain(*layers, Affine(classes))


def resnet20(classes: int) -> Layer:
    """He et al. 2015 (arXiv 1512.03385), section 4.2, with projections where the shape changes (option B).

    272,474 parameters for 10 classes.
    """
    return _resnet([16, 32, 64], blocks=3, classes=classes)


def resnet56(classes: int) -> Layer:
    """The same, deeper; 855,770 parameters for 10 classes."""
    return _resnet([16, 32, 64], blocks=9, classes=classes)


def resnet18(classes: int) -> Layer:
    """Table 1 of the same paper from conv2 on, behind one 3 x 3 convolution; 11,173,962 parameters for 10 classes."""
    return _resnet([64, 128, 256, 512], blocks=2, classes=classes)


def _resnet(stages: Sequence[int], blocks: int, classes: int) -> Layer:
    layers: list[Layer] = [Standardize(), ConvNorm(stages[0])]
    for i, filters in enumerate(stages):
        for block in range(blocks):
            stride = 2 if i > 0 and block == 0 else 1
            body = Chain(ConvNorm(filters, stride=stride), ConvNorm(filters, relu=False))
            layers.append(Residual(body, None if stride == 1 else ConvNorm(filters, 1, stride, relu=False)))
    return Chain(*layers, GlobalAveragePool(), Affine(classes))


def googlenet(classes: int) -> Layer:
    """Szegedy et al. 2015 (arXiv 1409.4842), table 1, without the auxiliary classifiers.

    Images of 32 x 32 come into the first inception block as 8 x 8, by a stem whose first convolution is 3 x 3 with
    stride 1 in place of 7 x 7 with stride 2; 5,983,402 parameters for 10 classes.
    """
    return Chain(
        Standardize(),
        ConvNorm(64),  # 32, 32, 64
        MaxPool(3, 2, pad=1),
        ConvNorm(64, size=1),
        ConvNorm(192),  # 16, 16, 192
        MaxPool(3, 2, pad=1),
        _inception(64, 96, 128, 16, 32, 32),  # 8, 8, 256: the paper's 3a
        _inception(128, 128, 192, 32, 96, 64),
        MaxPool(3, 2, pad=1),
        _inception(192, 96, 208, 16, 48, 64),  # 4, 4, 512: 4a
        _inception(160, 112, 224, 24, 64, 64),
        _inception(128, 128, 256, 24, 64, 64),
        _inception(112, 144, 288, 32, 64, 64),
        _inception(256, 160, 320, 32, 128, 128),
        MaxPool(3, 2, pad=1),
        _inception(256, 160, 320, 32, 128, 128),  # 2, 2, 832: 5a
        _inception(384, 192, 384, 48, 128, 128),
        GlobalAveragePool(),
        Dropout(0.4),
        Affine(classes),
    )


def _inception(one: int, to_three: int, three: int, to_five: int, five: int, pooled: int) -> Layer:
    """Figure 2b of the paper. to_three, to_five: filters of the 1 x 1 convolutions before the larger ones."""
    return Branches(
        ConvNorm(one, size=1),
        Chain(ConvNorm(to_three, size=1), ConvNorm(three)),
        Chain(ConvNorm(to_five, size=1), ConvNorm(five, size=5)),
        Chain(MaxPool(3, 1, pad=1), ConvNorm(pooled, size=1)),
    )


NETWORKS = {
    "deepconvnet": deepconvnet,
    "simpleconvnet": simpleconvnet,
    "vgg11": vgg11,
    "vgg16": vgg16,
    "googlenet": googlenet,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet18": resnet18,
}


def usual_image_shape(name: str) -> Shape:
    """Of the images that a network is made for: MNIST's or CIFAR-10's."""
    return (28, 28, 1) if name in ("deepconvnet", "simpleconvnet") else (32, 32, 3)


def build_network(
    name: str, image_shape: Shape, classes: int, output_shape: Shape | None, model: Layer | None = None
) -> tuple[Layer, Specs]:
    """The network of that name, or of a user's package.module:function, and its parameters for such images (H, W, C).

    output_shape: what it must give for an image; None: anything. model: the network itself, if it is there already.
    Raises UsageError where there is none, where it is no layer, has no parameters, does not fit the images or gives
    something else; what the user's own code raises comes through.
    """
    if model is None and name not in NETWORKS and not is_factory(name):
        raise UsageError(f"--model {name}: expected one of {', '.join(NETWORKS)}, or package.module:function")
    if model is None:
        model = NETWORKS[name](classes) if name in NETWORKS else call_factory(name, classes)
    if not is_layer(model):
        raise UsageError(
            f"--model {name} returned {kind_of(model)}, but a layer, with shapes and forward, was expected"
        )
    try:
        found, specs = shapes_of(model, image_shape)
    except ValueError as error:
        raise UsageError(f"--model {name} does not fit images of {image_shape}: {error}") from None
    if output_shape is not None and found != output_shape:
        needed = f"the task learns from outputs of shape {output_shape}"
        if output_shape == (classes,):
            needed = f"the data set has {classes} classes: end it with Affine(classes)"
        raise UsageError(f"--model {name} gives outputs of shape {found}, but {needed}")
    if not count(specs, lambda spec: spec.trained):
        raise UsageError(f"--model {name} has no parameters, so there is nothing to train")
    return model, specs
