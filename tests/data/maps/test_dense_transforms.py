"""Joint transforms: alignment, mirror, scale, padding, seeds."""

from __future__ import annotations

import pytest
import torch
from helpers.dense_copies import valid
from hypothesis import given, settings
from hypothesis import strategies as st

from vismt.base.errors import UserError
from vismt.config.sections import MapAugmentation
from vismt.data.maps.dense_sample import LABELS, MAPS, NO_CLASS, blank, collate, size_of
from vismt.data.maps.dense_transforms import (
    augment_sample,
    crop,
    flip,
    pad,
    photometric,
    random_crop,
    resize,
    scale,
)

QUICK = settings(max_examples=20, deadline=None)
SIDES = st.integers(5, 40)


def coordinates(height: int, width: int) -> dict[str, torch.Tensor]:
    """Every target says where it came from: labels hold the row, depth 1 + row + column / 1000, normals point at them.

    Edges are where row and column are one number. The class is of the whole image, and one that would be 'no label' in a map.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    vectors = torch.stack([columns + 1.0, rows + 1.0, torch.ones(height, width)])
    sample = {name: rows.clone() if name != "parts" else columns.clone() for name in LABELS}
    sample["edge"] = (rows == columns).to(torch.int64)
    image = torch.stack([rows / height, columns / width, torch.zeros(height, width)])
    normals = torch.nn.functional.normalize(vectors, dim=0)
    return {
        "image": image,
        **sample,
        "depth": 1 + rows + columns / 1000,
        "normals": normals,
        "class": torch.tensor(255),
    }


def same_class(sample) -> bool:
    """The class of `coordinates`, untouched."""
    return sample["class"].shape == () and sample["class"].dtype == torch.int64 and sample["class"].item() == 255


def aligned(sample, s: float = 1.0, mirrored: bool = False, edge_distance: float = 0.0) -> None:
    """Fails unless every valid pixel of every target names the same source pixel, and the class is the image's.

    apart: how far from the source pixel that is at its centre a pixel may be an edge.
    """
    assert same_class(sample)
    valid_pixels = valid("depth", sample["depth"])
    assert all(torch.equal(valid(name, sample[name]), valid_pixels) for name in MAPS)
    rows, columns = sample["semseg"][valid_pixels], sample["parts"][valid_pixels]
    edge = sample["edge"][valid_pixels]
    assert (
        torch.equal(rows, sample["saliency"][valid_pixels])
        and ((rows - columns).abs()[edge == 1] <= edge_distance).all()
    )
    assert edge_distance or torch.equal(edge == 1, rows == columns)
    assert torch.allclose(sample["depth"][valid_pixels] * s, 1 + rows + columns / 1000, rtol=1e-5)
    x, y, z = sample["normals"][:, valid_pixels]
    assert torch.allclose(y / z, rows + 1.0, rtol=1e-4) and torch.allclose(
        (-x if mirrored else x) / z, columns + 1.0, rtol=1e-4
    )
    assert torch.allclose(sample["normals"][:, valid_pixels].norm(dim=0), torch.ones(()), atol=1e-5)


@QUICK
@given(SIDES, SIDES)
def test_flip_twice_is_the_identity(height, width):
    sample = coordinates(height, width)
    sample["normals"][:, 0] = 0
    sample["depth"][0] = 0
    once, twice = flip(sample), flip(flip(sample))
    assert all(torch.equal(twice[name], sample[name]) for name in sample) and same_class(once)
    assert not torch.equal(once["normals"][0], sample["normals"][0].flip(-1))
    signs = torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    assert torch.equal(once["normals"], sample["normals"].flip(-1) * signs)
    assert torch.equal(valid("normals", once["normals"]), valid("normals", sample["normals"]).flip(-1))


@QUICK
@given(SIDES, SIDES, st.floats(0.3, 3))
def test_scale_keeps_depth_times_s_and_alignment(height, width, s):
    sample = coordinates(height, width)
    out = scale(sample, s)
    assert size_of(out) == (max(1, round(height * s)), max(1, round(width * s)))
    aligned(out, s, edge_distance=1 + 2 / s)
    far = scale(sample, s, inverse_depth=True)["depth"]
    assert torch.allclose(far / s, out["depth"] * s, rtol=1e-5)


def test_nearest_takes_the_pixel_at_the_centre():
    # 4 -> 2: the centres of the new pixels lie between old ones 0|1 and 2|3, the later one counts; 2 -> 4 doubles each.
    sample = {"image": torch.zeros(3, 1, 4), "semseg": torch.tensor([[0, 1, 2, 3]])}
    assert scale(sample, 0.5)["semseg"].tolist() == [[1, 3]]
    assert scale({"image": torch.zeros(3, 1, 2), "semseg": torch.tensor([[7, 9]])}, 2)["semseg"][0].tolist() == [
        7,
        7,
        9,
        9,
    ]


@QUICK
@given(SIDES, SIDES, st.floats(0.1, 4), st.data())
def test_lines_of_a_stored_edge_map_survive_any_scale_one_pixel_wide(height, width, s, data):
    at = data.draw(st.integers(0, height - 1))
    edge = torch.zeros(height, width, dtype=torch.int64)
    edge[at] = 1
    for turned in (False, True):
        sample = {"image": torch.zeros(3, height, width), "edge": edge}
        sample = {name: values.mT if turned else values for name, values in sample.items()}
        out = scale(sample, s)["edge"]
        out = out.mT if turned else out
        count = out.sum(0)
        # The ends of a widened line may be thinned away with its sides.
        ends = 0 if s <= 1 else 3
        assert (
            count.max() <= 1 and (count[ends : len(count) - ends] == 1).all() and set(out.unique().tolist()) <= {0, 1}
        )
        middle = (out.nonzero()[:, 0] + 0.5) / len(out)
        assert (middle - (at + 0.5) / height).abs().max() <= 0.5 / height + 0.5 / len(out)


def test_stored_edges_by_hand():
    # 6 -> 4 rows: pixel k goes to (2k + 1) * 4 // 12: rows 0, 1, 1, 2, 3, 3. Nearest would take rows 0, 2, 3, 5 and lose the
    # line at 1; 255 is nearest's, but for an edge that falls there.
    edge = torch.tensor([0, 1, 0, 0, 255, 255])[:, None].expand(6, 6).clone()
    edge[4, 2] = 1
    out = resize({"image": torch.zeros(3, 6, 6), "edge": edge}, (4, 4))["edge"]
    assert out.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [255, 1, 255, 255]]
    assert torch.equal(resize({"image": torch.zeros(3, 6, 6), "edge": edge}, (6, 6))["edge"], edge)
    # Two lines with one row between them stay two, both when shrunk to 5/6 and when enlarged to 4/3.
    pair = torch.zeros(12, 12, dtype=torch.int64)
    pair[[4, 6]] = 1
    for size in (10, 16):
        out = resize({"image": torch.zeros(3, 12, 12), "edge": pair}, (size, size))["edge"]
        assert (out[:, 3:-3].sum(0) == 2).all()


def test_scale_does_not_average_labels_and_smooths_the_image():
    sample = {"image": torch.zeros(3, 8, 8), "semseg": torch.zeros(8, 8, dtype=torch.int64)}
    sample["image"][..., ::2], sample["semseg"][:, ::2] = 1.0, 10
    out = scale(sample, 0.25)
    assert set(out["semseg"].unique().tolist()) <= {0, 10}
    assert torch.allclose(out["image"], torch.full((3, 2, 2), 0.5), atol=0.1)  # antialiased: stripes become grey


@QUICK
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 2**32))
def test_crop_keeps_targets_aligned_and_padding_is_never_valid(height, width, tall, wide, seed):
    sample = coordinates(height, width)
    out = random_crop(sample, (tall, wide), torch.Generator().manual_seed(seed), cat_max_ratio=1.1)
    assert size_of(out) == (tall, wide)
    aligned(out)
    # Valid are exactly the pixels that come from the sample.
    assert int(valid("depth", out["depth"]).sum()) == min(tall, height) * min(wide, width)
    fitted = resize(sample, (tall, wide))
    assert size_of(fitted) == (tall, wide)
    aligned(fitted, edge_distance=1 + 2 * max(height / tall, width / wide))


def test_padding_and_resize_by_hand():
    sample = coordinates(4, 6)
    out = pad(sample, (5, 8), fill=0.25)
    assert torch.equal(out["image"][:, :4, :6], sample["image"])
    assert (out["image"][:, 4] == 0.25).all() and (out["image"][:, :, 6:] == 0.25).all()
    for name in MAPS:
        assert torch.equal(out[name][..., 4:, :], blank(name, 1, 8)) and torch.equal(
            out[name][..., :4, 6:], blank(name, 4, 2)
        )
    assert size_of(pad(sample, (2, 2))) == (4, 6) and same_class(out)
    # 4 x 6 into 12 x 12: twice as large, 8 x 12, four rows of padding, depth still in metres.
    fitted = resize(sample, (12, 12))
    assert (
        valid("depth", fitted["depth"]).sum(0).tolist() == [8] * 12 and fitted["depth"].max() == sample["depth"].max()
    )


def test_class_ratio_limit():
    # Class 1 fills the right tenth: a window of 10 columns that avoids it has one class only and is drawn again.
    labels = torch.zeros(10, 100, dtype=torch.int64)
    labels[:, 45:55] = 1
    sample = {"image": torch.zeros(3, 10, 100), "semseg": labels}

    def mixed(ratio: float) -> int:
        draws = (
            random_crop(sample, (10, 10), torch.Generator().manual_seed(s), cat_max_ratio=ratio) for s in range(60)
        )
        return sum(0.25 < out["semseg"].float().mean().item() < 0.75 for out in draws)

    # 5 of the 91 places hold each share; once about 10 %, in ten tries 1 - .9 ** 10 = 65 %.
    assert mixed(0.75) > 25 > 15 > mixed(1.1)
    void = {"image": torch.zeros(3, 4, 4), "semseg": torch.full((4, 4), 255)}
    out = random_crop(void, (3, 3), torch.Generator().manual_seed(0), cat_max_ratio=0.75)
    assert (out["semseg"] == 255).all()


def test_photometric_touches_the_image_alone():
    sample = coordinates(6, 7)
    out = photometric(sample, torch.Generator().manual_seed(3))
    assert not torch.equal(out["image"], sample["image"]) and out["image"].min() >= 0 and out["image"].max() <= 1
    assert all(out[name] is sample[name] for name in (*MAPS, "class"))


@QUICK
@given(st.integers(0, 2**62), st.booleans())
def test_augment_is_a_function_of_its_seed(seed, partial):
    sample = coordinates(18, 25)
    state = torch.get_rng_state()
    out = augment_sample(sample, seed, (12, 20), MapAugmentation())
    again = augment_sample(sample, seed, (12, 20), MapAugmentation())
    assert torch.equal(torch.get_rng_state(), state) and size_of(out) == (12, 20)
    assert all(torch.equal(out[name], again[name]) for name in out) and same_class(out)
    if partial:  # without semseg there are no repeated crops: the geometry is the same for any set of targets
        less, more = (
            {k: v for k, v in sample.items() if k in ("image", *names)} for names in (("depth",), ("depth", "edge"))
        )
        assert torch.equal(*(augment_sample(part, seed, (18, 25), MapAugmentation())["depth"] for part in (less, more)))


def test_augment_mirrors_half_of_the_time_and_varies():
    sample = coordinates(20, 20)
    unchanged = MapAugmentation(scales=[1, 1], strength=0)
    outs = [augment_sample(sample, seed, (20, 20), unchanged) for seed in range(40)]
    mirrored = [bool((out["normals"][0] < 0).any()) for out in outs]
    assert 10 < sum(mirrored) < 30
    for out, flipped in zip(outs, mirrored, strict=True):
        aligned(out, mirrored=flipped)
    scaled = MapAugmentation(strength=0)
    sizes = {augment_sample(sample, seed, (20, 20), scaled)["depth"].max().item() for seed in range(10)}
    assert len(sizes) > 5


def test_collate_fills_what_a_sample_lacks():
    whole, bare = coordinates(4, 5), {"image": torch.zeros(3, 4, 5), "depth": torch.ones(4, 5)}
    batch = collate([bare, whole])
    assert (
        batch["image"].shape == (2, 3, 4, 5)
        and batch["normals"].shape == (2, 3, 4, 5)
        and batch["edge"].shape == (2, 4, 5)
    )
    assert not valid("semseg", batch["semseg"])[0].any() and valid("depth", batch["depth"])[0].all()
    assert torch.equal(batch["normals"][1], whole["normals"]) and not valid("normals", batch["normals"])[0].any()
    assert set(collate([bare])) == {"image", "depth"}


def test_the_class_of_an_image_in_a_batch():
    # 255 is the 256th class, and no map's 'no label'.
    maps, classified = {"image": torch.zeros(3, 4, 5), "depth": torch.ones(4, 5)}, {"image": torch.ones(3, 4, 5)}
    batch = collate([maps, {**classified, "class": torch.tensor(255)}, {**classified, "class": torch.tensor(0)}])
    assert batch["class"].tolist() == [NO_CLASS, 255, 0] and batch["class"].dtype == torch.int64
    assert valid("class", batch["class"]).tolist() == [False, True, True]
    assert valid("depth", batch["depth"]).flatten(1).all(1).tolist() == [True, False, False]
    assert torch.equal(blank("class", 9, 7), torch.tensor(NO_CLASS))


@pytest.mark.parametrize(("call", "message"), [
    (lambda s: scale(s, 0), "scale 0 must be above 0"),
    (lambda s: crop(s, 1, 0, (4, 5)), r"a crop of \(4, 5\) at \(1, 0\) leaves the sample of \(4, 5\)"),
    (lambda s: MapAugmentation(scales=[2, 1]), r"scales: \[2, 1\]; give two factors"),
    (lambda s: flip({**s, "normal": s["normals"]}), "target 'normal' is not known. Near: 'normals'"),
    (lambda s: flip({**s, "edge": s["edge"][1:]}), r"'edge' is \(3, 5\), must be \(4, 5\)"),
    (lambda s: flip({**s, "class": torch.tensor([1])}), r"'class' is \(1,\), must be \(\) for its image"),
    (lambda s: flip({"depth": s["depth"]}), r"has no 'image', holds \['depth'\]"),
    (lambda s: collate([s, crop(s, 0, 0, (2, 2))]), r"of sizes \[\(2, 2\), \(4, 5\)\]; crop or resize"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        call(coordinates(4, 5))
