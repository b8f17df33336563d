"""The gate: an artefact held against the run."""
