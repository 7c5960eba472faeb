"""Where the op tests run: all on the CPU and, marked `gpu`, on a GPU if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings
from strategies import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flashdecpp import LLM

# The same examples every time, so a red test stays red. No deadline, as some machines are slow.
settings.register_profile(
    "flashdecpp",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("flashdecpp")


def _places(*kinds: tuple[str, torch.dtype]) -> list:
    return [
        pytest.param(
            Place(device, dtype),
            marks=pytest.mark.gpu if device == "cuda" else (),
            id=f"{device}-{str(dtype).removeprefix('torch.')}",
        )
        for device, dtype in kinds
    ]


CPU = [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float16)]
GPU = [("cuda", torch.bfloat16), ("cuda", torch.float16)]


@pytest.fixture(params=_places(*CPU, *GPU))
def place(request) -> Place:
    """A device and a dtype that every op supports."""
    return request.param


@pytest.fixture(params=_places(*CPU, *GPU, ("cuda", torch.float32)))
def any_place(request) -> Place:
    """`place`, plus float32 on a GPU, which attention, gemv and flat_gemm refuse."""
    return request.param


@pytest.fixture(params=_places(("cpu", torch.bfloat16), ("cuda", torch.bfloat16)))
def one_place(request) -> Place:
    """One dtype per device, for tests that don't depend on the dtype."""
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of a random Llama."""
    from runner_models import save_model  # imports transformers, which op tests don't need

    folder = tmp_path_factory.mktemp("llama")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    from runner_models import load

    return load(folder)


@pytest.fixture(scope="module")
def theirs(folder) -> PreTrainedModel:
    """The same model, run by transformers."""
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
