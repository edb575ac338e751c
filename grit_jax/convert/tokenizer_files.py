"""The `tokenizer.json` of a tokenizer, for tools that read no other file.

A sentencepiece model becomes one that gives the same ids: the blanks are
written as `▁` with one more in front, and pairs of pieces are merged in the
order in which sentencepiece would. The order is not in the model and is
restored from the scores of the pieces.
"""

import json
from collections.abc import Mapping
from typing import Any

import sentencepiece
import tokenizers

from grit_jax.data.tokenizer import (
  JSON_FILE,
  SENTENCEPIECE_FILE,
  SentencePieceTokenizer,
  Tokenizer,
  TokenizerError,
)

# Together with the vocabulary: characters that a normalisation would change.
_PROBE = '  \t \u00a0\u3000 ﬁ½Å①Ａ１…e\u0301İß 🙂\r\n a\u200b\ufeff '
_PIECES_A_PROBE = 8


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
  """Writes a tokenizer as a `tokenizer.json`.

  Encoding with special tokens puts one BOS in front and nothing behind;
  encoding without gives the ids of `tokenizer`. Nothing is cut or padded.

  Args:
    tokenizer: The tokenizer.

  Returns:
    The file. That of a tokenizer that was read from one is as it was, where
    it is so already.

  Raises:
    TokenizerError: It is a sentencepiece model that is not a byte-pair
      encoding like Mistral's.
  """
  if isinstance(tokenizer, SentencePieceTokenizer):
    return _convert(tokenizer)
  return _complete(tokenizer)


def _convert(tokenizer: SentencePieceTokenizer) -> bytes:
  """Returns the file of a sentencepiece model."""
  processor = sentencepiece.SentencePieceProcessor(
    model_proto=tokenizer.files[SENTENCEPIECE_FILE]
  )
  pieces = {processor.id_to_piece(i): i for i in range(tokenizer.vocab_size)}
  special = [tokenizer.unk, tokenizer.bos, tokenizer.eos]
  document = {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [
      {
        'id': index,
        'content': processor.id_to_piece(index),
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': True,
      }
      for index in sorted(special)
    ],
    'normalizer': {
      'type': 'Sequence',
      'normalizers': [
        {'type': 'Prepend', 'prepend': '▁'},
        {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'},
      ],
    },
    'pre_tokenizer': None,
    'post_processor': _bos_template(tokenizer),
    'decoder': {
      'type': 'Sequence',
      'decoders': [
        {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '},
        {'type': 'ByteFallback'},
        {'type': 'Fuse'},
        {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0},
      ],
    },
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': processor.id_to_piece(tokenizer.unk),
      'continuing_subword_prefix': None,
      'end_of_word_suffix': None,
      'fuse_unk': True,
      'byte_fallback': True,
      'ignore_merges': False,
      'vocab': pieces,
      # Strings, not pairs, which older readers do not know.
      'merges': [
        f'{left} {right}' for left, right in _find_merges(processor, pieces)
      ],
    },
  }
  data = _write(document)
  _check_ids(tokenizer, list(pieces), data)
  return data


def _find_merges(
  processor: sentencepiece.SentencePieceProcessor, pieces: Mapping[str, int]
) -> list[tuple[str, str]]:
  """Returns the pairs that sentencepiece merges, the most urgent first.

  Two neighbours merge where they make a piece, the best score first, and the
  leftmost of equal scores. Mistral's runs of blanks all have one score; there
  the leftmost first means that a run grows before another begins, as it does
  where pairs with the longer left piece come first.
  """
  merges = []
  for piece, index in pieces.items():
    if processor.is_control(index) or processor.is_byte(index):
      continue
    score = processor.get_score(index)
    for cut in range(1, len(piece)):
      left, right = piece[:cut], piece[cut:]
      if left in pieces and right in pieces:
        merges.append((-score, -cut, left, right))
  return [(left, right) for *_, left, right in sorted(merges)]


def _check_ids(
  tokenizer: SentencePieceTokenizer, pieces: list[str], data: bytes
) -> None:
  """Raises TokenizerError where the written tokenizer gives other ids."""
  probes = [_PROBE]
  for start in range(0, len(pieces), _PIECES_A_PROBE):
    probe = ''.join(pieces[start : start + _PIECES_A_PROBE])
    probes.append(probe.replace('▁', ' '))
  written = tokenizers.Tokenizer.from_buffer(data)
  encoded = written.encode_batch_fast(probes, add_special_tokens=False)
  for probe, ids, found in zip(
    probes, tokenizer.encode_batch(probes), encoded, strict=True
  ):
    if found.ids != ids:
      raise TokenizerError(
        'this sentencepiece model cannot be written as a tokenizer.json: only '
        'a byte-pair encoding with a dummy prefix and without normalisation '
        f'can, and on {probe!r} it differs from one'
      )


def _complete(tokenizer: Tokenizer) -> bytes:
  """Returns the file of a tokenizer that was read from one."""
  data = tokenizer.files[JSON_FILE]
  document = json.loads(data)
  wanted = document | {'truncation': None, 'padding': None}
  if not _begins_with_bos(tokenizer, wanted):
    present = document.get('post_processor') or {}
    # Of what is there only this one adds no special tokens.
    kept = [
      processor
      for processor in present.get('processors', [present])
      if processor.get('type') == 'ByteLevel'
    ]
    wanted['post_processor'] = {
      'type': 'Sequence',
      'processors': [*kept, _bos_template(tokenizer)],
    }
  return data if wanted == document else _write(wanted)


def _begins_with_bos(tokenizer: Tokenizer, document: dict[str, Any]) -> bool:
  """Says whether the document's post-processor adds one BOS and no more."""
  written = tokenizers.Tokenizer.from_buffer(_write(document))
  text = 'a b\n'
  return written.encode(text).ids == [tokenizer.bos, *tokenizer.encode(text)]


def _bos_template(tokenizer: Tokenizer) -> dict[str, Any]:
  bos = tokenizer.bos_piece

  def special(type_id: int) -> dict[str, Any]:
    return {'SpecialToken': {'id': bos, 'type_id': type_id}}

  def text(name: str, type_id: int) -> dict[str, Any]:
    return {'Sequence': {'id': name, 'type_id': type_id}}

  return {
    'type': 'TemplateProcessing',
    'single': [special(0), text('A', 0)],
    'pair': [special(0), text('A', 0), special(1), text('B', 1)],
    'special_tokens': {
      bos: {'id': bos, 'ids': [tokenizer.bos], 'tokens': [bos]}
    },
  }


def _write(document: dict[str, Any]) -> bytes:
  return json.dumps(document, ensure_ascii=False).encode()
