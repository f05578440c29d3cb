"""Written answers of a recommendation, and their reading as one of the candidates.

A written line is an exact answer where it equals the title of a candidate, and an answer by substring where it contains one
title: of titles that contain each other the longest counts, which LLaRA's released reading treats as invalid. HitRatio@1 is
correct / all; relative to valid answers only it would rise with each invalid answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vismt.llm.ilora.hybrid import conditioned
from vismt.llm.net import LmNet
from vismt.llm.tasks.base import Item, answer_tokens, gather
from vismt.llm.tasks.pieces import IGNORE, Piece, select_tokens


@torch.no_grad()
def written(net: LmNet, items: Sequence[Item], tokenizer: Any, new_tokens: int) -> list[str]:
    """Return the text that the LM generates after each prompt."""
    device = next(net.lm.parameters()).device
    prompts = [replace(item, pieces=[_prompt(item.pieces[0])]) for item in items]
    batch = {name: value.to(device) for name, value in gather(prompts).items()}
    end = tokenizer.eos_token_id
    line_end = answer_tokens(tokenizer, "\n")
    stops = [] if end is None else [end]
    if len(line_end) == 1:
        stops += line_end
    with conditioned(net, batch) as given, net.inserted(given):
        generated = net.generate(given, new_tokens, stops)
    return tokenizer.batch_decode(generated, skip_special_tokens=True)


def _prompt(piece: Piece) -> Piece:
    """Return the piece without its counted tokens."""
    return select_tokens(piece, [position for position, label in enumerate(piece.labels) if label == IGNORE])


def read_answer(text: str, titles: Sequence[str], label: int) -> dict[str, bool]:
    """Return whether a written answer is right and valid: its first line equals a title, or contains one; case is ignored."""
    names = [_plain(title) for title in titles]
    line = _plain(text.split("\n")[0])
    contained = [name for name in names if name in line]
    longest = [name for name in contained if not any(name != other and name in other for other in contained)]
    return {
        "right": line == names[label],
        "valid": line in names,
        "right_substring": longest == [names[label]],
        "valid_substring": len(longest) == 1,
    }


def _plain(text: str) -> str:
    """Return the text in lower case with single spaces."""
    return " ".join(text.casefold().split())
