"""The context loaders where only a GPU has the memory or the graph; their numbers are held in test_decode.py."""

import pytest
import torch

from vllm_turboquant.kernels.format import page_format

from ..kernels.oracle import make_batch

pytestmark = pytest.mark.gpu
FMT = page_format("turboquant", 128)


@pytest.fixture(params=("portable", "cuda"))
def load_context(request):
    from vllm_turboquant.kernels import prefill
    from vllm_turboquant.kernels.cuda import context

    if request.param == "portable":
        return prefill.load_context
    assert context.prepare(torch.device("cuda", torch.cuda.current_device()), FMT, 32, torch.bfloat16)
    return context.load_context


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def test_pages_and_rows_beyond_four_gib(load_context, seed):
    near = make_batch(FMT, [100], [1], 2, 1, 32, seed, device="cuda")
    heads, size, slot = near.cache.shape[1:]
    pool = torch.empty(5 * 2**30, dtype=torch.uint8, device="cuda")
    far = pool.as_strided((5, heads, size, slot), (2**30 - 2**20, size * slot, slot, 1))
    far[1:] = near.cache[near.block_table[0, :4].long()]
    spread = [torch.empty(5 * 2**29, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    cases = (
        (
            near.cache,
            near.block_table[:, :4],
            [torch.empty(90, heads, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)],
        ),
        (far, ints(1, 2, 3, 4)[None], [side.as_strided((90, heads, 128), (28 * 2**20, 128, 1)) for side in spread]),
    )
    outs = []
    for cache, table, sides in cases:
        load_context(cache, table, ints(3), ints(0, 90), 90, *sides, FMT)
        outs.append(torch.cat(sides))
    assert torch.equal(*outs)


def test_ranges_are_read_when_a_graph_replays(load_context, seed):
    """Captured at one bound, replayed with other ranges below it."""
    batch = make_batch(FMT, [300, 300], [1, 1], 2, 1, 32, seed, device="cuda")
    first, starts = ints(0, 0), ints(0, 1, 2)
    key, value = (torch.zeros(200, 2, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def step():
        load_context(batch.cache, batch.block_table, first, starts, 100, key, value, FMT)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    first.copy_(ints(37, 200))
    starts.copy_(ints(5, 105, 182))
    graph.replay()
    replayed = key.clone(), value.clone()
    for side in (key, value):
        side[5:182] = float("nan")
    step()
    assert torch.equal(replayed[0], key) and torch.equal(replayed[1], value)
    assert torch.isfinite(key).all() and key[5:182].any(-1).all() and not key[182:].any()
