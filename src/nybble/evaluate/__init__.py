"""Base against tuned: how much better, how sure, and what the training data gave away."""
