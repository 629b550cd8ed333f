"""What `adms.attention` exports, and that it costs nothing until asked for."""

import importlib
import subprocess
import sys

import pytest

import adms.attention


@pytest.mark.parametrize("name", adms.attention.__all__)
def test_every_name_is_the_object_of_its_module(name: str) -> None:
    found = getattr(adms.attention, name)
    assert found.__name__ == name
    assert getattr(importlib.import_module(found.__module__), name) is found
    assert name in dir(adms.attention)


def test_the_lists_agree() -> None:
    assert sorted(adms.attention._HOME) == sorted(adms.attention.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'DynamicAttentoin'"):
        adms.attention.DynamicAttentoin  # noqa: B018


def test_importing_adms_loads_no_stand_alone_module() -> None:
    code = (
        "import sys, adms; print([name for name in sys.modules if name.startswith("
        "('adms.attention.dynamic', 'adms.attention.integrated', "
        "'adms.attention.streaming_transformer', 'adms.attention.adaptive_update'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
