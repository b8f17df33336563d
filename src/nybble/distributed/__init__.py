"""The processes of a run, one a device."""
