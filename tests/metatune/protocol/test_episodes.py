"""Episodes: pure in (seed, i), the rules' numbers by hand, and one clear error for each thing that cannot be drawn."""

import itertools
import math
import random

import pytest
import torch
from torch.utils.data import DataLoader

from vismt.base.errors import UserError
from vismt.base.seeds import mix_seed
from vismt.metatune.protocol.episodes import (
    DisjointSampler,
    EpisodeSampler,
    VariableSampler,
    query_size,
    support_shots,
    support_total,
)

LABELS = torch.arange(12).repeat_interleave(30)[torch.randperm(360, generator=torch.Generator().manual_seed(1))]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def both():
    return [EpisodeSampler(LABELS, ways=5, shots=2, queries=4, seed=3), VariableSampler(LABELS, seed=3)]


@pytest.mark.parametrize("sampler", both(), ids=["uniform", "variable"])
def test_an_episode_depends_on_seed_and_number_only(sampler):
    twin = type(sampler)(LABELS, **({"ways": 5, "shots": 2, "queries": 4} if hasattr(sampler, "ways") else {}), seed=3)
    torch.manual_seed(9)
    state, python = torch.get_rng_state(), random.getstate()
    late = sampler[7]
    [sampler[i] for i in range(5)]
    assert same(late, twin[7]) and same(late, sampler[7])
    assert not same(sampler[7], sampler[8])
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()
    twin.seed = 4
    assert not same(late, twin[7])


@pytest.mark.parametrize("sampler", both(), ids=["uniform", "variable"])
def test_workers_do_not_change_a_bit(sampler):
    alone = list(DataLoader(sampler, batch_size=None, sampler=range(6), num_workers=0))
    shared = list(DataLoader(sampler, batch_size=None, sampler=range(6), num_workers=2))
    assert all(same(a, b) and same(a, sampler[i]) for i, (a, b) in enumerate(zip(alone, shared, strict=True)))


def test_uniform_episode_structure():
    sampler = EpisodeSampler(LABELS, ways=4, shots=3, queries=5, seed=0)
    for i in range(20):
        episode = sampler[i]
        assert episode.ways == 4 and len(episode.classes.unique()) == 4
        assert torch.equal(LABELS[episode.support], episode.classes[episode.support_labels])
        assert torch.equal(LABELS[episode.query], episode.classes[episode.query_labels])
        assert torch.equal(episode.support_labels.bincount(), torch.full((4,), 3))
        assert torch.equal(episode.query_labels.bincount(), torch.full((4,), 5))
        drawn = torch.cat([episode.support, episode.query])
        assert len(drawn.unique()) == len(drawn)


def test_classes_and_images_are_drawn_uniformly():
    sampler = EpisodeSampler(LABELS, ways=3, shots=1, queries=1, seed=5)
    episodes = [sampler[i] for i in range(800)]
    # 800 x 3 draws over 12 classes: 200 each, standard deviation sqrt(800 * 1/4 * 3/4) = 12.2; 5 of them are 61.
    assert (torch.cat([e.classes for e in episodes]).bincount() - 200).abs().max() < 61
    # An image is a support of 800 * 3 / 360 = 6.7 episodes on average; a sampler that prefers the first would show 60.
    assert torch.cat([e.support for e in episodes]).bincount(minlength=360).max() < 25


def test_seeds_are_mixed_not_added():
    # An additive scheme makes episode 1 of seed 0 equal to episode 0 of seed 1.
    assert mix_seed(0, 1) != mix_seed(1, 0)
    assert not same(EpisodeSampler(LABELS, seed=0)[1], EpisodeSampler(LABELS, seed=1)[0])
    assert len({mix_seed(s, i) for s in range(30) for i in range(30)}) == 900
    assert 0 <= mix_seed(0, 0) < 2**63


def test_superclass_holds_all_ways_and_small_ones_are_never_chosen():
    superclass = torch.tensor([0] * 6 + [1] * 4 + [2] * 2)
    sampler = EpisodeSampler(LABELS, ways=4, shots=1, queries=2, superclass=superclass)
    kinds = [superclass[sampler[i].classes].unique().tolist() for i in range(60)]
    assert all(len(kind) == 1 for kind in kinds)
    # Superclasses are equally likely although one has 6 classes and the other 4; 60 draws, 30 +- 3.9 each.
    assert {kind[0] for kind in kinds} == {0, 1} and 15 < sum(kind == [1] for kind in kinds) < 45


