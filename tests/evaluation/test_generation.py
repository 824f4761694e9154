"""Agreement of greedy texts: equal to greedy decoding from the cache itself, token by token."""

import torch

from vllm_turboquant.evaluation.codecs import Case
from vllm_turboquant.evaluation.generation import agreements

from .conftest import VOCABULARY

TOKENS = 24


def greedy(model, prompt, case, tokens):
    """The text that decoding from the cache gives, all of it computed anew for every token."""
    ids = prompt
    for _ in range(tokens):
        ids = torch.cat([ids, model.logits(model.hidden(ids, case)[-1:]).argmax(-1).cpu()])
    return ids[len(prompt) :]


def test_agreement_is_that_of_greedy_decoding(model, seed):
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(VOCABULARY, (n,), generator=g) for n in (5, 33, 70)]
    cases = [Case("auto"), Case("turboquant-k8v4"), Case("turboquant-k2v2")]
    found = agreements(model, cases, prompts, TOKENS)
    for case, agreement in zip(cases, found, strict=True):
        for prompt, same in zip(prompts, agreement.same, strict=True):
            exact, own = (greedy(model, prompt, each, TOKENS) for each in (Case("auto"), case))
            differ = (exact != own).nonzero()
            assert same == (int(differ[0]) if len(differ) else TOKENS)
    assert found[0].same == [TOKENS] * 3 and found[0].top1 == 1.0
    # It can fail: two bits lose the text at once or soon, and not all is lost after that.
    assert sum(found[2].same) < sum(found[0].same) and 0 < found[2].top1 < 1
