"""Switches and sizes of the trial engine, apart from it: whoever sets them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOptions:
    """What the engine may do. It changes cost and memory; tokens only in ties of low precision.

    Attributes:
        share_layers: begin above the layers that an edit leaves alone.
        share_front: run the tokens that all prompts begin with once.
        drafts: verify stored responses before decoding token by token.
        verify_tokens: tokens per pass that verifies drafts; None: what a timing found best.
        rows: responses that are decoded side by side.
    """

    share_layers: bool = True
    share_front: bool = True
    drafts: bool = True
    verify_tokens: int | None = None
    rows: int = 512
