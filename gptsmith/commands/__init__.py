"""What each command does: a few lines between the words typed and the package.

Modules that need PyTorch are imported inside the functions that use them, so that `--help` and
`describe` never wait for it. Data goes to standard output, everything else to standard error.
"""
