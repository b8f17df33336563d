"""Checks of this machine; each problem comes with its fix."""
