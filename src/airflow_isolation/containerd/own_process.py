"""Asking a program of ours that must work in a process of its own: a question and its answer, both JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def ask(program: Path, question: Mapping[str, object], *, seconds: float) -> dict[str, Any]:
    """Run ``program`` with the question as its standard input. Its answer has the key ``failed`` where it says why not;
    so it has when the program takes longer than ``seconds``, and is killed, or says nothing that can be read.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(program)],
            input=json.dumps(question).encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"failed": f"{program.name} took longer than {seconds:g} s"}
    except ValueError:
        reason = done.stderr.decode(errors="replace").strip()[-300:] or f"exit status {done.returncode}"
        return {"failed": f"{program.name} failed: {reason}"}
    return answer
