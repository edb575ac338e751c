"""Snippets of an export's README.md: how each tool loads it.

The Python ones run as they stand, but for the folder's path. Versions and traps
are those that were seen by running the tools, but where it says not.
"""

import string

# Stands for the export's own path.
FOLDER = 'path/to/this/folder'

SENTENCE_TRANSFORMERS = string.Template("""
### sentence-transformers

```bash
pip install 'sentence-transformers>=5.4'$requires
```

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer('$folder')
queries = model.encode(
    ['Who proposed it?'],
    prompt='$user\\nFind the answer to the question\\n$embed\\n',
)
documents = model.encode(['A group of researchers did.', 'It rains.'])
print(model.similarity(queries, documents))
```

Without `prompt` it is `$embed\\n`, that of a text without an instruction. Texts
are cut at $tokens tokens, the prompt's among them; `model.max_seq_length` sets
another number. sentence-transformers before 5.4 takes white space off the ends
of prompts and texts, and so pools a token of the prompt.
""")

GRITLM = string.Template("""
### gritlm (PyTorch)

```bash
pip install 'gritlm>=1.0.2'$requires
```

```python
from gritlm import GritLM

model = GritLM(
    '$folder', mode='embedding', attn='$attention', pooling_method='$pooling'
)
queries = model.encode(
    ['Who proposed it?'],
    instruction='$user\\nFind the answer to the question\\n$embed\\n',
)
documents = model.encode(
    ['A group of researchers did.', 'It rains.'], instruction='$embed\\n'
)
print(queries @ documents.T)
```

A text without an instruction has the prompt `$embed\\n`; an empty one would be
another embedding. Texts are cut at 512 tokens; `max_length` sets another
number.
""")

GRITLM_UNIFIED = """
`mode='unified'` loads the head too: `model.generate` is that of transformers.
"""

TRANSFORMERS_EMBEDDING = string.Template("""
### transformers, for embedding

```bash
pip install 'transformers>=$version'
```

```python
import torch
from transformers import AutoModel, AutoTokenizer

folder = '$folder'
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder)

def embed(texts, prompt):
    batch = tokenizer(
        [prompt + text for text in texts],
        padding=True,
        truncation=True,
        max_length=$tokens,
        return_tensors='pt',
    )
    with torch.no_grad():
        hidden = model(**batch$causal).last_hidden_state.float()
    weights = batch['attention_mask'].clone()
$weights
    pooled = (weights[:, :, None] * hidden).sum(1) / weights.sum(1)[:, None]
$projection    return torch.nn.functional.normalize(pooled, dim=-1)

queries = embed(
    ['Who proposed it?'],
    '$user\\nFind the answer to the question\\n$embed\\n',
)
documents = embed(['A group of researchers did.', 'It rains.'], '$embed\\n')
print(queries @ documents.T)
```
""")

EARLIER_TRANSFORMERS = """
Attention is bidirectional with `is_causal=False`, which transformers has since
5.2. Before, 4.37 to 4.44 raise TypeError, and 4.48 to 5.1 give wrong embeddings
without a word: causal ones, or bidirectional ones only where a batch has no
padding.
"""

_TEXT_ALONE = """\
    weights[:, : len(tokenizer(prompt)['input_ids'])] = 0  # the text alone"""
WEIGHTS = {
  'mean': _TEXT_ALONE,
  'weightedmean': f'{_TEXT_ALONE}\n    weights *= weights.cumsum(1)',
  'cls': '    weights[:, 1:] = 0  # the first token alone',
  'lasttoken': """\
    last = weights.cumsum(1) == weights.sum(1)[:, None]
    weights *= last  # the last token alone""",
}

PROJECTION = string.Template("""\
    from safetensors.torch import load_file

    dense = load_file(f'{folder}/$path/model.safetensors')
    pooled = pooled @ dense['linear.weight'].float().T
    pooled = pooled + dense['linear.bias'].float()
""")

MTEB = string.Template("""
### mteb

```bash
pip install 'mteb>=2.26' 'sentence-transformers>=5.4'$requires
```

```python
import mteb
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel

def write_prompt(instruction, prompt_type=None):
    user = f'$user\\n{instruction}\\n' if instruction else ''
    return f'{user}$embed\\n'

model = InstructSentenceTransformerModel(
    '$folder',
    revision=None,
    instruction_template=write_prompt,
    apply_instruction_to_passages=False,
)
print(mteb.evaluate(model, mteb.get_tasks(tasks=['NFCorpus']), cache=None))
```

Each task brings its instruction; the passages of retrieval have none. With a
`SentenceTransformer` as the model nothing has one. mteb's cache has a single
name for all local folders, and would give a model the results of another.
""")

VLLM_EMBEDDING = string.Template("""
### vLLM, for embedding

As its source reads; it was not run:

```bash
vllm serve $folder --runner pooling \\
  --hf-overrides '{"architectures": ["GritLM"]}'
```

The input is a prompt as above, without $bos, which the tokenizer adds.
""")

TRANSFORMERS_GENERATION = string.Template("""
### transformers, for generation

```bash
pip install 'transformers>=$causal_version'
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = '$folder'
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{'role': 'user', 'content': 'What is a language model?'}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=False
)
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors='pt')
tokens = model.generate(**inputs, max_new_tokens=64)
answer = tokens[0, inputs['input_ids'].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

The chat template writes $bos, so the tokenizer must not add another. Its roles
are user and assistant in turn; there is no system role. Generating in batches
needs `tokenizer.padding_side = 'left'`.
""")

SERVERS = string.Template("""
### vLLM and llama.cpp, for generation

vLLM loads the folder as it is (as its source reads; it was not run), and
llama.cpp converts it$known:

```bash
vllm serve $folder
python convert_hf_to_gguf.py $folder --outfile model.gguf
```
""")
