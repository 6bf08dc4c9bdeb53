"""The parameter shapes of two well-known networks: those of `python -m onepass bench --like`.

Read from the source tree, because torch can also be measured where onepass is not installed.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

Shapes = list[tuple[int, ...]]

_shapes = runpy.run_path(str(Path(__file__).parents[1] / "python" / "onepass" / "_cli" / "shapes.py"))
resnet50: Callable[[], Shapes] = _shapes["resnet50"]
gpt2_small: Callable[[], Shapes] = _shapes["gpt2_small"]
