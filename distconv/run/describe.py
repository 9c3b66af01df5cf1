"""What --print-config and --describe print; nothing is trained then."""

from __future__ import annotations

from distconv.config import Config


def text_to_print(settings: Config, flag: str) -> str:
    """The settings as TOML (print_config), or the layers of the model (describe).

    Layers are described for the images of the data set; where none is named, for those that the model is made for, of
    10 classes. Raises what reading data raises.
    """
    if flag == "print_config":
        return settings.toml()
    from distconv import data  # NumPy, which the settings can do without
    from distconv.nn.networks import build_network, usual_image_shape
    from distconv.nn.summary import describe

    shape, classes = usual_image_shape(settings.model), 10
    if settings.data != data.AUTO:
        found = data.load(data.prepare(settings.data)[0])
        shape, classes = found.image_shape, found.classes
    model, _ = build_network(settings.model, shape, classes, None)
    return f"{describe(settings.model, model, shape)}\n"
