"""Whatever one request raises stays with it."""

import pytest
import torch
from prometheus_client import Counter

from engine.fault_boundary import FaultBoundary
from engine.jobs.job import JobSpec
from engine.request import Request


class Panic(BaseException):
    """As a panic in Rust, which tokenizers are written in, arrives."""


class Live:
    """Requests and the errors of those that ended."""

    def __init__(self) -> None:
        self.requests = [Request(str(number), JobSpec("x", 64, 64, seed=number)) for number in range(3)]
        self.live = dict.fromkeys(self.requests)
        self.errors: dict[str, Exception] = {}
        counter = Counter("out_of_memory", "", ["whose"], registry=None)
        self.boundary = FaultBoundary(torch.device("cpu"), self.live, self.fail, counter)

    def fail(self, request: Request, error: Exception) -> None:
        del self.live[request]
        self.errors[request.id] = error


@pytest.mark.parametrize(
    "error", [Panic("planted"), GeneratorExit(), RecursionError(), MemoryError(), StopIteration(), AssertionError()]
)
def test_any_error_ends_one_request(error: BaseException) -> None:
    state = Live()

    def work(requests: list[Request]) -> None:
        if any(request.id == "1" for request in requests):
            raise error

    done = state.boundary.run(state.requests, work)
    assert [request.id for request in done] == ["0", "2"]
    assert list(state.errors) == ["1"]
    assert isinstance(state.errors["1"], Exception)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_the_end_of_the_process_ends_no_request(error: BaseException) -> None:
    state = Live()

    def work(_: list[Request]) -> None:
        raise error

    with pytest.raises(type(error)):
        state.boundary.run(state.requests, work)
    assert not state.errors


def test_all_work_is_preceded_by_a_sign_of_life() -> None:
    state, order = Live(), list[str]()
    state.boundary.beat = lambda: order.append("beat")
    state.boundary.run_each(state.requests, lambda request: order.append(request.id))
    assert order == ["beat", "0", "beat", "1", "beat", "2"]
