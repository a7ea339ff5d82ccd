"""What has been imported and collected by the time that the first test runs is not looked at for garbage again: thousands
of short tests would have the collector walk all of Airflow hundreds of times."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
