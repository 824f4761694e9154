"""The file that keeps a calibration: what it was made for, and the key basis of every layer and tensor-parallel rank."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .kernels import private
from .kernels.basis import MAX_BUCKETS, KeyBasis

FORMAT = 2  # to be raised when what tensors mean changes, the rotation and the closed form of the transform included
_HEADER = "turboquant-calibration"
_PARTS = ("forward", "inverse", "means", "sink_mean")
# The product of a matrix and its inverse, both rounded to fp32, of a transform whose condition is at most 1e3 (shrinkage).
_INVERSE = 1e-2


class CalibrationFileError(Exception):
    """Why a file cannot be used: half a sentence, to be continued by the remedy."""


@dataclass(frozen=True)
class Identity:
    """What a calibration depends on.

    architecture, hidden_size, vocabulary, model_layers, dtype: of the model's configuration. fingerprints: of the loaded weights,
    by tensor-parallel rank. layers: calibrated layers to ``[KV heads of a rank, head size]``. positions: the served length
    that the statistics cover. recipe: what the model was run on. model, revision: as the user named them, not compared.
    """

    model: str
    revision: str | None
    architecture: str
    hidden_size: int
    vocabulary: int
    model_layers: int
    dtype: str
    fingerprints: tuple[str, ...]
    layers: dict[str, tuple[int, int]]
    positions: int
    recipe: dict[str, int]

    @property
    def ranks(self) -> int:
        return len(self.fingerprints)

    def file_name(self) -> str:
        """Readable, and different for everything that makes another calibration."""
        digest = hashlib.sha256(json.dumps({"format": FORMAT} | asdict(self), sort_keys=True).encode()).hexdigest()
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", self.model.rstrip("/").rpartition("/")[2])
        return f"{slug}-{digest[:16]}.safetensors"


def configured_identity(config: Any, ranks: int) -> Identity:
    """What vLLM's ModelConfig tells before weights are loaded; fingerprints are empty and there are no layers."""
    return Identity(
        model=config.model,
        revision=config.revision,
        architecture=config.architecture,
        hidden_size=config.get_hidden_size(),
        vocabulary=config.get_vocab_size(),
        model_layers=config.get_total_num_hidden_layers(),
        dtype=str(config.dtype).removeprefix("torch."),
        fingerprints=("",) * ranks,
        layers={},
        positions=config.max_model_len,
        recipe={},
    )


