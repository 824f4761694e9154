"""Settings, dtype names and every refusal about values. Imports nothing from vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .kernels.format import DEBUG_PRESETS, DEFAULT_PRESET, PRESETS

SETTINGS_KEY = "turboquant"
DEBUG_ENVIRONMENT = "TURBOQUANT_DEBUG"
FLAG = "--kv-cache-dtype"
BACKEND_NAME = "VLLM_TURBOQUANT"  # vLLM's own backend is called TURBOQUANT
SERVE_PLAIN = f"serve this model with {FLAG} auto"  # the remedy where the model itself rules compression out
SETTINGS_FLAG = "--additional-config"
CALIBRATION = f'{SETTINGS_FLAG} {{"{SETTINGS_KEY}": {{"calibration": ...}}}}'
AUTO, OFF = "auto", "off"
CALIBRATE = "vllm-turboquant calibrate"
# vLLM's own presets start so; it claims the prefix in many places.
UPSTREAM_PREFIX = "turboquant_"


class TurboQuantError(Exception):
    """A configuration that cannot be served, in one sentence for the user.

    Not a ValueError on purpose: pydantic, which validates vLLM's configuration, would wrap it in a report of its own.
    """


def dtype_names() -> tuple[str, ...]:
    """The values of ``--kv-cache-dtype`` that this plugin registers; debug formats only on request."""
    debug = tuple(DEBUG_PRESETS) if os.environ.get(DEBUG_ENVIRONMENT) == "1" else ()
    return (*PRESETS, *debug)


def is_ours(kv_cache_dtype: str | None) -> bool:
    return kv_cache_dtype in PRESETS or kv_cache_dtype in DEBUG_PRESETS


def stored(kv_cache_dtype: str) -> str:
    """What pages of a registered dtype hold, in words."""
    preset = (PRESETS | DEBUG_PRESETS)[kv_cache_dtype]
    key, value = ({8: "fp8", 32: "fp32"}.get(x.bits, f"{x.bits + x.sketch}-bit") for x in (preset.key, preset.value))
    return f"{key} keys, {value} values"


def refuse(flag: str, value: object, reason: str, remedy: str) -> TurboQuantError:
    """The one form of every refusal: flag, value, why, and what to do instead. One line, whatever the value holds."""
    text = f"{flag} {value}: {reason}; {remedy}."
    return TurboQuantError("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def refuse_backend(kv_cache_dtype: str, backend: object) -> TurboQuantError:
    """An attention backend was asked for explicitly, by whatever option of vLLM."""
    name = getattr(backend, "name", backend)
    return refuse(
        FLAG,
        kv_cache_dtype,
        f"selects its own attention backend and cannot be combined with --attention-backend {name}; allowed is none",
        "drop --attention-backend",
    )


@dataclass(frozen=True)
class TurboQuantSettings:
    """``--additional-config '{"turboquant": {...}}'``.

    ``calibration``: "auto" fits the transform of stored keys to the model at its first start and keeps it; "off" subtracts no
    more than the key bias that weights tell; else the absolute path of a file that ``vllm-turboquant calibrate`` made.
    """

    calibration: str = AUTO

    @property
    def calibration_file(self) -> Path | None:
        return None if self.calibration in (AUTO, OFF) else Path(self.calibration)

    @classmethod
    def from_additional_config(cls, additional_config: object) -> TurboQuantSettings:
        """Reads the ``turboquant`` object; absent means defaults. Raises TurboQuantError for anything unknown."""
        if not isinstance(additional_config, Mapping) or SETTINGS_KEY not in additional_config:
            return cls()
        given: Any = additional_config[SETTINGS_KEY]
        known = [field.name for field in fields(cls)]
        where = f'{SETTINGS_FLAG} {{"{SETTINGS_KEY}": ...}}'
        if not isinstance(given, Mapping):
            raise refuse(where, repr(given), "is not an object", f"give an object with the keys {', '.join(known)}")
        for key in given:
            if key not in known:
                raise refuse(where, repr(key), f"is not a setting; allowed are {', '.join(known)}", "remove or rename it")
        settings = cls(**given)
        _check_calibration(settings.calibration)
        return settings


def _check_calibration(value: object) -> None:
    if value in (AUTO, OFF):
        return
    allowed = f'allowed are "{AUTO}", "{OFF}" and the absolute path of a calibration file'
    if not isinstance(value, str) or not os.path.isabs(value):
        raise refuse(CALIBRATION, repr(value), f"is neither a mode nor an absolute path; {allowed}", f'set "{OFF}" or a path')
    if not os.path.isfile(value):
        raise refuse(CALIBRATION, value, f"there is no such file; {allowed}", f'make it with "{CALIBRATE}" or set "{OFF}"')


def refuse_calibration_file(path: Path, reason: str) -> TurboQuantError:
    """A calibration file that the user named and that does not fit."""
    return refuse(CALIBRATION, path, reason, f'make one with "{CALIBRATE}" or set "{OFF}"')


def check_dtype_name(kv_cache_dtype: str, on_cpu: bool) -> None:
    """Refuses names that look like ours and are not, and vLLM's own presets where they compute garbage."""
    allowed = ", ".join(dtype_names())
    if kv_cache_dtype.startswith(UPSTREAM_PREFIX):
        if on_cpu:
            raise refuse(
                FLAG,
                kv_cache_dtype,
                "names vLLM's built-in format, which has no CPU kernel and would compute wrong results; "
                f"allowed on CPU are {allowed}",
                f"use {FLAG} {DEFAULT_PRESET}",
            )
        return
    if kv_cache_dtype.startswith(DEFAULT_PRESET) and kv_cache_dtype not in dtype_names():
        raise refuse(FLAG, kv_cache_dtype, f"is not a TurboQuant preset; allowed are {allowed}", f"use {FLAG} {DEFAULT_PRESET}")
