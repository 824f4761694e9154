"""The CUDA decode's build, without a GPU: every family of variants for every architecture, and its constants."""

import ctypes
import re

import pytest
import torch

from vllm_turboquant.kernels.codebook import LEVELS
from vllm_turboquant.kernels.cuda import context, driver, launch, nvrtc, store, turn
from vllm_turboquant.kernels.cuda.driver import Device
from vllm_turboquant.kernels.cuda.macros import e4m3, half, key_strides, sign_words
from vllm_turboquant.kernels.cuda.programs import ContextVariant, StoreVariant, TurnVariant
from vllm_turboquant.kernels.cuda.variant import BITS, HEAD_SIZES, Options, supported
from vllm_turboquant.kernels.format import LOSSLESS_PRESET, PRESETS, UNIT_TOKENS, page_format
from vllm_turboquant.kernels.rotation import hadamard, rotation

COVERED = [name for name, preset in PRESETS.items() if (preset.key.bits, preset.value.bits) in BITS and not preset.key.sketch]
# Multiprocessors and shared memory of A100, RTX 4090, H100, B200 and RTX 5090.
DEVICES = {
    80: Device(80, 108, 167936, 166912),
    89: Device(89, 128, 102400, 101376),
    90: Device(90, 132, 233472, 232448),
    100: Device(100, 148, 233472, 232448),
    120: Device(120, 170, 102400, 101376),
}
PLAIN = ()  # no window, soft cap, sinks or key basis
BASIS = (False, False, 0, 1)
BUCKETS = (False, False, 0, 16)
RECENT = (False, False, 0, 16, True)


def families():
    """(arch, preset, head size, bf16, group, query length, options): each value of each axis, not their product."""
    for head_size in HEAD_SIZES:
        for preset in COVERED:
            yield 90, preset, head_size, True, 4, 1, PLAIN
        yield 90, "turboquant", head_size, False, 8, 1, PLAIN
        yield 90, "turboquant", head_size, True, 16, 1, PLAIN
        yield 90, "turboquant", head_size, True, 4, 2, (True, True, 32)
        yield 90, "turboquant", head_size, True, 4, 1, BASIS
        yield 90, "turboquant", head_size, True, 4, 1, BUCKETS
        yield 90, "turboquant-k3v3", head_size, True, 4, 1, RECENT
    yield 90, "turboquant-k3v3", 128, False, 16, 1, BUCKETS
    yield 90, "turboquant-k2v2", 128, True, 4, 4, (True, True, 16, 0, True)
    for arch in (80, 89, 100, 120):
        for head_size in (64, 128):
            yield arch, "turboquant", head_size, True, 4, 1, PLAIN
        for preset in COVERED:  # heads of 256 dims fill the register file
            yield arch, preset, 256, True, 4, 1, PLAIN
        yield arch, "turboquant", 256, True, 4, 1, BUCKETS
        yield arch, "turboquant-k3v3", 128, False, 8, 8, (True, True, 16)
        yield arch, "turboquant", 128, True, 4, 1, BUCKETS
        yield arch, "turboquant-k2v2", 128, True, 4, 1, RECENT


def compile_without_spills(variant, arch):
    """The compiler's log of a cubin none of whose registers goes to memory."""
    cubin, log = nvrtc.compile_cubin(variant, arch, ("--ptxas-options=-v",))
    assert cubin.startswith(b"\x7fELF")
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")], log
    return log


@pytest.mark.parametrize(("arch", "preset", "head_size", "bf16", "group", "query_len", "options"), list(families()))
def test_compiles_without_spills(arch, preset, head_size, bf16, group, query_len, options):
    pytest.importorskip("cuda.bindings.nvrtc")
    fmt = page_format(preset, head_size)
    variant = launch.choose_variant(DEVICES[arch], Options(fmt, 32, bf16, group, query_len, *options))
    compile_without_spills(variant, arch)
    print(f"sm_{arch} {preset} d={head_size} {options}: {variant.tuning}")


CONTEXT_FAMILIES = [
    *((90, preset, head_size, True, False) for preset in COVERED for head_size in HEAD_SIZES),
    *((90, "turboquant", head_size, False, basis) for head_size in HEAD_SIZES for basis in (False, True)),
    *((arch, "turboquant", head_size, True, False) for arch in (80, 89, 100, 120) for head_size in HEAD_SIZES),
    *((arch, "turboquant-k3v3", head_size, True, True) for arch in DEVICES for head_size in (128, 256)),
]


