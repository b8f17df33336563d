"""The parity gate: an artefact is compared with the run it was made from."""
