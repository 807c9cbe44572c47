"""Calibration error: against the definition row by row, from counts alone, and how much may be chance."""

import numpy as np
import pytest

from model import calibration


def by_definition(confidence: np.ndarray, right: np.ndarray) -> float:
    """Guo et al. 2017, equation 5, over 15 bins of equal width."""
    place = np.minimum((confidence * 15).astype(int), 14)
    return sum(
        (place == n).mean() * abs(confidence[place == n].mean() - right[place == n].mean())
        for n in range(15)
        if (place == n).any()
    )


@pytest.mark.parametrize("seed", range(5))
def test_counts_give_the_error_of_the_rows_within_half_a_cell(seed: int) -> None:
    draw = np.random.default_rng(seed)
    confidence = draw.beta(4, 1, 500)
    right = draw.random(500) < confidence * draw.uniform(0.3, 1.0)
    found = calibration.error(*calibration.cells(list(confidence), list(right)))
    assert found == pytest.approx(by_definition(confidence, right), abs=1 / 300)


def test_the_ends_of_the_scale_and_no_rows_at_all() -> None:
    assert calibration.error(*calibration.cells([1.0, 0.0], [True, False])) == pytest.approx(1 / 300)
    assert calibration.error(*calibration.cells([1.0, 1.0], [True, False])) == pytest.approx(0.5, abs=1 / 300)
    assert calibration.error(*calibration.cells([], [])) == 0.0


def test_a_rise_is_beyond_chance_with_many_rows_and_not_with_few() -> None:
    def sets(rows: int) -> tuple[float, float]:
        draw = np.random.default_rng(1)
        sure = draw.uniform(0.6, 1.0, rows)
        fine = calibration.cells(list(sure), list(draw.random(rows) < sure))
        bold = calibration.cells(list(sure), list(draw.random(rows) < sure - 0.1))
        return calibration.increase_interval(fine, bold, rows)

    assert sets(3000)[0] > 0
    assert sets(30)[0] < 0
