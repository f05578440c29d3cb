"""Position tables on another grid: the three ways against arithmetic by hand."""

import pytest
import torch

from vismt.backbones.position import resample
from vismt.base.errors import UserError


def ramp(side: int, prefix: int = 1) -> torch.Tensor:
    """A table whose channel 0 is the column index and channel 1 the row index of each cell; prefix rows are -7."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    cells = torch.stack([columns, rows], dim=-1).reshape(1, side * side, 2).float()
    return torch.cat([torch.full((1, prefix, 2), -7.0), cells], dim=1)


def cubic_of_ramp(position: float, a: float = -0.75) -> float:
    """Bicubic interpolation of f(k) = k at `position`, from the definition of the four weights."""
    cell = int(position)
    t = position - cell

    def near(d: float) -> float:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1

    def far(d: float) -> float:
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a

    return sum(
        weight * k
        for weight, k in zip((far(1 + t), near(t), near(1 - t), far(2 - t)), (cell - 1, cell, cell + 1, cell + 2))
    )


def test_onnx_samples_at_half_pixel_centres() -> None:
    grid = resample(ramp(14), (8, 8), "onnx")[0, 1:].reshape(8, 8, 2)
    # column 3 of 8 looks at 3.5 * 14 / 8 - 0.5 = 5.625 of 14;
    # its weights (-0.0659, 0.4263, 0.7495, -0.1099) on 4, 5, 6, 7 give 5.5957
    assert cubic_of_ramp(5.625) == pytest.approx(5.5957, abs=1e-4)
    assert grid[4, 3, 0] == pytest.approx(5.5957, abs=1e-4)
    assert grid[3, 4, 1] == pytest.approx(5.5957, abs=1e-4)


def test_dino_samples_by_the_scale_with_its_tenth() -> None:
    grid = resample(ramp(14), (8, 8), "dino")[0, 1:].reshape(8, 8, 2)
    # 3.5 * 14 / 8.1 - 0.5 = 5.5494, not 5.625: the whole grid is squeezed by 8 / 8.1;
    # weights (-0.0837, 0.5282, 0.6575, -0.1020) on 4, 5, 6, 7 give 5.5372
    expected = cubic_of_ramp(3.5 * 14 / 8.1 - 0.5)
    assert expected == pytest.approx(5.5372, abs=1e-4)
    assert grid[4, 3, 0] == pytest.approx(expected, abs=1e-4)
    # column 6: 6.5 * 14 / 8.1 - 0.5 = 10.7346
    assert grid[0, 6, 0] == pytest.approx(cubic_of_ramp(10.734568), abs=1e-4)


def test_timm_averages_where_onnx_picks() -> None:
    spike = torch.zeros(15, 15)
    spike[7, 7] = 1
    table = spike.reshape(1, 225, 1)
    # 15 -> 5: column i looks at (i + 0.5) * 3 - 0.5 = 3 i + 1, a whole cell, so the third one is the spike itself
    assert resample(table, (5, 5), "onnx", prefix=0).reshape(5, 5)[2, 2] == pytest.approx(1.0)
    # antialiased, the kernel (a = -0.5) is three times as wide: at 0, 1/3, 2/3, 4/3, 5/3 it is 1, 7/9, 3/9, -2/27, -1/27, and the
    # sum 1 + 2 * (7/9 + 3/9 - 2/27 - 1/27) = 3 gives the spike a third of the weight along each side
    assert resample(table, (5, 5), "timm", prefix=0).reshape(5, 5)[2, 2] == pytest.approx(1 / 9, abs=1e-5)


@pytest.mark.parametrize(("position", "golden"), [("timm", 0.63), ("onnx", 0.24)])
def test_relative_difference_to_dino_on_a_random_table(position: str, golden: float) -> None:
    table = torch.randn(1, 197, 384, generator=torch.Generator().manual_seed(0))
    dino, other = resample(table, (8, 8), "dino"), resample(table, (8, 8), position)
    assert float((other - dino).norm() / dino.norm()) == pytest.approx(golden, abs=0.01)


@pytest.mark.parametrize("position", ["timm", "dino", "onnx"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_rows_stay_and_the_shape_is_right(position: str, prefix: int) -> None:
    table = ramp(7, prefix).to(torch.float16)
    new = resample(table, (3, 5), position, prefix)
    assert new.shape == (1, prefix + 15, 2) and new.dtype == torch.float16
    assert torch.equal(new[:, :prefix], table[:, :prefix])


@pytest.mark.parametrize("position", ["timm", "dino", "onnx"])
def test_the_same_grid_is_left_alone(position: str) -> None:
    table = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(resample(table, (7, 7), position), table)


@pytest.mark.parametrize("old", range(4, 40, 5))
@pytest.mark.parametrize("new", [2, 6, 8, 13, 37])
def test_dino_gives_the_grid_asked_for(old: int, new: int) -> None:
    assert resample(torch.zeros(1, old * old, 1), (new, new), "dino", prefix=0).shape[1] == new * new


def test_errors() -> None:
    with pytest.raises(UserError, match=r"position 'dini' is unknown.*Near: 'dino'"):
        resample(ramp(4), (2, 2), "dini")
    with pytest.raises(UserError, match=r"\(1, 12, 2\): 11 rows are not a square grid"):
        resample(torch.zeros(1, 12, 2), (2, 2), "onnx")
