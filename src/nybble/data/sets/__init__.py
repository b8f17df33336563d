"""From a recipe's sources to training and validation sets, tokenised once and stored in the cache."""
