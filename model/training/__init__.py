"""Training and measuring expert blocks. Imported by `libration train` and `libration evaluate` only."""
