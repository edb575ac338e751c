"""Conversion from and to the folders that Hugging Face tools read."""


class ConvertError(ValueError):
  """A folder that cannot be converted; the message names what is wrong."""