def test_classes_restrict_the_draw():
    sampler = EpisodeSampler(LABELS, ways=3, shots=1, queries=2, classes=[2, 5, 7])
    assert all(set(sampler[i].classes.tolist()) == {2, 5, 7} for i in range(5))


def test_query_size_by_hand():
    assert query_size(torch.tensor([9, 40])) == 4  # floor(9 / 2)
    assert query_size(torch.tensor([25, 40])) == 10  # floor(25 / 2) = 12, limit 10
    assert query_size(torch.tensor([2, 40])) == 1


def test_support_total_by_hand():
    # u = 0.5: floor(0.5 * 5 + 1) + floor(0.5 * min(100, 200) + 1) = 3 + 51
    assert support_total(torch.tensor([5, 200]), 0.5) == 54
    assert support_total(torch.tensor([5, 200]), 0.0) == 2  # at least one each
    assert support_total(torch.full((9,), 100), 0.9) == 500  # 9 * 91 = 819, limit 500
    assert support_total(torch.tensor([5, 200]), 0.99, contribution=1) == 2  # floor(0.99 + 1) = 1 each


def test_support_shots_by_hand():
    counts, flat = torch.tensor([10, 30]), torch.zeros(2)
    # p = (1/4, 3/4), S - N = 10: floor(2.5) + 1 = 3, floor(7.5) + 1 = 8
    assert support_shots(counts, torch.tensor([6, 26]), 12, flat).tolist() == [3, 8]
    assert support_shots(counts, torch.tensor([2, 26]), 12, flat).tolist() == [2, 8]  # capped by R
    # weights (10 * 2, 30): p = (0.4, 0.6), S - N = 11: floor(4.4) + 1 = 5, floor(6.6) + 1 = 7
    weights = torch.tensor([math.log(2), 0.0])
    assert support_shots(counts, torch.tensor([9, 26]), 13, weights).tolist() == [5, 7]


def test_variable_episodes_follow_the_rules():
    sizes = torch.randint(4, 160, (60,), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60).repeat_interleave(sizes)
    sampler = VariableSampler(labels, seed=1)
    ways = []
    for i in range(120):
        episode = sampler[i]
        counts = sizes[episode.classes]
        queries = min(10, int(counts.min()) // 2)
        shots = episode.support_labels.bincount(minlength=episode.ways)
        ways.append(episode.ways)
        assert torch.equal(episode.query_labels.bincount(), torch.full((episode.ways,), queries))
        assert shots.min() >= 1 and bool((shots <= counts - queries).all()) and len(episode.support) <= 500
        assert not set(episode.support.tolist()) & set(episode.query.tolist())
    assert min(ways) < 10 and max(ways) > 45 and min(ways) >= 5 and max(ways) <= 50


def test_variable_shots_are_unequal_and_the_papers_one_shot_is_equal():
    episode = VariableSampler(LABELS, seed=2)[0]
    assert len(episode.support_labels.bincount().unique()) > 1
    one_shot = VariableSampler(LABELS, seed=2, min_ways=5, max_ways=5, max_contribution=1)
    assert all(one_shot[i].support_labels.tolist() == [0, 1, 2, 3, 4] for i in range(10))
    assert len(one_shot[0].query) == 50


def test_nodes_give_all_their_leaves():
    nodes = [[0, 1, 2], [3, 4, 5, 6, 7], list(range(12))]
    sampler = VariableSampler(LABELS, nodes=nodes, min_ways=4, max_ways=8)
    drawn = [frozenset(sampler[i].classes.tolist()) for i in range(20)]
    assert frozenset([3, 4, 5, 6, 7]) in drawn  # a node of 5 leaves gives all 5
    assert {len(group) for group in drawn} == {5, 8}  # the node of 12 is cut to 8, the node of 3 is never used


def test_superclass_of_variable_episodes():
    superclass = torch.tensor([0] * 7 + [1] * 5)
    sampler = VariableSampler(LABELS, superclass=superclass)
    assert all(len(superclass[sampler[i].classes].unique()) == 1 for i in range(20))


def test_describe_tells_data_and_rules_apart():
    base = EpisodeSampler(LABELS, seed=1).describe()
    assert base == EpisodeSampler(LABELS, seed=1).describe()
    assert base != EpisodeSampler(LABELS.flip(0), seed=1).describe()
    assert base != EpisodeSampler(LABELS, seed=1, shots=2).describe()
    assert base != EpisodeSampler(LABELS, seed=1, classes=range(9)).describe()
    assert VariableSampler(LABELS).describe() != VariableSampler(LABELS, max_support=100).describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 1}, "ways is 1: it must be at least 2"),
        ({"shots": 0}, "shots is 0"),
        ({"ways": 13}, "12 classes cannot give 13 ways"),
        ({"shots": 20, "queries": 11}, r"take 31 images of a class, too few in class 0 \(30\).*and 7 more"),
        ({"classes": [1, 12, 2, 3, 4]}, "id 12, the labels have 0 to 11"),
        ({"superclass": torch.zeros(3)}, "superclass has 3 entries for 12 classes"),
        ({"superclass": torch.arange(12) // 3}, "largest superclass has 3 classes, which cannot give 5"),
        ({"superclass": torch.zeros(13), "classes": [0, 1, 2, 3, 12]}, "no image in class 12"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_error(options, message):
    with pytest.raises(UserError, match=message):
        EpisodeSampler(LABELS, **options)


def test_small_class_is_named():
    labels = torch.tensor([0] * 9 + [1] * 20 + [2] * 20)
    with pytest.raises(
        UserError, match=r"5 shots \+ 15 queries take 20 images of a class, too few in class 'oak' \(9\):"
    ):
        EpisodeSampler(labels, ways=2, shots=5, queries=15, names=["oak", "elm", "ash"])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS, {"min_ways": 1}, "need 2 <= min_ways"),
        (LABELS, {"classes": [0, 1, 2]}, "3 classes cannot give 5 ways"),
        (torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4]), {}, "1 image in class 4"),
        (LABELS, {"nodes": [[0, 1]]}, "none of 1 nodes has 5 to 392 leaf classes"),
        (LABELS, {"nodes": [[0]], "superclass": torch.zeros(12)}, "superclass and nodes both given"),
        (torch.tensor([]), {}, "0 labels given"),
        (torch.tensor([0, -1]), {}, "all >= 0"),
    ],
)
def test_variable_errors(labels, options, message):
    with pytest.raises(UserError, match=message):
        VariableSampler(labels, **options)
    with pytest.raises(IndexError):
        EpisodeSampler(LABELS)[-1]


