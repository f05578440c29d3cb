"""The parts that a frozen recommender gives to a language model (LLaRA, arXiv 2312.02445; iLoRA, arXiv 2408.10159).

    vector of item i = W2 gelu(W1 e_i), or W e_i      replaces the embedding of the token after the title of the item
    gates of a row   = gate network(user)             user = the recommender's representation of the history of the row

The recommender stays in evaluation mode when the surrounding net trains. In the released code it is a submodule that trains
with dropout. With "text" gates, the user is the mean over the history of vectors of the titles. Two controls measure whether
gates depend on the user. "random" draws the gates of each row from the simplex, and "shuffled-user" passes another user, of the
training rows, to the gate network. Both are functions of the name of the row. "group" draws the gates once for each of
USER_GROUPS groups. A group consists of the users nearest to one of USER_GROUPS users of training rows. Similar users then share
an adapter, and no gate network chose it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError, require_known
from vismt.llm.ilora.method import gate_part
from vismt.llm.ilora.recommenders import ItemRecommender
from vismt.llm.net import LmNet, TextBatch
from vismt.llm.tasks.base import Tokenizer, answer_tokens
from vismt.lowrank.layers.gates import instance_gates

GATES = ("user", "text", "random", "group", "shuffled-user")
DRAWN = ("random", "group")  # kinds of gates without a gate network
WITH_OTHERS = ("group", "shuffled-user")
USER_GROUPS = 16
PROJECTORS = ("mlp", "linear")


class Hybrid(nn.Module):
    """Item vectors and gates from a frozen recommender.

    Args:
        recommender: Recommender, which is frozen in place.
        width: Hidden width of the LM. None for an LM that reads only titles.
        gates: Kind of gates, one of GATES, see the module's docstring.
        others: Representations (n, d) of users of training rows, for "shuffled-user" and "group".
        texts: Vectors (items, d) of the titles, for "text".
        projector: "mlp" (LLaRA's) or "linear".
        seed: Seed of the projector.

    Raises:
        UserError: If the value of `gates` is unknown, other users are missing for "shuffled-user" or "group", or vectors of
            titles are missing for "text".
    """

    others: Tensor

    def __init__(
        self,
        recommender: ItemRecommender,
        width: int | None,
        gates: str = "user",
        others: Tensor | None = None,
        texts: Tensor | None = None,
        projector: str = "mlp",
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_known("gates: no source", [gates], GATES)
        self.recommender = recommender.requires_grad_(False).eval()
        self.condition = gates
        inner = recommender.width
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if width is None:
                self.projector: nn.Module = nn.Identity()
            elif projector == "linear":
                self.projector = nn.Linear(inner, width)
            else:
                self.projector = nn.Sequential(nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width))
        self.register_buffer("others", others if others is not None else torch.empty(0, inner))
        if gates in WITH_OTHERS and not len(self.others):
            raise UserError(f"gates: '{gates}' needs the representations of other users.")
        if gates == "text" and texts is None:
            raise UserError("gates: 'text' needs vectors of the titles.")
        self.texts: Tensor | None
        self.register_buffer("texts", texts, persistent=False)  # follow from the frozen LM and the catalogue

    @property
    def user_width(self) -> int:
        """Width of the vectors that the gate network reads."""
        return self.recommender.width if self.texts is None else self.texts.shape[1]

    def train(self, mode: bool = True) -> Hybrid:
        """Set the mode of the projector. The recommender stays in evaluation mode."""
        super().train(mode)
        self.recommender.eval()
        return self

    def vectors(self, items: Tensor) -> Tensor:
        """Return the vectors (m, width) of items (m,) int64."""
        return self.projector(self.recommender.item(items))

    def gates(self, lm: nn.Module, batch: TextBatch) -> Tensor | None:
        """Return the gates (b, e) for the rank groups of the LM. Return None for an LM without gates.

        batch: TextBatch with "history" (b, n) and "key" (b,), both int64.
        """
        part = gate_part(lm)
        if part is None:
            return None
        if self.condition == "random":
            return random_gates(batch["key"], part.rank_groups)
        if self.condition == "group":
            nearest = torch.cdist(self.recommender(batch["history"]), self.others[:USER_GROUPS]).argmin(1)
            return random_gates(nearest, part.rank_groups)
        if self.condition == "shuffled-user":
            return part(self.others[batch["key"] % len(self.others)])
        if self.texts is not None:
            present = (batch["history"] >= 0).float()
            weights = present / present.sum(1, keepdim=True)
            return part(torch.einsum("bn,bnd->bd", weights, self.texts[batch["history"].clamp_min(0)]))
        return part(self.recommender(batch["history"]))


@contextmanager
def conditioned(net: LmNet, batch: TextBatch) -> Iterator[TextBatch]:
    """Yield a batch with the vectors of its items, inside the gates of its users.

    For a net without a recommender the batch is unchanged.
    """
    if not isinstance(net.head, Hybrid):
        yield batch
        return
    items = batch.get("items")
    with_vectors = batch if items is None else {**batch, "vectors": net.head.vectors(items[items >= 0])}
    gates = net.head.gates(net.lm, batch)
    if gates is None:
        yield with_vectors
        return
    with instance_gates(gates):
        yield with_vectors


@torch.no_grad()
def title_vectors(lm: Any, tokenizer: Tokenizer, titles: Sequence[str]) -> Tensor:
    """Return one vector for each title, (items, d) fp32: the mean of the LM's input embeddings over its tokens.

    Each coordinate has mean 0 and variance 1 over the items.
    """
    embeddings = lm.get_input_embeddings().weight
    vectors = [
        embeddings[torch.tensor(answer_tokens(tokenizer, f" {title}"), device=embeddings.device)].float().mean(0)
        for title in titles
    ]
    stacked = torch.stack(vectors)
    return (stacked - stacked.mean(0)) / stacked.std(0).clamp_min(1e-6)


def random_gates(keys: Tensor, rank_groups: int) -> Tensor:
    """Draw gates (b, rank_groups) uniformly from the simplex, as a function of the key int64 (b,) of each row."""
    uniform = [
        torch.rand(rank_groups, generator=torch.Generator().manual_seed(key)).clamp_min(1e-12) for key in keys.tolist()
    ]
    spacing = -torch.stack(uniform).log()
    return (spacing / spacing.sum(1, keepdim=True)).to(keys.device)
