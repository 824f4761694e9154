"""Rotations for every head size: orthogonal, mixing, and the same in every process."""

import hashlib
import subprocess
import sys

import pytest
import torch

from vllm_turboquant.kernels.rotation import rotation, sketch_matrix

HEAD_SIZES = (64, 80, 96, 112, 128, 160, 192, 256, 512, 576)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("seed", (0, 1))
def test_orthogonal(head_size, seed):
    matrix = rotation(head_size, seed)
    identity = torch.eye(head_size, dtype=torch.float64)
    assert (matrix @ matrix.T - identity).abs().max() < 1e-6
    assert (matrix.T @ matrix - identity).abs().max() < 1e-6


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_no_coordinate_keeps_its_energy(head_size):
    """Every entry is at most sqrt(2 / d): a lone outlier is spread over the whole head."""
    assert rotation(head_size).abs().max() <= (2 / head_size) ** 0.5 + 1e-12


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_seeds_give_different_rotations(head_size):
    assert not torch.equal(rotation(head_size, 0), rotation(head_size, 1))


def test_the_sketch_is_standard_normal():
    entries = sketch_matrix(128).flatten()
    n = entries.numel()
    # Five standard errors of the mean and of the second moment of n normal draws; the draws are fixed.
    assert entries.mean().abs() < 5 / n**0.5
    assert (entries.square().mean() - 1).abs() < 5 * (2 / n) ** 0.5


def test_another_process_draws_the_same():
    """Tensor-parallel ranks, restarts and prefill/decode peers must agree on every bit."""
    program = (
        "import hashlib; from vllm_turboquant.kernels.rotation import rotation, sketch_matrix; h = hashlib.sha256();"
        "[h.update(m.numpy().tobytes()) for m in (rotation(96), rotation(128), sketch_matrix(64))]; print(h.hexdigest())"
    )
    here = hashlib.sha256()
    for matrix in (rotation(96), rotation(128), sketch_matrix(64)):
        here.update(matrix.numpy().tobytes())
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here.hexdigest()
