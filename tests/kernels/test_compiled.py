"""The kernels compile for the cards that are served, without spilled registers and within their shared memory."""

import pytest

from tests.kernels import ON_LINUX_X86

if not ON_LINUX_X86:
    pytest.skip("Triton has wheels for Linux on x86-64 alone", allow_module_level=True)

import torch

from tests.kernels.launches import NANO, PUBLISHED, SMALL, Sizes, launches
from tests.kernels.offline import CARDS, SHARED_LIMIT, compile_launches

CASES = {f"published-{capability}": (PUBLISHED, capability) for capability in CARDS} | {
    "float32-89": (Sizes(dtype=torch.float32), 89),
    "nano-90": (NANO, 90),
    "small-90": (SMALL, 90),
}


@pytest.mark.parametrize("entry", launches(PUBLISHED))
@pytest.mark.parametrize(("sizes", "capability"), CASES.values(), ids=CASES)
def test_compiles_without_spills(sizes: Sizes, entry: str, capability: int) -> None:
    kernels = compile_launches(launches(sizes)[entry], capability)
    assert kernels
    for kernel in kernels:
        assert kernel.local == 0, kernel
        assert kernel.shared <= SHARED_LIMIT, kernel


def test_a_kernel_that_needs_too_many_registers_is_noticed() -> None:
    """Compile attention for so many query heads that their values do not fit into registers."""
    kernels = compile_launches(launches(Sizes(heads=512))["paged_decode"], 90)
    assert any(kernel.local > 0 for kernel in kernels)
