"""Where an exception comes from in the user's own code, as ``file.py:line``."""

from __future__ import annotations

import importlib.util
import os
import re
import traceback
from collections.abc import Iterable

FRAME = re.compile(r'File "([^"]+)", line (\d+)')
"""A frame as Python prints it: file and line."""
# the folders are found without loading torch, which the command line does without until it computes
_TORCH = importlib.util.find_spec("torch")
_OURS = (
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    *((os.path.dirname(os.path.abspath(_TORCH.origin)) + os.sep,) if _TORCH is not None and _TORCH.origin else ()),
    "<",
)


def error_source(error: BaseException) -> str:
    """Give the innermost user line of an exception, from the frames that its text quotes or from its traceback."""
    frames = [(frame.filename, str(frame.lineno)) for frame in traceback.extract_tb(error.__traceback__)]
    return innermost_line(FRAME.findall(str(error))) or innermost_line(frames)


def innermost_line(frames: Iterable[tuple[str, str]]) -> str:
    """Give the last ``(file, line)`` that lies neither in PyTorch nor in kancompile, as ``file.py:line``; empty for none."""
    found = ""
    for path, line in frames:
        if not path.startswith(_OURS):
            found = f"{os.path.basename(path)}:{line}"
    return found
