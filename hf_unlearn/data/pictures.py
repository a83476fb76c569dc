"""Images as data sets hold them, made 8-bit pictures that an image processor reads without guessing."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hf_unlearn.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}
"""The mode of PIL for a number of channels."""
COLOURED = ("P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
"""Modes that have no direct way to grey, or one that reads other values than colours."""
DEEP_MODES = ("I", "F")
"""Modes of PIL with more than 8 bits a channel begin with these letters; conversion to RGB clips them to white."""


def picture(image: object, channels: int, where: str) -> Any:
    """Return an image as an 8-bit PIL image, in RGB if the model has three channels, in grey if it has one.

    Images of a number of channels that PIL does not know are returned as they are.

    >>> picture(np.zeros((2, 3), dtype=np.uint8), 3, "row 0").size
    (3, 2)

    Args:
        image: A PIL image, an array `[H, W]`, `[H, W, C]` or `[C, H, W]` of 8-bit values, an undecoded image
            (`{"bytes": ..., "path": ...}`, bytes, a path).
        channels: Number of channels of the model.
        where: The row, for errors.

    Raises:
        DataError: The image is missing, cannot be read, or has values of more than 8 bits or fractions, for which
            only the user knows which is black and which is white.
    """
    from PIL import Image

    if isinstance(image, (Tensor, np.ndarray, list, tuple)):
        values = _eight_bits(image, where)
        values = _channels_last(values, isinstance(image, Tensor))
        if values.ndim != 2 and values.shape[-1] not in (3, 4):
            return image
        image = Image.fromarray(values)
    elif isinstance(image, (bytes, str, Path, Mapping)):
        image = _decoded(image, where)
    if not isinstance(image, Image.Image):
        raise DataError(f"{where} has {image!r:.60} as its image; give an image, or leave the row out")
    if image.mode.startswith(DEEP_MODES):
        raise DataError(
            f"{where} has an image of mode {image.mode} (more than 8 bits a channel); convert it to 8 bits as for the "
            "model's own training, because the range of its values is not known"
        )
    mode = MODES.get(channels)
    return image if mode in (None, image.mode) else _converted(image, mode, where)


def _converted(image: "Image", mode: str, where: str) -> "Image":
    try:
        opaque = image.convert("RGB") if mode == "L" and image.mode in COLOURED else image  # has the palette's colours
        return opaque.convert(mode)
    except ValueError as error:
        raise DataError(f"{where} has an image of mode {image.mode}, which has no {mode} form: {error}") from error


def _decoded(image: Any, where: str) -> "Image":
    """Read an image that is not decoded, turned as its camera says, as `datasets` does."""
    from PIL import Image, ImageOps

    source = (image.get("bytes") or image.get("path")) if isinstance(image, Mapping) else image
    if source is None:
        raise DataError(f"{where} has an image without bytes and path; give an image, or leave the row out")
    try:
        opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        opened.load()
    except OSError as error:
        raise DataError(
            f"{where} has an image that cannot be read ({error}); repair it or leave the row out"
        ) from error
    return ImageOps.exif_transpose(opened)


def _eight_bits(image: Any, where: str) -> NDArray:
    """Return an array of 8-bit values; raise `DataError` if the image has others."""
    try:
        values = _array_of(image) if isinstance(image, Tensor) else np.asarray(image)
    except ValueError as error:  # lists of unequal lengths
        raise DataError(f"{where} has an image whose rows have unequal lengths; repair it") from error
    whole = values.dtype.kind in "iu" and (values.dtype == np.uint8 or values.dtype == np.int64)
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * 255
    if not whole or values.ndim not in (2, 3) or not values.size or values.min() < 0 or values.max() > 255:
        raise DataError(
            f"{where} has an image {list(values.shape)} of {values.dtype} values; give 8-bit values (uint8) of height, "
            "width and channels, or rows with pixel_values that the model's image processor made"
        )
    return values.astype(np.uint8)


def _array_of(image: Tensor) -> NDArray:
    """Return the array of a tensor; numpy has no bfloat16."""
    image = image.detach().cpu()
    return (image.float() if image.is_floating_point() else image).numpy()


def _channels_last(values: NDArray, is_tensor: bool) -> NDArray:
    """Return `[H, W, C]`, or `[H, W]` for one channel; tensors have their channels first where both could be."""
    if values.ndim == 3:
        first, last = values.shape[0] in (1, 3, 4), values.shape[2] in (1, 3, 4)
        if first and (is_tensor or not last):
            values = values.transpose(1, 2, 0)
        if values.shape[2] == 1:
            values = values[..., 0]
    return np.ascontiguousarray(values)
