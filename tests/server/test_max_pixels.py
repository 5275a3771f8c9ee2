"""GLIMMER_MAX_PIXELS holds for every image, also without a size."""

from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.geometry import CELL, MAX_ASPECT, MAX_SIDE, MIN_SIDE, limit_pixels
from tests.server.conftest import MakeClient
from tests.server.image_files import file_of, patterned
from tests.server.stub_engine import DEFAULT_SIZE, StubEngine
from tests.server.test_edits import data_url
from tests.server.test_errors import error_of

SIDES = st.integers(MIN_SIDE, MAX_SIDE)
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@given(SIDES, SIDES, st.integers(MIN_SIDE**2, MAX_SIDE**2))
def test_a_limited_size(width: int, height: int, max_pixels: int) -> None:
    width = min(width, MAX_ASPECT * height)
    height = min(height, MAX_ASPECT * width)
    limited = limit_pixels(width, height, max_pixels)
    assert limited[0] * limited[1] <= max_pixels
    if width * height <= max_pixels:
        assert limited == (width, height)
        return
    assert all(side % CELL == 0 and MIN_SIDE <= side <= MAX_SIDE for side in limited)
    assert max(limited) <= MAX_ASPECT * min(limited)
    assert max(limited) <= max(width, height)
    larger = (limited[0] + CELL) * (limited[1] + CELL)
    assert larger > max_pixels or min(limited) == MIN_SIDE or max(limited) == MAX_ASPECT * min(limited)


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        (GENERATIONS, {}),
        (GENERATIONS, {"size": "auto"}),
        (GENERATIONS, {"size": None, "n": 2}),
        (EDITS, {"image": data_url(file_of(patterned(320, 200)))}),
        (EDITS, {"image": [data_url(file_of(patterned(64, 256)))] * 2, "size": "auto"}),
        (EDITS, {"image": data_url(file_of(patterned(256, 256))), "size": "auto"}),
    ],
)
async def test_without_a_size(make_client: MakeClient, stub: StubEngine, url: str, fields: dict[str, Any]) -> None:
    async with make_client(max_pixels=64 * 64) as client:
        response = await client.post(url, json={"prompt": "x", **fields})
        assert response.status_code == 200
    [spec] = stub.specs
    assert (spec.width, spec.height) == (64, 64)
    assert response.json()["size"] == "64x64"


async def test_with_room_the_default_size_stays(make_client: MakeClient, stub: StubEngine) -> None:
    width, height = map(int, DEFAULT_SIZE.split("x"))
    async with make_client(max_pixels=width * height) as client:
        assert (await client.post(GENERATIONS, json={"prompt": "x"})).json()["size"] == DEFAULT_SIZE


async def test_a_plan_must_fit_the_smaller_size(make_client: MakeClient, stub: StubEngine) -> None:
    async def post(client: httpx.AsyncClient, rows: int, cols: int) -> httpx.Response:
        plan = {"rows": rows, "cols": cols, "tokens": [1] * (rows * cols)}
        return await client.post(GENERATIONS, json={"prompt": "x", "plan": plan})

    async with make_client(max_pixels=64 * 64) as client:
        error = error_of(await post(client, 2, 3))
        assert error["param"] == "plan"
        assert "for size 64x64 it must have 2 rows and 2 cols" in error["message"]
        assert (await post(client, 2, 2)).status_code == 200
