"""The fused operations: their reference in plain torch, their kernels, and the choice between them."""
