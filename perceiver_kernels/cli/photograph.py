"""From a file, or from a photograph that an installed package ships, to an array of pixels."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels.cli.arguments import UserError


def load(path: Path | None, size: tuple[int, int] | None) -> tuple[str, Tensor]:
    """A photograph's name and its pixels, (height, width, 3) in [0, 1].

    Args:
        path: an image file, or None for a photograph that some installed package ships.
        size: height and width to resample it to.
    """
    name, pixels = shipped() if path is None else (path.name, read(path))
    return name, pixels if size is None else resample(pixels, size)


def resample(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(pixels.shape[:2]) == size:
        return pixels
    planes = pixels.permute(2, 0, 1)[None]
    planes = F.interpolate(planes, size, mode="bicubic", align_corners=False, antialias=True)
    return planes[0].permute(1, 2, 0).clamp(0, 1).contiguous()


def shipped() -> tuple[str, Tensor]:
    """The first photograph that an installed package ships."""
    for name, open_photograph in (("astronaut (scikit-image)", _astronaut), ("china (scikit-learn)", _china)):
        with contextlib.suppress(ImportError, OSError):
            return name, torch.as_tensor(open_photograph()).float() / 255
    raise UserError("no package with a photograph is installed: pip install scikit-image, or name an image file")


def _astronaut() -> Any:
    return importlib.import_module("skimage.data").astronaut()


def _china() -> Any:
    return importlib.import_module("sklearn.datasets").load_sample_image("china.jpg")


def read(path: Path) -> Tensor:
    """The pixels of an image file: grey, palette, 16 bits and transparency (over white) become plain colour."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError("reading an image file needs Pillow: pip install pillow") from error
    with explained(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a large photograph is what this is for
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":  # one wide channel
                return _wide_grey(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            return values.view(image.height, image.width, 3).float() / 255


def _wide_grey(image: Any) -> Tensor:
    """Grey in 16 bits, or in 32 bits or floating point, which count from 0 to their own brightest pixel."""
    import array

    wide = image.convert("F")
    values = torch.tensor(array.array("f", wide.tobytes())).view(wide.height, wide.width, 1)
    brightest = 65535.0 if image.mode.startswith("I;16") else values.amax().clamp(min=1e-6)
    return (values / brightest).nan_to_num().clamp(0, 1).repeat(1, 1, 3)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what can go wrong with an image file into one line."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not an image file") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has more pixels than Pillow is willing to open: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
