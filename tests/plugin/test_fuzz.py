"""What users and disks may hand over, made up by hypothesis: settings, dtype names, calibration files, bytes of pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_turboquant.calibration_file import CalibrationFileError, load, mismatch, save
from vllm_turboquant.config import TurboQuantError, TurboQuantSettings, check_dtype_name
from vllm_turboquant.kernels import reference
from vllm_turboquant.kernels.basis import KeyBasis
from vllm_turboquant.kernels.format import LOSSLESS_PRESET, PRESETS, page_format

from .refused import check_sentence
from .test_calibration import IDENTITY, LAYERS, random_basis

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
# print_blob: how a failure is made again.
FEW = settings(max_examples=60, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(FEW, max_examples=300)


@MANY
@given(JSON | st.fixed_dictionaries({"calibration": JSON | st.sampled_from(("auto", "off", "/", "/\0", "off "))}))
def test_settings_are_valid_or_refused_in_words(value: Any) -> None:
    try:
        found = TurboQuantSettings.from_additional_config({"turboquant": value})
    except TurboQuantError as error:
        check_sentence(str(error), ())
    else:
        assert found.calibration in ("auto", "off") and found.calibration_file is None


@MANY
@given(st.text(max_size=30) | st.text(max_size=12).map(lambda tail: f"turboquant{tail}"), st.booleans())
def test_names_of_dtypes(name: str, on_cpu: bool) -> None:
    try:
        check_dtype_name(name, on_cpu)
    except TurboQuantError as error:
        check_sentence(str(error), ())
        assert name not in PRESETS
    else:
        assert name in PRESETS or not name.startswith("turboquant") or (name.startswith("turboquant_") and not on_cpu)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("fuzz") / "file"
    save(path, IDENTITY, [{name: random_basis(*shape, generator) for name, shape in LAYERS.items()} for _ in range(2)])
    return path


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something else could stand in a JSON value."""
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], to: Any) -> Any:
    if not path:
        return to
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], to)
    return copy


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The description of a safetensors file, and its tensors."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


@MANY
@given(data=st.data(), to=JSON)
def test_edited_descriptions_of_calibrations(whole: Path, data: st.DataObject, to: Any) -> None:
    """Anywhere in the file's description, or in this project's own inside it."""
    outer, tensors = split(whole.read_bytes())
    inner = json.loads(outer["__metadata__"]["turboquant-calibration"])
    if data.draw(st.booleans()):
        inner = changed(inner, data.draw(st.sampled_from(places(inner))), to)
        outer["__metadata__"]["turboquant-calibration"] = json.dumps(inner)
    else:
        outer = changed(outer, data.draw(st.sampled_from(places(outer))), to)
    described = json.dumps(outer).encode()
    path = whole.with_name("edited")
    path.write_bytes(len(described).to_bytes(8, "little") + described + tensors)
    try:
        identity, found = load(path, 0)
    except CalibrationFileError as error:
        assert str(error)
        return
    # What could be read is either what was written, or says that it is something else, or differs where nothing is compared.
    _, original = load(whole, 0)
    if mismatch(identity, IDENTITY) is None:
        assert set(found) >= set(LAYERS)
        for name in LAYERS:
            pairs = zip(found[name].tensors, original[name].tensors, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs) and found[name].bucket == original[name].bucket


def basis_of(kind: str, d: int) -> KeyBasis | None:
    return random_basis(2, d, torch.Generator().manual_seed(d)) if kind == "basis" else None


@pytest.mark.parametrize("preset", [*PRESETS, LOSSLESS_PRESET])
@pytest.mark.parametrize(("head_size", "kind"), ((64, "plain"), (80, "plain"), (128, "basis"), (576, "plain")))
@FEW
@given(seed=st.integers(0, 2**31))
def test_any_bytes_are_a_page(preset: str, head_size: int, kind: str, seed: int) -> None:
    """Decoded without error; not finite only where a stored number is not; other blocks do not matter."""
    fmt, generator = page_format(preset, head_size), torch.Generator().manual_seed(seed)
    cache = torch.randint(0, 256, (3, 2, 16, fmt.slot_bytes), dtype=torch.uint8, generator=generator)
    blocks, starts, basis = torch.tensor([1]), torch.tensor([16]), basis_of(kind, head_size)
    sides = reference.load(cache, blocks, fmt, basis, starts)
    assert all(side.shape == (16, 2, head_size) for side in sides)
    other = torch.randint(0, 256, cache.shape, dtype=torch.uint8, generator=generator)
    other[1] = cache[1]
    for side, again in zip(sides, reference.load(other, blocks, fmt, basis, starts), strict=True):
        assert torch.equal(side.nan_to_num(7), again.nan_to_num(7))
    scalars = cache[1].view(2, -1)[:, fmt.scalar_base : fmt.unit_bytes].contiguous().view(torch.float16)
    if fmt.preset.key.scaled and fmt.preset.value.scaled and scalars.isfinite().all():
        assert all(side.isfinite().all() for side in sides)
