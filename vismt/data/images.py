"""Labelled images: `open_images` finds a copy of a set on this machine and returns an `ImageSet`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vismt.base import console
from vismt.base.errors import UserError, require_known
from vismt.data.cards import Card, load_card
from vismt.data.copies import first_copy, listed, not_found, sources_for
from vismt.data.fetching import fetch
from vismt.data.formats.python_sets import images_of, python_object
from vismt.data.image_set import ImageSet, ImageSource
from vismt.data.set_entries import row_name


def _drop_damaged(images: ImageSet) -> ImageSet:
    """Return the set without the examples that cannot be decoded. A class that loses its last example is a UserError."""
    kept, skipped = [], []
    for i in console.track(range(len(images)), "data", f"{images.name}: decoding {len(images):,} images"):
        try:
            images.read(i)
            kept.append(i)
        except UserError:
            skipped.append(images.ids[i])
    if not skipped:
        return images
    share = f"{len(skipped)} of {len(images):,} images"
    console.stage("data", f"{images.name}: {share} skipped, they cannot be decoded: {listed(skipped, 5)}")
    emptied = sorted(set(images.labels.tolist()) - set(images.labels[kept].tolist()))
    if emptied:
        name = images.classes[emptied[0]]
        raise UserError(
            f"data '{images.name}': no image of class '{name}' can be decoded. Replace its files in {images.where}."
        )
    return images.take(kept, skipped)


def open_images(
    card: Card | str | Path,
    split: str = "all",
    *,
    on_bad_sample: Literal["error", "skip"] = "error",
    download: bool = False,
) -> ImageSet:
    """Return the images of `split`, from the first of the card's sources that is on this machine and has that split.

    Args:
        card: Card, its name, its file or its folder, a folder of class folders or a csv file without a card, or the name of a
            Python object (python_sets.py).
        split: Name of a split, or "all" for every split.
        on_bad_sample: "skip" or "error". With "skip" every image is decoded once now. Images that cannot be decoded are left
            out, listed in `.skipped` and reported in a line. With "error" reading such an image raises UserError.
        download: Whether torchvision may download the set if no source is on this machine.

    Raises:
        UserError: If the card or split is unknown, the set is not on this machine, a class folder is empty, or the number of
            images or classes differs from the card.
    """
    require_known("on_bad_sample is", [on_bad_sample], ("error", "skip"))
    given = None if isinstance(card, Card) else python_object(str(card), split)
    if isinstance(given, ImageSet):
        images = given
    elif given is not None:
        images = images_of(given, row_name(str(card)), split)
    else:
        images = _open_copy(card if isinstance(card, Card) else load_card(card), split, download)
    return images if on_bad_sample == "error" else _drop_damaged(images)


def _open_copy(card: Card, split: str, download: bool) -> ImageSet:
    sources = sources_for(card, ImageSource, split)
    copy = first_copy(card, sources)
    if copy is None:
        downloadable = next((source for source in sources if source.downloadable), None) if download else None
        if downloadable is None:
            raise not_found(card, split)
        copy = downloadable, downloadable.candidates(card)[-1]
        fetch(card, *copy, lambda: first_copy(card, sources) is not None)
    source, base = copy
    return source.load(card, base, split)
