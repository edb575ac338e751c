"""An HTTP server that speaks OpenAI's protocol, with one set of weights.

`python -m grit_jax.serve --model=...` answers `/v1/embeddings`,
`/v1/chat/completions` and `/v1/models`, and says at `/health` that it runs. It
needs the extra `serve`.
"""
