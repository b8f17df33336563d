"""4-bit layers: whether they run on this machine, and whether their results are right."""

from __future__ import annotations

import bitsandbytes as bnb
import torch

from nybble.preflight.doctor.finding import Finding, Verdict
from nybble.preflight.doctor.versions import pin
from nybble.weights.frozen import dequantised

# Limits for the relative (Frobenius) errors of a 4-bit layer; measured: products in bf16 0.0024, Gaussian weights in NF4 0.092.
PRODUCT_TOLERANCE, QUANTISATION_TOLERANCE = 0.01, 0.12


def nf4(device: torch.device, needed: bool = True) -> Finding:
    """Quantise a small layer to NF4 on the device and compare its products with plain ones."""
    name = f"nf4, {device}"
    fault: Verdict = "fail" if needed else "warn"
    fix = f"`python -m bitsandbytes` says more; reinstall: pip install --force-reinstall {pin('bitsandbytes')}"
    try:
        quantised, forward, gradient = nf4_errors(device)
    except RuntimeError as error:
        return Finding(name, fault, f"4-bit layers do not run: {str(error).splitlines()[0]}", fix)
    detail = f"relative error: forward {forward:.2g}, gradient {gradient:.2g} (limit {PRODUCT_TOLERANCE})"
    if not (forward <= PRODUCT_TOLERANCE and gradient <= PRODUCT_TOLERANCE):
        return Finding(name, fault, f"wrong results: {detail}", fix)
    if not quantised <= QUANTISATION_TOLERANCE:
        return Finding(
            name, fault, f"relative error of the weights {quantised:.2g} (limit {QUANTISATION_TOLERANCE})", fix
        )
    return Finding(name, "ok", detail)


def nf4_errors(device: torch.device) -> tuple[float, float, float]:
    """Relative errors of an NF4 layer with double quantisation on the device.

    Returns:
        The errors of its weights, compared with those before quantisation; of its forward products (several rows, as in
        training, and one, as in generation); and of its input gradient. Products are compared with plain ones of the dequantised
        weights.
    """
    generator = torch.Generator().manual_seed(0)
    weight, rows, output_gradient = (
        torch.randn(*shape, generator=generator) for shape in ((128, 256), (16, 256), (16, 128))
    )
    half = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    dtype = torch.float16 if half else torch.bfloat16
    layer = bnb.nn.Linear4bit(256, 128, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    layer = layer.to(device)
    # As in nybble's training; otherwise bitsandbytes repacks the weights for AVX512 in eval mode, permanently.
    layer.support_avx512bf16_for_cpu = False
    x = rows.to(device, dtype).requires_grad_()
    out = layer(x)
    out.backward(output_gradient.to(device, dtype))
    with torch.no_grad():
        one = layer(x[:1])
    plain = dequantised(layer).float()
    expected = x.detach().float() @ plain.T
    forward = max(_relative_error(out, expected), _relative_error(one, expected[:1]))
    expected_gradient = output_gradient.to(device, dtype).float() @ plain
    gradient = float("inf") if x.grad is None else _relative_error(x.grad, expected_gradient)
    return _relative_error(plain, weight.to(device)), forward, gradient


def _relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.detach().float() - expected).norm() / expected.norm())
