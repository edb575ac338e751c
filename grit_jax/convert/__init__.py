"""Conversion from and to the folders that Hugging Face tools read."""
