"""The note that the project started from, step by step through this codec: same matrix, codebook and data.

The note's own arithmetic is written out here in plain torch; every step of ours must give its values.
"""

import math

import torch

from vllm_turboquant.kernels.codec import dequantise, quantise, sketch, unsketch

# fp32 sums of at most 8 terms in another order
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
NOTE_CODEBOOK = torch.tensor([-0.75, -0.25, 0.25, 0.75])
LEVELS = (0.25, 0.75)  # the same codebook as sign and magnitude


def note_data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, the picked key, the rotation and the query of the note: its seed, its order of draws."""
    torch.manual_seed(0)
    hidden = torch.randn(12, 8)
    projection = torch.randn(8, 4)
    keys = hidden @ projection
    pi = 0.5 * torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    return keys, keys[5].clone(), pi, torch.randn(4)


def note_index(codes: torch.Tensor) -> torch.Tensor:
    """Our sign-magnitude codes as the note's positions in the ascending codebook."""
    negative, magnitude = codes // 2, codes % 2
    return torch.where(negative == 1, 1 - magnitude, 2 + magnitude)


def test_rotation_of_the_note_is_orthogonal_and_hadamard():
    from vllm_turboquant.kernels.rotation import hadamard

    _, x, pi, _ = note_data()
    torch.testing.assert_close(pi.T @ pi, torch.eye(4))
    # The note's matrix is Sylvester's.
    torch.testing.assert_close(hadamard(4).float(), pi)
    torch.testing.assert_close(hadamard(4).float() @ x, pi @ x, **TOLERANCE)


def test_every_step_gives_the_values_of_the_note():
    _, x, pi, q = note_data()
    y = pi @ x

    index = (y[:, None] - NOTE_CODEBOOK[None, :]).abs().argmin(-1)
    codes = quantise(y, LEVELS)
    assert torch.equal(note_index(codes).long(), index)

    y_hat = NOTE_CODEBOOK[index]
    assert torch.equal(dequantise(codes, LEVELS, torch.float32), y_hat)

    x_hat = pi.T @ y_hat
    ours = dequantise(codes, LEVELS, torch.float32) @ pi
    torch.testing.assert_close(ours, x_hat, **TOLERANCE)

    r = x - x_hat
    gamma = r.norm()
    negative, norm = sketch(x - ours, pi)
    torch.testing.assert_close(norm, gamma, **TOLERANCE)

    projected = pi @ r
    qjl = torch.sign(projected)
    qjl[qjl == 0] = 1.0
    assert torch.equal(1.0 - 2.0 * negative.float(), qjl)

    r_hat = math.sqrt(math.pi / 2.0) / 4 * gamma * (pi.T @ qjl)
    torch.testing.assert_close(unsketch(negative, norm, pi), r_hat, **TOLERANCE)

    final = ours + unsketch(negative, norm, pi)
    torch.testing.assert_close(final, x_hat + r_hat, **TOLERANCE)

    torch.testing.assert_close(((x - ours) ** 2).mean(), ((x - x_hat) ** 2).mean(), **TOLERANCE)
    torch.testing.assert_close(((x - final) ** 2).mean(), ((x - x_hat - r_hat) ** 2).mean(), **TOLERANCE)
    torch.testing.assert_close(q @ ours, q @ x_hat, **TOLERANCE)
    torch.testing.assert_close(q @ final, q @ (x_hat + r_hat), **TOLERANCE)


def test_a_zero_projection_counts_as_positive():
    negative, _ = sketch(torch.zeros(1, 4), torch.eye(4))
    assert not negative.any()


def test_all_keys_of_the_note_quantise_alike():
    keys, _, pi, _ = note_data()
    y = keys @ pi.T
    index = (y[..., None] - NOTE_CODEBOOK).abs().argmin(-1)
    assert torch.equal(note_index(quantise(y, LEVELS)).long(), index)
