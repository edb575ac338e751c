"""What a trained model is for: to embed, to search, to answer."""
