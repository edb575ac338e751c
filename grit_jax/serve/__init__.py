"""An HTTP server that speaks OpenAI's protocol, with one set of weights.

`python -m grit_jax.serve --model=...` answers `/v1/embeddings`,
`/v1/chat/completions` and `/v1/models`, and says at `/health` that it runs. It
needs the extra `serve`.

Beyond OpenAI's fields an embedding request may have `instruction`, and a chat
request `top_k`. The prompt format knows no system: what a system message says,
which may be the first, goes before the first message of the user's, with an
empty line between. The text parts of a message are joined by newlines.
"""
