"""TF32 is off while a float32 detector computes; these switches exist without a GPU too."""

import pytest
import torch

from vitadapter_zoo.models.precision import float32_precision, usual_state


def switches() -> tuple[str, str]:
    return (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize(("allow_tf32", "expected"), [(False, "ieee"), (True, "tf32")])
def test_precision_is_set_for_cuda_and_restored_after_an_error(
    allow_tf32: bool, expected: str
) -> None:
    def fail() -> None:
        with float32_precision(torch.device("cuda", 0), allow_tf32=allow_tf32):
            assert switches() == (expected, expected)
            raise RuntimeError("inside")

    before = switches()
    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert switches() == before


def test_other_devices_leave_the_switches_alone() -> None:
    before = switches()
    with float32_precision(torch.device("cpu"), allow_tf32=True):
        assert switches() == before


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_programs_that_use_both_kinds_of_settings(device: str) -> None:
    """Reading the older setting then raises an error."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="legacy"):
            torch.get_float32_matmul_precision()
        with float32_precision(torch.device(device), allow_tf32=False), usual_state():
            assert products.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # type: ignore[attr-defined]
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
