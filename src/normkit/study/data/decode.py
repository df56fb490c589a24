"""Pictures to pixels: one split decoded into one contiguous uint8 array."""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from normkit.study.errors import DataError


def decode_split(where: str, split: Any, column: str, size: int | None, target: Path) -> set[str]:
    """Decode the images of a split into a ``.npy`` file, ``(N, C, H, W)``; grey where all are, else RGB.

    Args:
        where: Name of data and split, for messages.
        split: The split.
        column: Its column with the images.
        size: Height and width that they are brought to, or None.
        target: The file.

    Returns:
        What a report must say of them.

    Raises:
        DataError: An image is damaged, of another size or of more than 8 bits per value, or there is none.
    """
    from datasets import Image

    raw = split.select_columns([column]).cast_column(column, Image(decode=False)).with_format(None)
    if len(raw) == 0:
        raise DataError(f"{where}: no examples; give some")
    sample = range(0, len(raw), max(1, len(raw) // 64))
    opened = [_picture(where, i, raw[i][column]) for i in sample]
    mode = "L" if all(picture.mode in {"1", "L"} for picture in opened) else "RGB"
    qualities = {q for picture in opened if (q := _jpeg_quality(picture)) is not None}

    def pixels(item: tuple[int, Any]) -> np.ndarray:
        index, row = item
        picture = _picture(where, index, row[column])
        try:
            picture = picture.convert(mode)
        except Exception as error:
            raise DataError(f"{where}: image {index} is damaged ({error}); fetch or remove it") from error
        return np.asarray(picture if size is None else _fit(picture, size), dtype=np.uint8)

    shape = pixels((0, raw[0])).shape
    array: Any = None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(raw), 1024):
            rows = list(enumerate(raw.select(range(start, min(start + 1024, len(raw)))), start))
            for (index, _), image in zip(rows, pool.map(pixels, rows), strict=True):
                if image.shape != shape:
                    raise DataError(
                        f"{where}: image {index} is {image.shape[1]}x{image.shape[0]}, the first is "
                        f"{shape[1]}x{shape[0]}; bring them to one size with image_size"
                    )
                if array is None:
                    channels = 1 if mode == "L" else 3
                    array = np.lib.format.open_memmap(target, "w+", np.uint8, (len(raw), channels, *shape[:2]))
                array[index] = image if mode == "L" else image.transpose(2, 0, 1)
    array.flush()
    if not qualities:
        return set()
    return {
        f"images are stored as lossy JPEG (quality about {min(qualities)}): compare methods with one another, not with "
        "published accuracies on lossless images"
    }


def _picture(where: str, index: int, value: Any) -> Any:
    # An opened picture, its pixels not yet decoded.
    from PIL import Image

    try:
        source = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        picture = Image.open(io.BytesIO(source))
    except Exception as error:
        raise DataError(
            f"{where}: image {index} cannot be read ({type(error).__name__}: {error}); fetch or remove it"
        ) from error
    if picture.mode.startswith(("I", "F")):  # which a conversion to 8 bits would cut off at 255
        raise DataError(
            f"{where}: image {index} has more than 8 bits per value (mode {picture.mode}); scale the images to 8 bits, or "
            "give a factory, package.module:factory, that returns tensors"
        )
    return picture


def _fit(picture: Any, size: int) -> Any:
    """Shorter side resized to ``size``, centre cut out."""
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.resize((width, height)).crop((left, top, left + size, top + size))


def _jpeg_quality(picture: Any) -> int | None:
    """Quality of a JPEG by the usual scaling of its luminance table, whose entries sum to 3688 at quality 50."""
    tables: dict[int, Sequence[int]] | None = getattr(picture, "quantization", None)
    if picture.format != "JPEG" or not tables:
        return None
    scale = 100 * sum(tables[min(tables)]) / 3688
    return round((200 - scale) / 2 if scale <= 100 else 5000 / scale)
