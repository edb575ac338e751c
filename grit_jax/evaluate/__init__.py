"""How good the embeddings and the language model are."""
