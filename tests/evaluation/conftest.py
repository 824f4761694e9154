"""A random model whose keys and attention are not those of a random model."""

import pytest
import torch

from vllm_turboquant.evaluation.model import EvaluatedModel

LAYERS, HEADS, KV_HEADS, D, VOCABULARY = 3, 4, 2, 32, 300


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text, add_special_tokens=True):
        return ([0] if add_special_tokens else []) + [1 + ord(c) % (VOCABULARY - 1) for c in text]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random, but with keys that have a constant part and attention that is not flat."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("random")
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * D,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        initializer_range=0.15,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)  # a model is a fixture, not a draw: bounds below are of this one
    built = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for layer in built.model.layers:
            layer.self_attn.k_proj.bias.normal_(std=3.0)
    built.save_pretrained(folder)
    patch = pytest.MonkeyPatch()
    patch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: Letters())
    yield EvaluatedModel(str(folder), "cpu")
    patch.undo()
