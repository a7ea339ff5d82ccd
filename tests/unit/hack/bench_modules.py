"""The modules of hack/bench.d, which find each other by name, as they do when a benchmark runs."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

HACK = Path(__file__).resolve().parents[3] / "hack"
PLACES = [str(HACK / "bench.d"), str(HACK / "setup")]


def bench_module(name: str) -> Any:
    sys.path[:0] = PLACES
    try:
        return import_module(name)
    finally:
        for place in PLACES:
            sys.path.remove(place)
