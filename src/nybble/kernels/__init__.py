"""Every fused operation by name: its reference in plain torch, its kernels, the choice between them."""
