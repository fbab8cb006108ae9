"""What one can learn from a trained model: where it looks, what it costs."""
