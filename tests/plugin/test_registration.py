"""``register()`` in a fresh process: all patches once, or none and one line; and a configuration that travels there."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import EngineConfig

BUILT_IN = "turboquant_4bit_nc"


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pickle") / "vllm_config.pickle"


@pytest.fixture
def fresh(engine_config: EngineConfig, pickled: Path) -> dict[str, Any]:
    """What ``fresh.py`` saw; run once."""
    if not pickled.exists():
        config = engine_config(additional_config={"turboquant": {"calibration": "off"}})
        pickled.write_bytes(pickle.dumps(config))
        environment = {key: value for key, value in os.environ.items() if key != "TURBOQUANT_DEBUG"}
        script = [sys.executable, str(Path(__file__).with_name("fresh.py")), str(pickled)]
        done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        pickled.with_suffix(".json").write_text(done.stdout.splitlines()[-1])
    return json.loads(pickled.with_suffix(".json").read_text())


def test_it_is_the_version_under_test(fresh: dict[str, Any]) -> None:
    import vllm

    assert fresh["version"] == vllm.__version__
    assert vllm.__version__.startswith(os.environ.get("TURBOQUANT_TEST_EXPECTS", "0.3"))


def test_configuration_unpickles_before_plugins_load(fresh: dict[str, Any]) -> None:
    assert fresh["plugin imported by unpickling"] is False
    assert fresh["unpickled dtype"] == "turboquant"
    assert fresh["unpickled settings"] == {"turboquant": {"calibration": "off"}}


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0", "0.320.0", "dev", "0.3"])
def test_unsupported_version_changes_nothing(version: str, fresh: dict[str, Any]) -> None:
    seen = fresh["unsupported"][version]
    assert seen["changed"] == []
    (line,) = seen["log"]
    for part in (f"vLLM {version} is not supported", "--kv-cache-dtype turboquant", "0.32 and 0.33", "pip install"):
        assert part in line


@pytest.mark.parametrize("name", ["customize_spec", "create_model_config"])
def test_missing_structure_changes_nothing(name: str, fresh: dict[str, Any]) -> None:
    seen = fresh["lacking"][name]
    assert seen["untouched"] is True
    (line,) = seen["log"]
    assert name in line and "lacks" in line and "pip install" in line


def test_register_patches_once_and_silently(fresh: dict[str, Any]) -> None:
    expected = {"torch dtypes", "backends", "selection", "model config", "metrics", "excepthook"}
    if fresh["version"].startswith("0.32"):
        expected |= {"dtypes", "schema", "argparse"}
    else:
        expected |= {"handlers"}
    assert expected <= set(fresh["first"]["changed"]) <= expected | {"dtypes"}
    assert fresh["first"]["log"] == []
    assert fresh["second"] == {"changed": [], "log": []}


def test_names_after_registration(fresh: dict[str, Any]) -> None:
    """The debug format is registered because that process asked for it."""
    parsed = fresh["parsed"]
    for name in ("turboquant", "turboquant-k8v4", "turboquant-debug-lossless", "auto", "fp8"):
        assert parsed[name] == name
    for name, why in (("turboquant-k9v9", "is not a TurboQuant preset"), (BUILT_IN, "names vLLM's built-in format")):
        if fresh["version"].startswith("0.32"):
            assert f"error: --kv-cache-dtype {name}: {why}" in parsed[name]
            assert parsed[name].endswith("; use --kv-cache-dtype turboquant.")
        else:  # 0.33's parser takes any string; test_refusals sees the sentence come from the configuration
            assert parsed[name] == name


def test_debug_format_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_turboquant.config import TurboQuantError, check_dtype_name, dtype_names

    for value, present in ((None, False), ("0", False), ("1", True)):
        monkeypatch.delenv("TURBOQUANT_DEBUG", raising=False)
        if value is not None:
            monkeypatch.setenv("TURBOQUANT_DEBUG", value)
        assert ("turboquant-debug-lossless" in dtype_names()) is present
        if not present:
            with pytest.raises(TurboQuantError, match="is not a TurboQuant preset"):
                check_dtype_name("turboquant-debug-lossless", on_cpu=True)
