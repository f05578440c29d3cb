"""The recommenders, and what they are compared with: popularity, and cosines by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers.tiny import holds
from torch import nn

from vismt.llm.ilora.recommenders import GRU4Rec, NextItem, SASRec, cosine_scores, pad_histories, popularity_scores

NETS = pytest.mark.parametrize("make", [partial(GRU4Rec, 12), partial(SASRec, 12, 6)], ids=["gru4rec", "sasrec"])


def test_popularity_counts_next_items():
    scores = popularity_scores([3, 3, 1], torch.tensor([[0, 1, 3]]), 5)
    assert scores.exp().tolist() == [pytest.approx([1, 2, 3])]


def test_cosines_with_the_last_item_and_with_the_mean():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0]])
    histories = torch.tensor([[0, 1, -1], [3, 3, 0]])
    candidates = torch.tensor([[0, 1, 2], [0, 1, 3]])
    half = 0.5**0.5
    last = cosine_scores(vectors, histories, candidates, last=True)
    assert torch.allclose(last, torch.tensor([[0, 1, half], [1, 0, -1]], dtype=torch.float64))
    mean = cosine_scores(vectors, histories, candidates, last=False)
    fifth = 5**-0.5  # the mean of the first row is (1/2, 1)
    expected = torch.tensor([[fifth, 2 * fifth, 3 * fifth * half], [-1, 0, 1]], dtype=torch.float64)
    assert torch.allclose(mean, expected)


@NETS
def test_the_order_counts_and_padding_does_not(make: Callable[..., nn.Module]) -> None:
    net = make(width=8, seed=3).eval()
    alone = net(torch.tensor([[3, 1, 4]]))
    assert torch.allclose(net(torch.tensor([[3, 1, 4, -1, -1]])), alone, atol=1e-6)
    for other in ([1, 3, 4], [3, 1]):
        assert (net(torch.tensor([other])) - alone).abs().max() > 1e-4
    assert net.scores(alone).shape == (1, 12)
    assert torch.allclose(net.scores(alone, torch.tensor([[5, 2]])), net.scores(alone)[:, [5, 2]])
    state = torch.random.get_rng_state()
    assert holds(make(seed=3), make(seed=3).state_dict())
    assert torch.equal(state, torch.random.get_rng_state())


@NETS
def test_what_follows_is_learned(make: Callable[..., nn.Module]) -> None:
    net = make(width=16, dropout=0.0)
    rows = [[(start + step) % 12 for step in range(3)] for start in range(12)]
    batch = {"history": pad_histories(rows), "next": torch.tensor([(row[-1] + 1) % 12 for row in rows])}
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        NextItem(net)(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(NextItem(net.eval())(batch)["first"]) == 1
