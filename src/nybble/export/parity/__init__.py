"""The gate: an artefact compared with the run it was made from."""