def fingerprint(model: torch.nn.Module) -> str:
    """Of names, shapes, dtypes and sampled bytes of all parameters, quantised ones included; copies a few hundred kB.

    Strides between samples are odd, so that they meet every byte of an element: the low ones may be 0 throughout.
    """
    digest = hashlib.sha256()
    samples: list[torch.Tensor] = []
    for name, parameter in sorted(model.named_parameters()):
        for part in _plain(parameter.detach()):
            digest.update(f"{name} {tuple(part.shape)} {part.dtype}\n".encode())
            storage = part.untyped_storage()
            start = part.storage_offset() * part.element_size()
            count = min(part.numel() * part.element_size(), storage.nbytes() - start)
            raw = torch.empty(0, dtype=torch.uint8, device=part.device).set_(storage, start, (count,))
            samples.append(raw[:: (count // 1024) | 1])
    for device in sorted({str(sample.device) for sample in samples}):
        digest.update(torch.cat([s for s in samples if str(s.device) == device]).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with memory of their own behind a wrapper, as quantisation libraries make them."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(tensor, name))]


def save(path: Path, identity: Identity, bases: list[Mapping[str, KeyBasis]]) -> None:
    """Writes all ranks' bases, atomically: readers see the file before or after. bases: by rank, layer to basis. OSError."""
    tensors = {
        f"{rank}.{layer}.{part}": getattr(basis, part).cpu()
        for rank, own in enumerate(bases)
        for layer, basis in own.items()
        for part in _PARTS
    }
    tensors |= {
        f"{rank}.{layer}.bucket": torch.tensor([basis.bucket]) for rank, own in enumerate(bases) for layer, basis in own.items()
    }
    header = {"format": FORMAT, "checksum": _checksum(tensors), "identity": asdict(identity)}
    private.write(path, lambda scratch: save_file(tensors, scratch, metadata={_HEADER: json.dumps(header)}))


def read_identity(path: Path) -> Identity:
    """What a file was made for. Raises CalibrationFileError."""
    return _read(path, rank=None)[0]


def load(path: Path, rank: int) -> tuple[Identity, dict[str, KeyBasis]]:
    """What a file was made for, and one rank's bases, on the CPU. Raises CalibrationFileError for a file that is not whole."""
    identity, tensors = _read(path, rank)
    bases: dict[str, KeyBasis] = {}
    for layer, (heads, d) in identity.layers.items():
        parts = [tensors.get(f"{rank}.{layer}.{part}") for part in (*_PARTS, "bucket")]
        shapes = [None if p is None else tuple(p.shape) for p in parts]
        buckets = shapes[2][1] if shapes[2] is not None and len(shapes[2]) == 3 else 0
        whole = [(heads, d, d), (heads, d, d), (heads, buckets, d), (heads, d), (1,)]
        if shapes != whole or not 1 <= buckets <= MAX_BUCKETS:
            raise CalibrationFileError(f"lacks tensors of layer {layer}")
        forward, inverse, means, sink_mean, bucket = (part for part in parts if part is not None)
        basis = KeyBasis(forward, inverse, means, sink_mean, int(bucket))
        finite = basis.means.isfinite().all() and basis.sink_mean.isfinite().all()
        if not finite or not (basis.forward @ basis.inverse - torch.eye(d)).abs().max() < _INVERSE:
            raise CalibrationFileError(f"holds no invertible transform of layer {layer}")
        bases[layer] = basis
    return identity, bases


def _read(path: Path, rank: int | None) -> tuple[Identity, dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            if header is None:
                raise CalibrationFileError("is not a calibration file of vllm-turboquant")
            if header["format"] != FORMAT:
                raise CalibrationFileError(f"has format {header['format']}, allowed is {FORMAT}")
            identity, checksum = _identity(header["identity"]), header["checksum"]
            tensors = {} if rank is None else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise CalibrationFileError(f"cannot be read ({error})") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CalibrationFileError(f"has a broken header ({error})") from error
    if rank is not None and _checksum(tensors) != checksum:
        raise CalibrationFileError("is damaged: its checksum does not match")
    return identity, tensors


def _identity(fields: dict[str, Any]) -> Identity:
    """From JSON. Raises AttributeError, KeyError, TypeError or ValueError where something is of another kind."""
    layers = {name: (heads, d) for name, (heads, d) in fields["layers"].items()}
    found = Identity(**fields | {"layers": layers, "fingerprints": tuple(fields["fingerprints"])})
    strings = (
        found.model,
        found.architecture,
        found.dtype,
        *found.fingerprints,
        *([] if found.revision is None else [found.revision]),
    )
    sizes = [number for shape in layers.values() for number in shape]
    numbers = found.hidden_size, found.vocabulary, found.model_layers, found.positions, *sizes, *found.recipe.values()
    if not all(type(x) is str for x in strings) or not all(type(x) is int for x in numbers):
        raise TypeError("a string or a number is none")
    return found


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # Flat: what has no dimension cannot be seen as bytes.
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def mismatch(found: Identity, wanted: Identity) -> str | None:
    """Why a file made for ``found`` does not serve ``wanted``; None where it does.

    More layers and a longer served length in the file are welcome. Empty fingerprints, and layers then, are not compared:
    before weights are loaded nobody knows them.
    """
    made = f"was made for {found.model}"
    for name in ("architecture", "hidden_size", "vocabulary", "model_layers"):
        if getattr(found, name) != getattr(wanted, name):
            return f"{made}, another model ({name} {getattr(found, name)} instead of {getattr(wanted, name)})"
    if found.dtype != wanted.dtype:
        return f"{made} with --dtype {found.dtype} instead of {wanted.dtype}"
    if wanted.positions > found.positions:
        return f"{made} at up to {found.positions} tokens, {wanted.positions} are to be served"
    if found.ranks != wanted.ranks:
        return f"{made} at tensor parallel size {found.ranks} instead of {wanted.ranks}"
    if not any(wanted.fingerprints):
        return None
    if found.fingerprints != wanted.fingerprints:
        return f"{made} with other weights"
    missing = [name for name, shape in wanted.layers.items() if found.layers.get(name) != shape]
    return f"{made} and lacks layer {missing[0]}" if missing else None
