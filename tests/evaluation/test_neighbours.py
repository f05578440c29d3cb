"""The k-NN answer of an image set, by hand."""

from __future__ import annotations

import torch

from vismt.evaluation.neighbours import neighbour_classes


def test_an_image_has_the_class_of_its_nearest_others() -> None:
    """24 images of class 0 around one direction and 3 of class 1 around another: an image does not count for itself."""
    angles = torch.cat([torch.linspace(0, 0.2, 24), torch.tensor([1.5, 1.52, 1.54]), torch.tensor([1.53])])
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.arange(1, 29)[:, None]  # lengths do not count
    labels = torch.tensor([0] * 24 + [1] * 3 + [0])
    assert neighbour_classes(features, labels).tolist() == [0] * 24 + [1] * 3 + [1]
