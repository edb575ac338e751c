"""The decoder and its presets."""