def indices(episode) -> set[int]:
    return set(torch.cat([episode.support, episode.query]).tolist())


def test_parts_share_no_image_and_are_a_function_of_the_seed_alone():
    labels = torch.arange(6).repeat(23)
    sampler = EpisodeSampler(labels, ways=3, shots=1, queries=3, seed=4, parts=5)
    assert (sampler.parts, sampler.covers) == (5, "images")
    seen = [set().union(*(indices(sampler[i]) for i in range(part, 60, 5))) for part in range(5)]
    for first, second in itertools.combinations(seen, 2):
        assert not first & second
    for class_id in range(6):
        shares = [sampler.part(class_id, part) for part in range(5)]
        assert [len(share) for share in shares] == [4] * 5  # 23 // 5; three images are in no part
        assert (labels[torch.cat(shares)] == class_id).all() and len(torch.cat(shares).unique()) == 20
    # other ways, shots and queries divide the images in the same way, another seed does not
    other = EpisodeSampler(labels, ways=2, shots=2, queries=1, seed=4, parts=5)
    assert torch.equal(other.part(0, 1), sampler.part(0, 1))
    again = EpisodeSampler(labels, ways=3, shots=1, queries=3, seed=5, parts=5)
    assert set(again.part(0, 1).tolist()) != set(sampler.part(0, 1).tolist())
    # without parts, episodes and their description are those of earlier versions
    plain = EpisodeSampler(labels, ways=3, shots=1, queries=3, seed=4)
    assert (plain.parts, plain.covers) == (0, "sampler") and "parts" not in plain.describe()
    assert {**sampler.describe()} == {**plain.describe(), "parts": 5}


def test_small_classes_have_fewer_parts_or_none():
    def parts(images: int) -> tuple[int, str]:
        sampler = EpisodeSampler(torch.arange(3).repeat(images), ways=3, shots=1, queries=3, parts=5)
        return sampler.parts, sampler.covers

    assert [parts(n) for n in (25, 20, 19, 16, 15)] == [
        (5, "images"),
        (5, "images"),
        (4, "images"),
        (4, "images"),
        (0, "sampler"),
    ]


