"""Sizes of pictures that are no squares: nine shapes of about the same area. Torch-free.

Official code: apple/ml-starflow@e565a46 dataset.py aspect_ratio_to_image_size.
"""

from __future__ import annotations

from vgm_cli.errors import USAGE, VgmError

RATIOS = ("1:1", "2:3", "3:2", "16:9", "9:16", "4:5", "5:4", "21:9", "9:21")  # width:height, those of the paper


def sides(size: int, ratio: str | float, multiple: int) -> tuple[int, int]:
    """(height, width) of an area close to size * size, of the ratio width:height, both rounded to multiples.

    VgmError: a ratio that is none.
    """
    if isinstance(ratio, str):
        width, _, height = ratio.partition(":")
        if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
            raise VgmError(f"'{ratio}' is no ratio of width to height", f"one of {', '.join(RATIOS)}", USAGE)
        ratio = int(width) / int(height)
    area = size * size
    height, width = (round((area * r) ** 0.5 / multiple) * multiple for r in (1 / ratio, ratio))
    if not (height and width):
        raise VgmError(f"the ratio {ratio:g} leaves no picture of this size", f"one of {', '.join(RATIOS)}", USAGE)
    return height, width
