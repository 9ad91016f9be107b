"""The attributes of TfAgc>Agc and TfAgc>AgcGrad in a graph, as `tf_agc.reference` takes them. Nothing of tensors."""

from typing import Any

DATA_FORMATS = {"channels_last": "N...C", "channels_first": "NC..."}


def reference_arguments(attributes: Any) -> dict[str, Any]:
    """The arguments `activation`, `alpha` and `data_format` of `reference.agc` for a NodeDef's attributes."""
    data_format = attributes["data_format"].s.decode()
    return {
        "activation": attributes["activation"].s.decode(),
        "alpha": attributes["alpha"].f,
        "data_format": next(name for name, value in DATA_FORMATS.items() if value == data_format),
    }