def test_parts_are_of_the_classes_where_images_are_too_few():
    labels = torch.arange(14).repeat(6)
    sampler = EpisodeSampler(labels, ways=3, shots=1, queries=3, seed=4, parts=5)
    assert (sampler.parts, sampler.covers) == (4, "classes")  # 14 // 3
    seen = [set().union(*(sampler[i].classes.tolist() for i in range(part, 160, 4))) for part in range(4)]
    assert sorted(len(classes) for classes in seen) == [3, 3, 4, 4] and set().union(*seen) == set(range(14))
    assert len(set().union(*(indices(sampler[i]) for i in range(160)))) == len(labels)
    plain = EpisodeSampler(labels, ways=3, shots=1, queries=3, seed=4)
    assert sampler.describe() == {**plain.describe(), "parts of classes": 4}
    # other shots and queries divide the classes in the same way
    other = EpisodeSampler(labels, ways=3, shots=2, queries=2, seed=4, parts=5)
    assert {*other[2].classes.tolist()} <= seen[2]


def test_superclasses_are_in_one_part():
    superclass = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4])
    labels = torch.arange(14).repeat(6)

    def sampler(ways: int) -> EpisodeSampler:
        return EpisodeSampler(labels, ways=ways, shots=1, queries=3, seed=4, parts=5, superclass=superclass)

    assert (sampler(2).parts, sampler(2).covers) == (5, "classes")
    drawn = [{*superclass[sampler(2)[i].classes].tolist()} for i in range(10)]
    assert drawn[:5] == drawn[5:] and sorted(map(sorted, drawn[:5])) == [[0], [1], [2], [3], [4]]
    assert (sampler(3).parts, sampler(3).covers) == (0, "sampler")  # three superclasses have three classes


def test_episodes_without_replacement_use_no_image_twice():
    labels = torch.arange(4).repeat(10)
    sampler = DisjointSampler(labels, ways=3, shots=1, queries=2, seed=1)
    episodes = [sampler[i] for i in range(len(sampler))]
    assert sum(len(indices(episode)) for episode in episodes) == len(set().union(*map(indices, episodes)))
    # three episodes of each of four classes, three classes an episode
    assert len(episodes) == 4 and sampler.covers == "images" and sampler.parts == 0
    for episode in episodes:
        assert torch.equal(labels[episode.support], episode.classes[episode.support_labels])
        assert torch.equal(labels[episode.query], episode.classes[episode.query_labels])
    again = DisjointSampler(labels, ways=3, shots=1, queries=2, seed=1)
    assert all(
        torch.equal(a.query, b.query) for a, b in zip(episodes, [again[i] for i in range(len(again))], strict=True)
    )
    with pytest.raises(UserError, match="enough for 1 episode"):
        DisjointSampler(labels, ways=3, shots=2, queries=4)


def test_episodes_without_replacement_have_every_class_and_superclass_equally_often():
    labels = torch.arange(6).repeat_interleave(torch.tensor([9, 60, 12, 30, 17, 90]))
    episodes = list(DisjointSampler(labels, ways=2, shots=1, queries=2, seed=3))
    assert len(episodes) == 9 and torch.cat([e.classes for e in episodes]).bincount().tolist() == [3] * 6
    # which classes meet, and in which order, is random
    samplers = [DisjointSampler(labels, ways=2, shots=1, queries=2, seed=seed) for seed in range(9)]
    assert len({tuple(torch.cat([e.classes for e in sampler]).tolist()) for sampler in samplers}) == 9
    superclass = torch.tensor([0, 0, 1, 1, 1, 1])
    episodes = list(DisjointSampler(labels, ways=2, shots=1, queries=2, superclass=superclass))
    assert torch.stack([superclass[e.classes[0]] for e in episodes]).bincount().tolist() == [3, 3]
    assert all(len(superclass[e.classes].unique()) == 1 for e in episodes)


def test_episodes_without_replacement_have_the_mean_of_those_with_it():
    # An episode's score is the share of images in small classes, which are half of the classes and a tenth of the images.
    labels = torch.arange(8).repeat_interleave(torch.tensor([10, 90] * 4))
    means = torch.tensor(
        [
            [float((e.classes % 2 == 0).double().mean()) for e in DisjointSampler(labels, ways=3, queries=4, seed=seed)]
            for seed in range(200)
        ]
    ).mean(1)
    # three episodes of three classes in a run: a standard error of at most sqrt(1 / 4 / 9 / 200) = 0.012
    assert abs(float(means.mean()) - 0.5) < 0.05


