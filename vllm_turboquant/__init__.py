"""TurboQuant KV cache for stock vLLM: ``vllm serve MODEL --kv-cache-dtype turboquant``."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of vLLM's ``vllm.general_plugins`` group; safe to call in every process, any number of times.

    Never raises: with a vLLM that it does not support it logs one line and changes nothing.
    """
    from .compat import activate

    activate()


__all__ = ["__version__", "register"]
