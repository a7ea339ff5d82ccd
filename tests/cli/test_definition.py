"""Every ``airflow`` command reads what commands there are: that must cost nothing."""

from __future__ import annotations

import subprocess
import sys


def test_the_parser_loads_nothing_heavy() -> None:
    program = (
        "import sys; import airflow.cli.cli_config; before = set(sys.modules);"
        "import airflow_isolation.integration.cli.definition;"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert set(done.stdout.split()) <= {
        "airflow_isolation",
        "airflow_isolation.integration",
        "airflow_isolation.integration.cli",
        "airflow_isolation.integration.cli.definition",
    }
