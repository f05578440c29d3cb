"""`scripts.bench serve`: A batch with 8 different LoRA adapters, against the same batch with one adapter and in peft.

The random Llama of `bench core` (hidden 512, 8 layers, ffn 1376) with rank 16 on every linear, and 8 prompts: "generate"
writes 32 tokens after prompts of 16, "forward" runs prompts of 128 tokens once, as a classifier does. peft gets the same
adapters and the same names (`adapter_names`). The logits of both have to agree, else the benchmark ends with an error.

"switch" reads one prompt of 128 tokens under S2FT: with the adapter that is there, and with the next one of 8, which are in
memory and exchanged in the weights before the prompt.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.bench.core import imported_peft, llama
from scripts.bench.timing import Ratios, interleave
from vismt.base.errors import UserError
from vismt.llm.s2ft.slices import read_slices, switch
from vismt.lowrank.files.peft_folder import export_peft
from vismt.lowrank.files.save_load import save_adapter
from vismt.lowrank.model.mixed import adapters_per_sample
from vismt.lowrank.model.named import activate
from vismt.methods import adapt
from vismt.testing.method_contract import shake

RANK, ADAPTERS, WRITTEN, SHARE = 16, 8, 32, 0.03  # SHARE: of the units that S2FT trains
ONE, MIXED = "vismt, 1 adapter", f"vismt, {ADAPTERS} adapters"
PEFT_ONE, PEFT = "peft, 1 adapter", f"peft, {ADAPTERS} adapters"
SAME, SWITCHED = "the same adapter", f"the next of {ADAPTERS} adapters"
TARGETS = ((MIXED, ONE, 1.15), (MIXED, PEFT, 1.0))

Call = Callable[..., Tensor]  # (net, **options of peft) -> logits or token ids


def run(rounds: int = 9, device: str = "cpu") -> list[Ratios]:
    """Time generation and forward passes."""
    where = torch.device(device)
    model = llama(where).eval()
    return [*serve(model, rounds, where), switching(model, rounds, where)]


@torch.no_grad()
def serve(model: nn.Module, rounds: int, device: torch.device, lengths: tuple[int, int] = (16, 128)) -> list[Ratios]:
    """Time batches of a causal LM. lengths: tokens of a prompt that is continued, and of one that is read."""
    servers = _servers(model)
    vocabulary = model.get_submodule("lm_head").weight.shape[0]
    prompts, texts = (torch.randint(vocabulary, (ADAPTERS, length), device=device) for length in lengths)

    def generate(net: Any, **options: Any) -> Tensor:
        mask = torch.ones_like(prompts)
        ends = {"min_new_tokens": WRITTEN, "max_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}
        return net.generate(input_ids=prompts, attention_mask=mask, **ends, **options)

    def forward(net: Any, **options: Any) -> Tensor:
        return net(input_ids=texts, use_cache=False, **options).logits

    ours, theirs = servers[MIXED](forward), servers[PEFT](forward)
    if not (ours - theirs).abs().max() < 1e-3 * theirs.abs().max():
        raise UserError(f"bench serve: {MIXED} and {PEFT} have other logits; the ratio means nothing.")
    works: tuple[tuple[str, Call, int], ...] = (("generate", generate, WRITTEN), ("forward", forward, lengths[1]))
    results = []
    for title, call, tokens in works:
        steps = {name: partial(server, call) for name, server in servers.items()}
        timing = interleave(steps, rounds, label=title, device=device)
        results.append(Ratios(f"{title}, {ADAPTERS} prompts, {ADAPTERS * tokens} tokens, rank {RANK}", timing, TARGETS))
    return results


@torch.no_grad()
def switching(model: nn.Module, rounds: int, device: torch.device, length: int = 128) -> Ratios:
    """Time a prompt of `length` tokens with and without another S2FT adapter put into the weights before it."""
    adapters = []
    for seed in range(ADAPTERS):
        trained = copy.deepcopy(model)
        adapt(trained, "s2ft", ratio=SHARE, seed=seed)
        shake(trained, 0.02, seed)
        with tempfile.TemporaryDirectory() as folder:
            adapters.append(read_slices(save_adapter(trained, folder)))
    model, following = copy.deepcopy(model), itertools.cycle(adapters)
    text = torch.randint(model.get_submodule("lm_head").weight.shape[0], (1, length), device=device)

    def answer() -> Tensor:
        return model(input_ids=text, use_cache=False).logits

    def switched() -> Tensor:
        switch(model, next(following))
        return answer()

    answers = [switched() for _ in adapters]
    if any(torch.equal(one, other) for one, other in itertools.pairwise(answers)):
        raise UserError("bench serve: two S2FT adapters give the same logits; the ratio means nothing.")
    timing = interleave({SAME: answer, SWITCHED: switched}, rounds, label="switch", device=device)
    return Ratios(f"switch, 1 prompt, {length} tokens, S2FT of {SHARE:.0%}", timing, ((SWITCHED, SAME, 1.25),))


def _servers(model: nn.Module) -> dict[str, Callable[[Call], Tensor]]:
    """Return by candidate what runs a call on its net."""
    names = [f"adapter{number}" for number in range(ADAPTERS)]
    one = copy.deepcopy(model)
    for seed, name in enumerate(names):
        adapt(one, "lora", rank=RANK, seed=seed, name=name)
        shake(one, 0.02, seed)
    with tempfile.TemporaryDirectory() as folder:
        folders = [export_peft(one, Path(folder) / name, name=name) for name in names]
        plain = copy.deepcopy(model)  # peft replaces its linears
        peft = imported_peft("serve").PeftModel.from_pretrained(plain, folders[0], adapter_name=names[0]).eval()
        for name, saved in zip(names[1:], folders[1:]):
            peft.load_adapter(saved, adapter_name=name)
    mixed = activate(copy.deepcopy(one), names)

    def ours(call: Call) -> Tensor:
        with adapters_per_sample(names):
            return call(mixed)

    return {
        ONE: lambda call: call(one),
        MIXED: ours,
        PEFT_ONE: lambda call: call(peft),
        PEFT: lambda call: call(peft, adapter_names=names),
    }
