"""The PEP 517 build backend: setuptools', except that torch is asked for only by builds that compile.

A build needs torch's headers. pip hides the environment from an isolated build, but not its files, so torch
is downloaded only where the environment has none that is new enough.
"""

from __future__ import annotations

from typing import Any

import setuptools
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from build_support.environment import MINIMUM_TORCH, find_torch, need_setuptools

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None

need_setuptools(setuptools.__version__)  # an older one calls pyproject.toml invalid


def _torch() -> list[str]:
    found = find_torch()
    return [] if found and found.new_enough else [f"torch>={MINIMUM_TORCH}"]


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return build_meta.get_requires_for_build_sdist(config_settings)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]
