"""How sure a distribution over tokens is, and how far two of them are apart.

Both in nats and in float64: the divergence of two close layers is a difference of sums over a
whole vocabulary, which float32 would round away. No epsilon: 0 log 0 is 0 exactly (`torch.special`
has it so), hence a token that is ruled out adds nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = math.log(2)  # of the Jensen-Shannon divergence, nats


def probabilities(logits: Tensor) -> Tensor:
    """softmax over the vocabulary, float64 [..., vocabulary]; a logit of -inf gives 0."""
    return torch.softmax(logits.double(), dim=-1)


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy H(p) of distributions [..., vocabulary], in nats, [...].

    Between 0 and ln(vocabulary). NaN where a probability is NaN.

    Source: shared reference of seed 003 (H of the full-vocabulary next-token distribution).
    """
    found: Tensor = torch.special.entr(p).sum(dim=-1)
    return found


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two distributions [..., vocabulary], in nats, [...].

    KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2, as H(m) - (H(p) + H(q)) / 2, token by
    token. Symmetric, 0 exactly for equal distributions, at most ln 2; rounding outside of that
    range (1e-16) is cut off. NaN where a probability is NaN.

    Raises:
        ValueError: the vocabularies differ.

    Source: Lin 1991.
    """
    if p.shape[-1] != q.shape[-1]:
        raise ValueError(f"vocabularies of {p.shape[-1]} and {q.shape[-1]} tokens")
    terms: Tensor = torch.special.entr((p + q) / 2)
    terms -= (torch.special.entr(p) + torch.special.entr(q)) / 2
    return terms.sum(dim=-1).clamp(0.0, LARGEST)
