"""The built-in skill: free-text orders to strict JSON, trained and scored offline on a CPU."""
