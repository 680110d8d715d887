"""Distances in units of the last place, against float64 and torch's own neighbours."""

import math

import pytest
import torch

from mergetool.kernels.last_place import distance, last_place

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_unit_is_what_lies_between_neighbours(dtype):
    values = torch.tensor([1.0, 1.5, 1.9921875, 2.0, 3.0, 0.75, 0.0078125, 100.0, 0.0]).to(dtype)
    neighbours = torch.nextafter(values, torch.full_like(values, math.inf))
    expected = (neighbours.double() - values.double()).float()
    assert last_place(values.float(), dtype)[:-1].tolist() == expected[:-1].tolist()
    assert last_place(values.float(), dtype)[-1] <= torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_rounded_once_is_the_same(dtype):
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert distance(values, values.to(dtype), dtype, 0.0) == distance(values, values.to(dtype), torch.float32, 0.0)
    assert distance(values, values.to(dtype), dtype, 0.0).other == 0
    assert distance(values, values.to(dtype).float(), dtype, 0.0).other == 0  # narrow numbers in a wide file


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_half_a_unit_is_the_bound_and_noise_is_added_to_it(dtype):
    eps = torch.finfo(dtype).eps
    below, above = (torch.tensor([1.0 + eps * part] * 8) for part in (0.499, 0.501))
    one = torch.ones(8).to(dtype)
    assert distance(below, one, dtype, 0.0).other == 0
    told = distance(above, one, dtype, 0.0)
    assert (told.other, told.beyond, told.far) == (8, 8, 0)
    assert told.units == pytest.approx(0.501, rel=1e-3)
    assert distance(above, one, dtype, 0.01 * eps).beyond == 0


def test_only_a_few_units_may_come_from_roundings_on_the_way():
    expected = torch.ones(1000)
    found = expected.bfloat16()
    found[7] += 3 * 2**-7
    assert (
        distance(expected, found, torch.bfloat16, 0.0).beyond,
        distance(expected, found, torch.bfloat16, 0.0).far,
    ) == (1, 0)
    found[7] += 2 * 2**-7
    told = distance(expected, found, torch.bfloat16, 0.0)
    assert (told.beyond, told.far, told.place, told.units) == (1, 1, 7, 5.0)
    assert told.worst == 5 * 2**-7


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_only_like_itself(value):
    expected = torch.tensor([1.0, value, 3.0])
    assert distance(expected, expected.bfloat16(), torch.float32, 0.0).other == 0
    told = distance(torch.tensor([1.0, 2.0, 3.0]), expected.bfloat16(), torch.float32, 0.0)
    assert (told.beyond, told.far, told.place, told.worst) == (1, 1, 1, math.inf)
    told = distance(expected, torch.tensor([1.0, 2.0, 3.0]), torch.float32, 0.0)
    assert (told.beyond, told.far, told.place) == (1, 1, 1)


def test_numbers_too_large_for_float16_become_infinite_there():
    assert (
        distance(torch.tensor([1e6, -1e6]), torch.tensor([math.inf, -math.inf]).half(), torch.float16, 0.0).other == 0
    )
    assert distance(torch.tensor([1.0, -1e6]), torch.tensor([math.inf, -math.inf]).half(), torch.float16, 0.0).far == 1
