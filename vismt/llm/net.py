"""A causal LM as the tasks use it: hidden states, token log-likelihoods, a head on the last token, and cached lower blocks.

Batches are padded on the left, so that the last column is every row's last token and generation goes on from it; positions
count from each row's (or packed document's) first token. Logits are made for the tokens that count and for no others.
Where the blocks below `first` are frozen, their output on a fixed piece of text is a constant: it is computed once
(`lower_states`), and a step then runs the other blocks only. Cached states are those without dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.llm.tasks.pieces import IGNORE, Piece, collate

Batch = Mapping[str, Tensor]


class LmNet(nn.Module):
    """lm: a causal LM of transformers. head: a module on features (b, d), nn.Identity for tasks that have none.

    first: the blocks below are frozen and may be given as cached states. samples: draws of a Bayesian head. Raises UserError
    where there is no such block. Its LM has to pass `check_logits`.
    """

    def __init__(self, lm: nn.Module, head: nn.Module | None = None, first: int = 0, samples: int = 20) -> None:
        super().__init__()
        self.samples = samples
        self.lm, self.head, self.first = lm, head if head is not None else nn.Identity(), first
        depth = len(blocks(lm))
        if not 0 <= first < depth:
            raise UserError(f"model.first_block: {first}; {type(lm).__name__} has blocks 0 to {depth - 1}.")

    @property
    def stock(self) -> nn.Module:
        """The LM, which is what is adapted."""
        return self.lm

    def hidden(self, batch: Batch) -> Tensor:
        """(b, n, d) after the final norm. batch: of `collate`, with "lower" (b, n, d) where the lower blocks are cached.

        "vectors" (m, d), where given, take the m places that have an item, see `inserted`.
        """
        mask = batch["mask"]
        given = mask.long() if mask.ndim == 2 else self._additive(mask)
        with _replaced(blocks(self.lm)[: self.first], batch.get("lower")), self.inserted(batch):
            out = self.lm.base_model(
                input_ids=batch["ids"], attention_mask=given, position_ids=batch["positions"], use_cache=False
            )
        return out.last_hidden_state

    def features(self, batch: Batch) -> Tensor:
        """(b, d) of each row's last token, in fp32."""
        return self.hidden(batch)[:, -1].float()

    def token_nll(self, batch: Batch, at_once: int = 4096) -> tuple[Tensor, Tensor]:
        """(b,) nats summed over the tokens with a label, and (b,) how many these are.

        Labels stand at the token itself: the one before predicts it. at_once: tokens whose logits are held together.
        """
        targets = batch["labels"][:, 1:]
        counted = targets != IGNORE
        states, targets = self.hidden(batch)[:, :-1][counted], targets[counted]
        each, rows = self._nll(states, targets, at_once), counted.nonzero()[:, 0]
        return torch.zeros(len(counted), device=rows.device).index_add(0, rows, each), counted.sum(1)

    def branch_nll(self, batch: Batch, at_once: int = 4096) -> tuple[Tensor, Tensor]:
        """(b, k) nats and numbers of tokens of the answers of trees; a row that has fewer answers than k has none of 0 tokens."""
        rows, columns = (batch["labels"] != IGNORE).nonzero(as_tuple=True)
        states = self.hidden(batch)[rows, batch["previous"][rows, columns]]
        count = int(batch["branch"].max())
        places = rows * count + batch["branch"][rows, columns] - 1
        total = torch.zeros(len(batch["labels"]) * count, device=rows.device)
        nats = total.index_add(0, places, self._nll(states, batch["labels"][rows, columns], at_once))
        return nats.view(-1, count), total.index_add(0, places, torch.ones_like(places, dtype=total.dtype)).view(
            -1, count
        )

    def _nll(self, states: Tensor, targets: Tensor, at_once: int) -> Tensor:
        """(m,) nats of the tokens `targets` from the states (m, d) before them."""
        output = self.lm.get_output_embeddings()
        each = [
            F.cross_entropy(output(part).float(), wanted, reduction="none")
            for part, wanted in zip(states.split(at_once), targets.split(at_once))
        ]
        return torch.cat(each) if each else torch.zeros(0, device=states.device)

    @contextmanager
    def inserted(self, batch: Batch) -> Iterator[None]:
        """While it lasts, vectors (m, d) take the places of "items" (b, n) in what block `first` receives.

        With first 0 this is the input embedding, as in LLaRA. Deeper it is x + (vector - e) |x| / E, x the state of the
        stream, e the token's own embedding, E the mean length of embeddings: what the frozen blocks have added stays, and a
        vector weighs against it what it would weigh in the embeddings (the stream grows a hundredfold over SmolLM2's
        blocks). Tokens that are generated have no items.
        """
        if batch.get("vectors") is None:
            yield
            return
        places, vectors = batch["items"] >= 0, batch["vectors"]

        def put(module: nn.Module, given: object, states: Tensor) -> Tensor:
            if states.shape[:2] != places.shape:
                return states
            new = vectors
            if self.first:
                x = states[places].float()
                e = F.embedding(batch["ids"][places], self.lm.get_input_embeddings().weight).float()
                new = x + (vectors - e) * x.norm(dim=1, keepdim=True) / self._embedding_norm
            return states.masked_scatter(places[..., None], new.to(states.dtype))

        before = blocks(self.lm)[self.first - 1] if self.first else self.lm.get_input_embeddings()
        hook = before.register_forward_hook(put)
        try:
            yield
        finally:
            hook.remove()

    @cached_property
    def _embedding_norm(self) -> float:
        """Mean length of the token embeddings, which are frozen wherever `first` is not 0."""
        return float(self.lm.get_input_embeddings().weight.detach().float().norm(dim=1).mean())

    def answer_rows(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Rows (k, d) of the output embedding for these tokens, and of its bias (k,) where it has one; copies in fp32."""
        output = self.lm.get_output_embeddings()
        chosen = torch.tensor(list(tokens), device=output.weight.device)
        bias = getattr(output, "bias", None)
        return output.weight.detach()[chosen].float(), None if bias is None else bias.detach()[chosen].float()

    @torch.no_grad()
    def lower_states(self, pieces: Sequence[Piece], at_once: int = 8) -> list[Tensor]:
        """(n, d) of each piece: what block `first` receives. Pieces of one length run together, so nothing is padded."""
        found: dict[int, Tensor] = {}
        groups: dict[tuple[int, bool], list[int]] = {}
        for number, piece in enumerate(pieces):
            groups.setdefault((len(piece.ids), piece.documents is None), []).append(number)
        device, training = next(self.lm.parameters()).device, self.lm.training
        self.lm.eval()
        for numbers in groups.values():
            for start in range(0, len(numbers), at_once):
                chosen = numbers[start : start + at_once]
                batch = {name: value.to(device) for name, value in collate([pieces[i] for i in chosen]).items()}
                with _caught(blocks(self.lm), self.first) as seen:
                    self.hidden(batch)
                found.update(zip(chosen, seen[0].cpu().unbind(0)))
        self.lm.train(training)
        return [found[number] for number in range(len(pieces))]

    def _additive(self, mask: Tensor) -> Tensor:
        """(b, n, n) bool -> (b, 1, n, n) in the LM's dtype: 0 where attention may go, the lowest number where not."""
        kind = self.lm.dtype
        return torch.zeros(mask.shape, dtype=kind, device=mask.device).masked_fill_(~mask, torch.finfo(kind).min)[
            :, None
        ]


def check_logits(lm: nn.Module) -> None:
    """UserError unless the logits of an LM are its output embedding on its last hidden state, which the tasks rely on."""
    ids = torch.arange(2, device=next(lm.parameters()).device)[None]
    with torch.no_grad():
        plain = lm.get_output_embeddings()(lm.base_model(input_ids=ids).last_hidden_state)
        whole = lm(input_ids=ids).logits
    if plain.shape != whole.shape or not torch.allclose(plain.float(), whole.float(), rtol=1e-2, atol=1e-2):
        raise UserError(f"{type(lm).__name__} scales or caps its logits, which vismt's tasks do not; take another LM.")


def blocks(lm: nn.Module) -> nn.ModuleList:
    """The row of transformer blocks; UserError for a model that has none."""
    depth = getattr(lm.config, "num_hidden_layers", None)
    found = next((m for m in lm.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)
    if found is None:
        raise UserError(
            f"{type(lm).__name__} has no plain row of {depth} blocks; take a decoder such as Llama, Qwen2 or GPT-2."
        )
    return found


@contextmanager
def _replaced(lower: Sequence[nn.Module], states: Tensor | None) -> Iterator[None]:
    """While it lasts, the lower blocks give `states` instead of running; nothing changes without states."""
    if states is None:
        yield
        return
    for block in lower:
        block.forward = lambda hidden_states, *args, **options: states
    try:
        yield
    finally:
        for block in lower:
            del block.forward


@contextmanager
def _caught(row: Sequence[nn.Module], first: int) -> Iterator[list[Tensor]]:
    """While it lasts, blocks from `first` on pass their input through; the list holds what the first of them received."""
    seen: list[Tensor] = []

    def passed(hidden_states: Tensor, *args: object, **options: object) -> Tensor:
        seen.append(hidden_states)
        return hidden_states

    for block in row[first:]:
        block.forward = passed
    try:
        yield seen
    finally:
        for block in row[first:]:
            del block.forward
