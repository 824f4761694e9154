"""Sleep mode: memory is unmapped under the kernels and comes back.

Alone on a card: vLLM asserts that less of it is in use while it sleeps, by whomever.
"""

import pytest

pytest.importorskip("vllm")

from ..server.shapes import VOCABULARY
from ..server.test_kinds import K4V4
from ..server.weights import real_weights
from .engines import LOSSLESS
from .tiny_engines import GRAPHS, check_near

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kv", (LOSSLESS, K4V4, "turboquant-k2v2"))
@pytest.mark.parametrize("level", (1, 2))
def test_sleep(level, kv, engines):
    """Pages are lost; tables, counters, calibrations and what graphs point at are as before."""
    real = {"model": real_weights(engines.root, VOCABULARY), "load_format": "auto"}
    graphs = {"enforce_eager": False, "compilation_config": GRAPHS, "max_model_len": 1024}  # keys stored by position
    job = {"then": [f"sleep at level {level}"] * 2, "given": False}
    engines.each("llama", job, dtypes=(kv,), enable_sleep_mode=True, **graphs, **real)
    found = engines.run()[kv]
    assert "GiB memory is still in use" in (engines.root / "engines.log").read_text()
    for answers in found["then"]:
        # The same steps over again, where no bit moved when it was measured; what rounding moves is 0.003 and more.
        assert check_near(answers, found["answers"]) < 0.001
