"""The built-in plugins. Folders given with `--plugins` are appended to this namespace."""
