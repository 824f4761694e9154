"""Connectors that keep or move pages: which fit, and whose pages a shared folder holds."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from .config import FLAG, OFF, TurboQuantSettings, refuse
from .kernels.format import FORMAT_VERSION

# vLLM's own, which finds blocks by the tokens in them alone.
SHARED_STORAGE = ("ExampleConnector", "SharedStorageConnector")
MARK = "turboquant.json"
# Those that move a block's bytes whatever they are, and either keep them to one server or tell other servers' pages apart.
KNOWN = (
    *SHARED_STORAGE,
    *("NixlConnector", "NixlPullConnector", "NixlPushConnector"),
    *("OffloadingConnector", "SimpleCPUOffloadConnector", "MultiConnector"),
)


def configs(config: Any) -> list[dict[str, Any]]:
    """Name, None without, and extra settings of each connector in a KVTransferConfig or its dict, those inside a MultiConnector
    included."""
    if config is None:
        return []
    get = config.get if isinstance(config, dict) else lambda key: getattr(config, key, None)
    extra = get("kv_connector_extra_config") or {}
    own = {"name": get("kv_connector"), "extra": extra}
    return [own, *(found for one in extra.get("connectors") or [] for found in configs(one))]


def names(config: Any) -> list[str]:
    return [one["name"] for one in configs(config) if one["name"]]


def tiers(config: Any) -> list[str]:
    """Types of the tiers to which native offloading hands pages on; --kv-offloading-size needs no connector's name for it."""
    listed = [tier for one in configs(config) for tier in one["extra"].get("secondary_tiers") or []]
    return [str(tier.get("type")) for tier in listed if isinstance(tier, dict)]


def check(dtype: str, args: Any) -> None:
    """Raises TurboQuantError for connectors not known to carry compressed pages, and for tiers that other servers read."""
    for tier in tiers(args.kv_transfer_config):
        # Files and objects are named by tokens and dtype: pages of another calibration would be read as one's own.
        raise refuse(
            FLAG,
            dtype,
            f"cannot be combined with --kv-transfer-config's secondary tier {tier}, which finds pages whatever their calibration",
            "drop secondary_tiers or use --kv-cache-dtype auto",
        )
    for connector in names(args.kv_transfer_config):
        if "lmcache" in connector.lower():
            raise refuse(
                FLAG,
                dtype,
                f"cannot be combined with --kv-transfer-config's {connector}, which computes page sizes of its own",
                "use another connector or --kv-cache-dtype auto",
            )
        if connector not in KNOWN:
            raise refuse(
                FLAG,
                dtype,
                f"cannot be combined with --kv-transfer-config's {connector}, which may give one server pages of another's "
                f"calibration or preset; allowed are {', '.join(KNOWN)}",
                "use one of them or --kv-cache-dtype auto",
            )
    if args.kv_offloading_size is not None and args.kv_offloading_backend == "lmcache":
        raise refuse(
            FLAG,
            dtype,
            "cannot be combined with --kv-offloading-backend lmcache, which computes page sizes of its own; allowed is native",
            "use --kv-offloading-backend native",
        )


def claim_folders(dtype: str, args: Any, model: Any, settings: TurboQuantSettings) -> None:
    """Marks folders of shared storage with what its pages are; TurboQuantError where they are something else."""
    file = settings.calibration_file
    own = {
        "kv_cache_dtype": dtype,
        "format": FORMAT_VERSION,
        "model": model.model,
        "model_dtype": str(model.dtype).removeprefix("torch."),
        "block_size": args.block_size,
        "tensor_parallel_size": args.tensor_parallel_size,
        "calibration": OFF if file is None else hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    for one in configs(args.kv_transfer_config):
        if one["name"] in SHARED_STORAGE:
            # The folder that vLLM takes where none is named.
            _claim(dtype, Path(one["extra"].get("shared_storage_path", "/tmp")), own)


def _claim(dtype: str, folder: Path, own: dict[str, Any]) -> None:
    remedy = "name an empty folder as shared_storage_path"
    try:
        found = json.loads((folder / MARK).read_text())
    except FileNotFoundError:
        if any(re.fullmatch("[0-9a-f]{32,}", file.parent.name) for file in folder.glob("*/*.safetensors")):
            raise refuse(FLAG, dtype, f"shared storage {folder} holds pages of another dtype", remedy) from None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text(json.dumps(own))
        return
    except (OSError, ValueError) as error:
        raise refuse(FLAG, dtype, f"{folder / MARK} cannot be read ({error})", remedy) from error
    if not isinstance(found, dict):
        raise refuse(FLAG, dtype, f"{folder / MARK} is not what a server of this plugin writes", remedy)
    other = [key for key in own if found.get(key) != own[key]]
    if other:
        reason = f"shared storage {folder} holds pages of {other[0]} {found.get(other[0])}, not {own[other[0]]}"
        raise refuse(FLAG, dtype, reason, remedy)
