"""A causal LM as the tasks use it: hidden states, token log-likelihoods, a head on the last token, and cached lower blocks.

Batches are padded on the left, so that the last column is the last token of every row and generation continues from it.
Positions count from the first token of each row (or packed document). Logits are computed only for counted tokens. In training
they are computed for some tokens at a time, also in the backward pass.

If the blocks below `first` are frozen, their output on a fixed piece of text is constant. It is computed once, and a step then
runs only the other blocks. Cached states are computed without dropout. `stored_lower_states` keeps them in the cache folder for
later runs and other processes (vismt.storage.stored_tensors). The key consists of the texts and the identity of the LM without
block `first` and the blocks above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vismt.base.errors import UserError
from vismt.base.identity import Identity
from vismt.llm.tasks.documents import by_document
from vismt.llm.tasks.pieces import IGNORED, Piece, collate_pieces
from vismt.lowrank.contexts import evaluating
from vismt.storage.stored_tensors import has_hooks, machine, path_of, read_stored, write_stored

TextBatch = Mapping[str, Tensor]
# numbers of tokens whose logits a step of training, or of scoring, holds at a time
TRAINED_AT_ONCE, SCORED_AT_ONCE = 1024, 4096


class LmNet(nn.Module):
    """A causal LM with a head.

    Args:
        lm: Causal LM of transformers that passes `check_logits`.
        head: Module on features (b, d). None (nn.Identity) for tasks without a head.
        first: Number of the first block that is not frozen. The output of the blocks below may be given as cached states.

    Raises:
        UserError: If the LM has no block `first`.
    """

    lm: Any  # a model of transformers
    head: Any  # a module on features, which tasks ask for what their heads have

    def __init__(self, lm: nn.Module, head: nn.Module | None = None, first: int = 0) -> None:
        super().__init__()
        self.lm = lm
        self.head = nn.Identity() if head is None else head
        self.first = first
        depth = len(blocks(lm))
        if not 0 <= first < depth:
            raise UserError(f"model.first_block: {first}; {type(lm).__name__} has blocks 0 to {depth - 1}.")

    @property
    def stock(self) -> nn.Module:
        """The LM, which is the part that is adapted."""
        return self.lm

    def hidden(self, batch: TextBatch) -> Tensor:
        """Return the hidden states (b, n, d) after the final norm.

        batch: TextBatch from `collate_pieces`, with "lower" (b, n, d) if the output of the lower blocks is cached. If "vectors"
        (m, d) are present, they replace the states at the m positions of items, see `inserted`.
        """
        return by_document(self.lm, batch, self.states)

    def states(self, batch: TextBatch) -> Tensor:
        """Return `hidden` of one forward pass over all documents of each row."""
        mask = batch["mask"]
        if mask.ndim == 2:
            attention_mask = mask.long()
        else:  # the additive form (b, 1, n, n): 0 for a token that is shown, otherwise the lowest number
            dtype = self.lm.dtype
            zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            attention_mask = zeros.masked_fill_(~mask, torch.finfo(dtype).min)[:, None]
        skipped = () if batch.get("lower") is None else blocks(self.lm)[: self.first]
        with _forward_replaced(skipped, lambda hidden_states, *args, **options: batch["lower"]), self.inserted(batch):
            out = self.lm.base_model(
                input_ids=batch["ids"], attention_mask=attention_mask, position_ids=batch["positions"], use_cache=False
            )
        return out.last_hidden_state

    def features(self, batch: TextBatch) -> Tensor:
        """Return the hidden states (b, d) fp32 of the last token of each row."""
        return self.hidden(batch)[:, -1].float()

    def token_nll(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Return the NLL (b,) in nats, summed over the tokens with a label, and the number (b,) of these tokens.

        A label stands at its token. The token before predicts it.
        """
        targets = batch["labels"][:, 1:]
        chosen = targets != IGNORED
        nll = self._nll(self.hidden(batch)[:, :-1][chosen], targets[chosen])
        rows = chosen.nonzero()[:, 0]
        return torch.zeros(len(chosen), device=rows.device).index_add(0, rows, nll), chosen.sum(1)

    def mean_nll(self, batch: TextBatch) -> Tensor:
        """Return the mean NLL, a scalar in nats, of the tokens with a label."""
        nats, tokens = self.token_nll(batch)
        return nats.sum() / tokens.sum()

    def branch_nll(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Return the NLL in nats and the number of tokens of each answer of trees, both (b, k).

        If a row has fewer than k answers, the numbers of the absent answers are 0.
        """
        rows, columns = (batch["labels"] != IGNORED).nonzero(as_tuple=True)
        states = self.hidden(batch)[rows, batch["previous"][rows, columns]]
        count = int(batch["branch"].max())
        answers = rows * count + batch["branch"][rows, columns] - 1
        zeros = torch.zeros(len(batch["labels"]) * count, device=rows.device)
        nats = zeros.index_add(0, answers, self._nll(states, batch["labels"][rows, columns]))
        tokens = zeros.index_add(0, answers, torch.ones_like(answers, dtype=zeros.dtype))
        return nats.view(-1, count), tokens.view(-1, count)

    def branch_logits(self, batch: TextBatch, tokens: Sequence[int]) -> Tensor:
        """Return the logits (b, k, tokens) fp32 of some tokens after the last token of each answer of trees.

        Raises:
            UserError: If rows have different numbers of answers.
        """
        branch = batch["branch"]
        last = (branch > 0) & (branch != F.pad(branch[:, 1:], (0, 1)))
        if len(last.sum(1).unique()) > 1:
            raise UserError("branch_logits: rows of different numbers of answers; batch rows with as many each.")
        states = self.hidden(batch)[last].unflatten(0, (len(branch), -1))
        output, chosen = self.lm.get_output_embeddings(), list(tokens)
        if type(output) is not nn.Linear:
            return output(states)[..., chosen].float()
        bias = None if output.bias is None else output.bias[chosen]
        return F.linear(states, output.weight[chosen], bias).float()

    @torch.no_grad()
    def generate(
        self, batch: TextBatch, new_tokens: int, ends: Sequence[int], temperature: float = 0.0, seed: int = 0
    ) -> Tensor:
        """Return the tokens (b, m), m <= new_tokens, that the LM writes after each row. One of `ends` ends a row.

        temperature: 0 takes the likeliest token. Otherwise tokens are drawn from softmax(logits / temperature), by `seed`.
        """
        from transformers import GenerationConfig

        drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        settings = GenerationConfig(
            do_sample=bool(temperature),
            **drawn,
            max_new_tokens=new_tokens,
            eos_token_id=list(ends) or None,
            pad_token_id=ends[0] if ends else 0,
        )
        # transformers takes what a given configuration leaves open from the checkpoint's: penalties, beams, forbidden
        # words.
        lm = self.lm
        own, lm.generation_config = lm.generation_config, settings
        try:
            with torch.random.fork_rng(enabled=bool(temperature)):
                if temperature:
                    torch.manual_seed(seed)
                written = lm.generate(batch["ids"], attention_mask=batch["mask"].long(), generation_config=settings)
        finally:
            lm.generation_config = own
        return written[:, batch["ids"].shape[1] :]

    def _nll(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return the NLL (m,) in nats of the tokens `targets` (m,) given the states (m, d) before them."""
        output, at_once = self.lm.get_output_embeddings(), SCORED_AT_ONCE

        def nll(states: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(output(states).float(), targets, reduction="none")

        if torch.is_grad_enabled() and len(states) > TRAINED_AT_ONCE:
            # The logits of all tokens would be kept for the backward pass. Each chunk computes its own logits there
            # again.
            at_once, nll = TRAINED_AT_ONCE, partial(checkpoint, nll, use_reentrant=False)
        chunks = [nll(*pair) for pair in zip(states.split(at_once), targets.split(at_once))]
        return torch.cat(chunks) if chunks else torch.zeros(0, device=states.device)

    @contextmanager
    def inserted(self, batch: TextBatch) -> Iterator[None]:
        """Replace the input of block `first` at the positions of "items" (b, n) by "vectors" (m, d), inside the block.

        With first 0 this is the input embedding, as in LLaRA. Otherwise the new state is x + (vector - e) |x| / E, with x the
        residual stream, e the embedding of the token and E the mean norm of the embeddings. This keeps the contribution of the
        frozen blocks. The vector has the same weight relative to it as in the embeddings (the stream grows a hundredfold over
        SmolLM2's blocks). Generated tokens have no items.
        """
        if batch.get("vectors") is None:
            yield
            return
        is_item = batch["items"] >= 0
        vectors = batch["vectors"]

        def insert(module: nn.Module, inputs: object, states: Tensor) -> Tensor:
            if states.shape[:2] != is_item.shape:
                return states
            new = vectors
            if self.first:
                x = states[is_item].float()
                e = F.embedding(batch["ids"][is_item], self.lm.get_input_embeddings().weight).float()
                new = x + (vectors - e) * x.norm(dim=1, keepdim=True) / self._embedding_norm
            return states.masked_scatter(is_item[..., None], new.to(states.dtype))

        before = blocks(self.lm)[self.first - 1] if self.first else self.lm.get_input_embeddings()
        hook = before.register_forward_hook(insert)
        try:
            yield
        finally:
            hook.remove()

    @cached_property
    def _embedding_norm(self) -> float:
        """Mean norm of the token embeddings. The embeddings are frozen unless `first` is 0."""
        return float(self.lm.get_input_embeddings().weight.detach().float().norm(dim=1).mean())

    def answer_rows(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return fp32 copies of the rows (k, d) of the output embedding and of its bias (k,). The bias may be None."""
        output = self.lm.get_output_embeddings()
        chosen = torch.tensor(list(tokens), device=output.weight.device)
        bias = getattr(output, "bias", None)
        return output.weight.detach()[chosen].float(), None if bias is None else bias.detach()[chosen].float()

    @torch.no_grad()
    def lower_states(self, pieces: Sequence[Piece], at_once: int = 8) -> list[Tensor]:
        """Return the input (n, d) of block `first` for each piece. Pieces of equal length run together, without padding."""
        states: dict[int, Tensor] = {}
        groups: dict[tuple[int, bool], list[int]] = {}
        for number, piece in enumerate(pieces):
            groups.setdefault((len(piece.ids), piece.documents is None), []).append(number)
        device = next(self.lm.parameters()).device
        captured: list[Tensor] = []  # inputs of the blocks from `first` on (the blocks pass them through)

        def capture(hidden_states: Tensor, *args: object, **options: object) -> Tensor:
            captured.append(hidden_states)
            return hidden_states

        def lower(batch: TextBatch) -> Tensor:
            captured.clear()
            self.states(batch)
            return captured[0]

        with evaluating(self.lm), _forward_replaced(blocks(self.lm)[self.first :], capture):
            for numbers in groups.values():
                for start in range(0, len(numbers), at_once):
                    chosen = numbers[start : start + at_once]
                    batch = {
                        name: value.to(device) for name, value in collate_pieces([pieces[i] for i in chosen]).items()
                    }
                    states.update(zip(chosen, by_document(self.lm, batch, lower).cpu().unbind(0)))
        return [states[number] for number in range(len(pieces))]


def stored_lower_states(net: LmNet, pieces: Sequence[Piece]) -> list[Tensor]:
    """Return the input (n, d) of block `net.first` for each piece, computed once. Pieces of the same text share one tensor.

    One file has the states of all pieces that are requested together, since the sums of a state depend on the texts of its
    batch. Nothing is stored if the code of a lower block is not a library's own.
    """
    texts = {(piece.ids, piece.documents): piece for piece in pieces}
    base = net.lm.base_model
    path = None
    if not has_hooks(base.modules()):
        upper = list(blocks(net.lm)[net.first :])
        path = path_of(repr((net.first, list(texts))), Identity(base, skip=upper), machine(net.lm.device))
    stored = None if path is None else read_stored(path)
    if stored is None:
        states = net.lower_states(list(texts.values()))
        if path is not None:
            write_stored(path, {"states": torch.cat(states)})
    else:
        states = list(stored["states"].split([len(ids) for ids, _ in texts]))
    by_text = dict(zip(texts, states))
    return [by_text[piece.ids, piece.documents] for piece in pieces]


def counted_tokens(batch: TextBatch) -> Tensor:
    """Return the number of tokens with a label in a batch, as a scalar."""
    return (batch["labels"][:, 1:] != IGNORED).sum()


def check_logits(lm: Any) -> None:
    """Raise UserError unless the logits of an LM are its output embedding applied to its last hidden state.

    The tasks compute logits in this way.
    """
    ids = torch.arange(2, device=next(lm.parameters()).device)[None]
    with torch.no_grad():
        expected = lm.get_output_embeddings()(lm.base_model(input_ids=ids).last_hidden_state)
        logits = lm(input_ids=ids).logits
    if expected.shape != logits.shape or not torch.allclose(expected.float(), logits.float(), rtol=1e-2, atol=1e-2):
        raise UserError(f"{type(lm).__name__} scales or caps its logits, which vismt's tasks do not; take another LM.")


@torch.no_grad()
def check_first_block(lm: Any, first: int) -> None:
    """Raise UserError unless cached states instead of the blocks below `first` lead to the hidden states of all blocks."""
    net = LmNet(lm, first=first)
    part = Piece(tuple(place % lm.config.vocab_size for place in range(5)), (IGNORED,) * 5)
    device = next(lm.parameters()).device
    batch = {name: value.to(device) for name, value in collate_pieces([part]).items()}
    try:
        states = torch.stack(net.lower_states([part])).to(device)
        whole, upper = net.states(batch).float(), net.states({**batch, "lower": states}).float()
    except Exception:  # blocks whose input or output is not one tensor fail in ways of their own
        equal = False
    else:
        equal = bool((whole - upper).norm() <= torch.finfo(lm.dtype).eps ** 0.5 * whole.norm())
    if not equal:
        raise UserError(
            f"model.first_block: {first}; the blocks of {type(lm).__name__} cannot be left out for cached states; set it to 0."
        )


def blocks(lm: Any) -> nn.ModuleList:
    """Return the list of transformer blocks. Raise UserError for a model without such a list."""
    depth = getattr(lm.config, "num_hidden_layers", None)
    for module in lm.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(
        f"{type(lm).__name__} has no plain list of {depth} blocks; take a decoder such as Llama, Qwen2 or GPT-2."
    )


@contextmanager
def _forward_replaced(replaced: Iterable[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    modules = list(replaced)
    # forwards of instances, which hooks of other libraries set
    own = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, former in zip(modules, own, strict=True):
            if former is None:
                del module.forward
            else:
                module.forward = former
