"""A folder of images as samples: one subfolder for each class, or images alone, prepared by the user's own transform."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kancompile.data.sample_arrays import to_array
from kancompile.errors import KanCompileError, foreign, reason

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_BATCH = 64


class ImageFolder:
    """Batches ``(samples [b, *input_shape], labels [b])``, or samples alone; iterating again reads the files again.

    With subfolders, a class is a subfolder, and its label the number of its name in sorted order, as in torchvision. The order of
    the images is a seeded permutation: whoever reads only the first thousand still meets all classes.

    Attributes:
        classes: names of the subfolders; empty for a folder of images alone.
        files: the images, in the order of reading.
    """

    def __init__(self, folder: Path, transform: Callable[[Any], Any], name: str, seed: int = 0) -> None:
        """List the images.

        Args:
            folder: the folder.
            transform: maps a ``PIL.Image.Image`` to an array or tensor ``[*input_shape]``, as in training.
            name: what errors call the data.
            seed: of the order.

        Raises:
            KanCompileError: Pillow is missing, there are no images, or images both inside and beside subfolders.
        """
        self.name = f"{name} {str(folder)!r}"
        if importlib.util.find_spec("PIL") is None:
            raise KanCompileError(f"{self.name}: images need Pillow; install it: pip install 'kancompile[images]'")
        self._transform = transform
        with foreign(self.name, "give a folder that you may read"):
            beside = _images(folder.iterdir())
            subs = [sub for sub in sorted(folder.iterdir()) if sub.is_dir() and sub.name[0] != "."]
            inside = {sub.name: files for sub in subs if (files := _images(sub.rglob("*")))}
        if beside and inside:
            raise KanCompileError(
                f"{self.name}: found {len(beside)} images beside subfolders with images ({', '.join(list(inside)[:6])}), "
                "expected one subfolder for each class, or images alone"
            )
        if not beside and not inside:
            raise KanCompileError(
                f"{self.name}: found no images, expected files such as {', '.join(SUFFIXES[:3])}, in one subfolder for each class"
            )
        self.classes = tuple(inside)
        labelled: list[tuple[Path, int]] = [(file, 0) for file in beside]
        labelled += [(file, number) for number, files in enumerate(inside.values()) for file in files]
        random.Random(seed).shuffle(labelled)
        self.files = tuple(file for file, _ in labelled)
        self._labels = np.array([label for _, label in labelled], np.int64)

    def __len__(self) -> int:
        """Count the images."""
        return len(self.files)

    def __iter__(self) -> Iterator[Any]:
        """Read, prepare and stack the images, 64 at a time."""
        shape: tuple[int, ...] | None = None
        for start in range(0, len(self.files), _BATCH):
            samples = []
            for file in self.files[start : start + _BATCH]:
                sample = self._sample(file)
                shape = shape or sample.shape
                if sample.shape != shape:
                    raise KanCompileError(
                        f"{self.name}: the transform made shape {sample.shape!r} of {file.name}, and {shape!r} of the images "
                        "before, expected one shape; resize or crop in the transform"
                    )
                samples.append(sample)
            batch = np.stack(samples)
            yield (batch, self._labels[start : start + _BATCH]) if self.classes else batch

    def _sample(self, file: Path) -> NDArray[Any]:
        from PIL import Image

        try:
            with Image.open(file) as image:
                image.load()
        except Exception as error:  # each of Pillow's readers has its own, and an image may declare any size
            raise KanCompileError(
                f"{self.name}: {file} cannot be read as an image ({reason(error)}); remove it"
            ) from error
        try:
            sample = self._transform(image)
        except KanCompileError:
            raise
        except Exception as error:
            raise KanCompileError(
                f"{self.name}: the transform raised {type(error).__name__} for {file.name} ({image.mode}, "
                f"{image.width}x{image.height}): {error}; it gets a PIL image and returns an array"
            ) from error
        if isinstance(sample, Image.Image):
            raise KanCompileError(
                f"{self.name}: the transform returned an image, expected an array or tensor as in training; end it with "
                "torchvision's ToTensor() or np.asarray(image, np.float32) / 255"
            )
        return to_array(sample, f"{self.name}: {file.name}")


def _images(paths: Iterator[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file())
