"""The two networks of the source, and the road to a user's own.

A factory takes the number of classes and returns a layer, usually a Chain. `--model package.module:factory` names one.
"""

from __future__ import annotations

from distconv.errors import UsageError
from distconv.factory import call_factory, is_factory
from distconv.nn.layers import Affine, Chain, Conv, Dropout, Layer, MaxPool, is_layer, kind_of, shapes_of
from distconv.nn.parameters import Shape, Specs, count


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
        advice = "end it with Affine(classes)" if output_shape == (classes,) else f"give outputs of {output_shape}"
        raise UsageError(
            f"--model {name} gives outputs of shape {found}, but the data set has {classes} classes: {advice}"
        )
    if not count(specs):
        raise UsageError(f"--model {name} has no parameters, so there is nothing to train")
    return model, specs
