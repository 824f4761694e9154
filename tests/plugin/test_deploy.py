"""deploy/ against this vLLM: every command line parses, and all metrics of the Grafana board exist."""

from __future__ import annotations

import pytest

from ..deploy import board
from ..deploy.commands import SERVERS, Server
from .conftest import EngineConfig


@pytest.mark.parametrize("server", SERVERS, ids=str)
def test_command_line(server: Server, plugin: None) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    model, *options = server.arguments
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", model, *options])
    assert parsed.kv_cache_dtype == server.dtype
    assert parsed.tensor_parallel_size * parsed.pipeline_parallel_size == parsed.nnodes * server.gpus


def test_engine_options_of_ray_serve(plugin: None) -> None:
    """Ray Serve hands its options to vLLM by name."""
    import dataclasses

    from vllm.engine.arg_utils import AsyncEngineArgs

    from ..deploy.commands import ray_engine_options

    options = ray_engine_options()
    assert options["kv_cache_dtype"] == "turboquant"
    assert set(options) <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def test_metrics_of_the_board(engine_config: EngineConfig) -> None:
    import prometheus_client
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    config = engine_config()
    PrometheusStatLogger(config, [0]).log_engine_initialized()
    scrape = prometheus_client.generate_latest().decode()
    assert 'cache_dtype="turboquant"' in scrape
    board.check(scrape)