@pytest.mark.parametrize(("arch", "preset", "head_size", "bf16", "basis"), CONTEXT_FAMILIES)
def test_the_context_loader_compiles_without_spills(arch, preset, head_size, bf16, basis):
    pytest.importorskip("cuda.bindings.nvrtc")
    variant = ContextVariant(page_format(preset, head_size), 32, bf16, basis)
    log = compile_without_spills(variant, arch)
    assert re.findall(r"(\d+) bytes stack frame", log) == ["0"], log


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize(("buckets", "few"), ((1, True), (64, True), (64, False)))
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_the_turn_of_queries_compiles_without_spills(head_size, buckets, few, arch):
    pytest.importorskip("cuda.bindings.nvrtc")
    variant = TurnVariant(page_format("turboquant", head_size), True, buckets, few)
    compile_without_spills(variant, arch)


STORE_FAMILIES = [
    *((90, preset, head_size, basis) for preset in COVERED for head_size in HEAD_SIZES for basis in (False, True)),
    *((arch, "turboquant-k4v3", head_size, True) for arch in (80, 89, 100, 120) for head_size in HEAD_SIZES),
]


@pytest.mark.parametrize(("arch", "preset", "head_size", "basis"), STORE_FAMILIES)
def test_the_store_compiles_without_spills(arch, preset, head_size, basis):
    pytest.importorskip("cuda.bindings.nvrtc")
    variant = StoreVariant(page_format(preset, head_size), 32, arch != 80, basis)
    compile_without_spills(variant, arch)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("preset", COVERED)
