"""What a frozen recommender gives to a language model (LLaRA, arXiv 2312.02445; iLoRA, arXiv 2408.10159).

    vector of item i = W2 gelu(W1 e_i)         in the place of a token that stands beside the item's title
    gates of a row   = gate network(user)      user = the recommender's representation of the row's history

The recommender is in evaluation mode whatever the net around it does: in the released code it is a submodule that trains
with dropout. Two controls tell whether gates depend on the user: "random" draws the gates of each row from the simplex, and
"shuffled-user" gives the gate network another user, of the training rows. Both are functions of the row's name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vismt.errors import UserError, near
from vismt.llm.ilora import gate_part
from vismt.llm.net import Batch
from vismt.llm.sasrec import SASRec

GATES = ("user", "random", "shuffled-user")


class Hybrid(nn.Module):
    """recommender: is frozen here. width: of the LM, None for an LM that reads titles alone. gates: see above.

    others: representations (n, d) of users, for "shuffled-user". seed: of the projector.
    """

    def __init__(
        self, recommender: SASRec, width: int | None, gates: str = "user", others: Tensor | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        check_gates(gates)
        self.recommender, self.condition = recommender.requires_grad_(False).eval(), gates
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            inner = recommender.width
            self.projector = (
                nn.Identity()
                if width is None
                else nn.Sequential(nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width))
            )
        self.register_buffer("others", others if others is not None else torch.empty(0, inner))
        if gates == "shuffled-user" and not len(self.others):
            raise UserError("gates: 'shuffled-user' needs the representations of other users.")

    def train(self, mode: bool = True) -> Hybrid:
        """The recommender stays in evaluation mode."""
        super().train(mode)
        self.recommender.eval()
        return self

    def vectors(self, items: Tensor) -> Tensor:
        """Items int64 (m,) -> (m, width)."""
        return self.projector(self.recommender.item(items))

    def gates(self, lm: nn.Module, batch: Batch) -> Tensor | None:
        """(b, e), for the gated rank groups of the LM, None where it has none. batch: "history" (b, n) and "key" (b,)."""
        part = gate_part(lm)
        if part is None:
            return None
        if self.condition == "random":
            return random_gates(batch["key"], part.n_experts)
        shuffled = self.condition == "shuffled-user"
        return part(self.others[batch["key"] % len(self.others)] if shuffled else self.recommender(batch["history"]))


def random_gates(keys: Tensor, experts: int) -> Tensor:
    """(b, e) from the flat distribution over the simplex, a function of each row's key int64 (b,)."""
    drawn = [
        torch.rand(experts, generator=torch.Generator().manual_seed(key)).clamp_min(1e-12) for key in keys.tolist()
    ]
    spacing = -torch.stack(drawn).log()
    return (spacing / spacing.sum(1, keepdim=True)).to(keys.device)


def check_gates(gates: str) -> None:
    """UserError for a condition that is not known."""
    if gates not in GATES:
        raise UserError(f"gates: '{gates}'.{near(gates, GATES)}")
