"""YAML presets, one folder per command, and the worlds that ship; the constructors are the schema."""
