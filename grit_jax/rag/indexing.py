"""Documents become an index, with their KV caches if they are wanted."""

import argparse
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np

from grit_jax.data.formats import format_embedding_prefix
from grit_jax.data.sources import FileSource
from grit_jax.errors import UserError
from grit_jax.files import writing
from grit_jax.inference import arguments
from grit_jax.inference.cache import to_dtype
from grit_jax.inference.corpus import (
  CorpusWriter,
  describe,
  open_begun,
  writing_index,
)
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.shards import Document
from grit_jax.initial import InitialModel, open_initial
from grit_jax.rag.answering import encode_documents
from grit_jax.rag.caches import DiskCaches
from grit_jax.rag.documents import find_files, write_passages
from grit_jax.rag.prompts import BEHIND_QUERY, Mode

PASSAGES = 'passages.jsonl'


def format_size(count: float) -> str:
  """Writes a number of bytes as a reader wants it."""
  for unit in ('B', 'kB', 'MB', 'GB'):
    if count < 1000:
      return f'{count:.4g} {unit}'
    count /= 1000
  return f'{count:.4g} TB'


def write_index(flags: argparse.Namespace) -> None:
  """Writes an index of documents, or goes on with one.

  Args:
    flags: Of `python -m grit_jax.rag index`.

  Raises:
    UserError: There is no room for the caches.
    And what `grit_jax.encode` raises.
  """
  files = find_files(flags.source)
  initial = open_initial(flags.model)
  with writing_index(flags.index) as folder:
    _write(flags, files, initial, folder)


def _write(
  flags: argparse.Namespace,
  files: Sequence[pathlib.Path],
  initial: InitialModel,
  folder: pathlib.Path,
) -> None:
  if flags.caches == Mode.QUERY_DOC.value:
    prefix = BEHIND_QUERY
  else:
    prefix = format_embedding_prefix('', initial.tokenizer)
  settings = {
    **arguments.describe(flags, initial),
    'instruction': '',
    'max_length': flags.max_length,
    'caches': flags.caches,
    'cache_dtype': flags.cache_dtype if flags.caches else '',
  }
  # Of an index that is there, nothing changes before all is compared.
  target, new = folder / PASSAGES, folder / f'.new-{PASSAGES}'
  try:
    lengths = write_passages(
      files, new, initial.tokenizer, flags.max_length, prefix
    )
    made_of = describe(FileSource(new), settings, flags.shard_documents)
    made_of['input'] = ', '.join(flags.source)
    open_begun(folder, made_of, flags.stored_dtype)
    new.replace(target)
  finally:
    new.unlink(missing_ok=True)
  writer = CorpusWriter(
    FileSource(target),
    folder,
    settings,
    flags.stored_dtype,
    flags.shard_documents,
  )
  caches = DiskCaches(folder)
  if flags.caches:
    config = initial.model
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    token_bytes = numbers * to_dtype(flags.cache_dtype).itemsize
    _check_room(flags, token_bytes, lengths[writer.done :], sum(lengths))
  if writer.done < writer.total:
    model = arguments.load(flags)

    def embed(documents: Sequence[Document]) -> np.ndarray:
      if not flags.caches:
        return model.encode_corpus(
          documents, max_length=flags.max_length, batch_size=flags.batch_size
        )
      with writing(folder):
        return _embed_and_cache(model, documents, caches, writer.done, flags)

    writer.write(embed)
  print(f'{folder}: an index of {writer.done} passages')
  if flags.caches:
    size = caches.measure(writer.done)
    print(
      f'{caches.folder}: their caches for {flags.caches}, '
      f'{format_size(size)}, {format_size(size / sum(lengths))} a token'
    )


def _embed_and_cache(
  model: GritLM,
  documents: Sequence[Document],
  caches: DiskCaches,
  first: int,
  flags: argparse.Namespace,
) -> np.ndarray:
  """Embeds documents, and writes their caches from number `first` on.

  A batch at a time: the caches of a shard may not fit into the memory.
  """
  found, mode = [], Mode(flags.caches)
  for start in range(0, len(documents), flags.batch_size):
    part = documents[start : start + flags.batch_size]
    embeddings, kept = encode_documents(
      model, part, mode, flags.max_length, flags.batch_size
    )
    found.append(embeddings)
    for number, cache in enumerate(kept, first + start):
      caches.write(number, cache.astype(flags.cache_dtype))
  return np.concatenate(found)


def _check_room(
  flags: argparse.Namespace, token_bytes: int, lengths: list[int], tokens: int
) -> None:
  """Says what the caches take, and refuses where the disk has less."""
  needed = token_bytes * sum(lengths)
  free = shutil.disk_usage(flags.index).free
  print(
    f'Caches of {tokens} tokens in {flags.cache_dtype}: '
    f'{format_size(token_bytes)} a token, {format_size(token_bytes * tokens)} '
    f'in all, {format_size(needed)} of that yet to write; '
    f'{format_size(free)} are free.'
  )
  if needed > free:
    raise UserError(
      f'{flags.index}: the caches need {format_size(needed)}, and '
      f'{format_size(free)} are free on the disk. Make room, or leave out '
      '--caches: documents are then read again for each answer'
    )
