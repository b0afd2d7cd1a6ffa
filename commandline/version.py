"""The project's version: `--version`, and `version` in every file's metadata."""

VERSION = "1.0.0"
