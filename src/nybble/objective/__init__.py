"""Objectives: the loss that is minimised, and what else is measured."""
