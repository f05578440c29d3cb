"""An embedding with a low-rank update: the rows of a table W (v, d) of entries, looked up with those of B (v, r).

    y = W[ids] + s * (B[ids] C A - B0[ids] A0)        A (r, d)

B has a row for each entry and starts at zero with LoRA, so an entry that never occurs keeps its vector. In peft's file the
table is transposed: lora_embedding_A is B^T (r, v), lora_embedding_B is A^T (d, r).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.low_rank import FORMS, LowRankLayer


@FORMS.register("embedding")
class LowRankEmbedding(LowRankLayer):
    """nn.Embedding. forward: ids (...) int64 -> (..., d)."""

    peft_names = ("lora_embedding_A", "lora_embedding_B")

    def forward(self, ids: Tensor) -> Tensor:
        out = F.embedding(ids, self.weight, self.shell.padding_idx)
        out = out + self._product(ids, self.lora_A, self.left()).to(out.dtype)
        return out if self.lora_A0 is None else out - self._product(ids, self.lora_A0, self.lora_B0).to(out.dtype)

    def _product(self, ids: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self.scale * F.embedding(ids, B, self.shell.padding_idx) @ A

    def peft_factors(self, update: LowRank) -> tuple[Tensor, Tensor]:
        return (update.L * update.scale).t(), update.R.t()
