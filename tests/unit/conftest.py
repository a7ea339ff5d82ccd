"""What holds for all unit tests.

Objects that exist when the first test runs are not looked at for garbage again: otherwise thousands of short tests would
have the collector walk all of Airflow hundreds of times. And no test asserts a duration: Hypothesis's own deadline for
each example is off, which a busy machine would miss.
"""

from __future__ import annotations

import gc

from hypothesis import settings

settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
