"""What the documents say exists, exists: files, headings, commands of ours, settings."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from airflow_isolation.settings.dag_metadata import read_metadata