GROUPED = torch.arange(3).repeat_interleave(120)
TRIPLES = torch.arange(360) // 3 * 3  # the index of the first image of each


def test_a_group_is_in_one_part_and_in_one_of_support_and_queries():
    settings = {"ways": 3, "shots": 2, "queries": 6, "seed": 4, "parts": 5, "groups": TRIPLES}
    sampler = EpisodeSampler(GROUPED, **settings)
    assert (sampler.parts, sampler.covers) == (5, "images")
    drawn: list[set[int]] = [set() for _ in range(5)]
    for number in range(100):
        episode = sampler[number]
        support, query = (set(TRIPLES[images].tolist()) for images in (episode.support, episode.query))
        assert not support & query
        assert torch.equal(GROUPED[episode.query], episode.classes[episode.query_labels])
        drawn[number % 5] |= support | query
    assert sum(map(len, drawn)) == len(set().union(*drawn)) == 120
    for class_id in range(3):
        assert [len(sampler.part(class_id, part)) for part in range(5)] == [24] * 5
    # the same parts for other shots; another description than without groups, and the same where all are alone
    assert torch.equal(EpisodeSampler(GROUPED, **settings | {"shots": 1}).part(2, 3), sampler.part(2, 3))
    plain, alone = (EpisodeSampler(GROUPED, **settings | {"groups": g}) for g in (None, torch.arange(360)))
    assert (
        plain.describe() == alone.describe()
        and same(plain[7], alone[7])
        and torch.equal(plain.part(0, 1), alone.part(0, 1))
    )
    assert (
        plain.describe()
        != sampler.describe()
        != EpisodeSampler(GROUPED, **settings | {"groups": TRIPLES // 6}).describe()
    )


def test_a_group_of_several_classes_is_in_one_part_and_in_one_of_support_and_queries():
    people = torch.arange(360) % 40  # with three images of each class
    sampler = EpisodeSampler(GROUPED, ways=3, shots=1, queries=6, seed=4, parts=5, groups=people)
    assert sampler.parts == 5
    seen: list[set[int]] = [set() for _ in range(5)]
    for number in range(60):
        episode = sampler[number]
        support, query = (set(people[images].tolist()) for images in (episode.support, episode.query))
        assert not support & query
        seen[number % 5] |= support | query
    assert sum(map(len, seen)) == len(set().union(*seen)) == 40


def test_parts_with_too_few_groups_are_parts_of_the_classes_or_none():
    def covers(size: int, classes: int = 3) -> str:
        labels = torch.arange(classes).repeat_interleave(60)
        return EpisodeSampler(
            labels, ways=3, shots=5, queries=5, parts=5, groups=torch.arange(len(labels)) // size
        ).covers

    # Five of 15 images in each of four parts: the others are five in the pairs without them, and none in triples.
    assert [covers(size) for size in (1, 2, 3, 6)] == ["images", "images", "sampler", "sampler"]
    assert [covers(size, 15) for size in (1, 6)] == ["images", "classes"]


def test_a_few_pairs_leave_parts_of_the_images():
    groups = torch.arange(300)
    groups[torch.arange(0, 300, 30) + 1] = torch.arange(0, 300, 30)  # three pairs in 100 images of a class
    labels = torch.arange(3).repeat_interleave(100)
    sampler = EpisodeSampler(labels, ways=3, shots=5, queries=15, parts=5, groups=groups)
    assert (sampler.parts, sampler.covers) == (5, "images")


def test_episodes_without_replacement_use_no_group_twice():
    sampler = DisjointSampler(GROUPED, ways=3, shots=2, queries=6, seed=1, groups=TRIPLES)
    episodes = list(sampler)
    groups = [set(TRIPLES[torch.cat([episode.support, episode.query])].tolist()) for episode in episodes]
    assert len(episodes) > 2 and sum(map(len, groups)) == len(set().union(*groups))
    for episode in episodes:
        assert not set(TRIPLES[episode.support].tolist()) & set(TRIPLES[episode.query].tolist())


def test_groups_of_other_images():
    with pytest.raises(UserError, match="7 groups for 360 images"):
        EpisodeSampler(GROUPED, ways=3, groups=torch.arange(7))
