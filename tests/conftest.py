"""Settings of the test run: one thread each, and warnings that are another package's."""

import sys
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # Several schedulers of diffusers hand tensors to numpy functions, in a way that numpy 2 will no longer accept.
    for message in ("__array__ implementation doesn't accept a copy keyword", "__array_wrap__ must accept context"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:DeprecationWarning")


@pytest.fixture(autouse=True)
def clean_models() -> Iterator[None]:
    """Tests share the models of `tiny`: IEC is taken off after each, and must have left nothing on them."""
    yield
    if "tiny" in sys.modules:
        sys.modules["tiny"].take_off()
