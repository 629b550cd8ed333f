"""What all tests share: offline, seeded, and skipped with a reason where an asset is absent."""

import os

# Before anything imports transformers or datasets: a test never asks a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Derandomised: a failure found once is found again. `--hypothesis-profile explore` searches anew.
settings.register_profile("adms", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("adms")


def assets_gap() -> str | None:
    """Why the test assets cannot be used; None if they can."""
    folder = os.environ.get("ADMS_TEST_ASSETS")
    if not folder:
        return "ADMS_TEST_ASSETS is not set; it names a folder with models/ and text/"
    missing = [name for name in ("models", "text") if not (Path(folder) / name).is_dir()]
    if missing:
        return f"ADMS_TEST_ASSETS is {folder}, which has no folder {' and no '.join(missing)}"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("measured") and not os.environ.get("ADMS_MEASURE"):
        pytest.skip("a long run or a figure of time or training, by hand with ADMS_MEASURE=1")
    if item.get_closest_marker("assets"):
        gap = assets_gap()
        if gap:
            pytest.skip(gap)
    if item.get_closest_marker("smollm2"):
        from adms.evaluation.models import smollm2_gap

        gap = smollm2_gap()
        if gap:
            pytest.skip(gap)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of test assets; tests that use it are marked ``assets``."""
    gap = assets_gap()
    if gap:
        pytest.skip(gap)
    return Path(os.environ["ADMS_TEST_ASSETS"])


@pytest.fixture(scope="session")
def assets_models(assets: Path) -> Path:
    """The folder of small trained models, one folder each: ``tiny-neox``, ``tiny-mpt``, ..."""
    return assets / "models"


@pytest.fixture(scope="session")
def assets_text(assets: Path) -> Path:
    """The folder of long texts: ``handbook.txt``, ``sotu.txt``."""
    return assets / "text"


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 on the CPU; tests that use it are marked ``smollm2``.

    One model for all tests: a test that enables ADMS on it disables it again.
    """
    from adms.evaluation.models import load_model, smollm2_gap

    gap = smollm2_gap()
    if gap:
        pytest.skip(gap)
    return load_model()
