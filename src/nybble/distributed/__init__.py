"""The processes of a run, one per device."""