def test_strides_are_the_formats(preset, head_size):
    """The addresses that codes.cuh forms, against the format: keys by strides, values by lane."""
    fmt = page_format(preset, head_size)
    run = 32 if head_size >= 128 else 16
    for plane in fmt.key_planes:
        at = key_strides(plane)
        for token in range(UNIT_TOKENS):
            for panel in range(max(1, head_size // 128)):
                for t in range(4):
                    first = panel * 128 + t * run  # the lane's first dim; words of the 1-bit plane hold 32
                    word = at["BASE"] + panel * at["PANEL"] + token * at["TOKEN"] + t * run // plane.dims * plane.word_bytes
                    assert word == plane.byte_offset(token, first // plane.dims * plane.word_bytes), (plane.bits, token, t)
    for plane in fmt.value_planes:
        eighth = head_size // 8 * plane.bits // 8
        for token in range(UNIT_TOKENS):
            lane_pair, odd, part = token % 8 // 2, token % 2, token // 8
            for g in range(8):
                for byte in range(eighth):
                    lane = 4 * g + lane_pair
                    inside = part * 64 * eighth + lane * 2 * eighth + odd * eighth + byte
                    if 2 * eighth > 16:
                        inside = (2 * part + odd) * 512 + lane * 16 + byte
                    assert plane.offset + inside == plane.byte_offset(token, g * eighth + byte)
    macros = launch.choose_variant(DEVICES[90], Options(fmt, 16, True, 4, 1)).macros()
    for token in range(UNIT_TOKENS):
        for group in range(fmt.groups):
            for kind in range(2):
                at = int(macros["SCALE_BASE"]) + group * int(macros["SCALE_GROUP_BYTES"])
                assert at + token % 8 * 8 + kind * 4 + token // 8 * 2 == fmt.scalar_offset(token, group, kind)


def test_levels_are_exact():
    for levels in LEVELS.values():
        for level in levels:
            assert torch.tensor([half(level)], dtype=torch.int16).view(torch.float16).item() == level
            assert torch.tensor([e4m3(level)], dtype=torch.uint8).view(torch.float8_e4m3fn).item() == level
            assert torch.tensor([e4m3(-level)], dtype=torch.uint8).view(torch.float8_e4m3fn).item() == -level


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_signs_are_the_rotations(head_size):
    words = [int(word.rstrip("u"), 16) for word in sign_words(head_size)]
    signs = torch.tensor([-1.0 if words[i // 32] >> i % 32 & 1 else 1.0 for i in range(head_size)], dtype=torch.float64)
    assert torch.equal(hadamard(head_size) * signs, rotation(head_size))


def test_supported():
    fmt = page_format("turboquant", 128)
    assert supported(fmt, 16, 4, 1) and supported(fmt, 64, 16, 8)
    assert not supported(fmt, 48, 4, 1) and not supported(fmt, 16, 17, 1) and not supported(fmt, 16, 4, 9)
    assert not supported(page_format("turboquant", 96), 16, 4, 1)
    assert not supported(page_format("turboquant", 256, 64), 16, 4, 1)  # a model with heads of 64 and 256 dims
    for preset in ("turboquant-k8v4", "turboquant-k4v4-qjl"):
        assert not supported(page_format(preset, 128), 16, 4, 1)
    assert not supported(page_format(LOSSLESS_PRESET, 128), 16, 4, 1)


@pytest.mark.parametrize(
    ("file", "mirror", "size"),
    (
        ("params", launch._Params, 19 * 8 + 10 * 4),
        ("context", context._Params, 13 * 8 + 4 * 4),
        ("store", store._Params, 20 * 8 + 4 * 4),
        ("turn", turn._Params, 5 * 8 + 4 * 4),
    ),
)
def test_parameters_mirror_the_struct(file, mirror, size):
    assert ctypes.sizeof(mirror) == size
    text = nvrtc.source(file)
    body = re.sub(r"(//|#)[^\n]*", "", text[text.index("struct Params {") + 15 : text.index("};")])
    names = [name.strip(" *\n") for line in body.split(";") for name in re.sub(r"^\s*(const )?\w+ ", "", line).split(",")]
    assert [name for name in names if name] == [name for name, _ in mirror._fields_]


def test_cubins_are_kept(tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    variant = launch.choose_variant(DEVICES[90], Options(page_format("turboquant", 64), 16, True, 1, 1))
    cubin = nvrtc.load_cubin(variant, 90)
    (file,) = (tmp_path / "turboquant" / "cubin").iterdir()
    assert file.read_bytes()[32:] == cubin
    monkeypatch.setattr(nvrtc, "compile_cubin", None)
    assert nvrtc.load_cubin(variant, 90) == cubin


def test_the_compilers_empty_log_goes_into_memory_of_its_own():
    """Into a shared object of one byte, it once turned spaces of other output into NULs."""
    pytest.importorskip("cuda.bindings.nvrtc")
    _, log = nvrtc.compile_cubin(ContextVariant(page_format("turboquant", 64), 16, True), 90)
    assert log == "" and ord(bytes([32])) == 32


def test_a_machine_without_nvrtc_says_so_once(monkeypatch, caplog):
    def missing(*_):
        raise nvrtc.CudaError("NVRTC is not usable: gone")

    driver._warn.cache_clear()
    monkeypatch.setattr(launch, "_kernel", missing)
    arguments = (torch.device("cuda", 0), page_format("turboquant", 128), 16, torch.bfloat16, 4, 1)
    assert not launch.prepare(*arguments) and not launch.prepare(*arguments)
    assert [record.message for record in caplog.records] == [
        "The CUDA decode is not used, the slower portable one is: NVRTC is not usable: gone"
    ]


@pytest.mark.parametrize(("module", "name"), ((context, "context loader"), (store, "store")))
def test_so_do_the_other_kernels(module, name, monkeypatch, caplog):
    def missing(*_):
        raise nvrtc.CudaError("NVRTC is not usable: gone")

    driver._warn.cache_clear()
    monkeypatch.setattr(module, "_function", missing)
    card, fmt = torch.device("cuda", 0), page_format("turboquant", 128)
    assert not module.prepare(card, fmt, 16, torch.bfloat16) and not module.prepare(card, fmt, 16, torch.bfloat16)
    # Not covered, so nothing to warn of.
    assert not module.prepare(card, fmt, 16, torch.float32) and not module.prepare(card, fmt, 48, torch.bfloat16)
    assert not module.prepare(torch.device("cpu"), fmt, 16, torch.bfloat16)
    assert not module.prepare(card, page_format("turboquant-k8v4", 128), 16, torch.bfloat16)
    assert [record.message for record in caplog.records] == [
        f"The CUDA {name} is not used, the slower portable one is: NVRTC is not usable: gone"
    ]
