"""Causal attention, forward and backward apart, by whichever backend a device has."""
