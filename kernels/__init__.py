"""Bytes and arithmetic of the TurboQuant KV cache. Imports nothing from vLLM."""
