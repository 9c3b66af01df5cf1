"""The two networks of the source, and the road to a user's own.

A factory takes the number of classes and returns a layer, usually a Chain. `--model package.module:factory` names one.
"""

from __future__ import annotations

from distconv.errors import UsageError
from distconv.factory import is_factory, load_factory
from distconv.nn.layers import Affine, Chain, Conv, Dropout, Layer, MaxPool
from distconv.nn.parameters import Shape, Specs


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
    """One convolution and two affine layers, first weights of standard deviation 0.01."""
    return Chain(
        Conv(30, size=5, relu=True, deviation=0.01),
        MaxPool(),
        Affine(100, relu=True, deviation=0.01),
        Affine(classes, deviation=0.01),
    )


NETWORKS = {"deepconvnet": deepconvnet, "simpleconvnet": simpleconvnet}


def build_network(name: str, image_shape: Shape, classes: int) -> tuple[Layer, Specs]:
    """The network of that name, or of a user's package.module:function, and its parameters for such images (H, W, C).

    Raises UsageError where there is none, where it does not fit the images or gives no score for each class.
    """
    if name not in NETWORKS and not is_factory(name):
        raise UsageError(f"--model {name}: expected one of {', '.join(NETWORKS)}, or package.module:function")
    factory = NETWORKS[name] if name in NETWORKS else load_factory(name)
    model = factory(classes)
    try:
        output_shape, specs = model.shapes(image_shape)
    except ValueError as error:
        raise UsageError(f"--model {name} does not fit images of {image_shape}: {error}") from None
    if output_shape != (classes,):
        raise UsageError(
            f"--model {name} gives outputs of shape {output_shape}, but the data set has {classes} classes: "
            f"end it with Affine(classes)"
        )
    return model, specs
